"""What `vllmc warm --dump` writes for a person to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.core.errors import VllmcError

if TYPE_CHECKING:
    from vllmc.core.pipeline import Ready


def write_dump(directory: Path, ready: Ready) -> None:
    """Writes the texts of each unit to `directory/PIECE/RANGE`; what lies there is overwritten.

    Raises `VllmcError` (`not-writable`).
    """
    for unit in ready.units:
        place = directory / unit.pieces[0] / unit.range.replace(":", "-")
        try:
            place.mkdir(parents=True, exist_ok=True)
            for name, text in unit.texts:
                (place / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise VllmcError(
                "not-writable",
                f"the dump cannot be written to {place}",
                context={"cause": str(error)},
                hint="give --dump a directory that this user may write to",
            ) from error
