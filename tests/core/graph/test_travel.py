from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllmc.core.errors import VllmcError
from vllmc.core.graph.piece import OpaqueInput, Piece, canonical_piece
from vllmc.core.graph.split import split, splits_at
from vllmc.core.graph.travel import pack_piece, unpack_piece
from vllmc.kernels.layer_name import LayerName


@pytest.fixture
def piece_of(trace_toy: Any, ops: Any) -> Any:
    """`compute(cut(x))` as a piece of its own."""

    def make(compute: Any, **changes: Any) -> Piece:
        def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
            return ops.cut(compute(entry, ops.cut(x), rows))

        captured, spec = trace_toy(function, **changes)
        cuts = split(captured.graph, splits_at(spec.splitting_ops))
        pieces = [canonical_piece(cut, captured.roles) for cut in cuts if not cut.splitting]
        assert len(pieces) == 2
        return pieces[1]

    return make


def travelled(piece: Piece) -> Piece:
    return unpack_piece(json.loads(json.dumps(pack_piece(piece))))


@pytest.mark.parametrize(
    "compute",
    [
        lambda entry, x, rows: F.silu(entry.linear(x)) * 0.1 + float("inf"),
        lambda entry, x, rows: x[:, 1:, ::2].to(torch.float64).sum(-1, keepdim=True),
        lambda entry, x, rows: torch.cat([x, x.transpose(1, 2).contiguous().transpose(1, 2)], -1),
        lambda entry, x, rows: x[..., rows % 8].clamp(min=-1.0).reshape(-1, 2).max(0)[0],
        lambda entry, x, rows: torch.empty_like(x, memory_format=torch.contiguous_format).zero_(),
        lambda entry, x, rows: x.view(x.shape[1] * 8)[: x.shape[1] // 2],
    ],
)
def test_a_piece_that_travelled_is_the_piece_that_was_sent(piece_of: Any, compute: Any) -> None:
    sent = piece_of(compute)
    arrived = travelled(sent)
    assert arrived.digest == sent.digest
    assert (arrived.inputs, arrived.roles, arrived.outputs) == (
        sent.inputs,
        sent.roles,
        sent.outputs,
    )
    assert arrived.module.code == sent.module.code


def test_a_layers_name_travels_with_the_piece_that_is_given_it(trace_toy: Any, ops: Any) -> None:
    library = torch.library.Library("vllmc_test", "FRAGMENT")
    library.define("hoisted(Tensor x, vllmc.kernels.layer_name.LayerName name) -> Tensor")
    library.impl("hoisted", lambda x, name: x + 1, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "vllmc_test::hoisted", lambda x, name: torch.empty_like(x), lib=library
    )

    def function(entry: Any, x: Any, positions: Any, rows: Any) -> Any:
        return ops.cut(ops.hoisted(x, entry.names[0]))

    captured, spec = trace_toy(function, names=[LayerName("model.layers.0")])
    (cut, _) = split(captured.graph, splits_at(spec.splitting_ops))
    sent = canonical_piece(cut, captured.roles)
    [name] = [i for i in travelled(sent).inputs if isinstance(i, OpaqueInput)]
    assert name.example == LayerName("model.layers.0")
    library._destroy()


def test_a_piece_that_changed_on_its_way_is_refused(piece_of: Any) -> None:
    data = pack_piece(piece_of(lambda entry, x, rows: x * 2.0))
    [multiply] = [row for row in data["nodes"] if "mul" in row["target"]]
    multiply["args"][1] = {"float": (3.0).hex()}
    with pytest.raises(VllmcError, match="cannot-travel"):
        unpack_piece(data)


def test_a_piece_names_the_modules_that_register_its_ops(piece_of: Any, ops: Any) -> None:
    assert pack_piece(piece_of(lambda entry, x, rows: x * 2.0))["modules"] == []
    found = pack_piece(piece_of(lambda entry, x, rows: ops.named(x, "n")))["modules"]
    assert found, "the op is registered by the conftest of these tests"
    assert all(name.endswith("conftest") for name in found)


def test_an_op_that_is_not_registered_where_it_arrives_is_named(piece_of: Any, ops: Any) -> None:
    data = pack_piece(piece_of(lambda entry, x, rows: ops.named(x, "n")))
    for row in data["nodes"]:
        row["target"] = row["target"].replace("vllmc_test.named", "vllmc_test.elsewhere")
    with pytest.raises(VllmcError, match="unknown-op"):
        unpack_piece(data)
