"""Files that a command writes beside its output. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile

from vllmc.core.errors import VllmcError


def write_text(path: Path, text: str, flag: str, *, append: bool = False) -> None:
    """Writes `text` to the file that `flag` (`--junit`) names, and makes its directory.

    Raises `VllmcError` (`not-writable`).
    """
    mode = "a" if append else "w"
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def check_writable(path: Path, flag: str) -> None:
    """Makes the directory of `path`; raises what `write_text` would, without writing anything."""
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.open("a").close()
        else:
            TemporaryFile(dir=path.parent).close()


@contextmanager
def writing(path: Path, flag: str) -> Iterator[None]:
    """Raises `VllmcError` (`not-writable`) for what keeps from writing where `flag` says."""
    try:
        yield
    except OSError as error:
        raise VllmcError(
            "not-writable",
            f"{flag} cannot be written to {path}",
            context={"cause": str(error)},
            hint=f"give {flag} a place that this user may write to",
        ) from error
