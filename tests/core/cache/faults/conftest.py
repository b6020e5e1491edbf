"""Publications that meet faults, and what must hold after each."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import faulty
import pytest

from vllmc.core.cache.key import sha256_hex
from vllmc.core.cache.record import ProgramRecord, UnitRecord, encode
from vllmc.core.cache.store import Store


@dataclasses.dataclass(frozen=True)
class Publication:
    """A program of two units, and where `faulty` reads it from."""

    units: tuple[UnitRecord, ...]
    program: ProgramRecord
    paths: tuple[Path, ...]

    def into(self, store: Store) -> None:
        """Publishes it as `warm` does; a lease that is left over is a failure."""
        faulty.publish(store, self.units, self.program)

    def meets(self, fault: str, root: Path) -> list[str]:
        """Publishes it below `root` with a fault at each step; what became of each."""
        done = subprocess.run(
            [sys.executable, faulty.__file__, fault, root, *self.paths],
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        words = done.stdout.split()
        assert len(words) > 30, "the steps of a publication are no longer seen"
        return words


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A directory in memory, where there is one: a disk takes its time to sync at each step."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield Path(place)


@pytest.fixture
def publish(
    make_unit: Callable[..., UnitRecord],
    make_program: Callable[..., ProgramRecord],
    tmp_path: Path,
) -> Callable[..., Publication]:
    """Makes a publication; `seconds` changes the contents of its records and no key."""

    def make(seconds: float = 1.5) -> Publication:
        units = []
        for name in (b"one", b"two"):
            unit = dataclasses.replace(make_unit(name), seconds=seconds)
            data = faulty.artifact(unit)
            units.append(dataclasses.replace(unit, artifact=sha256_hex(data), bytes=len(data)))
        program = make_program(tuple(units), created=1000.0 + seconds)
        paths = []
        for record in (*units, program):
            paths.append(tmp_path / f"{record.key[:8]}.{seconds}")
            paths[-1].write_bytes(encode(record))
        return Publication(units=tuple(units), program=program, paths=tuple(paths))

    return make


@pytest.fixture
def counted() -> Callable[[str, int], None]:
    """Says how many faults were tried; `pytest -rP` shows it."""

    def say(what: str, count: int) -> None:
        print(f"faults: {what}: {count}")  # noqa: T201

    return say
