from __future__ import annotations

import pytest

from vllmc.core.diagnose.foreign_files import Unreadable
from vllmc.core.diagnose.vllm_index import artifact_place, read_index


@pytest.mark.parametrize(
    ("text", "range_", "piece"),
    [
        # vLLM 0.11
        ("{(None, 3, 'inductor'): ('hash', '/c/inductor_cache/x.py')}", "any", 3),
        ("{(8, 0, 'inductor_standalone'): ('artifact_shape_8_subgraph_0', '/c/a')}", "8", 0),
        # vLLM 0.15
        ("{((1, 8192), 2, 'inductor_standalone'): ('a', '/c/a')}", "1:8192", 2),
        # vLLM 0.20 and later
        (
            "{((1, 8192), 2, 'inductor_standalone'): "
            "{'graph_handle': ('a', '/c/a'), 'cache_key': 'abc'}}",
            "1:8192",
            2,
        ),
    ],
)
def test_the_index_of_each_release_is_understood(text: str, range_: str, piece: int) -> None:
    index = read_index(text)
    [entry] = index.entries
    assert (entry.range, entry.piece, index.unknown) == (range_, piece, 0)
    assert entry.path.startswith("/c/")


@pytest.mark.parametrize(
    "entry",
    [
        "1: 2",
        "(1, 2): ('a', 'b')",
        "((1, 2), 'x', 'c'): ('a', 'b')",
        "((1, 2), 1, 'c'): {'handle': 3}",
        "((1, 2), 1, 'c'): ('a',)",
        "((1, 2), 1, 'c'): None",
    ],
)
def test_entries_of_other_shapes_are_counted(entry: str) -> None:
    index = read_index(f"{{{entry}, ((1, 2), 0, 'c'): ('a', '/b')}}")
    assert (len(index.entries), index.unknown) == (1, 1)


@pytest.mark.parametrize("text", ["[]", "{((1, 2", "open('x')", ""])
def test_what_is_no_dictionary_is_unreadable(text: str) -> None:
    with pytest.raises(Unreadable):
        read_index(text)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("artifact_compile_range_1_8192_subgraph_12", ("1:8192", 12)),
        ("artifact_shape_None_subgraph_0", ("any", 0)),
        ("artifact_shape_16_subgraph_4", ("16", 4)),
        ("artifact_compile_range_1_8192_subgraph_12.tmp", None),
        ("computation_graph.py", None),
    ],
)
def test_an_artifact_s_name_tells_its_range_and_piece(name: str, place: object) -> None:
    assert artifact_place(name) == place
