from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.explain import (
    by_distance,
    diff,
    diff_guarded,
    diff_sources,
    differing,
)
from vllmc.core.cache.key import REDACTED, Factor, key_of
from vllmc.core.cache.record import SourceFile, encode, outline


def factor(name, value, group="inductor", **fields):
    return Factor(group=group, name=name, value=value, **fields)


def source(path="models/llama/modeling_llama.py", digest="a" * 32, functions=("f",)):
    return SourceFile(package="transformers", path=path, digest=digest, functions=functions)


def nearest(wanted, records, model):
    # Equal keys are told apart by what stands for the name of the record's file.
    by_id = {f"{index:064x}": record for index, record in enumerate(records)}
    ranked = by_distance(wanted, [outline(encode(r), id) for id, r in by_id.items()], model)
    return next((by_id[id] for _, id in ranked), None)


values = st.sampled_from([None, True, False, 0, 1, 1.0, "1", [1], {"a": 1}, REDACTED])
factor_sets = st.lists(
    st.builds(
        Factor,
        group=st.sampled_from(["spec", "inductor", "model", "novel"]),
        name=st.sampled_from("abc"),
        value=values,
        origin=st.sampled_from(["default", "flag", "env:X"]),
        affects_key=st.booleans(),
    ),
    max_size=6,
    unique_by=lambda f: f.identity,
)


@given(factor_sets, factor_sets)
def test_a_difference_that_affects_the_key_is_found_exactly_when_the_keys_differ(before, after):
    assert bool(diff(before, after)) == (key_of(before) != key_of(after))


@given(factor_sets, factor_sets, st.randoms())
def test_the_order_of_the_factors_changes_nothing(before, after, random):
    shuffled = random.sample(before, len(before)), random.sample(after, len(after))
    everything = diff(before, after, include_provenance=True)
    assert diff(*shuffled, include_provenance=True) == everything
    assert [c for c in everything if c.affects_key] == list(diff(before, after))


def test_a_changed_option_is_a_change_row():
    before = [factor("max_autotune", False)]
    after = [factor("max_autotune", True, origin="env:TORCHINDUCTOR_MAX_AUTOTUNE")]
    [change] = diff(before, after)
    assert change.to_json() == {
        "group": "inductor",
        "name": "max_autotune",
        "before": False,
        "after": True,
        "kind": "changed",
        "class": "codegen",
        "affects_key": True,
        "origin_before": "default",
        "origin_after": "env:TORCHINDUCTOR_MAX_AUTOTUNE",
        "note": "set by the environment variable TORCHINDUCTOR_MAX_AUTOTUNE; it was the default",
        "restore": "unset TORCHINDUCTOR_MAX_AUTOTUNE",
    }


def test_a_factor_on_one_side_only_says_where_it_is_absent():
    row = factor("new_option", 3)
    [added], [removed] = diff([], [row]), diff([row], [])
    assert (added.kind, added.before, added.origin_before) == ("added", None, None)
    assert (removed.kind, removed.after, removed.origin_after) == ("removed", None, None)
    assert added.note == "absent before"
    assert removed.note == "absent after"


def test_an_option_that_is_null_is_not_an_absent_one():
    [change] = diff([], [factor("limit", None)])
    assert change.kind == "added"


@pytest.mark.parametrize("values", [*itertools.permutations([True, 1, 1.0, "1"], 2)])
def test_values_that_python_takes_for_equal_and_the_key_does_not_differ(values):
    assert len(diff([factor("x", values[0])], [factor("x", values[1])])) == 1


def test_where_a_value_came_from_is_no_difference():
    assert diff([factor("x", 1)], [factor("x", 1, origin="flag", is_default=False)]) == ()


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        *((name, "codegen") for name in ("inductor", "functorch", "dynamo", "code", "kernels")),
        *((name, "codegen") for name in ("spec", "system", "versions", "environment")),
        *((name, "identity") for name in ("model", "sources", "graph")),
        ("novel", "unknown"),
    ],
)
def test_the_class_of_a_change_follows_its_group(group, expected):
    [change] = diff([factor("x", 1, group)], [factor("x", 2, group)])
    assert change.klass == expected


def test_a_redacted_value_makes_a_change_secret():
    [change] = diff([], [factor("HF_TOKEN", REDACTED, "environment")])
    assert change.klass == "secret"


def test_provenance_is_listed_on_demand_and_last():
    before = [factor("cxx", "g++ 13", "system", affects_key=False), factor("zzz", 1)]
    after = [factor("cxx", "clang 19", "system", affects_key=False), factor("zzz", 2)]
    assert [c.name for c in diff(before, after)] == ["zzz"]
    everything = diff(before, after, include_provenance=True)
    assert [(c.name, c.klass) for c in everything] == [("zzz", "codegen"), ("cxx", "surroundings")]


def test_a_factor_that_leaves_the_key_is_a_difference_though_its_value_stays():
    [change] = diff([factor("cxx", "g++")], [factor("cxx", "g++", affects_key=False)])
    assert change.affects_key
    assert change.note == "no longer part of the key"


def test_causes_come_before_what_follows_from_them_and_deliberate_settings_before_defaults():
    before = [
        factor("a_default", 1),
        factor("z_flag", 1),
        factor("torch", "2.12", "versions", origin="probe"),
        factor("config", "x", "model"),
        factor("digest", "x", "graph"),
        factor("x", 1, "novel"),
    ]
    after = [dataclasses.replace(f, value="other") for f in before]
    after[1] = dataclasses.replace(after[1], origin="flag")
    names = [change.name for change in diff(before, after)]
    assert names == ["config", "torch", "z_flag", "a_default", "digest", "x"]


def test_nested_values_differ_leaf_by_leaf_where_the_factor_stands():
    before = [
        factor("layers", 2, "model"),
        factor("rope", {"type": "yarn", "factor": 4.0, "base": 1}, "model"),
        factor("sizes", [*range(12)]),
        factor("token", {"name": "a", "value": REDACTED}),
    ]
    after = [
        factor("layers", 3, "model"),
        factor("rope", {"type": "yarn", "factor": 8.0, "beta": 2}, "model", origin="flag"),
        factor("sizes", [*range(10), 0, 11], origin="flag"),
        factor("token", {"name": "b", "value": "x"}),
    ]
    rows = [(c.name, c.before, c.after, c.kind, c.klass) for c in diff(before, after)]
    assert rows == [
        ("rope.base", 1, None, "removed", "identity"),
        ("rope.beta", None, 2, "added", "identity"),
        ("rope.factor", 4.0, 8.0, "changed", "identity"),
        ("layers", 2, 3, "changed", "identity"),
        ("sizes[10]", 10, 0, "changed", "codegen"),
        ("token.name", "a", "b", "changed", "codegen"),
        ("token.value", REDACTED, "x", "changed", "secret"),
    ]
    [base, *_] = diff(before, after)
    assert (base.origin_before, base.origin_after) == ("default", "flag")
    assert base.note == "set on the command line; it was the default"


@pytest.mark.parametrize(
    ("group", "name"),
    [("system", "cpu_features"), ("spec", "ranges"), ("spec", "sizes"), ("spec", "splitting_ops")],
)
def test_a_list_that_is_a_set_says_what_was_removed_and_added(group, name):
    before = [factor(name, ["amx_bf16", "avx2", "avx512_f"], group)]
    after = [factor(name, ["avx2", "avx512_f", "avx512_vl"], group)]
    rows = [(c.name, c.before, c.after, c.kind, c.note) for c in diff(before, after)]
    assert rows == [
        (name, ["amx_bf16"], None, "removed", "2 in common"),
        (name, None, ["avx512_vl"], "added", "2 in common"),
    ]


@given(factor_sets, factor_sets)
def test_factors_that_differ_are_told_whole_and_in_the_order_of_their_changes(before, after):
    pairs = differing(before, after, include_provenance=True)
    left, right = ({f.identity: f for f in side} for side in (before, after))
    identities = [(a or b).identity for a, b in pairs]
    assert pairs == tuple((left.get(i), right.get(i)) for i in identities)
    changes = diff(before, after, include_provenance=True)
    assert list(dict.fromkeys((c.group, c.name[0]) for c in changes)) == identities


@pytest.mark.parametrize(
    ("origin", "words"),
    [
        ("env:NAME", "set by the environment variable NAME"),
        ("file:vllmc.toml:3", "set in vllmc.toml:3"),
        ("flag", "set on the command line"),
        ("vllmc", "set by vllmc"),
        ("probe", "read from the system"),
    ],
)
def test_a_note_says_where_values_came_from(origin, words):
    default, other = factor("x", 1), factor("x", 2, origin=origin)
    assert diff([default], [other])[0].note == f"{words}; it was the default"
    assert diff([other], [default])[0].note == f"back at its default; it was {words}"
    assert diff([], [other])[0].note == f"absent before; {words}"


def test_a_changed_source_names_its_path_and_the_functions_traced_in_it():
    functions = ("A.forward", "B.forward", "c", "d", "e")
    [change] = diff_sources([source()], [source(digest="b" * 32, functions=functions)])
    assert (change.group, change.klass, change.kind) == ("sources", "identity", "changed")
    assert change.name == "transformers/models/llama/modeling_llama.py"
    assert (change.before, change.after) == ("a" * 32, "b" * 32)
    assert change.note == (
        "transformers/models/llama/modeling_llama.py; traced in it: A.forward, B.forward, c "
        "and 2 more"
    )


def test_sources_that_came_or_went_are_named_and_equal_ones_are_not():
    before = [source("gone.py"), source("same.py")]
    after = [source("came.py", functions=()), source("same.py", functions=("other",))]
    changes = diff_sources(before, after)
    assert [(c.name, c.kind) for c in changes] == [
        ("transformers/came.py", "added"),
        ("transformers/gone.py", "removed"),
    ]
    assert changes[0].note == "transformers/came.py was not traced before"
    assert changes[1].note == "transformers/gone.py is no longer there; traced in it: f"


def test_the_nearest_record_has_the_fewest_differences(make_program):
    def record(count, **fields):
        rows = [factor(str(i), "other" if i < count else 0) for i in range(6)]
        return make_program(factors=tuple(rows), **fields)

    wanted = [factor(str(i), 0) for i in range(6)]
    near, far = record(1, created=1.0), record(3, created=9.0)
    assert nearest(wanted, [far, near], "tiny-llama") == near
    assert nearest(wanted, [near, far], "tiny-llama") == near
    newer = record(1, created=2.0)
    assert nearest(wanted, [near, newer, far], "tiny-llama") == newer
    other_model = record(0, model="gpt2", created=99.0)
    assert nearest(wanted, [far, other_model], "tiny-llama") == far
    assert nearest(wanted, [far, other_model], "opt") == other_model
    assert nearest(wanted, [], "tiny-llama") is None


def test_another_identity_is_farther_than_a_few_other_options(make_program):
    wanted = [factor("layers", 2, "model"), *(factor(str(i), 0) for i in range(5))]
    deeper = make_program(factors=(factor("layers", 3, "model"), *wanted[1:]), created=9.0)
    options = make_program(factors=(wanted[0], *(factor(str(i), i > 1) for i in range(5))))
    assert nearest(wanted, [deeper, options], "tiny-llama") == deeper
    few = make_program(factors=(*wanted[:3], *(factor(str(i), 1) for i in range(2, 5))))
    assert nearest(wanted, [deeper, few], "tiny-llama") == few


def test_numbers_that_python_takes_for_equal_are_differences(make_program):
    near = make_program(factors=(factor("a", 1), factor("b", "x")))
    far = make_program(factors=(factor("a", True), factor("b", "x")))
    assert nearest([factor("a", 1), factor("b", "x")], [far, near], "tiny-llama") == near


def test_code_that_differs_with_its_file_is_not_told_twice():
    before = {"M['m'].f": "<function m.f#0123456789abcdef>", "M['m'].N": 1}
    after = {"M['m'].f": "<function m.f#fedcba9876543210>", "M['m'].N": 2}
    assert [c.name for c in diff_guarded(before, after)] == ["m.N", "m.f"]
    assert [c.name for c in diff_guarded(before, after, files_changed=True)] == ["m.N"]


def test_guarded_values_that_differ_are_named_by_their_expressions():
    before = {"M['m'].SCALE": 2.0, "M['m'].FLAG": True, "M['m'].SAME": 1}
    after = {"M['m'].SCALE": 3.0, "M['m'].FLAG": 1, "M['m'].SAME": 1}
    changes = diff_guarded(before, after)
    assert [(c.name, c.before, c.after) for c in changes] == [
        ("m.FLAG", True, 1),
        ("m.SCALE", 2.0, 3.0),
    ]
    assert all((c.group, c.klass, c.affects_key) == ("guarded", "identity", True) for c in changes)


@pytest.mark.parametrize(
    ("before", "after", "group", "expected"),
    [
        ((False, "default"), (True, "env:TORCHINDUCTOR_MAX_AUTOTUNE"), "inductor",
         "unset TORCHINDUCTOR_MAX_AUTOTUNE"),
        ((False, "default"), (True, "flag"), "inductor", "leave out -O a"),
        ((8, "flag"), (4, "default"), "functorch", "-O functorch.a=8"),
        ((8, "flag"), (4, "file:vllmc.toml:3"), "inductor", "-O a=8"),
        ((4, "default"), (8, "file:vllmc.toml:3"), "inductor", "remove it from vllmc.toml:3"),
        (("path:123", "env:X"), ("x", "default"), "inductor", ""),
        (("2.13.0", "probe"), ("2.14.0", "probe"), "system", ""),
    ],
)  # fmt: skip
def test_a_change_says_what_would_undo_it(before, after, group, expected):
    (change,) = diff(
        [factor("a", before[0], group, origin=before[1])],
        [factor("a", after[0], group, origin=after[1])],
    )
    assert change.restore == expected


@pytest.mark.parametrize(
    ("name", "before", "after", "group", "expected"),
    [
        ("dtype", ("bfloat16", "flag"), ("float32", "default"), "spec", "--dtype bfloat16"),
        ("dtype", ("float32", "default"), ("float16", "flag"), "spec", "leave out --dtype"),
        ("ranges", (["1:8", "9:16"], "flag"), (["1:8192"], "default"), "spec",
         "--compile-range 1:8 --compile-range 9:16"),
        ("torch", ("2.13.0", "probe"), ("2.14.0", "probe"), "versions",
         "pip install torch==2.13.0"),
        ("torch_key", ("ab", "probe"), ("cd", "probe"), "versions", ""),
        ("num_hidden_layers", (4, "flag"), (2, "vllmc"), "model", "--layers 4"),
        ("text.num_hidden_layers", (4, "vllmc"), (2, "flag"), "model", "leave out --layers"),
        ("PTXAS_OPTIONS", ("-O1 -v", "env:PTXAS_OPTIONS"), (None, "default"), "environment",
         "export PTXAS_OPTIONS='-O1 -v'"),
        ("TRITON_PTXAS_PATH", ("file:12", "env:TRITON_PTXAS_PATH"), (None, "default"),
         "environment", "set TRITON_PTXAS_PATH to the same file"),
    ],
)  # fmt: skip
def test_what_would_undo_a_change_can_be_typed(name, before, after, group, expected):
    (change,) = diff(
        [factor(name, before[0], group, origin=before[1])],
        [factor(name, after[0], group, origin=after[1])],
    )
    assert change.restore == expected


def test_a_changed_factor_is_one_difference_as_an_absent_one_is(make_program):
    wanted = [factor("a", 0), factor("b", 0), factor("c", 0)]
    changed = make_program(factors=(factor("a", 1), *wanted[1:]), created=2.0)
    lacking = make_program(factors=tuple(wanted[1:]), created=1.0)
    assert nearest(wanted, [changed, lacking], "tiny-llama") == changed


def test_provenance_does_not_make_a_record_more_distant(make_program):
    cxx = factor("cxx", "g++", "system", affects_key=False)
    with_provenance = make_program(factors=(factor("a", 0), cxx), created=2.0)
    without = make_program(factors=(factor("a", 0),), created=1.0)
    assert nearest([factor("a", 0)], [with_provenance, without], "tiny-llama") == with_provenance
