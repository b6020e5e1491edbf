from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllmc.core.graph.piece import OpaqueInput, SizeInput, TensorInput, canonical_piece
from vllmc.core.graph.split import split, splits_at
from vllmc.kernels.layer_name import LayerName


@pytest.fixture
def pieces_of(trace_toy: Any) -> Any:
    def make(function: Any, **changes: Any) -> list[Any]:
        captured, spec = trace_toy(function, **changes)
        cuts = split(captured.graph, splits_at(spec.splitting_ops))
        return [canonical_piece(cut, captured.roles) for cut in cuts if not cut.splitting]

    return make


@pytest.fixture
def digest_of(pieces_of: Any, ops: Any) -> Any:
    """The digest of `compute(cut(x))` as a piece of its own."""

    def make(compute: Any, prepare: Any = lambda x: x) -> str:
        def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
            return ops.cut(compute(ops.cut(prepare(x))))

        return str(pieces_of(function)[1].digest)

    return make


def test_equal_layers_have_one_digest(pieces_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        for layer in range(3):
            renamed = ops.cut(x)
            x = F.silu(entry.linear(renamed)) + x * 0.5 if layer < 3 else x
        return ops.cut(x)[0]

    first, *others, last = [p.digest for p in pieces_of(function)]
    assert len(set(others)) == 1
    assert len({first, others[0], last}) == 3


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda y: y + 2, lambda y: y - 2),
        (lambda y: y + y.sin(), lambda y: y + y.cos()),
        (lambda y: F.silu(y), lambda y: F.gelu(y)),
        (
            lambda y: F.adaptive_max_pool1d(y[0, :1], 2),
            lambda y: F.adaptive_avg_pool1d(y[0, :1], 2),
        ),
        (lambda y: y * 2, lambda y: y * 3),
        (lambda y: y * 1, lambda y: y * 1.0),
        (lambda y: y * 1, lambda y: y * True),
        (lambda y: y + 0.0, lambda y: y + -0.0),
        (lambda y: y.clamp(max=1.0), lambda y: y.clamp(min=1.0)),
        (lambda y: y.sum(-1), lambda y: y.sum((-1,))),
        (lambda y: y[..., 1:3], lambda y: y[..., 1:4]),
        (lambda y: y[..., 1:3], lambda y: y[..., 1:3:2]),
        (lambda y: y.to(torch.float64), lambda y: y.to(torch.bfloat16)),
        (lambda y: y.sin() - y.cos(), lambda y: y.cos() - y.sin()),
        (lambda y: torch.cat([y.sin(), y], -1), lambda y: torch.cat([y, y.sin()], -1)),
        (
            lambda y: y.masked_fill(y > 0, float("inf")),
            lambda y: y.masked_fill(y > 0, float("nan")),
        ),
    ],
)
def test_another_program_has_another_digest(digest_of: Any, one: Any, other: Any) -> None:
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(one)


def test_functions_of_one_dispatcher_are_told_apart(pieces_of: Any, ops: Any) -> None:
    def pooled(pool: Any) -> Any:
        # Boolean-dispatched functions share their qualified name.
        return lambda e, x, p, r: ops.cut(x)[0] * pool(e.linear.weight, 2).sum()

    one, other = (pieces_of(pooled(f))[-1].digest for f in (F.max_pool1d, F.adaptive_max_pool1d))
    assert one != other


@pytest.mark.parametrize(
    "prepare",
    [
        lambda x: x.to(torch.bfloat16),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[..., :4],
        lambda x: x[0],
        lambda x: torch.cat([x, x], 1),
    ],
    ids=["dtype", "stride", "shape", "rank", "relation to the token count"],
)
def test_another_input_has_another_digest(digest_of: Any, prepare: Any) -> None:
    assert digest_of(lambda y: y * 2 + 1, prepare) != digest_of(lambda y: y * 2 + 1)


def test_inputs_of_one_size_differ_from_inputs_of_two(pieces_of: Any, ops: Any) -> None:
    def function(second: Any) -> Any:
        def run(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
            a, b = ops.cut(x), ops.cut(second(x, rows))
            return ops.cut(a.sum(1) + b.sum(1))

        return run

    same = pieces_of(function(lambda x, rows: x + 1))[-1]
    other = pieces_of(function(lambda x, rows: x[:, rows]))[-1]
    assert same.roles == ("tokens",)
    assert sorted(other.roles) == ["rows", "tokens"]
    assert same.digest != other.digest


def test_a_piece_knows_what_its_sizes_count(pieces_of: Any, ops: Any) -> None:
    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return entry.linear(ops.cut(ops.cut(x)[0, rows])) * rows.shape[0]

    *_, last = pieces_of(function)
    assert last.roles == ("rows",)
    assert not last.depends_on_tokens
    assert {type(i) for i in last.inputs} <= {TensorInput, SizeInput}


def test_a_hoisted_name_is_an_input_and_a_baked_one_a_constant(pieces_of: Any, ops: Any) -> None:
    attend = torch.ops.vllmc.unified_attention_with_output

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        for name in entry.names:
            q = ops.cut(x).view(1, -1, 2, 4)
            out = torch.empty_like(q)
            (attend.str if isinstance(name, str) else attend.default)(q, q, q, out, name, 0.5)
            x = out.view(1, -1, 8) + 1
        return ops.cut(x)[0]

    texts = [f"layers.{number}" for number in range(3)]
    _, hoisted, same, *_ = pieces_of(function, names=[LayerName(text) for text in texts])
    _, baked, other, *_ = pieces_of(function, names=texts)
    assert hoisted.digest == same.digest
    assert baked.digest != other.digest
    assert [type(i) for i in hoisted.inputs].count(OpaqueInput) == 1
    assert not any(isinstance(i, OpaqueInput) for i in baked.inputs)
