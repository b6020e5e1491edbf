from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.errors import VllmcError
from vllmc.core.graph.normalize import value_of
from vllmc.core.graph.split import Cut, split, splits_at


@pytest.fixture
def cuts_of(trace_toy: Callable[..., Any]) -> Callable[..., tuple[Cut, ...]]:
    def make(function: Any, **changes: Any) -> tuple[Cut, ...]:
        captured, spec = trace_toy(function, **changes)
        return split(captured.graph, splits_at(spec.splitting_ops))

    return make


def shape_of(cuts: tuple[Cut, ...]) -> str:
    """`s` for each splitting piece and `c` for each compiled one."""
    return "".join("s" if cut.splitting else "c" for cut in cuts)


def targets(cut: Cut) -> list[str]:
    return [str(getattr(n.target, "__name__", n.target)) for n in cut.nodes]


def test_a_graph_is_cut_before_and_after_each_splitting_op(cuts_of: Any, ops: Any) -> None:
    cuts = cuts_of(lambda e, x, p, r: (ops.cut(ops.cut(x + 1) * 2) - 1)[0])
    assert shape_of(cuts) == "cscsc"
    assert [cut.name for cut in cuts] == [f"piece_{i}" for i in range(5)]


def test_consecutive_splitting_ops_share_a_piece(cuts_of: Any, ops: Any) -> None:
    cuts = cuts_of(lambda e, x, p, r: ops.cut(ops.cut(ops.cut(x)))[0])
    assert shape_of(cuts) == "csc"
    assert len(cuts[1].nodes) == 3


def test_sizes_between_splitting_ops_do_not_part_them(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        y = ops.cut(x)
        size = y.shape[1] * 2 + 1
        return (ops.cut(y) * size)[0]

    assert shape_of(cuts_of(function)) == "csc"


@pytest.mark.parametrize(
    ("allocate", "name"),
    [
        (torch.empty_like, "empty_like"),
        (lambda y: torch.empty(y.shape), "empty"),
        (lambda y: torch.empty_strided(y.shape, (8 * y.shape[1], 8, 1)), "empty_strided"),
        (lambda y: torch.empty_permuted(y.shape, (0, 2, 1)), "empty_permuted"),
        (lambda y: y.new_empty(y.shape), "new_empty"),
        (lambda y: y.new_empty_strided(y.shape, (8 * y.shape[1], 8, 1)), "new_empty_strided"),
        (lambda y: torch.ops.aten.empty_like(y), "empty_like"),
        (lambda y: torch.ops.aten.new_empty.default(y, y.shape), "new_empty.default"),
    ],
)
def test_an_allocation_between_splitting_ops_joins_the_piece_before(
    cuts_of: Any, ops: Any, allocate: Any, name: str
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        y = ops.cut(x)
        room = allocate(y)
        ops.fill(room)
        return ops.cut(y)[0]

    cuts = cuts_of(function)
    assert shape_of(cuts) == "csc"
    assert name in targets(cuts[1])


def test_an_allocation_beside_other_work_stays_with_it(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        y = ops.cut(x)
        room = torch.empty_like(y)
        room.copy_(y + 1)
        ops.fill(room)
        return (room + 1)[0]

    cuts = cuts_of(function)
    assert shape_of(cuts) == "cscsc"
    assert "empty_like" in targets(cuts[2])


def test_the_items_of_a_splitting_op_stay_with_it(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        left, right = ops.pair(x)
        return (left + right)[0]

    cuts = cuts_of(function)
    assert shape_of(cuts) == "csc"
    assert targets(cuts[1]).count("getitem") == 2
    assert len(cuts[1].outputs) == 2


def test_a_tuple_made_before_a_cut_does_not_cross_it(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        best = torch.topk(x, 2)
        y = ops.cut(x)
        return (y[:, :, :2] + best.values * best.indices)[0]

    cuts = cuts_of(function)
    assert all(isinstance(value_of(n), torch.Tensor) for cut in cuts for n in cut.outputs)
    assert targets(cuts[0]).count("getitem") == 2


def test_no_size_crosses_a_cut(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        shape = x.shape
        count = x.numel()
        y = ops.cut(x)
        return (y.view(shape[0] * shape[1], -1).reshape(shape) + x.new_zeros(shape) + count)[0]

    for cut in cuts_of(function):
        assert all(isinstance(value_of(node), torch.Tensor) for node in cut.outputs)


def test_a_size_of_a_tensor_that_no_one_else_needs_brings_the_tensor_along(
    link_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        # The size of a selection by value is known to the tensor alone.
        chosen = torch.cat([rows, rows])
        y = ops.cut(x)
        return (y * chosen.shape[0])[0]

    link_toy(function).check(1, 2, 17)


def test_nodes_without_users_are_kept(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        x = x.clone()
        y = ops.cut(x)
        x.zero_()
        x[:, :, 0] = 1
        return ops.cut(y)[0] + x[0]

    names = [name for cut in cuts_of(function) for name in targets(cut)]
    assert "zero_" in names
    assert "setitem" in names


def test_a_piece_without_outputs_is_still_run(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        x = x.clone()
        y = ops.cut(x)
        x.mul_(2)
        return (ops.cut(y) + ops.cut(x))[0]

    toy = link_toy(function)
    assert any(not unique.piece.outputs for unique in toy.plan.unique)
    toy.check(1, 5)


def test_what_is_neither_tensor_nor_number_may_not_cross_a_cut(cuts_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return entry.linear(ops.cut(entry.linear(x)))[0]

    with pytest.raises(VllmcError, match="both sides of a splitting op") as caught:
        cuts_of(function)
    assert caught.value.code == "unsupported-model"
    assert "autocast" in caught.value.message


def test_autocast_between_two_cuts_is_fine(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = entry.linear(x)
        return ops.cut(y.float())[0]

    link_toy(function).check(1, 5)


def test_gradients_switched_on_for_a_part_of_the_forward_do_not_matter(
    link_toy: Any, ops: Any
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        with torch.enable_grad():
            y = ops.cut(x * 2)
        return (y + 1)[0]

    link_toy(function).check(1, 5)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("torch.nn.functional.silu", lambda e, x, p, r: torch.nn.functional.silu(x + 1)[0] * 2),
        ("torch.nn.functional.linear", lambda e, x, p, r: e.linear(x + 1)[0] * 2),
        ("torch._C._nn.linear", lambda e, x, p, r: e.linear(x + 1)[0] * 2),
        ("torch.matmul", lambda e, x, p, r: torch.matmul(x + 1, e.linear.weight)[0] * 2),
        ("torch.Tensor.softmax", lambda e, x, p, r: (x + 1).softmax(-1)[0] * 2),
        ("operator.sub", lambda e, x, p, r: ((x + 1) - x)[0] * 2),
    ],
)
def test_any_function_splits_by_the_name_that_python_finds_it_by(
    link_toy: Any, name: str, function: Any
) -> None:
    toy = link_toy(function, splitting_ops=(name,))
    assert toy.plan.splitting == 1
    assert toy.plan.pieces == 3
    toy.check(1, 5)


@pytest.mark.parametrize("name", ["vllmc_test::pair", "vllmc_test::pair.default"])
def test_an_op_splits_with_and_without_its_overload(link_toy: Any, ops: Any, name: str) -> None:
    toy = link_toy(lambda e, x, p, r: ops.pair.default(x)[1][0], splitting_ops=(name,))
    assert toy.plan.splitting == 1


def test_a_splitting_op_may_take_lists_and_slices(link_toy: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        left, _ = ops.pair(x, [1.5, -2.0])
        return torch.cat([left, left[..., 1:3]], -1)[0]

    toy = link_toy(function, splitting_ops=("vllmc_test::pair", "torch.cat", "operator.getitem"))
    toy.check(1, 5)


# In-place operations and views around cuts. `isolated` runs the pieces on copies, as compiled code
# that knows nothing of what else shares their memory.


def _add_before_and_after(ops: Any, entry: Any, x: Any) -> Any:
    x = x + 0
    x.add_(1)
    y = ops.cut(x)
    x.add_(1)
    return x + ops.cut(y)


def _setitem_after(ops: Any, entry: Any, x: Any) -> Any:
    x = x.clone()
    y = ops.cut(x)
    x[:, :, 0] = 5.0
    return ops.cut(x) + y


def _view_before_write(ops: Any, entry: Any, x: Any) -> Any:
    half = x[:, :, :4]
    y = ops.cut(x)
    x.add_(1)
    return half * 2 + y[:, :, :4]


def _view_beside_write(ops: Any, entry: Any, x: Any) -> Any:
    y = ops.cut(x + 1)
    y.mul_(2)
    half = y[:, :, :4]
    ops.fill(y)
    return half + y[:, :, 4:]


def _view_written_by_the_op(ops: Any, entry: Any, x: Any) -> Any:
    out = torch.empty_like(x)
    out.copy_(x)
    ops.fill(out.view(1, -1, 2, 4))
    return out + 1


def _items_of_a_written_tensor(ops: Any, entry: Any, x: Any) -> Any:
    y = ops.cut(x + 1)
    left, right = y.chunk(2, -1)
    ops.fill(y)
    left.add_(1)
    z = ops.cut(x)
    return left + right + y[:, :, :4] + z[:, :, :4]


def _write_through_what_a_write_returned(ops: Any, entry: Any, x: Any) -> Any:
    x = x + 0
    y = x.add_(1)
    z = ops.cut(x)
    y.mul_(2)
    return x + y + ops.cut(z)


def _write_through_data_and_out(ops: Any, entry: Any, x: Any) -> Any:
    y = ops.cut(x + 1)
    half = y[:, :, :4]
    y.data.mul_(2)
    z = ops.cut(x)
    torch.add(y, 1, out=y)
    return half + z[:, :, :4]


def _result_is_a_view_written_later(ops: Any, entry: Any, x: Any) -> Any:
    y = ops.cut(x + 1)
    result = y[:, :, 2:]
    ops.fill(y)
    y.add_(1)
    return result


def _result_is_a_view_and_the_last_piece_splits(ops: Any, entry: Any, x: Any) -> Any:
    y = x + 1
    result = y[:, :, 2:]
    ops.fill(y)
    return result


def _write_to_a_parameter(ops: Any, entry: Any, x: Any) -> Any:
    row = entry.linear.bias[:8]
    y = ops.cut(x)
    entry.linear.bias.mul_(1.0)
    return y + row


_MUTATIONS = (
    _add_before_and_after,
    _setitem_after,
    _view_before_write,
    _view_beside_write,
    _view_written_by_the_op,
    _items_of_a_written_tensor,
    _write_through_what_a_write_returned,
    _write_through_data_and_out,
    _result_is_a_view_written_later,
    _result_is_a_view_and_the_last_piece_splits,
    _write_to_a_parameter,
)


@pytest.mark.parametrize("mutation", _MUTATIONS, ids=lambda m: m.__name__.strip("_"))
def test_what_is_written_in_place_is_seen_on_the_other_side_of_a_cut(
    link_toy: Any, ops: Any, mutation: Any
) -> None:
    toy = link_toy(lambda e, x, p, r: mutation(ops, e, x)[0], isolated=True)
    toy.check(1, 2, 17)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", _MUTATIONS, ids=lambda m: m.__name__.strip("_"))
def test_so_it_is_by_pieces_that_inductor_compiled(link_toy: Any, ops: Any, mutation: Any) -> None:
    toy = link_toy(lambda e, x, p, r: mutation(ops, e, x)[0], backend="inductor")
    toy.check(1, 2, 17)


# Random programs: a list of instructions, each a function of what was made so far.

_Instruction = tuple[str, int, int]
_KINDS = (
    "add", "scale", "cut", "pair", "size", "topk",
    "add_", "mul_", "iadd", "setitem", "out", "fill", "fill_empty",
    "half", "chunk", "join", "alias", "squeeze", "clone",
)  # fmt: skip


def _interpret(ops: Any, program: tuple[_Instruction, ...], x: torch.Tensor) -> torch.Tensor:
    """Tensors `[1, T, 8]` in `whole`, `[1, T, 4]` in `halves`."""
    whole = [x]
    halves = [x[:, :, :4] * 1]
    for kind, first, second in program:
        a, b = whole[first % len(whole)], whole[second % len(whole)]
        h, k = halves[first % len(halves)], halves[second % len(halves)]
        match kind:
            case "add":
                whole.append(a + b)
            case "scale":
                halves.append(h * 0.5)
            case "cut":
                whole.append(ops.cut(a))
            case "pair":
                halves.extend(ops.pair(h, [0.5, 0.25]))
            case "size":
                whole.append(a / a.shape[1])
            case "topk":
                halves.append(torch.topk(a, 4).values)
            case "add_":
                whole.append(a.add_(1))
            case "mul_":
                h.mul_(0.5)
            case "iadd":
                h += k.clone()
            case "setitem":
                a[:, :, second % 8] = b[:, :, first % 8] + 1
            case "out":
                torch.add(a, 1, out=a)
            case "fill":
                ops.fill(h if second % 2 else a)
            case "fill_empty":
                room = torch.empty_like(a)
                room.copy_(b)
                ops.fill(room)
                whole.append(room)
            case "half":
                halves.append(a[:, :, 2:6])
            case "chunk":
                halves.extend(a.chunk(2, -1))
            case "join":
                whole.append(torch.cat([h, k], -1))
            case "alias":
                whole.append(a.view(1, -1, 2, 4).view(1, -1, 8))
            case "squeeze":
                whole.append(a.unsqueeze(0).squeeze(0))
            case "clone":
                whole.append(b.clone())
    return torch.cat([*whole, *halves], -1)[0]


_PROGRAMS = st.lists(
    st.tuples(st.sampled_from(_KINDS), st.integers(0, 7), st.integers(0, 7)),
    min_size=2,
    max_size=12,
).map(tuple)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=_PROGRAMS)
def test_running_the_split_graph_equals_running_the_graph(
    link_toy: Any, ops: Any, program: tuple[_Instruction, ...]
) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return ops.cut(_interpret(ops, program, x))

    link_toy(function, isolated=True).check(1, 2, 17)
