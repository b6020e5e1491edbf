"""Building the module that is captured or run, with fake or real weights."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from vllmc.core.declare.declaration import declaration_of
from vllmc.core.declare.decorator import support_torch_compile
from vllmc.core.errors import VllmcError
from vllmc.core.models.attention import (
    ATTENTION_NAME,
    ENCODER_ATTENTION_NAME,
    attach_layer_names,
    register_attention,
)
from vllmc.core.models.checkpoint import WEIGHT_SCALE, read_weights
from vllmc.core.models.encoders import encoder_info
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.experts import EXPERTS_NAME, attach_expert_names, register_experts
from vllmc.core.models.model import EncoderInfo, OwnQuantization, Weights
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.fake import fake_weights

_MOST_NAMED: Final = 10

FAKE_EXPERTS_NAME = "batched_mm"
"""The one for a run on fake tensors: `grouped_mm` has no fake for other types than bfloat16."""


def _decoder_inputs(_: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids, positions = torch.zeros(2, 1, 2, dtype=torch.int64)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "logits_indices": torch.zeros(1, dtype=torch.int64),
    }


# The entries of vllmc's own engine, which runs their programs.
_declares_a_decoder = support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {1: "tokens"},
        "position_ids": {1: "tokens"},
        "logits_indices": {0: "rows"},
    },
    at_most_tokens=["rows"],
    example_inputs=_decoder_inputs,
)


@_declares_a_decoder
class DecoderEntry(torch.nn.Module):
    """A causal language model called on a flattened batch, with logits of chosen tokens only."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.selects = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        """`[1, T]`, `[1, T]`, `[B]` (int64) to logits `[B, vocab]`."""
        if self.selects:
            return self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                logits_to_keep=logits_indices,
                use_cache=False,
            ).logits[0]
        output = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        return output.logits[0, logits_indices]


def _encoder_inputs(_: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids, positions = torch.zeros(2, 1, 2, dtype=torch.int64)
    return {"input_ids": ids, "position_ids": positions}


@support_torch_compile(
    dynamic_arg_dims={"input_ids": {1: "tokens"}, "position_ids": {1: "tokens"}},
    is_encoder=True,
    example_inputs=_encoder_inputs,
)
class EncoderEntry(torch.nn.Module):
    """An encoder called on a flattened batch of whole sequences."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """`[1, T]`, `[1, T]` (int64) to the last layer's hidden states `[T, H]`.

        Each sequence's positions begin where the model's own would (`EncoderInfo`).
        """
        return self.model(input_ids=input_ids, position_ids=position_ids).last_hidden_state[0]


@_declares_a_decoder
class PlainEntry(torch.nn.Module):
    """A module of the user's own: `forward(input_ids, position_ids) -> [1, T, vocab]`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        """`[1, T]`, `[1, T]`, `[B]` (int64) to logits `[B, vocab]`."""
        return self.model(input_ids, position_ids)[0, logits_indices]


def build_entry(model: torch.nn.Module, spec: CompileSpec) -> torch.nn.Module:
    """The entry module of `model`, in eval mode, with vllmc's attention and layer names.

    `spec.experts` is what mixtures of experts run on, where a model lets one choose: `fused` is
    vllmc's op, `grouped_mm` Transformers' implementation of that name. Transformers' own loop over
    the experts that were hit cannot be captured: which they are is known only when it runs.

    A module of a class that was declared is its own entry.
    """
    model.eval().requires_grad_(False)
    if declaration_of(model) is not None:
        return model
    entry: torch.nn.Module
    if isinstance(model, PreTrainedModel):
        register_attention()
        register_experts()
        encodes = encoder_of(type(model).__name__, model) is not None
        model.config._attn_implementation = ENCODER_ATTENTION_NAME if encodes else ATTENTION_NAME
        fused = spec.experts == "fused"
        model.config._experts_implementation = EXPERTS_NAME if fused else spec.experts
        entry = EncoderEntry(model) if encodes else DecoderEntry(model)
    else:
        entry = PlainEntry(model)
    attach_layer_names(entry, spec.layer_names, split_kv_update=spec.split_kv_update)
    if spec.experts == "fused":
        attach_expert_names(entry, spec.layer_names)
    return entry


def encoder_of(name: str, model: torch.nn.Module) -> EncoderInfo | None:
    """As `encoder_info`, for a model that was made: one with a head on top is no encoder."""
    if not isinstance(model, PreTrainedModel) or model.base_model is not model:
        return None
    return encoder_info(name, model.config)


@contextmanager
def on_fake_experts(model: torch.nn.Module) -> Iterator[None]:
    """Within it, mixtures of experts of `model`, as `build_entry` left it, take fake tensors."""
    if not isinstance(model, PreTrainedModel):
        yield
        return
    before = model.config._experts_implementation
    model.config._experts_implementation = FAKE_EXPERTS_NAME
    try:
        yield
    finally:
        model.config._experts_implementation = before


_ENTRIES = (DecoderEntry, EncoderEntry, PlainEntry)


def model_of(entry: torch.nn.Module) -> torch.nn.Module:
    """The module that `build_entry` was given."""
    return entry.model if isinstance(entry, _ENTRIES) else entry


# What decides how weights are made is the process's, not the thread's: whether modules initialize
# their parameters, and the state of the random number generator.
_MAKING = threading.RLock()


@contextmanager
def weights_of(weights: Weights, device: str, seed: int) -> Iterator[None]:
    """Within it, modules are made on `device` with fake weights, or with random ones from `seed`.

    One thread at a time is within it.
    """
    with _MAKING, torch.device(device):
        if weights == "fake":
            with fake_weights(), no_init_weights():
                yield
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                yield


def initialize(
    name: str, config: PretrainedConfig, weights: Weights, *, device: str, dtype: str, seed: int
) -> torch.nn.Module:
    """The model of `config` with fake weights, or with random ones drawn from `seed`.

    Raises `VllmcError` (`unsupported-model`).
    """
    if getattr(config, "is_encoder_decoder", False):
        raise unsupported_model(name, f"{type(config).__name__} is an encoder-decoder")
    auto, options = _auto_class(name, config)
    if type(config) not in auto._model_mapping:
        raise unsupported_model(
            name,
            f"Transformers has no causal language model for {type(config).__name__}, and it is no "
            "encoder that vllmc knows",
        )

    def make() -> torch.nn.Module:
        try:
            return auto.from_config(config, dtype=getattr(torch, dtype), **options)
        except (ValueError, ImportError) as error:
            raise unsupported_model(name, str(error).splitlines()[0]) from error

    with weights_of(weights, device, seed):
        return make()


def load_weights(
    name: str, config: PretrainedConfig, source: str, revision: str | None, dtype: str
) -> torch.nn.Module:
    """The model of `config` with the weights of a directory or hub id, on the CPU.

    Raises `VllmcError` (`bad-weights`).
    """
    model, report = _loaded(name, config, source, dtype, revision=revision or "main")
    if getattr(model, "hf_quantizer", None) is not None:
        raise VllmcError(
            "bad-weights",
            f"the weights of {name} stay quantised, and a program of plain ones does not fit them",
            context={"method": config.quantization_config},
            hint="docs/quantization.md says which checkpoints vllmc reads",
        )
    if strange := [key for key in report["unexpected_keys"] if WEIGHT_SCALE in key]:
        raise VllmcError(
            "bad-weights",
            f"the weights of {name} are quantised, and its config.json does not say how",
            context={"scale": min(strange), "of": len(strange)},
            hint="docs/quantization.md says what a quantization_config holds",
        )
    _require_all(name, report)
    return model


def load_dequantized(
    name: str, config: PretrainedConfig, directory: Path, own: OwnQuantization, dtype: str
) -> torch.nn.Module:
    """As `load_weights`, of a directory whose weights are quantised, brought to `dtype`.

    Raises `VllmcError` (`bad-weights`).
    """
    weights = read_weights(directory, own, getattr(torch, dtype))
    model, report = _loaded(name, config, None, dtype, state_dict=weights)
    _require_all(name, report)
    return model


def _loaded(
    name: str, config: PretrainedConfig, source: str | None, dtype: str, **more: Any
) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model, and what Transformers reports of loading it."""
    auto, options = _auto_class(name, config)
    # An auto class reads nothing without a source.
    made = auto if source is not None else auto._model_mapping[type(config)]
    encodes = encoder_info(name, config) is not None
    try:
        with _MAKING, _no_progress_bar(), _heads_unreported() if encodes else nullcontext():
            model, report = made.from_pretrained(
                source,
                config=config,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                **options,
                **more,
            )
    # What Transformers lacks to read a quantisation of its own is an ImportError.
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise VllmcError(
            "bad-weights",
            f"the weights of {name} cannot be loaded",
            context={"cause": str(error).splitlines()[0]},
            hint="check that all files of the model are there; --weights fake needs none",
        ) from error
    return model, report


def _require_all(name: str, report: Mapping[str, Any]) -> None:
    """Refuses a model of which Transformers made up some weights."""
    if missing := sorted(report["missing_keys"]):
        raise VllmcError(
            "bad-weights",
            f"the weights of {name} lack {len(missing)} of its tensors, {missing[0]} for one",
            context={"missing": missing[:_MOST_NAMED]},
            hint="what is made up says nothing: check that all files of the model are there, and "
            "that --layers does not ask for more layers than they hold",
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps Transformers from drawing bars of its own: progress is told to observers."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextmanager
def _heads_unreported() -> Iterator[None]:
    """Keeps Transformers from listing the weights of heads, which an encoder goes without."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _auto_class(name: str, config: PretrainedConfig) -> tuple[Any, dict[str, bool]]:
    """The class of Transformers that makes the model, and options for it."""
    if encoder_info(name, config) is None:
        return AutoModelForCausalLM, {}
    made = AutoModel._model_mapping[type(config)]
    # A pooler comes after what the entry returns, and most checkpoints lack its weights.
    pools = "add_pooling_layer" in inspect.signature(made.__init__).parameters
    return AutoModel, {"add_pooling_layer": False} if pools else {}
