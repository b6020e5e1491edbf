"""What `vllmc warm --dump` writes for a person to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from vllmc.cli.side_files import writing

if TYPE_CHECKING:
    from vllmc.core.job import Job
    from vllmc.core.pipeline import Ready


def dump_places(directory: Path, jobs: Sequence[Job]) -> list[Path]:
    """Where the dump of each job is written: `directory`, of several jobs one below it for each.

    Raises `VllmcError` (`not-writable`) before anything is compiled for it.
    """
    with writing(directory, "--dump"):
        directory.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=directory).close()
    if len(jobs) == 1:
        return [directory]
    places: list[Path] = []
    for job in jobs:
        # Below the directory, however the model's path is written.
        parts = [part for part in PurePath(job.label).parts if part != ".."]
        place, number = directory / "-".join(parts), 2
        while place in places:
            place, number = directory / f"{'-'.join(parts)}-{number}", number + 1
        places.append(place)
    return places


def write_dump(directory: Path, ready: Ready) -> None:
    """Writes the texts of each unit to `directory/PIECE/RANGE`, in place of those of before.

    Raises `VllmcError` (`not-writable`).
    """
    from vllmc.core.compiler.protocol import AFTER_TEXT, BEFORE_TEXT, CODE_TEXT

    for unit in ready.units:
        place = directory / unit.pieces[0] / unit.range.replace(":", "-")
        with writing(place, "--dump"):
            place.mkdir(parents=True, exist_ok=True)
            for name in (BEFORE_TEXT, AFTER_TEXT, CODE_TEXT):
                (place / name).unlink(missing_ok=True)
            for name, text in unit.texts:
                (place / name).write_text(text, encoding="utf-8")
