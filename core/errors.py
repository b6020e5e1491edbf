"""The errors that vllmc raises, each with a code, a context and the next thing to do.

    VllmcError              exit 1: what the user, the disk or another process caused
    ├── UsageError          exit 2: an option or argument that cannot be meant as written
    ├── CheckFailed         exit 3: what was asked to be checked does not hold
    └── UnsafeCacheError    exit 4: the cache holds something corrupt or not trusted

What only vllmc itself can cause is asserted, not raised.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar


class VllmcError(Exception):
    """An error for the person who runs vllmc.

    `code` is kebab-case and stable (`unknown-model`), `message` says what happened, `context`
    holds the named facts around it, `hint` the next command or change to try.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        code: str,
        message: str,
        *,
        context: Mapping[str, object] | None = None,
        hint: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.context = dict(context or {})
        self.hint = hint
        if hint:
            # For who meets it as an exception of the library's.
            self.add_note(f"hint: {hint}")

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class UsageError(VllmcError):
    """An option or an argument is malformed or contradicts another."""

    exit_code = 2


class CheckFailed(VllmcError):
    """A check that the user asked for (`--fail-on-miss`, `--check`) does not hold."""

    exit_code = 3


class UnsafeCacheError(VllmcError):
    """Something in the cache is corrupt or not trusted, and was not used."""

    exit_code = 4
