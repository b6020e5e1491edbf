from __future__ import annotations

from typing import Any

import pytest
import torch

from vllmc.core.diagnose.live import watch_recompiles
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.graph.normalize import value_of
from vllmc.core.spec import CompileRange


def assertions(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    return [n for n in graph.nodes if n.target is torch.ops.aten._assert_scalar.default]


def test_the_token_count_is_the_first_thing_the_graph_is_given(trace_toy: Any, ops: Any) -> None:
    captured, _ = trace_toy(lambda e, x, p, r: ops.cut(x * p[..., None])[0, r])
    kinds = {(i.kind, i.name) for i in captured.inputs}
    assert ("size", "input_ids") in kinds
    assert {("activation", n) for n in ("input_ids", "position_ids", "logits_indices")} <= kinds
    weight = next(i for i in captured.inputs if i.name == "embedding.weight")
    assert (weight.dtype, weight.shape, weight.stride) == ("float32", (32, 8), (8, 1))
    assert sorted(captured.roles.values()) == ["rows", "tokens"]


def test_ids_and_positions_share_one_symbol(trace_toy: Any, ops: Any) -> None:
    for kind in ("unbacked", "backed", "backed-size-oblivious"):
        captured, _ = trace_toy(
            lambda e, x, p, r: ops.cut(x + p[..., None])[0], dynamic_shapes=kind
        )
        assert list(captured.roles.values()) == ["tokens"]


def test_the_traced_functions_are_named_by_their_file(trace_toy: Any, ops: Any) -> None:
    captured, _ = trace_toy(lambda e, x, p, r: ops.cut(x)[0])
    names = {name for file, found in captured.functions.items() for name in found}
    assert "ToyEntry.forward" in names
    assert __file__ in captured.functions


def test_assertions_that_hold_for_every_compiled_count_are_dropped(
    trace_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        torch._check(x.shape[1] <= 64)
        torch._check(x.shape[1] * 8 % 4 == 0)
        torch._check(x.shape[1] != 100)
        return ops.cut(x)[0, rows]

    captured, _ = trace_toy(function)
    assert assertions(captured.graph) == []


@pytest.mark.parametrize("kind", ["unbacked", "backed", "backed-size-oblivious"])
@pytest.mark.parametrize(
    "condition",
    [lambda n: n <= 20, lambda n: n >= 2 * 8, lambda n: n != 64],
    ids=["<=", ">=", "!="],
)
def test_an_assertion_that_fails_for_a_compiled_count_is_an_error(
    trace_toy: Any, ops: Any, condition: Any, kind: str
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        torch._check(condition(x.shape[1]))
        return ops.cut(x)[0]

    with pytest.raises(VllmcError) as caught:
        trace_toy(function, dynamic_shapes=kind)
    assert caught.value.code == "range-not-covered"
    assert "tokens" in caught.value.message
    trace_toy(function, dynamic_shapes=kind, ranges=(CompileRange(16, 20),))


def test_an_assertion_that_cannot_be_decided_is_made_on_every_call(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        torch._check((x.shape[1] - 7) * (x.shape[1] - 7) >= 1)
        return ops.cut(x + 1)[0]

    toy = link_toy(function)
    assert assertions(toy.captured.graph)
    toy.check(1, 6, 8)
    args = (torch.zeros(1, 7, dtype=torch.int64),) * 2
    with pytest.raises(VllmcError, match="the model demands") as caught:
        toy.program(*args, torch.tensor([0]))
    assert caught.value.code == "size-mismatch"


@pytest.mark.parametrize("kind", ["backed", "backed-size-oblivious"])
def test_a_branch_on_a_backed_size_must_hold_for_every_compiled_count(
    trace_toy: Any, ops: Any, kind: str
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        if x.shape[1] > 8:
            x = x * 2
        return ops.cut(x)[0]

    with pytest.raises(VllmcError, match="tokens > 8") as caught:
        trace_toy(function, dynamic_shapes=kind)
    assert caught.value.code == "range-not-covered"
    trace_toy(function, dynamic_shapes=kind, ranges=(CompileRange(9, 64),))


@pytest.mark.parametrize("kind", ["backed", "backed-size-oblivious"])
def test_a_branch_on_one_token_is_not_taken_for_granted(
    trace_toy: Any, ops: Any, kind: str
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        if x.shape[1] == 1:
            x = x * 2
        return ops.cut(x)[0]

    with pytest.raises(VllmcError) as caught:
        trace_toy(function, dynamic_shapes=kind)
    assert caught.value.code == "range-not-covered"
    trace_toy(function, dynamic_shapes=kind, ranges=(CompileRange(2, 64),))


def test_a_model_for_one_token_count_only_is_refused(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return ops.cut(x).view(17, 8)

    with pytest.raises(VllmcError, match=r"Eq\(tokens, 17\)") as caught:
        trace_toy(function, dynamic_shapes="backed")
    assert caught.value.code == "range-not-covered"
    trace_toy(function, dynamic_shapes="backed", ranges=(), sizes=(17,))


def test_a_branch_on_the_token_count_cannot_be_captured_unbacked(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        if x.shape[1] > 8:
            x = x * 2
        return ops.cut(x)[0]

    with pytest.raises(VllmcError) as caught:
        trace_toy(function)
    assert caught.value.code == "unsupported-model"


def test_a_tensor_reshaped_in_place_is_refused(trace_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        x = x.clone()
        y = ops.cut(x)
        x.transpose_(0, 1)
        return y[0] + x[:, 0]

    with pytest.raises(VllmcError, match=r"transpose_") as caught:
        trace_toy(function)
    assert caught.value.code == "unsupported-model"


def test_a_method_of_tensors_that_was_replaced_is_refused(
    trace_toy: Any, ops: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return entry.linear(x).relu()[0, rows]

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    trace_toy(function)
    monkeypatch.setattr(torch.Tensor, "relu", double)
    with pytest.raises(VllmcError) as caught:
        trace_toy(function)
    assert caught.value.code == "unsupported-model"
    assert "Tensor.relu was replaced" in caught.value.message


def test_an_op_all_of_whose_overloads_have_names_is_captured(link_toy: Any, ops: Any) -> None:
    library = torch.library.Library("vllmc_capture_test", "FRAGMENT")
    library.define("named.Tensor(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("named.Tensor", torch.clone, "CompositeExplicitAutograd")

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return ops.cut(torch.ops.vllmc_capture_test.named(entry.linear(x)))[0, rows]

    try:
        link_toy(function).check(1, 5)
    finally:
        library._destroy()


def test_a_higher_order_op_is_refused_by_name(trace_toy: Any, ops: Any) -> None:
    from torch._higher_order_ops.out_dtype import out_dtype

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        square = entry.linear.weight.to(torch.int8)
        return ops.cut(x)[0] * out_dtype(torch.ops.aten.mm.default, torch.int32, square, square)[0]

    with pytest.raises(VllmcError, match="higher-order op") as caught:
        trace_toy(function)
    assert caught.value.code == "unsupported-model"


def test_freezing_is_refused(trace_toy: Any, ops: Any) -> None:
    with pytest.raises(UsageError, match="freezing") as caught:
        trace_toy(lambda e, x, p, r: ops.cut(x)[0], inductor=(("freezing", True),))
    assert caught.value.code == "bad-option"


def test_capture_leaves_what_was_compiled_before(trace_toy: Any, ops: Any) -> None:
    compiled = torch.compile(lambda x: x * 2, backend="eager")
    compiled(torch.ones(3))
    trace_toy(lambda e, x, p, r: ops.cut(x)[0])
    with torch.compiler.set_stance("fail_on_recompile"), watch_recompiles() as report:
        compiled(torch.ones(3))
    assert report.recompiles == ()


def test_the_attention_op_may_be_called_with_defaults_and_keywords(
    trace_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        q = x.view(1, -1, 2, 4)
        out = torch.empty_like(q)
        op = torch.ops.vllmc.unified_attention_with_output.str
        op(q, q[:, :, :1], q[:, :, :1], out, "a", 0.5)
        op(q, key=q, value=q, output=out, layer_name="b", scale=0.5, sliding_window=4)
        return out.view(-1, 8)

    captured, _ = trace_toy(function)
    assert [(s.layer, s.kv_heads, s.key_size, s.window) for s in captured.attention] == [
        ("a", 1, 4, None),
        ("b", 2, 4, 4),
    ]


def test_sizes_of_a_graph_are_symbols_of_its_inputs(trace_toy: Any, ops: Any) -> None:
    captured, _ = trace_toy(lambda e, x, p, r: ops.cut(x)[0, r])
    free = {
        symbol
        for node in captured.graph.nodes
        if isinstance(value := value_of(node), torch.Tensor)
        for size in value.shape
        if isinstance(size, torch.SymInt)
        for symbol in size.node.expr.free_symbols
    }
    assert free == set(captured.roles)
