from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.app import main
from vllmc.core.cache.key import Factor, sha256_hex
from vllmc.core.cache.record import ProgramRecord, ProgramUnit, SourceFile, UnitRecord
from vllmc.core.cache.store import Store

SURROUNDINGS = ("VLLMC_", "COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_", "GITHUB_")


@dataclass(frozen=True)
class Done:
    """What a command line did: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert value["schema_version"] == 1
        return value


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment that says nothing to vllmc."""
    import os

    for name in os.environ:
        if name.startswith(SURROUNDINGS):
            monkeypatch.delenv(name)
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


@pytest.fixture
def vllmc(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs a command line in this process, with a cache directory of its own."""
    monkeypatch.setenv("VLLMC_CACHE_DIR", str(workplace.parent / "cache"))
    monkeypatch.setenv("VLLMC_TRUST_DIR", str(workplace.parent / "trust"))

    def run(*words: str) -> Done:
        code = main(words)
        captured = capsys.readouterr()
        return Done(code=code, out=captured.out, err=captured.err)

    return run


@dataclass(frozen=True)
class Stored:
    """A cache that holds one program of one unit."""

    store: Store
    program: ProgramRecord
    unit: UnitRecord
    data: bytes


@pytest.fixture
def stored(workplace: Path) -> Stored:
    store = Store(workplace.parent / "cache")
    data = b"machine code" * 200
    factors = (
        Factor(group="inductor", name="max_autotune", value=True, origin="flag", is_default=False),
        Factor(group="inductor", name="epilogue_fusion", value=True),
        Factor(group="system", name="isa", value="avx512", origin="probe"),
    )
    unit = UnitRecord(
        key=sha256_hex("unit"),
        artifact=store.put_artifact(data),
        format="native",
        code=sha256_hex("code"),
        bytes=len(data),
        seconds=1.25,
        created=1_700_000_000.0,
        factors=factors,
    )
    program = ProgramRecord(
        key=sha256_hex("program"),
        model="tiny-llama",
        created=1_700_000_100.0,
        factors=factors,
        sources=(
            SourceFile(
                package="transformers",
                path="models/llama/modeling_llama.py",
                digest="0123456789abcdef" * 2,
                functions=("LlamaModel.forward", "LlamaMLP.forward"),
            ),
        ),
        guarded={},
        units=(
            ProgramUnit(
                key=unit.key,
                artifact=unit.artifact,
                range="1:8192",
                pieces=tuple(f"piece_{i}" for i in range(6)),
            ),
        ),
        pieces={"total": 13, "splitting": 6, "compilable": 7, "unique": 1},
        program={"format": 1},
    )
    store.put_unit(unit)
    store.put_program(program)
    return Stored(store=store, program=program, unit=unit, data=data)
