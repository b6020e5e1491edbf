from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllmc.core.diagnose.torch_caches import Compilation, Lookup, TorchTrace, read_trace
from vllmc.core.diagnose.torch_components import part_of
from vllmc.core.diagnose.torch_diff import diff_traces
from vllmc.core.diagnose.torch_trace import is_trace
from vllmc.core.errors import VllmcError
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.minors.torch_2_12 import Torch212

LOG = "dedicated_log_torch_trace_0.log"
PREFIX = "V1121 12:12:21.348000 31490 torch/_logging/_internal.py:1328]"


def artifact(name: str, payload: object, **context: Any) -> str:
    head = {"artifact": {"name": name, "encoding": "json"}, "frame_id": 0, "frame_compile_id": 0}
    return f"{PREFIX} {json.dumps(head | context)}\n\t{json.dumps(payload)}\n"


def read(tmp_path: Path, *entries: str) -> TorchTrace:
    (tmp_path / LOG).write_text("".join(entries), encoding="utf-8")
    return read_trace(tmp_path)


def answers(compilation: Compilation) -> list[tuple[str, str]]:
    return [(lookup.cache, lookup.answer) for lookup in compilation.lookups]


def lookup(compilation: Compilation, cache: str) -> Lookup:
    return next(lookup for lookup in compilation.lookups if lookup.cache == cache)


def test_a_cold_start_misses_and_says_which_frames(traces: Path) -> None:
    trace = read_trace(traces / "cold")
    assert (trace.torch, trace.notes) == ("2.13.0+cpu", ())
    assert [(c.label, c.outcome) for c in trace.compilations] == [
        ("[0/0] program.py:20 in scale", "miss"),
        ("[0/1] program.py:20 in scale", "miss"),
        ("[1/0] program.py:25 in custom", "bypass"),
        ("[2/0] program.py:30 in train", "miss"),
    ]


def test_a_warm_start_hits_under_the_same_keys(traces: Path) -> None:
    cold, warm = (read_trace(traces / name) for name in ("cold", "warm"))
    assert [c.outcome for c in warm.compilations] == ["hit", "hit", "bypass", "hit"]
    for before, after in zip(cold.compilations, warm.compilations, strict=True):
        assert {k.key for k in before.lookups} == {k.key for k in after.lookups}
        assert before.graph == after.graph


def test_forward_and_backward_are_lookups_of_one_compilation(traces: Path) -> None:
    train = read_trace(traces / "cold").compilations[3]
    assert answers(train) == [("aot_autograd", "miss"), ("fx_graph", "miss"), ("fx_graph", "miss")]
    assert [k.backward for k in train.lookups] == [False, False, True]


def test_a_bypass_has_no_key_and_a_reason_without_addresses(traces: Path) -> None:
    custom = read_trace(traces / "warm").compilations[2]
    assert answers(custom) == [("aot_autograd", "bypass"), ("fx_graph", "hit")]
    bypass = lookup(custom, "aot_autograd")
    assert bypass.key == ""
    assert bypass.reason == (
        "Unsupported call_function target <function unknown_to_the_cache>. "
        "Function module: __main__, Function name: unknown_to_the_cache"
    )


def test_both_caches_can_be_bypassed(traces: Path) -> None:
    [frozen] = read_trace(traces / "frozen").compilations
    assert frozen.outcome == "bypass"
    assert [k.reason for k in frozen.lookups] == [
        "Cannot cache a graph with freezing enabled",
        "mkldnn tensors unpickleable",
    ]


def test_a_cache_that_is_off_is_seen_though_torch_writes_no_artifact(traces: Path) -> None:
    [disabled] = read_trace(traces / "disabled").compilations
    assert (disabled.outcome, answers(disabled)) == ("disabled", [("fx_graph", "disabled")])


def test_components_have_names_hashes_and_what_torch_prints(traces: Path) -> None:
    fused = read_trace(traces / "cold").compilations[0]
    found = {c.name: c for c in lookup(fused, "fx_graph").components}
    assert found["inductor_config[epilogue_fusion]"].text == "True"
    assert found["cache_key_tag"].text == ""
    assert found["example_inputs[0]"].text.startswith("TensorMetadata(dtype=torch.float32")
    assert "torch.ops.aten.relu" in found["gm"].text
    assert all(c.digest.isalnum() for c in found.values())
    assert lookup(fused, "aot_autograd").components == (), "its logger was not at DEBUG"
    detailed = read_trace(traces / "detailed").compilations[0]
    assert {c.name for c in lookup(detailed, "aot_autograd").components} >= {"aot_config", "gm"}
    assert {c.name: c.text for c in fused.functorch}["autograd_config[donated_buffer]"] == "True"


def test_the_same_graph_at_another_place_is_the_same_graph(traces: Path) -> None:
    cold, moved = (read_trace(traces / name).compilations for name in ("cold", "moved"))
    assert (cold[0].id, moved[3].id) == ("0/0", "3/0")
    assert cold[0].graph == moved[3].graph != cold[1].graph


def test_one_miss_that_both_caches_report_is_counted_once(tmp_path: Path) -> None:
    # AOTAutograd finds its entry and not the FX graph that it names; then Inductor asks itself.
    fx = artifact("fx_graph_cache_miss", {"key": "f1", "components": []})
    aot = artifact("aotautograd_cache_miss", {"key": None, "components": []})
    [compilation] = read(tmp_path, fx, aot, fx).compilations
    assert answers(compilation) == [("fx_graph", "miss"), ("aot_autograd", "miss")]


def test_hits_of_one_key_are_each_counted(tmp_path: Path) -> None:
    hit = artifact("fx_graph_cache_hit", {"key": "f1", "components": []})
    [compilation] = read(tmp_path, hit, hit).compilations
    assert answers(compilation) == [("fx_graph", "hit")] * 2


def test_a_hit_beside_a_miss_is_partial(tmp_path: Path) -> None:
    entries = (
        artifact("aotautograd_cache_miss", {"key": "a1"}),
        artifact("fx_graph_cache_hit", {"key": "f1"}),
    )
    assert read(tmp_path, *entries).compilations[0].outcome == "partial"


def test_a_guard_that_does_not_hold_is_the_reason_of_a_miss(tmp_path: Path) -> None:
    info = {"key": "f", "cache_status_detailed": "guard_miss", "cache_status_guard_expr": "s0 < 9"}
    [compilation] = read(tmp_path, artifact("fx_graph_cache_miss", info)).compilations
    assert compilation.lookups[0].reason == "the key is stored, but not for these sizes: s0 < 9"


def test_what_could_not_be_stored_is_no_answer_of_a_cache(tmp_path: Path) -> None:
    entries = (
        artifact("aotautograd_cache_miss", {"key": "a1"}),
        artifact("aotautograd_cache_pickle_failure", {"error": "no pickle", "field": "x"}),
    )
    [compilation] = read(tmp_path, *entries).compilations
    assert compilation.outcome == "miss"
    assert compilation.lookups[1].reason == "what was compiled could not be stored: no pickle"


def test_a_bundled_hit_is_one_of_the_fx_graph_cache(tmp_path: Path) -> None:
    [compilation] = read(tmp_path, artifact("fx_graph_bundled_cache_hit", {})).compilations
    assert (answers(compilation), compilation.outcome) == ([("fx_graph", "hit")], "hit")


def test_a_compilation_that_asked_no_cache_is_listed(tmp_path: Path) -> None:
    head = {"dynamo_output_graph": {"sizes": {}}, "frame_id": 0, "frame_compile_id": 0}
    [compilation] = read(tmp_path, f"{PREFIX} {json.dumps(head)}\n\tclass G: pass\n").compilations
    assert (compilation.outcome, compilation.lookups) == ("none", ())


def test_ranks_are_read_one_after_the_other(tmp_path: Path, traces: Path) -> None:
    for rank in (1, 0):
        name = f"dedicated_log_torch_trace_rank_{rank}_x.log"
        shutil.copy(traces / "detailed" / LOG, tmp_path / name)
    trace = read_trace(tmp_path)
    assert [c.label for c in trace.compilations] == [
        "rank 0 [0/0] program.py:20 in scale",
        "rank 1 [0/0] program.py:20 in scale",
    ]


def test_what_is_not_understood_is_said_with_its_count(tmp_path: Path) -> None:
    unknown = artifact("fx_graph_cache_weird", {})
    trace = read(
        tmp_path,
        unknown,
        unknown,
        artifact("fx_graph_cache_miss", {"key": "f1", "components": ["odd", 7]}),
        artifact("fx_graph_cache_hit", []),
        "something else\n",
        f'{PREFIX} {{"artifact": {{"na',
    )
    assert trace.notes == (
        f"{LOG} ends in the middle of an entry",
        f"{LOG}: 1 line was not understood",
        "an entry fx_graph_cache_weird is not known (2)",
        "a component of a key was not understood (2)",
        "the details of a hit could not be read (1)",
    )
    assert answers(trace.compilations[0]) == [("fx_graph", "miss"), ("fx_graph", "hit")]


def test_a_place_without_a_trace_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(VllmcError, match=r"no-trace: .* holds no log") as caught:
        read_trace(tmp_path)
    assert "TORCH_TRACE=DIR" in caught.value.hint


@st.composite
def damages(draw: st.DrawFn) -> bytes:
    """A trace of which bytes are lost, doubled, replaced, or cut off at the end."""
    data = (Path(__file__).parent / "traces" / "detailed" / LOG).read_bytes()
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 30, 2000))))
        with_what = draw(st.one_of(st.binary(max_size=6), st.just(data[start:end] * 2)))
        data = data[:start] + with_what + data[end:]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@settings(max_examples=300, deadline=None)
@given(damages())
def test_a_damaged_trace_is_read_as_far_as_it_goes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    (place / LOG).write_bytes(data)
    try:
        damaged = read_trace(place)
    except VllmcError:
        assert not is_trace(place)
        return
    intact = read_trace(Path(__file__).parent / "traces" / "changed")
    for pair in ((damaged, intact), (intact, damaged)):
        found = diff_traces(*pair)
        rows = [change.to_json() for change in found.changes]
        text = json.dumps([rows, found.notes, damaged.notes], allow_nan=False, ensure_ascii=False)
        assert text.encode("utf-8")


@pytest.mark.slow
def test_a_trace_of_the_torch_that_is_installed_is_understood_whole(
    tmp_path: Path, traces: Path
) -> None:
    # The traces that lie here are of one torch, and cut down: another may write other things.
    for case in ("detailed", "changed"):
        subprocess.run(
            [sys.executable, str(traces / "program.py"), case],
            env=os.environ
            | {
                "TORCH_TRACE": str(tmp_path / case),
                "TORCH_LOGS": "+torch._functorch._aot_autograd.autograd_cache",
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "caches"),
                "TORCHINDUCTOR_VEC_ISA_OK": "1",
            },
            capture_output=True,
            check=True,
        )
    before, after = (read_trace(tmp_path / case) for case in ("detailed", "changed"))
    assert (before.notes, after.notes) == ((), ())
    [compilation] = before.compilations
    assert compilation.label == "[0/0] program.py:20 in scale"
    assert answers(compilation) == [("aot_autograd", "miss"), ("fx_graph", "miss")]
    names = {c.name for k in compilation.lookups for c in k.components}
    assert len(names) > 500
    assert {name for name in names if part_of(name).klass == "unknown"} == set()
    found = diff_traces(before, after)
    assert [c.name for c in found.changes] == [
        # A hash of them all, on an older torch.
        "autograd_config" if isinstance(TORCH, Torch212) else "autograd_config[donated_buffer]",
        "example_inputs[0].shape",
    ]
