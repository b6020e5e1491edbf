from __future__ import annotations

from typing import Any

import pytest

from vllmc.core.errors import UnsafeCacheError
from vllmc.core.graph.layout import (
    Argument,
    AttentionSite,
    ExpertsSite,
    GraphInput,
    Layout,
    OpStep,
    UnitStep,
)


@pytest.fixture
def layout() -> Layout:
    return Layout(
        arguments=(Argument(path="input_ids", dtype="int64", shape=(1, "tokens")),),
        pieces=("piece_0",),
        ranges=("1", "2:64"),
        inputs=(
            GraphInput(kind="activation", name="input_ids"),
            GraphInput(kind="size", name="input_ids", dim=1),
            GraphInput(
                kind="attribute", name="model.weight", dtype="float32", shape=(4, 8), stride=(8, 1)
            ),
            GraphInput(kind="layer-name", name="layers.0"),
        ),
        steps=(
            UnitStep(piece=0, args=("p0", "p2"), results=("v0",)),
            OpStep(
                target="call_function:torch.ops.a.b",
                args=({"ref": "v0"}, {"float": "0x1.0p+0"}, None, True),
                kwargs={"out": {"ref": "v0"}},
                result="v1",
            ),
        ),
        result={"ref": "v0"},
        attention=(
            AttentionSite(layer="layers.0", kv_heads=1, key_size=4, value_size=4, window=8),
        ),
        experts=(
            ExpertsSite(
                layer="layers.0.mlp",
                tensors=(
                    GraphInput(
                        kind="attribute", name="up", dtype="float32", shape=(2, 4), stride=(4, 1)
                    ),
                ),
            ),
        ),
        demands=("d0 > 1",),
        promises=("d0 % 8 != 0",),
    )


def test_a_layout_survives_json(layout: Layout) -> None:
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("steps"),
        lambda data: data["arguments"][0].pop("path"),
        lambda data: data.pop("result"),
        lambda data: data["inputs"][0].pop("name"),
        lambda data: data["inputs"][0].update(more=1),
        lambda data: data["steps"][0].pop("piece"),
        lambda data: data["attention"].append({"layer": "x"}),
        lambda data: data["experts"][0].pop("tensors"),
        lambda data: data["experts"][0]["tensors"][0].pop("shape"),
        lambda data: data.update(inputs=None),
    ],
)
def test_anything_else_is_a_bad_record(layout: Layout, damage: Any) -> None:
    data: Any = layout.to_json()
    damage(data)
    with pytest.raises(UnsafeCacheError) as caught:
        Layout.from_json(data)
    assert caught.value.code == "bad-record"
