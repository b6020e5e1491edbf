"""Whose files are used: loading an artifact runs its code. Imports no torch.

A record says which artifact is loaded, by its SHA-256, so to trust the record is to trust both. A
record is trusted

- where it lies in a directory, and is a file, that belongs to this user or to root and that nobody
  else may write to; of a file that is asked of the open file, so that it cannot be swapped; or
- where a key of the trust store signed it; or
- where the user asks for it (`--trust-unsigned`).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from vllmc.core.cache.signing import Signature, split
from vllmc.core.cache.trust_store import trusts
from vllmc.core.errors import UnsafeCacheError


class Untrusted(UnsafeCacheError):
    """Something that would be used, and that others than this user and root may have written."""

    def __init__(self, path: Path | str, reason: str, *, hint: str) -> None:
        super().__init__(
            "untrusted",
            f"{path} is not trusted: {reason}",
            context={"path": str(path), "reason": reason},
            hint=hint,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Whom this process believes.

    `user` is the id of who runs it, `keys` the directory of the trust store where it is not the
    user's usual one, and `unsigned` says that anything is used.
    """

    user: int = field(default_factory=os.geteuid)
    keys: Path | None = None
    unsigned: bool = False

    def doubt(self, status: os.stat_result) -> str | None:
        """Why a file or directory may be another's work; None where it cannot be."""
        if (doubt := self.doubt_of_all(status)) is not None:
            return doubt
        if status.st_mode & stat.S_IWGRP:
            return "its group may write to it"
        return None

    def doubt_of_all(self, status: os.stat_result) -> str | None:
        """As `doubt`, of who is in no group with this user."""
        if status.st_uid not in (self.user, 0):
            return f"it belongs to user {status.st_uid}"
        if status.st_mode & stat.S_IWOTH:
            return "everybody may write to it"
        return None

    def doubt_of(self, directory: Path) -> str | None:
        """As `doubt`, of a directory, which need not exist. Raises what `os.stat` does."""
        try:
            return self.doubt(directory.stat())
        except FileNotFoundError:
            return None

    def check(self, path: Path, data: bytes, status: os.stat_result, root: Path) -> None:
        """Raises `Untrusted` where a record must not be used.

        `data` is the whole file at `path`, in the cache at `root`, and `status` what the open file
        says of itself.
        """
        place = self.doubt_of(root)
        if self.unsigned or not (doubt := place or self.doubt(status)):
            return
        body, signature = split(data)
        reason, hint = self._unsigned(body, signature)
        if reason:
            raise Untrusted(root if place else path, f"{doubt}, and {reason}", hint=hint)

    def _unsigned(self, body: bytes, signature: Signature | None) -> tuple[str, str]:
        """Why the signature does not make the record a trusted one, and what would."""
        if signature is None:
            return "what it holds is not signed", (
                "keep the cache where only this user can write (chmod -R go-w), "
                "sign it (vllmc warm --sign-key), or give --trust-unsigned"
            )
        if not trusts(signature.key, self):
            return f"the key that signs it is not in the trust store: {signature.key.hex()}", (
                "vllmc trust add FILE takes the public key of whom you trust"
            )
        if not signature.is_of(body):
            return "its signature is not of what it says", "vllmc cache verify finds the rest"
        return "", ""
