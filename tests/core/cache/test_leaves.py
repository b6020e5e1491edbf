from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.key import canonical_json
from vllmc.core.cache.leaves import Leaf, leaves

scalars = st.sampled_from([None, True, 0, 1, 1.0, "1", "a"])
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=12,
)


def rows(before, after, **how):
    return [(leaf.path, leaf.before, leaf.after) for leaf in leaves(before, after, **how)]


@given(values, values)
def test_there_is_a_leaf_exactly_where_the_texts_differ_and_each_leaf_differs(before, after):
    found = leaves(before, after)
    assert bool(found) == (canonical_json(before) != canonical_json(after))
    assert len({leaf.path for leaf in found}) == len(found)
    for leaf in found:
        assert leaf.kind != "changed" or canonical_json(leaf.before) != canonical_json(leaf.after)


@given(st.lists(scalars, max_size=5), st.lists(scalars, max_size=5))
def test_sets_with_something_in_common_differ_in_what_was_removed_and_added(before, after):
    found = leaves(before, after, unordered=True)
    old, new = ({canonical_json(entry) for entry in side} for side in (before, after))
    if canonical_json(before) == canonical_json(after):
        assert found == ()
    elif not old & new or old == new:
        assert found == (Leaf(path="", before=before, after=after),)
    else:
        told = {
            leaf.kind: {canonical_json(e) for e in (leaf.before or leaf.after)} for leaf in found
        }
        expected = {"removed": old - new, "added": new - old}
        assert told == {kind: entries for kind, entries in expected.items() if entries}


def test_dictionaries_are_compared_key_by_key_at_any_depth():
    before = {"type": "yarn", "scale": {"low": 1, "high": 4}, "gone": None, "same": [1]}
    after = {"type": "llama3", "scale": {"low": 1, "high": 8}, "came": 0, "same": [1]}
    assert leaves(before, after) == (
        Leaf(path=".came", before=None, after=0, kind="added"),
        Leaf(path=".gone", before=None, after=None, kind="removed"),
        Leaf(path=".scale.high", before=4, after=8),
        Leaf(path=".type", before="yarn", after="llama3"),
    )


def test_lists_of_one_length_are_compared_entry_by_entry():
    assert rows([1, 2, 3], [1, 5, 3]) == [("[1]", 2, 5)]
    assert rows([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 3}]) == [("[1].a", 2, 3)]


@pytest.mark.parametrize(
    ("before", "after"),
    [([1, 2], [3, 4]), ({"a": 1}, {"b": 1}), ({}, {"a": 1}), ([], {}), ([1], 1), ([1, 2], [3])],
)
def test_values_with_nothing_in_common_are_one_difference(before, after):
    assert rows(before, after) == [("", before, after)]


def test_of_a_list_with_many_differences_the_number_is_told():
    before = [*range(20)]
    few = [*range(100, 108), *range(8, 20)]
    assert [leaf.path for leaf in leaves(before, few)] == [f"[{i}]" for i in range(8)]
    many = [*range(100, 109), *range(9, 20)]
    assert leaves(before, many) == (
        Leaf(path="", before=before, after=many, note="9 of 20 entries differ"),
    )


def test_of_lists_of_two_lengths_the_common_beginning_is_left_out():
    [leaf] = leaves(["full"] * 2, ["full"] * 4)
    assert (leaf.path, leaf.before, leaf.after) == ("[2:]", None, ["full", "full"])
    assert (leaf.kind, leaf.note) == ("added", "2 entries before, 4 after")
    [leaf] = leaves(["full"] * 4, ["full"] * 2)
    assert (leaf.path, leaf.before, leaf.after, leaf.kind) == (
        "[2:]",
        ["full", "full"],
        None,
        "removed",
    )
    assert rows(["a", "b", "c"], ["a", "x"]) == [("[1:]", ["b", "c"], ["x"])]


def test_a_set_says_what_stays():
    [removed, added] = leaves(["a", "b", "c"], ["c", "d"], unordered=True)
    assert (removed.before, removed.note) == (["a", "b"], "1 in common")
    assert (added.after, added.kind) == (["d"], "added")
