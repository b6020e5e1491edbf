"""The trust store: the public keys whose signatures are believed. Imports no torch.

A directory with a file for each key, `<name>.pub`, as OpenSSH writes public keys. It is believed
only where it belongs to this user or to root, and nobody else may write to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vllmc.core.cache.files import (
    IrregularFile,
    make_directory,
    open_plain,
    write_plain,
    writing,
)
from vllmc.core.cache.signing import public_text, read_public_key
from vllmc.core.errors import UnsafeCacheError, UsageError, VllmcError

if TYPE_CHECKING:
    from vllmc.core.cache.trust import Trust

_ELSEWHERE: Final = "name another trust store with VLLMC_TRUST_DIR"
_NAME: Final = re.compile(r"[\w@-][\w@.+-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustedKey:
    """A key of the trust store: its name and its 32 bytes."""

    name: str
    key: bytes
    path: Path


def default_directory() -> Path:
    """Where the trust store lies unless VLLMC_TRUST_DIR says otherwise."""
    import platformdirs

    return platformdirs.user_config_path("vllmc") / "trust"


def trusted_keys(trust: Trust) -> Mapping[bytes, str]:
    """The names of the keys, by key; raises as `list_keys` does."""
    return {item.key: item.name for item in list_keys(trust)}


def trusts(key: bytes, trust: Trust) -> bool:
    """Whether this key's signatures are believed; raises as `list_keys` does."""
    return key in trusted_keys(trust)


def list_keys(trust: Trust) -> tuple[TrustedKey, ...]:
    """The keys of the trust store, by name; none where there is no directory.

    Raises `UnsafeCacheError` (`untrusted-key`) where another user may have put one there, and
    `VllmcError` (`bad-public-key`).
    """
    directory = trust.keys or default_directory()
    _believe(directory, trust.doubt_of(directory))
    try:
        files = sorted(directory.glob("*.pub"))
    except OSError as error:
        raise UnsafeCacheError(
            "untrusted-key",
            f"the trust store {directory} cannot be read: {error.strerror}",
            context={"path": str(directory)},
            hint=f"make it readable for this user, or {_ELSEWHERE}",
        ) from error
    return tuple(_read(path, trust) for path in files)


def add_key(trust: Trust, text: str, name: str, source: str) -> TrustedKey:
    """Adds the public key that `text` spells; one that is there already stays under its name.

    Raises `VllmcError` (`bad-public-key`, `key-name-taken`), `UsageError` of the name, and what
    `list_keys` does.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(
            "bad-key-name",
            f"'{name}' cannot be the name of a key",
            context={"name": name},
            hint="letters, digits and . - _ @ +, at most 64: --name release-2026",
        )
    key = read_public_key(text, source)
    for known in list_keys(trust):
        if known.key == key:
            return known
        if known.name == name:
            raise VllmcError(
                "key-name-taken",
                f"the trust store has another key called '{name}'",
                context={"path": str(known.path), "key": known.key.hex()},
                hint=f"give this one another name (--name), or first: vllmc trust rm {name}",
            )
    directory = trust.keys or default_directory()
    path = directory / f"{name}.pub"
    with writing(path, elsewhere=_ELSEWHERE):
        make_directory(directory)
    write_plain(path, public_text(key, name).encode("ascii"), temporary=directory / ".tmp")
    return TrustedKey(name=name, key=key, path=path)


def remove_key(trust: Trust, wanted: str) -> TrustedKey:
    """Removes the key of this name, or whose 64 hex digits begin so, under all its names.

    Raises `VllmcError` (`unknown-trusted-key`, `ambiguous-key`), and what `list_keys` does.
    """
    keys = list_keys(trust)
    found = [item for item in keys if item.name == wanted]
    if not found and len(wanted) >= 8:
        found = [item for item in keys if item.key.hex().startswith(wanted.lower())]
    if not found:
        raise VllmcError(
            "unknown-trusted-key",
            f"the trust store has no key '{wanted}'",
            context={"keys": [item.name for item in keys]},
            hint="vllmc trust ls lists them",
        )
    if len({item.key for item in found}) > 1:
        raise VllmcError(
            "ambiguous-key",
            f"{len(found)} keys of the trust store begin with {wanted}",
            context={"candidates": [item.name for item in found]},
            hint="give its name",
        )
    item = found[0]
    for same in keys:
        if same.key == item.key:
            with writing(same.path, elsewhere=_ELSEWHERE):
                same.path.unlink(missing_ok=True)
    return item


def _read(path: Path, trust: Trust) -> TrustedKey:
    try:
        with open_plain(path) as file:
            _believe(path, trust.doubt(os.fstat(file.fileno())))
            text = file.read().decode("ascii", "replace")
    except IrregularFile as error:
        _believe(path, f"it is {error}")
        raise AssertionError from error
    return TrustedKey(name=path.stem, key=read_public_key(text, str(path)), path=path)


def _believe(path: Path, doubt: str | None) -> None:
    if doubt is not None:
        raise UnsafeCacheError(
            "untrusted-key",
            f"the trust store's {path} is not believed: {doubt}",
            context={"path": str(path), "reason": doubt},
            hint=f"chmod go-w {path}; it should belong to you or to root",
        )
