"""Files that no one wrote as they are: whatever they hold, there is an answer or a clear error."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from vllmc.cli import report
from vllmc.cli.foreign import compare_recorded
from vllmc.cli.torch_inspect import torch_report, torch_row
from vllmc.cli.vllm_inspect import vllm_report, vllm_row
from vllmc.core.errors import VllmcError

DIAGNOSE = Path(__file__).parents[1] / "core/diagnose"
CACHE = DIAGNOSE / "vllm/0.28-pieces"
LOG = CACHE / "start.log"
TRACE = DIAGNOSE / "traces/changed"
[PLACE] = (CACHE / "torch_compile_cache").glob("*/rank_0_0/backbone")
FILES = tuple(sorted(p.relative_to(CACHE) for p in PLACE.iterdir() if p.suffix))
ODD = (
    b"[" * 20_000,
    b"{" * 20_000,
    b"-" * 20_000,
    b"9" * 5_000,
    b"\x00",
    b"\xff\xfe",
    b"\r",
    b"NaN",
)

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The data with a part of it replaced, and often cut short."""
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 200)))
    data = data[:start] + draw(st.sampled_from(ODD) | st.binary(max_size=64)) + data[end:]
    return data[: draw(st.integers(0, len(data)) | st.just(len(data)))]


@contextmanager
def a_cache() -> Iterator[tuple[Path, Path]]:
    """A copy of a cache in a directory of its own, and the directory of its compilation."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "cache")
        shutil.copytree(CACHE, copy)
        yield copy, copy / PLACE.relative_to(CACHE)


def answered(path: Path) -> str:
    """What is said of a cache, in every form there is."""
    row = vllm_row(path)
    json.dumps(row, allow_nan=False).encode()
    compare(path, CACHE)
    return printed(vllm_report(row, whole=False))


def compare(a: Path, b: Path) -> None:
    try:
        found = compare_recorded(str(a), str(b))
    except VllmcError:
        return
    if found is not None:
        changes = [change.to_json() for change in found.changes]
        json.dumps([changes, found.notes], allow_nan=False).encode()
        side = {"kind": "", "name": ""}
        row = {"a": side, "b": side, "equal": not changes, "changes": changes, "same": found.same}
        printed(report.diff({**row, "notes": found.notes}))


def printed(rendered: RenderableType) -> str:
    file = io.StringIO()
    Console(file=file, width=80).print(rendered)
    file.getvalue().encode()
    return file.getvalue()


@pytest.mark.parametrize("name", FILES, ids=lambda name: name.name)
@quick
@given(data=st.data())
def test_a_damaged_file_of_a_cache_is_answered_for(name: Path, data: st.DataObject) -> None:
    with a_cache() as (copy, _):
        (copy / name).write_bytes(data.draw(damaged((CACHE / name).read_bytes())))
        assert answered(copy)


@quick
@given(values, values, values)
def test_factors_of_any_type_are_answered_for(env: Any, digest: Any, unknown: Any) -> None:
    with a_cache() as (copy, place):
        value = {"env": env, "config_hash": digest, "unknown": unknown}
        (place / "cache_key_factors.json").write_text(json.dumps(value))
        assert answered(copy)


@quick
@given(st.dictionaries(st.text() | st.tuples(st.none() | st.integers(), st.text()), values))
def test_an_index_of_any_type_is_answered_for(index: Any) -> None:
    with a_cache() as (copy, place):
        (place / "vllm_compile_cache.py").write_text(repr(index), errors="replace")
        assert answered(copy)


@quick
@given(damaged(LOG.read_bytes()))
def test_a_damaged_log_is_answered_for(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "log")
        path.write_bytes(data)
        compare(path, CACHE)


@quick
@given(damaged(next(TRACE.iterdir()).read_bytes()))
def test_a_damaged_trace_is_answered_for(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.log")
        path.write_bytes(data)
        compare(path, TRACE)
        try:
            row = torch_row(path)
        except VllmcError:
            return
        json.dumps(row, allow_nan=False).encode()
        assert printed(torch_report(row, whole=True))


@quick
@given(st.lists(st.dictionaries(st.sampled_from(
    ["artifact", "dynamo_start", "compilation_metrics", "rank", "frame_id", "str", "stack"]
), values | st.fixed_dictionaries({"name": st.sampled_from(
    ["fx_graph_cache_miss", "aotautograd_cache_bypass", "torch_version", "fx_graph_cache_new"]
)}), min_size=1), min_size=1), values)  # fmt: skip
def test_entries_of_any_type_are_answered_for(entries: list[Any], payload: Any) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "trace.log")
        path.write_text("".join(
            f"V1121 12:12:21.348 31490 torch/x.py:1] {json.dumps(entry)}\n\t{json.dumps(payload)}\n"
            for entry in ({"artifact": {"name": "torch_version"}}, *entries)
        ))  # fmt: skip
        row = torch_row(path)
        json.dumps(row, allow_nan=False).encode()
        assert printed(torch_report(row, whole=True))
        compare(path, TRACE)


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def a_way_up(path: Path) -> None:
    path.symlink_to("../..")


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [Path.mkdir, a_pipe, a_loop, a_way_up, a_device])
@pytest.mark.parametrize("name", [*FILES, PLACE.relative_to(CACHE) / "artifact_shape_1_subgraph_9"])
def test_what_is_no_file_where_one_belongs_is_answered_for(
    name: Path, make: Callable[[Path], None]
) -> None:
    with a_cache() as (copy, _):
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        assert answered(copy)


@pytest.mark.parametrize("make", [a_pipe, a_loop, a_device])
def test_what_is_no_file_is_no_trace_and_no_log(
    vllmc: Any, workplace: Path, make: Callable[[Path], None]
) -> None:
    make(workplace / "odd")
    for words in (("inspect-key", "odd"), ("diff-config", "odd", "odd")):
        assert "Traceback" not in vllmc(*words).err
    (workplace / "trace").mkdir()
    make(workplace / "trace/odd.log")
    shutil.copy(next(TRACE.iterdir()), workplace / "trace")
    assert vllmc("inspect-key", "trace").code == 0


@pytest.mark.parametrize("data", ODD)
def test_a_snapshot_that_is_none_is_an_error(vllmc: Any, workplace: Path, data: bytes) -> None:
    (workplace / "odd.json").write_bytes(data)
    done = vllmc("diff-config", "odd.json", "odd.json")
    assert done.code == 1
    assert "error[bad-snapshot]" in done.err


@pytest.mark.parametrize("text", ["-" * 200_000 + "1", "1" + "+1" * 200_000, "(" * 300 + ")" * 300])
def test_an_index_that_nests_without_end_is_not_understood(text: str) -> None:
    with a_cache() as (copy, place):
        (place / "vllm_compile_cache.py").write_text(text)
        assert any(
            "vllm_compile_cache.py" in n for c in vllm_row(copy)["caches"] for n in c["notes"]
        )
