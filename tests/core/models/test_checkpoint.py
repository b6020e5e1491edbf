from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from quantized_reference import QUANTIZATION_CONFIGS, linears, save_quantized
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from vllmc.core.errors import VllmcError
from vllmc.core.job import resolve_spec
from vllmc.core.models.built import build_model
from vllmc.core.models.model import Model, Weights
from vllmc.core.models.quantized import QuantizedLinear
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec, Quantization

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MODES: dict[str, tuple[Quantization, ...]] = {
    "fp8 static": ("fp8-static", "fp8-dynamic"),
    "fp8 dynamic": ("fp8-dynamic", "fp8-static"),
    "modelopt": ("fp8-static", "fp8-dynamic"),
    "compressed static": ("fp8-static", "fp8-dynamic"),
    "compressed int8": ("int8-dynamic",),
}

Changed = dict[str, Any]


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **LLAMA)).eval()


@pytest.fixture
def scales(llama: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {path: torch.tensor(0.1 * (i + 1)) for i, path in enumerate(linears(llama))}


def built(directory: Path, mode: Quantization, dtype: str = "float32") -> torch.nn.Module:
    model = resolve(str(directory))
    spec = resolve_spec(CompileSpec(quantize=mode, dtype=dtype), model)
    return build_model(model, spec, "real").model


@pytest.mark.parametrize("layout", MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantised_weights_are_taken_bit_by_bit(
    layout: str, dtype: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = save_quantized(llama, tmp_path, layout)
    model = built(tmp_path, MODES[layout][0], dtype)
    for path in linears(llama):
        linear = model.get_submodule(path)
        assert isinstance(linear, QuantizedLinear)
        stored = tensors[f"{path}.weight"]
        assert torch.equal(linear.weight.view(torch.uint8), stored.view(torch.uint8)), path
        assert float(linear.weight_scale) == float(tensors[f"{path}.weight_scale"])


def test_linears_that_read_the_same_have_the_largest_scale_of_the_checkpoint(
    llama: PreTrainedModel, scales: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "fp8 static", scales=scales)
    model = built(tmp_path, "fp8-static")
    for group in (["q_proj", "k_proj", "v_proj"], ["o_proj"]):
        paths = [f"model.layers.1.self_attn.{name}" for name in group]
        largest = max(float(scales[path]) for path in paths)
        assert {float(model.get_submodule(path).input_scale) for path in paths} == {largest}


def test_a_dynamic_mode_needs_no_scale_of_activations(
    llama: PreTrainedModel, scales: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "modelopt", scales=scales)
    model = built(tmp_path, "fp8-dynamic")
    assert {m.input_scale for m in model.modules() if isinstance(m, QuantizedLinear)} == {None}


@pytest.mark.parametrize("layout", MODES)
def test_it_is_said_what_a_checkpoint_can_be_run_in(
    layout: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, layout)
    model = resolve(str(tmp_path))
    for mode in (None, "fp8-static", "fp8-dynamic", "int8-dynamic"):
        if mode in MODES[layout]:
            assert resolve_spec(CompileSpec(quantize=mode), model).quantize == mode
            continue
        with pytest.raises(VllmcError) as caught:
            resolve_spec(CompileSpec(quantize=mode), model)
        assert caught.value.code == "quantized-weights"
        assert caught.value.hint == f"--quantize {MODES[layout][0]}"


def test_what_a_checkpoint_left_is_left(llama: PreTrainedModel, tmp_path: Path) -> None:
    kept = ["model.layers.1.mlp.down_proj"]
    config = {**QUANTIZATION_CONFIGS["fp8 static"], "ignored_layers": ["lm_head", *kept]}
    save_quantized(llama, tmp_path, "fp8 static", kept=kept)
    change_config(tmp_path, config)
    for weights in ("fake", "real"):
        model = resolve(str(tmp_path))
        spec = resolve_spec(CompileSpec(quantize="fp8-dynamic"), model)
        made = build_model(model, spec, weights).model  # type: ignore[arg-type]
        assert type(made.get_submodule(kept[0])) is torch.nn.Linear
        assert type(made.get_submodule("model.layers.0.mlp.down_proj")) is QuantizedLinear


def test_weights_that_are_not_quantised_though_the_configuration_says_so_are_refused(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "fp8 static", kept=["model.layers.1.mlp.down_proj"])
    with pytest.raises(VllmcError) as caught:
        built(tmp_path, "fp8-dynamic")
    assert caught.value.code == "bad-weights"
    assert "model.layers.1.mlp.down_proj" in caught.value.message


def change_config(directory: Path, quantization: object) -> None:
    file = directory / "config.json"
    fields = json.loads(file.read_text()) | {"quantization_config": quantization}
    file.write_text(json.dumps(fields))


def _with(layout: str, *path: str, value: object) -> Changed:
    changed = copy.deepcopy(dict(QUANTIZATION_CONFIGS[layout]))
    inner: Any = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


WEIGHTS = ("config_groups", "group_0", "weights")


@pytest.mark.parametrize(
    "quantization",
    [
        _with("fp8 static", "weight_block_size", value=[128, 128]),
        _with("modelopt", "quant_algo", value="NVFP4"),
        _with("compressed static", *WEIGHTS, "strategy", value="channel"),
        _with("compressed static", *WEIGHTS, "num_bits", value=4),
        _with("compressed static", "config_groups", "group_0", "input_activations", value=None),
        _with("compressed static", "config_groups", value={}),
        _with("compressed static", "config_groups", "group_0", "targets", value=["re:.*mlp.*"]),
    ],
)
def test_other_kinds_of_scales_are_refused_by_name(
    quantization: Changed, llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "fp8 static")
    change_config(tmp_path, quantization)
    with pytest.raises(VllmcError) as caught:
        _ = resolve(str(tmp_path)).info
    assert caught.value.code == "unsupported-model"
    assert "quantised" in caught.value.message


PATH = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(f"{PATH}.weight_scale"), "has no weight_scale"),
        (lambda t: t.update({f"{PATH}.weight_scale": torch.ones(48, 1)}), "[48, 1]"),
    ],
)
def test_weights_that_do_not_say_what_they_are_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    says: str,
    llama: PreTrainedModel,
    tmp_path: Path,
) -> None:
    tensors = save_quantized(llama, tmp_path, "fp8 static")
    change(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VllmcError) as caught:
        built(tmp_path, "fp8-dynamic")
    assert caught.value.code == "bad-weights"
    assert says in str(caught.value.context["cause"])


def test_a_file_that_is_no_safetensors_is_refused(llama: PreTrainedModel, tmp_path: Path) -> None:
    save_quantized(llama, tmp_path, "fp8 static")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(VllmcError) as caught:
        built(tmp_path, "fp8-dynamic")
    assert caught.value.code == "bad-weights"


def test_weights_in_several_files_are_those_of_the_index(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = save_quantized(llama, tmp_path, "fp8 static")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in {*places.values()}:
        own = {name: tensors[name] for name in names if places[name] == file}
        safetensors.torch.save_file(own, tmp_path / file, {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    # A copy of the weights in another form, which is not to be read.
    (tmp_path / "consolidated.safetensors").write_bytes(b"nothing")
    made = built(tmp_path, "fp8-dynamic").get_submodule(PATH)
    assert torch.equal(made.weight.float(), tensors[f"{PATH}.weight"].float())


def test_warming_reads_no_weights(llama: PreTrainedModel, tmp_path: Path) -> None:
    save_quantized(llama, tmp_path, "fp8 static")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    model: Model = resolve(str(tmp_path))
    spec = resolve_spec(CompileSpec(quantize="fp8-static"), model)
    assert isinstance(build_model(model, spec).model.get_submodule(PATH), QuantizedLinear)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_scale_that_is_no_number_above_0_is_refused(
    name: str,
    scale: float,
    llama: PreTrainedModel,
    scales: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    tensors = save_quantized(llama, tmp_path, "fp8 static", scales=scales)
    tensors[f"{PATH}.{name}"] = torch.tensor(scale)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VllmcError, match=f"{PATH}.{name}") as caught:
        built(tmp_path, "fp8-static")
    assert caught.value.code == "bad-weights"
    assert str(scale) in str(caught.value.context["cause"])


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        (PATH, None),
        ("model.embed_tokens", None),
        (PATH, torch.zeros(32, 16).to(torch.float8_e4m3fn)),
        (PATH, torch.zeros(48, 32).to(torch.float8_e5m2)),
    ],
    ids=["no weight", "no embedding", "another size", "another type"],
)
def test_weights_that_would_be_made_up_are_refused(
    name: str, weight: torch.Tensor | None, llama: PreTrainedModel, tmp_path: Path
) -> None:
    tensors = save_quantized(llama, tmp_path, "fp8 static")
    del tensors[f"{name}.weight"]
    if weight is not None:
        tensors[f"{name}.weight"] = weight
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(VllmcError) as caught:
        built(tmp_path, "fp8-dynamic")
    assert caught.value.code == "bad-weights"


@pytest.mark.parametrize(
    ("layout", "others"), [("compressed int8", "fp8 static"), ("fp8 static", "compressed int8")]
)
def test_weights_of_another_type_than_the_configuration_speaks_of_are_refused(
    layout: str, others: str, llama: PreTrainedModel, tmp_path: Path
) -> None:
    # Each with its own scale: cut off, or rounded, they would be other weights.
    save_quantized(llama, tmp_path, layout)
    found = save_quantized(llama, tmp_path / "others", others)[f"{PATH}.weight"]
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file) | {f"{PATH}.weight": found}
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VllmcError, match=f"{PATH}.weight") as caught:
        built(tmp_path, MODES[layout][0])
    assert caught.value.code == "bad-weights"
    assert str(found.dtype) in str(caught.value.context["cause"])


def test_plain_weights_that_would_be_made_up_are_refused(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[f"{PATH}.weight"]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(VllmcError, match=f"{PATH}.weight") as caught:
        resolve(str(tmp_path)).build("real", CompileSpec())
    assert caught.value.code == "bad-weights"


def test_more_layers_than_the_checkpoint_has_are_refused(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    llama.save_pretrained(tmp_path)
    with pytest.raises(VllmcError, match=r"layers\.2\.") as caught:
        resolve(str(tmp_path), layers=3).build("real", CompileSpec())
    assert caught.value.code == "bad-weights"
    assert "--layers" in str(caught.value.hint)


@pytest.mark.parametrize("kept", ["lm_head", 5, [3], ["re:["]])
def test_a_list_of_modules_that_is_none_is_refused(
    kept: object, llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "compressed static")
    change_config(tmp_path, _with("compressed static", "ignore", value=kept))
    with pytest.raises(VllmcError, match="ignore") as caught:
        _ = resolve(str(tmp_path)).info
    assert caught.value.code == "unsupported-model"


def test_weights_with_scales_that_the_configuration_does_not_speak_of_are_refused(
    llama: PreTrainedModel, tmp_path: Path
) -> None:
    save_quantized(llama, tmp_path, "fp8 static")
    change_config(tmp_path, None)
    with pytest.raises(VllmcError, match="does not say how") as caught:
        resolve(str(tmp_path)).build("real", CompileSpec())
    assert caught.value.code == "bad-weights"


@pytest.mark.parametrize("weights", ["real", "fake"])
def test_a_method_that_makes_another_model_of_it_is_refused(
    weights: Weights, llama: PreTrainedModel, tmp_path: Path
) -> None:
    # Without weights too: what is warmed would not be the program that runs.
    save_quantized(llama, tmp_path, "fp8 static")
    change_config(tmp_path, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(VllmcError, match="gptq") as caught:
        resolve(str(tmp_path)).build(weights, CompileSpec())
    assert caught.value.code == "unsupported-model"


@pytest.mark.parametrize("saved", ["with a head", "without"])
def test_a_checkpoint_of_a_model_with_or_without_its_head_is_read(
    saved: str, tmp_path: Path
) -> None:
    # What is built has none of the first, and one of the second.
    sizes = {"vocab_size": 32, "max_position_embeddings": 16, "hidden_size": 32}
    more = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    if saved == "with a head":
        config = AutoConfig.for_model("bert", **sizes, **more)
        whole, path = AutoModelForMaskedLM.from_config(config), "encoder.layer.0.output.dense"
        name, kept = f"bert.{path}", ["cls", "bert.encoder.layer.0.intermediate"]
    else:
        config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=16)
        whole, name = AutoModelForCausalLM.from_config(config).transformer, "h.0.mlp.c_fc"
        path, kept = f"transformer.{name}", ["h.0.attn"]
    left = [n for n in linears(whole) if any(n.startswith(k) for k in kept)]
    tensors = save_quantized(whole, tmp_path, "compressed static", kept=left)
    change_config(tmp_path, _with("compressed static", "ignore", value=kept))
    made = built(tmp_path, "fp8-static")
    assert torch.equal(
        made.get_submodule(path).weight_scale, tensors[f"{name}.weight_scale"].view(1)
    )
    assert len([m for m in made.modules() if isinstance(m, QuantizedLinear)]) == len(
        linears(whole)
    ) - len(left)
