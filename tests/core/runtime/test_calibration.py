from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from quantized_reference import PROMPTS, input_scales, make_model

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import AttentionSite
from vllmc.core.models.building import build_entry
from vllmc.core.models.quantized import linears_to_quantize
from vllmc.core.runtime.calibration import calibrate, in_batches, random_prompts
from vllmc.core.runtime.workload import Limits
from vllmc.core.spec import CompileSpec

LIMITS = Limits(vocab_size=128, max_position=128, dtype=torch.float32, device="cpu")
ATTENTION = [
    AttentionSite(
        layer=f"model.model.layers.{number}.self_attn",
        kv_heads=2,
        key_size=16,
        value_size=16,
        window=None,
        causal=True,
    )
    for number in range(2)
]


def largest(model: torch.nn.Module, prompts: Sequence[Sequence[int]] = PROMPTS) -> dict[str, float]:
    entry = build_entry(model, CompileSpec())
    paths = linears_to_quantize(model)
    return calibrate(entry, paths, prompts, attention=ATTENTION, limits=LIMITS, encoder=None)


def test_it_sees_the_largest_element_that_each_linear_is_given_by_any_prompt() -> None:
    expected = {
        path: float(s) * 448 for path, s in input_scales(make_model("llama"), PROMPTS).items()
    }
    assert largest(make_model("llama")) == pytest.approx(expected, rel=1e-5)


def test_the_caches_hold_some_of_the_prompts_at_a_time() -> None:
    prompts = [range(n) for n in (1500, 500, 48, 1, 5000, 2048, 1)]
    batches = in_batches(prompts)
    assert [[len(p) for p in batch] for batch in batches] == [
        [1500, 500, 48],
        [1],
        [5000],
        [2048],
        [1],
    ]


def test_what_waits_for_room_in_the_caches_is_seen_too() -> None:
    # 24 times 100 tokens: the last are not among the first 2048.
    prompts = [[1] * 100] * 23 + [[*range(3, 103)]]
    expected = input_scales(make_model("llama"), [prompts[0], prompts[-1]])
    assert len(in_batches(prompts)) == 2
    found = largest(make_model("llama"), prompts)
    assert found == pytest.approx({p: float(s) * 448 for p, s in expected.items()}, rel=1e-5)


def test_a_model_that_overflows_is_refused() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(VllmcError) as caught:
        largest(model)
    assert caught.value.code == "not-finite"
    assert "model.layers.0.mlp.down_proj" in caught.value.message


def test_random_prompts_are_always_the_same_and_fit_the_model() -> None:
    prompts = random_prompts(LIMITS)
    assert prompts == random_prompts(LIMITS)
    assert [len(prompt) for prompt in prompts] == [64] * 8
    assert len({*prompts}) == 8
    assert all(0 <= token < 128 for prompt in prompts for token in prompt)
    assert {len(p) for p in random_prompts(replace(LIMITS, max_position=10))} == {9}
    assert {len(p) for p in random_prompts(replace(LIMITS, max_position=None))} == {64}
