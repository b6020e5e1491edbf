from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllmc.core.compiler.container import EAGER, unpack
from vllmc.core.compiler.registry import find_compiler
from vllmc.core.errors import UsageError


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: F.silu(x).masked_fill(x > 0, float("-inf")).clamp(min=-1e3),
        lambda x: torch.where(x > 0, x, float("inf")).clamp(max=7.5),
        lambda x: x.to(torch.bfloat16).to(device="cpu", dtype=torch.float32),
        lambda x: torch.ops.aten.add.Tensor(x, x, alpha=2),
        lambda x: F.adaptive_max_pool1d(x[0], 2)[None],
        lambda x: x[..., 1:7:2, None].sum(-1) + torch.finfo(torch.float32).eps,
    ],
)
def test_a_graph_computes_the_same_from_its_source(link_toy: Any, ops: Any, compute: Any) -> None:
    toy = link_toy(lambda e, x, p, r: compute(ops.cut(x))[0])
    toy.check(1, 2, 17)
    assert {unpack(a.artifact).format for a in toy.artifacts.values()} == {EAGER}


def test_the_same_graph_gives_the_same_artifact(link_toy: Any, ops: Any) -> None:
    def artifacts() -> list[bytes]:
        toy = link_toy(lambda e, x, p, r: F.silu(e.linear(ops.cut(x)))[0])
        return [made.artifact for made in toy.artifacts.values()]

    assert artifacts() == artifacts()


def test_an_unknown_backend_is_a_wrong_usage() -> None:
    with pytest.raises(UsageError, match="nonesuch") as caught:
        find_compiler("nonesuch")
    assert caught.value.code == "unknown-backend"
    assert "inductor" in caught.value.hint
