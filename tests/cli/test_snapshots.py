from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.snapshots import snapshot_side, stored_key, stored_side, unknown_side
from vllmc.core.errors import VllmcError


def write(directory: Path, value: Any) -> Path:
    path = directory / "snapshot.json"
    path.write_text(json.dumps(value))
    return path


def test_a_stored_program_is_a_side_with_its_model_factors_and_sources(stored: Any) -> None:
    side = stored_side(stored.store, stored.program.key[:9])
    assert side is not None
    assert (side.kind, side.name, side.model) == ("key", stored.program.key[:12], "tiny-llama")
    assert (side.factors, side.sources) == (stored.program.factors, stored.program.sources)


def test_a_stored_unit_is_a_side_without_a_model(stored: Any) -> None:
    side = stored_side(stored.store, stored.unit.key[:9])
    assert side is not None
    assert (side.kind, side.name, side.model) == ("unit", stored.unit.key[:12], "")
    assert (side.factors, side.sources) == (stored.unit.factors, ())


def test_a_key_may_be_typed_in_capitals(stored: Any) -> None:
    assert stored_key(stored.store, stored.program.key[:10].upper()) == stored.program.key


@pytest.mark.parametrize("text", ["tiny-llama", "abcdef", "0123456789xyz", "module:attribute"])
def test_what_does_not_look_like_a_key_is_none(stored: Any, text: str) -> None:
    assert stored_key(stored.store, text) is None
    assert stored_side(stored.store, text) is None


def test_what_looks_like_a_key_must_be_stored(stored: Any) -> None:
    with pytest.raises(VllmcError) as caught:
        stored_side(stored.store, "0123456789abcdef")
    assert caught.value.code == "unknown-key"


def test_a_snapshot_gives_the_factors_that_were_printed(stored: Any, tmp_path: Path) -> None:
    factors = stored.program.factors
    row = {"model": "m", "factors": [factor.to_json() for factor in factors]}
    path = write(tmp_path, row)
    side = snapshot_side(path)
    assert (side.kind, side.name, side.model) == ("snapshot", str(path), "m")
    assert side.factors == factors


@pytest.mark.parametrize(
    "value",
    [
        [],
        {"factors": []},
        {"model": "m"},
        {"model": "m", "factors": [{}]},
        {"model": "m", "factors": [{"group": 1}]},
        {"model": "m", "factors": 3},
        {"schema_version": 1, "command": "inspect-key", "error": {"code": "unknown-model"}},
    ],
    ids=lambda value: json.dumps(value)[:24],
)
def test_anything_else_is_no_snapshot(tmp_path: Path, value: Any) -> None:
    with pytest.raises(VllmcError) as caught:
        snapshot_side(write(tmp_path, value))
    assert caught.value.code == "bad-snapshot"
    assert "inspect-key --json" in caught.value.hint


def test_bytes_that_are_no_text_are_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(VllmcError) as caught:
        snapshot_side(path)
    assert caught.value.code == "bad-snapshot"


def test_the_error_for_no_side_names_the_kinds_there_are() -> None:
    error = unknown_side("x")
    assert error.exit_code == 2
    assert all(kind in error.hint for kind in ("current", "defaults", "key", "snapshot"))


def test_commands_on_stored_things_import_nothing_heavy(
    stored: Any, workplace: Path, vllm_start: Any
) -> None:
    program = (
        "import json, sys\n"
        "from vllmc.cli.app import main\n"
        "codes = [main(words) for words in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'transformers', 'triton', 'numpy', 'sympy', 'pydantic', 'filelock'}\n"
        "print(codes, heavy & set(sys.modules))\n"
    )
    key = stored.program.key[:12]
    row = {"model": "m", "factors": [factor.to_json() for factor in stored.program.factors]}
    snapshot = str(write(workplace, row))
    cache = str(vllm_start.store(workplace / "vllm"))
    log = workplace / "vllm.log"
    log.write_text(vllm_start.log())
    commands = [
        ["inspect-key", cache],
        ["diff-config", cache, str(log)],
        ["inspect-key", key],
        ["diff-config", key, snapshot, "--exit-code"],
        ["diff-config", key, stored.unit.key[:12]],
        ["diff-config", snapshot, snapshot],
        ["cache", "ls"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(commands)],
        env=os.environ | {"VLLMC_CACHE_DIR": str(stored.store.root)},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0] set()"
