from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from vllmc.core.errors import VllmcError
from vllmc.core.models.building import build_entry
from vllmc.core.models.expert_modules import expert_tensors, experts_in, experts_of
from vllmc.core.models.experts import (
    EXPERTS_NAME,
    EXPERTS_NAME_ATTRIBUTE,
    attach_expert_names,
    fused_experts,
    register_experts,
)
from vllmc.core.spec import CompileSpec
from vllmc.kernels.forward_context import AttentionMetadata, ForwardContext, forward_context
from vllmc.kernels.layer_name import LayerName, LayerNameKind

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
METADATA = AttentionMetadata(slots=torch.empty(0, dtype=torch.int64), sequences=())


def tiny(family: str, **fields: Any) -> Any:
    config = AutoConfig.for_model(family, **{**TINY, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3
    return model.eval().requires_grad_(False)


def modules_in(model: torch.nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if hasattr(m, EXPERTS_NAME_ATTRIBUTE)}


@pytest.mark.parametrize(
    ("family", "bias", "transposed", "gated_silu"),
    [
        ("mixtral", False, False, True),
        ("qwen3_moe", False, False, True),
        ("granitemoe", False, False, True),
        ("gpt_oss", True, True, False),
    ],
)
def test_the_op_computes_what_eager_transformers_does(
    family: str, bias: bool, transposed: bool, gated_silu: bool
) -> None:
    model = tiny(family)
    register_experts()
    names = attach_expert_names(model, "hoisted")
    assert len(names) == 2
    experts = experts_in(model)
    assert tuple(experts) == names
    context = ForwardContext(metadata=METADATA, caches={}, experts=experts)
    for name, module in modules_in(model).items():
        found = experts[name]
        assert (found.up_bias is not None) == (found.down_bias is not None) == bias
        assert found.gated_silu == gated_silu
        assert (found.up.stride(2) != 1) == transposed
        hidden = torch.randn(9, 16)
        ids = torch.rand(9, 4).topk(2).indices
        weights = torch.rand(9, 2)
        module.config._experts_implementation = "eager"
        expected = module(hidden, ids, weights)
        module.config._experts_implementation = EXPERTS_NAME
        with forward_context(context):
            torch.testing.assert_close(module(hidden, ids, weights), expected)


def test_experts_lie_in_the_module_s_own_memory() -> None:
    model = tiny("gpt_oss")
    [module, _] = [m for n, m in model.named_modules() if n.endswith("experts")]
    experts = experts_of(module)
    assert experts.up.data_ptr() == module.gate_up_proj.data_ptr()
    assert [*expert_tensors(module)] == [
        "gate_up_proj",
        "gate_up_proj_bias",
        "down_proj",
        "down_proj_bias",
    ]


def test_a_gate_of_another_activation_is_not_taken_for_silu() -> None:
    model = tiny("mixtral", hidden_act="gelu")
    assert [e.gated_silu for e in experts_in(model).values()] == [False, False]


@pytest.mark.parametrize("kind", ["hoisted", "baked"])
def test_only_experts_modules_are_named(kind: LayerNameKind) -> None:
    model = tiny("mixtral")
    names = attach_expert_names(model, kind)
    assert names == ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    held = {n: getattr(m, EXPERTS_NAME_ATTRIBUTE) for n, m in modules_in(model).items()}
    assert held == {n: LayerName(n) if kind == "hoisted" else n for n in names}
    assert attach_expert_names(tiny("llama"), kind) == ()


def test_registering_again_changes_nothing() -> None:
    register_experts()
    before = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    register_experts()
    assert ALL_EXPERTS_FUNCTIONS._global_mapping == before
    assert before[EXPERTS_NAME] is fused_experts


def test_grouped_mm_stays_transformers_own() -> None:
    model = tiny("mixtral")
    build_entry(model, CompileSpec(experts="grouped_mm"))
    assert model.config._experts_implementation == "grouped_mm"
    assert modules_in(model) == {}


def test_what_the_op_does_not_do_is_refused_with_module_and_line() -> None:
    @use_experts_implementation(has_post_expert_norm=True)
    class Normed(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()

        def forward(self, hidden: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return hidden

    register_experts()
    config = copy.copy(tiny("mixtral").config)
    config._experts_implementation = EXPERTS_NAME
    with pytest.raises(VllmcError, match=r"Normed .* it normalises what each") as caught:
        Normed(config)(torch.ones(1, 2), torch.ones(1, 1), torch.ones(1, 1))
    assert caught.value.code == "unsupported-model"
    assert str(caught.value.context["line"]).startswith("test_experts.py:")
    assert "--experts grouped_mm" in (caught.value.hint or "")


def test_experts_of_several_devices_are_refused() -> None:
    model = tiny("mixtral")
    build_entry(model, CompileSpec())
    [module, _] = modules_in(model).values()
    module._is_expert_parallel = True
    with pytest.raises(VllmcError, match="several devices"):
        module(torch.ones(1, 16), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
