from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.diagnose.vllm_graph import (
    compare_graphs,
    moved_quotes,
    package_roots,
    read_graph,
    source_roots,
)


def test_a_graph_has_its_pieces_and_the_sources_it_quotes(vllm_start: Any) -> None:
    graph = read_graph(vllm_start.graph)
    assert graph.pieces == tuple(f"submod_{i}" for i in range(7))
    [source] = graph.sources
    assert source.endswith("site-packages/vllm/model_executor/models/llama.py")
    assert package_roots(graph.sources) == ("/opt/venv/lib/python3.12/site-packages",)
    assert graph.quotes[0].line == 118
    assert graph.quotes[0].text == "forward, code: x = self.down_proj(x)"


def test_comments_are_no_difference(vllm_start: Any) -> None:
    other = vllm_start.graph.replace("/opt/venv", "/home/u/v").replace(".py:118", ".py:120")
    before, after = read_graph(vllm_start.graph), read_graph(other)
    assert compare_graphs(before, after).sameness == "identical"
    assert moved_quotes(before, after) == ("vllm/model_executor/models/llama.py",)


def test_names_of_layers_are_a_difference_of_their_own(vllm_start: Any) -> None:
    other = vllm_start.graph.replace("'model.layers.", "'language_model.model.layers.")
    assert compare_graphs(read_graph(vllm_start.graph), read_graph(other)).sameness == "names"


def test_the_first_line_that_differs_is_shown_with_its_piece(vllm_start: Any) -> None:
    ops = ("attention(x, 'model.layers.1", "mla(x, 'model.layers.1")
    other = vllm_start.graph.replace(*ops)
    found = compare_graphs(read_graph(vllm_start.graph), read_graph(other))
    assert (found.sameness, found.piece) == ("different", "submod_3")
    assert "unified_attention" in found.before
    assert "unified_mla" in found.after


def test_a_long_line_is_shown_around_the_difference() -> None:
    start = "def forward(self, " + "weight, " * 5000
    found = compare_graphs(read_graph(f"{start}a, x)"), read_graph(f"{start}b, x)"))
    assert found.before.startswith("... ")
    assert found.before.endswith("a, x)")
    assert found.after.endswith("b, x)")
    assert len(found.before) < 200


def test_a_graph_that_goes_on_is_different_at_the_end() -> None:
    found = compare_graphs(read_graph("a\nb"), read_graph("a\nb\nc"))
    assert (found.sameness, found.before, found.after) == ("different", "", "c")


def test_a_secret_in_a_line_is_not_shown() -> None:
    before, after = read_graph("x = 1"), read_graph("x = 'hf_abcdefghijklmnopqrstuv'")
    assert compare_graphs(before, after).after == "<redacted>"


def test_sources_that_are_not_installed_have_the_directory_they_share() -> None:
    paths = ["/src/vllm/a/x.py", "/src/vllm/b/y.py", "/v/site-packages/torch/nn.py", "<string>"]
    assert source_roots(paths) == ("/v/site-packages", "/src/vllm")
    assert source_roots(["<string>", "x.py"]) == ()


@given(st.text())
def test_any_text_is_some_graph(text: str) -> None:
    graph = read_graph(text)
    assert compare_graphs(graph, graph).sameness == "identical"
    compare_graphs(graph, read_graph(text[1:]))
