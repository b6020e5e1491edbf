from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from repeating import plans, told
from transformers import AutoConfig, AutoModelForCausalLM

from vllmc.core.errors import VllmcError
from vllmc.core.models.building import build_entry, model_of
from vllmc.core.models.model import Scales
from vllmc.core.models.quantized import QuantizedLinear, linears_to_quantize, quantize
from vllmc.core.models.watched import groups_by_input
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.fake import fake_weights, is_fake

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CPU = torch.device("cpu")
SELF = "model.layers.0.self_attn."
MLP = "model.layers.0.mlp."


def entry_of(model_type: str, **fields: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **fields})
    return build_entry(AutoModelForCausalLM.from_config(config), CompileSpec())


def quantised(entry: torch.nn.Module) -> dict[str, QuantizedLinear]:
    found = model_of(entry).named_modules()
    return {path: module for path, module in found if isinstance(module, QuantizedLinear)}


def groups(entry: torch.nn.Module) -> list[list[str]]:
    model = model_of(entry)
    return groups_by_input(entry, model, linears_to_quantize(model), CPU)


def test_the_head_and_embeddings_are_left() -> None:
    paths = linears_to_quantize(model_of(entry_of("llama")))
    assert len(paths) == 2 * 7
    assert all(path.startswith("model.layers.") for path in paths)


def test_what_makes_a_number_for_each_expert_is_left() -> None:
    fields = {"mixer": "attention", "num_local_experts": 16, "num_experts_per_tok": 2}
    paths = linears_to_quantize(model_of(entry_of("granitemoe", **fields)))
    assert not any("router" in path for path in paths)
    assert f"{SELF}q_proj" in paths


def test_experts_are_left_and_shared_ones_are_not() -> None:
    entry = entry_of("qwen2_moe", num_experts=4, shared_expert_intermediate_size=32, **EXPERTS)
    paths = linears_to_quantize(model_of(entry))
    of_mlp = [path.removeprefix(MLP) for path in paths if path.startswith(MLP)]
    assert of_mlp == [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]


def test_sizes_that_matrix_units_do_not_take_are_left() -> None:
    paths = linears_to_quantize(model_of(entry_of("llama", num_key_value_heads=1)))
    names = {path.rpartition(".")[2] for path in paths}
    assert names == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "kept",
    [f"{SELF}q_proj", SELF.rstrip("."), "*.q_proj", r"re:.*layers\.0\.self_attn\.q.*", "model"],
)
def test_what_a_checkpoint_kept_is_left(kept: str) -> None:
    paths = linears_to_quantize(model_of(entry_of("llama")), [kept])
    assert f"{SELF}q_proj" not in paths


def test_what_a_checkpoint_kept_is_no_part_of_a_name() -> None:
    paths = linears_to_quantize(model_of(entry_of("llama")), ["q_proj", "model.layers.0.self"])
    assert len(paths) == 2 * 7


QKV = [f"{SELF}{name}_proj" for name in "qkv"]
GATED = [f"{MLP}gate_proj", f"{MLP}up_proj"]


@pytest.mark.parametrize(
    ("model_type", "first"),
    [
        ("llama", [QKV, [f"{SELF}o_proj"], GATED, [f"{MLP}down_proj"]]),
        # Attention and feed-forward read one norm.
        ("cohere", [[*QKV, *GATED], [f"{SELF}o_proj"], [f"{MLP}down_proj"]]),
        ("phi", [[*QKV, f"{MLP}fc1"], [f"{SELF}dense"], [f"{MLP}fc2"]]),
    ],
)
def test_linears_are_grouped_by_the_tensor_that_they_read(
    model_type: str, first: list[list[str]]
) -> None:
    found = groups(entry_of(model_type))
    assert sorted(found[: len(first)]) == sorted(first)
    assert len(found) == 2 * len(first)


def test_a_linear_that_is_called_twice_joins_both_groups() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 16)
            self.a, self.b, self.both, self.c = (torch.nn.Linear(16, 16) for _ in range(4))

        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            y = self.a(x) + self.both(x)
            return self.b(y) + self.both(y) + self.c(y * 2)

    entry = build_entry(Twice(), CompileSpec())
    assert [sorted(group) for group in groups(entry)] == [["a", "b", "both"], ["c"]]


def test_finding_groups_leaves_the_model_as_it_was() -> None:
    entry = entry_of("qwen2_moe", num_experts=4, **EXPERTS)
    before = (dict(entry.named_parameters()), model_of(entry).config.to_dict())
    groups(entry)
    assert dict(entry.named_parameters()) == before[0]
    assert model_of(entry).config.to_dict() == before[1]
    assert not any(module._forward_pre_hooks for module in entry.modules())


def test_what_is_read_by_several_has_one_scale() -> None:
    entry = entry_of("llama")
    largest = {path: 1.0 + index for index, path in enumerate([*QKV, *GATED])}

    def calibrate(_: torch.nn.Module, paths: Any) -> Mapping[str, float]:
        return {path: largest.get(path, 0.0) for path in paths}

    quantize(entry, "fp8-static", own={}, calibrate=calibrate)
    found = quantised(entry)
    for group in (QKV, GATED):
        scale = found[group[0]].input_scale
        assert all(found[path].input_scale is scale for path in group)
        assert scale is not None
        assert float(scale) * 448 == pytest.approx(max(largest[path] for path in group))
    assert found[QKV[0]].input_scale is not found[GATED[0]].input_scale
    # Nothing that is larger was seen: a scale all the same.
    assert float(found[f"{SELF}o_proj"].input_scale) > 0


@pytest.mark.parametrize("mode", ["fp8-dynamic", "int8-dynamic"])
def test_dynamic_modes_have_no_scale_of_inputs(mode: Any) -> None:
    entry = entry_of("llama")
    quantize(entry, mode, own={})
    assert {linear.input_scale for linear in quantised(entry).values()} == {None}


@pytest.mark.parametrize(
    ("mode", "dtype", "largest"),
    [("fp8-static", torch.float8_e4m3fn, 448.0), ("int8-dynamic", torch.int8, 127.0)],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_weight_is_quantised_by_its_largest_element(
    model_type: str, mode: Any, dtype: torch.dtype, largest: float
) -> None:
    fields = {"n_embd": 32, "n_head": 4, "n_layer": 1} if model_type == "gpt2" else {}
    path = "transformer.h.0.mlp.c_fc" if model_type == "gpt2" else GATED[0]
    entry = entry_of(model_type, **fields)
    before = model_of(entry).get_submodule(path)
    quantize(entry, mode, own={})
    made = quantised(entry)[path]
    # Transformers' Conv1D holds its weight the other way round.
    weight = before.weight.t() if model_type == "gpt2" else before.weight
    assert isinstance(weight, torch.Tensor)
    assert made.weight.dtype is dtype
    assert made.weight.is_contiguous()
    assert made.weight.float().abs().max() == largest
    scale = weight.abs().max() / largest
    torch.testing.assert_close(made.weight_scale, scale.view(1).detach())
    step = scale * (0.5 if dtype is torch.int8 else 16)
    assert (made.weight.float() * scale - weight).abs().max() <= step * 1.001
    assert (made.bias is None) == (before.bias is None)


def test_a_linear_held_in_two_places_stays_one() -> None:
    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 16)
            self.first = torch.nn.Linear(16, 16)
            self.list = torch.nn.ModuleList([self.first])

        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.list[0](self.first(self.embed(ids)))

    entry = build_entry(Held(), CompileSpec())
    quantize(entry, "fp8-static", own={})
    model = model_of(entry)
    assert isinstance(model.first, QuantizedLinear)
    assert model.list[0] is model.first


def test_a_linear_may_be_given_its_input_by_name() -> None:
    class ByName(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 16)
            self.linear = torch.nn.Linear(16, 16)

        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return self.linear(input=self.embed(ids))

    torch.manual_seed(0)
    entry = build_entry(ByName(), CompileSpec())
    given = (*torch.arange(8).expand(2, 1, 8), torch.arange(8))
    exact = entry(*given)
    assert groups(entry) == [["linear"]]
    quantize(entry, "int8-dynamic", own={})
    assert (entry(*given) - exact).norm() < 0.02 * exact.norm()


def test_fake_weights_become_fake_quantised_ones() -> None:
    with fake_weights():
        entry = entry_of("llama")
    quantize(entry, "fp8-static", own={})
    tensors = [*entry.parameters(), *entry.buffers()]
    assert all(map(is_fake, tensors))
    assert {t.dtype for t in tensors} >= {torch.float8_e4m3fn, torch.float32}


def test_a_model_without_a_linear_is_refused() -> None:
    class Bare(torch.nn.Module):
        def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            return ids + positions

    with pytest.raises(VllmcError) as caught:
        quantize(build_entry(Bare(), CompileSpec()), "fp8-dynamic", own={})
    assert caught.value.code == "nothing-to-quantize"
    assert "Bare" in caught.value.message


def test_a_group_has_the_largest_of_its_checkpoints_scales() -> None:
    entry = entry_of("llama")
    own = {
        path: Scales(weight=0.5, input=float(index + 1))
        for index, path in enumerate(linears_to_quantize(model_of(entry)))
    }
    quantize(entry, "fp8-static", own=own)
    found = quantised(entry)
    assert [float(found[path].weight_scale) for path in QKV] == [0.5] * 3
    assert {float(found[path].input_scale) for path in QKV} == {own[QKV[-1]].input}


@pytest.mark.parametrize("lacks", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("mode", ["fp8-static", "fp8-dynamic"])
def test_a_checkpoint_that_lacks_a_scale_is_refused(lacks: str, mode: Any) -> None:
    entry = entry_of("llama")
    paths = linears_to_quantize(model_of(entry))
    own = {path: Scales(weight=0.5, input=0.5) for path in paths}
    if lacks == "weight_scale":
        del own[QKV[1]]
    else:
        own[QKV[1]] = Scales(weight=0.5, input=None)
    with pytest.raises(VllmcError) as caught:
        quantize(entry, mode, own=own)
    assert caught.value.code == "bad-weights"
    assert f"no {lacks} of {QKV[1]}" in caught.value.message
    assert caught.value.context == {"missing": 1, "of": 14}


@pytest.mark.parametrize("mode", ["fp8-static", "fp8-dynamic", "int8-dynamic"])
def test_of_equal_quantised_layers_one_is_traced(mode: Any, tmp_path: Path) -> None:
    fields = {**SIZES, "num_hidden_layers": 6}
    AutoConfig.for_model("llama", **fields).save_pretrained(tmp_path)
    repeating, whole, stood_in = plans(str(tmp_path), quantize=mode)
    assert told(repeating) == told(whole)
    assert stood_in == 5
    assert repeating.counts["unique"] == 3
