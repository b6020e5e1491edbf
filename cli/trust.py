"""`vllmc trust`: whose signatures are believed. Imports no torch."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, command
from vllmc.core.cache.files import writing
from vllmc.core.cache.signing import generate, public_text
from vllmc.core.cache.trust_store import TrustedKey, add_key, list_keys, remove_key
from vllmc.core.errors import UsageError, VllmcError


@command
def add(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A public key; - reads it.")],
    common: CommonFlags,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", show_default="FILE's, without .pub", help="What the key is called."
        ),
    ] = None,
) -> None:
    """Trust what this key signs: an Ed25519 public key as ssh-keygen or openssl write it.

    With --json, added: name, key (64 hex digits) and path.
    """
    if file == "-" and name is None:
        raise UsageError(
            "no-key-name", "a key that is read from a pipe takes --name", hint="--name release-2026"
        )
    text = sys.stdin.read() if file == "-" else _text(Path(file))
    added = add_key(common.settings().trust, text, name or Path(file).stem, file)
    row = _row(added)
    common.output("trust add").data({"added": row}, lambda: f"trusted: {_told(added)}")


@command
def ls(common: CommonFlags) -> None:
    """List the keys that are trusted.

    With --json, keys: each with name, key (64 hex digits) and path.
    """
    rows = [_row(item) for item in list_keys(common.settings().trust)]
    common.output("trust ls").data({"keys": rows}, lambda: render.trusted(rows))


@command
def rm(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="Its name, or its first 8 or more hex digits.")
    ],
    common: CommonFlags,
) -> None:
    """Trust a key no longer. What was imported with it stays.

    With --json, removed: name, key (64 hex digits) and path.
    """
    removed = remove_key(common.settings().trust, key)
    row = _row(removed)
    common.output("trust rm").data({"removed": row}, lambda: f"no longer trusted: {_told(removed)}")


@command
def keygen(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Where the private key goes; FILE.pub is public.")
    ],
    common: CommonFlags,
) -> None:
    """Make a pair of keys: the private one signs (--sign-key), the public one is trusted.

    The private key is not encrypted, and only its owner can read its file. ssh-keygen -t ed25519
    makes the same. With --json, private, public (paths) and key (64 hex digits).
    """
    pair, public = generate(), file.with_name(f"{file.name}.pub")
    for path in (file, public):
        if os.path.lexists(path):
            raise VllmcError(
                "exists",
                f"{path} is there already, and may be a key in use",
                context={"path": str(path)},
                hint="name another file, or remove it",
            )
    for path, text, mode in (
        (file, pair.private_text(), 0o600),
        (public, public_text(pair.public, file.name), 0o644),
    ):
        elsewhere = writing(path, elsewhere="name another file")
        with elsewhere, os.fdopen(os.open(path, _NEW, mode), "w") as opened:
            opened.write(text)
    data = {"private": str(file), "public": str(public), "key": pair.public.hex()}
    common.output("trust keygen").data(
        data, lambda: f"{file} signs (--sign-key); {public} is for vllmc trust add"
    )


_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise VllmcError(
            "bad-public-key",
            f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}",
            context={"path": str(path)},
            hint="give the public key, which ends in .pub",
        ) from error


def _row(item: TrustedKey) -> dict[str, str]:
    return {"name": item.name, "key": item.key.hex(), "path": str(item.path)}


def _told(item: TrustedKey) -> str:
    return f"{item.name} {item.key.hex()}"
