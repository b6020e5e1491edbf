"""A store in a temporary directory, and records to fill it with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vllmc.core.cache.key import Factor, key_of, sha256_hex
from vllmc.core.cache.record import ProgramRecord, ProgramUnit, SourceFile, UnitRecord
from vllmc.core.cache.store import Store


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """What warming one model leaves: the program's record, its units' records, their artifacts."""

    program: ProgramRecord
    units: tuple[UnitRecord, ...]
    artifacts: tuple[bytes, ...]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def make_unit() -> Callable[..., UnitRecord]:
    def make(artifact: bytes, *, created: float = 1000.0) -> UnitRecord:
        factors = (
            Factor(group="graph", name="digest", value=sha256_hex(artifact), origin="probe"),
            Factor(group="inductor", name="max_autotune", value=False),
        )
        return UnitRecord(
            key=key_of(factors),
            artifact=sha256_hex(artifact),
            format="standalone",
            code=sha256_hex(b"code of " + artifact),
            bytes=len(artifact),
            seconds=1.5,
            created=created,
            factors=factors,
        )

    return make


@pytest.fixture
def make_program() -> Callable[..., ProgramRecord]:
    def make(
        units: tuple[UnitRecord, ...] = (),
        *,
        model: str = "tiny-llama",
        created: float = 1000.0,
        source: str = "a" * 32,
        factors: tuple[Factor, ...] | None = None,
    ) -> ProgramRecord:
        if factors is None:
            factors = (Factor(group="model", name="config", value={"name": model, "layers": 2}),)
        return ProgramRecord(
            key=key_of(factors),
            model=model,
            created=created,
            factors=factors,
            sources=(
                SourceFile(
                    package="transformers",
                    path="models/llama/modeling_llama.py",
                    digest=source,
                    functions=("LlamaModel.forward",),
                ),
            ),
            guarded={},
            units=tuple(
                ProgramUnit(
                    key=unit.key,
                    artifact=unit.artifact,
                    range="1:8192",
                    pieces=(f"piece_{index}",),
                )
                for index, unit in enumerate(units)
            ),
            pieces={"total": 5, "splitting": 2, "compilable": 3, "unique": len(units)},
            program={"inputs": ["input_ids", "positions"], "version": 1},
        )

    return make


@pytest.fixture
def warm(
    store: Store,
    make_unit: Callable[..., UnitRecord],
    make_program: Callable[..., ProgramRecord],
) -> Callable[..., Warmed]:
    """Stores a program of the given artifacts as `warm` does: artifacts, units, program."""

    def fill(*artifacts: bytes, **program: object) -> Warmed:
        units = tuple(make_unit(artifact) for artifact in artifacts)
        for artifact, unit in zip(artifacts, units, strict=True):
            store.put_artifact(artifact)
            store.put_unit(unit)
        record = make_program(units, **program)
        store.put_program(record)
        return Warmed(program=record, units=units, artifacts=artifacts)

    return fill


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """The contents of every plain file below a directory, by relative path."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture
def start() -> Callable[..., subprocess.Popen[str]]:
    """Starts a Python script in a process of its own, killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *args: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
