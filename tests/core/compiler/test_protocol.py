from __future__ import annotations

import torch.fx as fx

from vllmc.core.compiler.protocol import Unit, example_inputs, example_scope
from vllmc.core.graph.piece import OpaqueInput, Piece
from vllmc.core.spec import CompileRange, CompileSpec
from vllmc.kernels.layer_name import LayerName


def test_inputs_that_share_an_example_are_objects_of_their_own() -> None:
    """Of layers that were not traced the examples are one object, and AOTAutograd goes by that."""
    given = OpaqueInput(type_name="LayerName", example=LayerName("layer"))
    piece = Piece(graph=fx.Graph(), inputs=(given, given), roles=(), outputs=0, digest="")
    unit = Unit(piece=piece, range=CompileRange(1, 8))
    first, second = example_inputs(unit, example_scope(unit, CompileSpec()))
    assert first == second == LayerName("layer")
    assert first is not second
