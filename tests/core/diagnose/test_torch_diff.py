from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.cache.explain import Change
from vllmc.core.cache.key import REDACTED
from vllmc.core.diagnose.torch_caches import (
    Cache,
    Compilation,
    Component,
    Lookup,
    TorchTrace,
    read_trace,
)
from vllmc.core.diagnose.torch_diff import TraceDiff, diff_traces


def component(name: str, text: str, digest: str = "") -> Component:
    return Component(name=name, digest=digest or f"h{hash(text):x}", text=text)


def looked_up(*components: Component, cache: Cache = "fx_graph", **changes: Any) -> Lookup:
    lookup = Lookup(
        cache=cache,
        answer="miss",
        key="f" + "".join(c.digest for c in components),
        reason="",
        components=components,
    )
    return replace(lookup, **changes)


def compiled(*lookups: Lookup, **changes: Any) -> Compilation:
    made = Compilation(
        id="0/0", rank=None, frame="m.py:1 in f", graph="g", lookups=lookups, functorch=()
    )
    return replace(made, **changes)


def trace(*compilations: Compilation, torch: str = "2.13.0") -> TorchTrace:
    return TorchTrace(name="t", torch=torch, compilations=compilations, notes=())


def compare(before: Component, after: Component) -> list[Change]:
    sides = (trace(compiled(looked_up(side))) for side in (before, after))
    return list(diff_traces(*sides).changes)


def named(found: TraceDiff) -> list[tuple[str, str, Any, Any]]:
    return [(c.group, c.name, c.before, c.after) for c in found.changes]


def of(traces: Path, before: str, after: str) -> TraceDiff:
    return diff_traces(read_trace(traces / before), read_trace(traces / after))


def test_one_option_that_differs_is_named_once_for_all_compilations(traces: Path) -> None:
    # Situation 4 of the field: the cache was shipped, and one flag makes it inert.
    found = of(traces, "cold", "option")
    [change] = found.changes
    assert (change.group, change.name) == ("torch.fx_graph", "inductor_config[epilogue_fusion]")
    assert (change.before, change.after, change.kind) == (True, False, "changed")
    assert (change.klass, change.affects_key, change.note) == ("codegen", True, "")
    assert found.same > 30
    assert any("so more may have moved than is named (TORCH_LOGS=" in note for note in found.notes)


def test_a_cold_and_a_warm_start_have_the_same_keys(traces: Path) -> None:
    found = of(traces, "cold", "warm")
    assert found.changes == ()
    assert found.notes[0] == (
        "FX graph cache: the same key was a miss in a and a hit in b: "
        "[0/0] program.py:20 in scale, [0/1] program.py:20 in scale, "
        "[1/0] program.py:25 in custom and 1 more"
    )
    assert any(
        note.startswith("AOTAutograd cache: bypass in both")
        and "Unsupported call_function target" in note
        and note.endswith("[1/0] program.py:25 in custom")
        for note in found.notes
    )


def test_a_trace_and_itself_differ_in_nothing(traces: Path) -> None:
    found = of(traces, "option", "option")
    assert (found.changes, len(found.notes)) == ((), 1)


def test_compilations_whose_ids_moved_are_matched_by_their_graphs(traces: Path) -> None:
    found = of(traces, "cold", "moved")
    assert named(found) == [
        ("torch.compilation", "[0/1] program.py:20 in scale", "miss", None),
        ("torch.compilation", "[0/0] program.py:35 in late", None, "miss"),
    ]
    assert [c.kind for c in found.changes] == ["removed", "added"]
    assert "[3/0] program.py:20 in scale" in found.notes[0]


def test_a_trace_of_ranks_is_compared_with_one_of_a_single_process() -> None:
    key = component("inductor_config[o]", "1")
    ranks = [compiled(looked_up(key), rank=rank) for rank in (0, 1)]
    [change] = diff_traces(trace(*ranks), trace(compiled(looked_up(key)))).changes
    assert (change.name, change.kind) == ("rank 1 [0/0] m.py:1 in f", "removed")


def test_settings_and_inputs_are_told_apart(traces: Path) -> None:
    # Situation 5: a miss, and two things moved. The setting comes first.
    found = of(traces, "detailed", "changed")
    assert named(found) == [
        ("torch.aot_autograd", "autograd_config[donated_buffer]", True, False),
        ("torch.fx_graph", "example_inputs[0].shape", "torch.Size([4])", "torch.Size([8])"),
    ]
    assert [c.klass for c in found.changes] == ["codegen", "identity"]
    assert found.notes == ()


def test_a_cache_that_is_off_on_one_side_is_a_difference(traces: Path) -> None:
    found = of(traces, "detailed", "disabled")
    assert named(found) == [
        ("torch.fx_graph", "answer", "miss", "disabled"),
        ("torch.aot_autograd", "answer", "miss", "not asked"),
    ]
    assert found.changes[0].klass == "unknown"


def test_a_bypass_on_one_side_is_a_difference_with_its_reason() -> None:
    bypass = looked_up(answer="bypass", key="", reason="an op cannot be cached")
    found = diff_traces(trace(compiled(looked_up(key="f1"))), trace(compiled(bypass)))
    [change] = found.changes
    assert (change.before, change.after, change.klass) == ("miss", "bypass", "unknown")
    assert change.note == "an op cannot be cached"


@pytest.mark.parametrize(
    ("before", "after", "leaf"),
    [
        ("{'a': 1, 'b': {'c': 2}}", "{'a': 1, 'b': {'c': 3}}", ("inductor_config[o].b.c", 2, 3)),
        ("{'a': 1}", "{'a': 1, 'b': 2}", ("inductor_config[o].b", None, 2)),
        ("[1, 2]", "[1, 3]", ("inductor_config[o]", [1, 2], [1, 3])),
        ("[[1], [2]]", "[[1], [3]]", ("inductor_config[o].1", [2], [3])),
        ("B(value=False)", "B(value=True)", ("inductor_config[o].value", False, True)),
        ("1", "True", ("inductor_config[o]", 1, True)),
        ("None", "x", ("inductor_config[o]", None, "x")),
    ],
)
def test_values_are_compared_leaf_by_leaf(
    before: str, after: str, leaf: tuple[str, Any, Any]
) -> None:
    name = "inductor_config[o]"
    [change] = compare(component(name, before), component(name, after))
    assert (change.name, change.before, change.after) == leaf
    assert change.kind == "changed"


def test_a_component_that_only_one_side_has_is_added_or_removed() -> None:
    both = component("cache_key_tag", "")
    more = component("inductor_config[new]", "True")
    sides = trace(compiled(looked_up(both))), trace(compiled(looked_up(both, more)))
    [added] = diff_traces(*sides).changes
    assert (added.name, added.before, added.after) == ("inductor_config[new]", None, True)
    assert (added.kind, added.origin_before, added.origin_after) == ("added", None, "probe")
    [removed] = diff_traces(*reversed(sides)).changes
    assert (removed.kind, removed.origin_before, removed.origin_after) == ("removed", "probe", None)


def test_of_two_graphs_the_lines_that_differ_are_shown() -> None:
    code = "def forward(self, x):\n    a = relu(x)\n    {}\n    return b"
    before, after = (component("gm", code.format(line)) for line in ("b = sin(a)", "b = cos(a)"))
    [change] = compare(before, after)
    assert (change.before, change.after) == ("b = sin(a)", "b = cos(a)")
    assert change.note == "the graph itself; from line 3 of 4 on"
    assert change.klass == "identity"


def test_where_torch_prints_the_same_the_hashes_are_shown() -> None:
    name = "fx_kwargs[get_decomp_fn]"
    [change] = compare(
        component(name, "<function f at 0x7f01>", "aaa"),
        component(name, "<function f at 0x7f02>", "bbb"),
    )
    assert (change.before, change.after) == ("hash aaa", "hash bbb")
    assert "only the hash differs" in change.note


def test_a_hash_that_differs_counts_not_the_address() -> None:
    name = "fx_kwargs[get_decomp_fn]"
    assert not compare(
        component(name, "<function f at 0x7f01>", "aaa"),
        component(name, "<function f at 0x7f02>", "aaa"),
    )


@pytest.mark.parametrize(
    ("versions", "values", "note"),
    [
        (("2.12.0", "2.13.0"), ("2.12.0", "2.13.0"), "torch's version and sources"),
        (("2.13.0", "2.13.0"), ("hash a", "hash b"), "2.13.0 on both sides, but its sources"),
        (("", "2.13.0"), ("hash a", "hash b"), "torch writes only a hash"),
    ],
)
def test_another_torch_is_named_by_its_version(
    versions: tuple[str, str], values: tuple[str, str], note: str
) -> None:
    sides = (
        trace(
            compiled(
                looked_up(
                    component("torch_version", "�", digest), component("inductor_config[x]", digest)
                )
            ),
            torch=version,
        )
        for digest, version in zip("ab", versions, strict=True)
    )
    first, _ = diff_traces(*sides).changes
    assert (first.name, first.before, first.after) == ("torch_version", *values)
    assert note in first.note


def test_a_part_that_is_not_known_is_of_an_unknown_class() -> None:
    [change] = compare(component("from_the_future", "1"), component("from_the_future", "2"))
    assert change.klass == "unknown"
    assert change.affects_key


def test_what_shapes_no_code_is_surroundings_though_it_moves_the_key() -> None:
    [change] = compare(component("cache_key_tag", ""), component("cache_key_tag", "mine"))
    assert (change.klass, change.affects_key) == ("surroundings", True)


def test_a_secret_is_never_shown() -> None:
    name = "inductor_config[hub_token]"
    [change] = compare(component(name, "hf_" + "a" * 20), component(name, "hf_" + "b" * 20))
    assert change.klass == "secret"
    assert (change.before, change.after) == (REDACTED, REDACTED)


def test_keys_without_components_are_never_called_equal() -> None:
    sides = (trace(compiled(looked_up(cache="aot_autograd", key=key))) for key in ("a1", "a2"))
    [change] = diff_traces(*sides).changes
    assert (change.name, change.before, change.after) == ("key", "a1", "a2")
    assert (change.klass, change.note) == ("unknown", "torch wrote no components")


def test_the_pieces_of_one_compilation_are_matched_by_their_graphs() -> None:
    # A split graph: one compilation of Dynamo's, many lookups of Inductor's.
    def pieces(value: str, *graphs: str) -> Compilation:
        return compiled(
            *(looked_up(component("gm", g), component("inductor_config[o]", value)) for g in graphs)
        )

    found = diff_traces(trace(pieces("1", "x", "y", "z")), trace(pieces("2", "z", "x")))
    assert named(found) == [("torch.fx_graph", "inductor_config[o]", 1, 2)]
    assert found.notes == ("FX graph cache: a graph was looked up in a alone: [0/0] m.py:1 in f",)


def test_a_difference_in_some_compilations_says_in_which() -> None:
    def two(value: str) -> TorchTrace:
        steady = component("inductor_config[o]", "0")
        return trace(
            compiled(looked_up(steady), graph="g"),
            compiled(looked_up(component("inductor_config[o]", value)), id="1/0", graph="h"),
        )

    [change] = diff_traces(two("1"), two("2")).changes
    assert change.note == "in [1/0] m.py:1 in f"


def test_what_a_could_not_store_is_said() -> None:
    unsaved = looked_up(answer="unsaved", key="", reason="what was compiled could not be stored: x")
    miss = looked_up(key="f1")
    found = diff_traces(trace(compiled(miss, unsaved)), trace(compiled(miss)))
    assert found.notes == (
        "FX graph cache: in a what was compiled could not be stored: x: [0/0] m.py:1 in f",
    )


def test_the_same_key_that_missed_over_other_sizes_is_told() -> None:
    same = component("gm", "code")
    reason = "the key is stored, but not for these sizes: L['t0'] <= 9"
    found = diff_traces(
        trace(compiled(looked_up(same))), trace(compiled(looked_up(same, reason=reason)))
    )
    assert found.changes == ()
    assert found.notes == (
        f"FX graph cache: the same key was a miss in both: in b {reason}: [0/0] m.py:1 in f",
    )
