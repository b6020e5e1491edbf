"""Files that a command writes beside its output. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from vllmc.core.errors import VllmcError


def write_text(path: Path, text: str, flag: str, *, append: bool = False) -> None:
    """Writes `text` to the file that `flag` (`--junit`) names, and makes its directory.

    Raises `VllmcError` (`not-writable`).
    """
    mode = "a" if append else "w"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise VllmcError(
            "not-writable",
            f"{flag} cannot be written to {path}",
            context={"cause": str(error)},
            hint=f"give another {flag} FILE",
        ) from error
