"""Tiny models that several test modules save and resolve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from vllmc.core.job import Job, make_job, resolve_spec
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec


def save_llama(directory: Path, *, layers: int) -> Path:
    """The configuration of a Llama with this many layers, saved without weights."""
    LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    ).save_pretrained(directory)
    return directory


def save_decoder(
    directory: Path, model_type: str, fields: Mapping[str, Any], *, spread: float
) -> PreTrainedModel:
    """Saves a decoder with weights that vary, by `spread`: no two of its logits are close."""
    config = AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn(tensor.shape), alpha=spread)
        # Else a tied embedding makes each token its own likeliest successor.
        model.get_input_embeddings().weight.mul_(0.2)
    model.save_pretrained(directory)
    return model


def continued(model: PreTrainedModel, prompt: Sequence[int], tokens: int) -> tuple[int, ...]:
    """What Transformers continues `prompt` with, one whole forward for each token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return tuple(ids[len(prompt) :])


def job_of(directory: Path, cache: Path, *, layers: int | None = None, **changes: Any) -> Job:
    """The job of the model saved in `directory`; `changes` are fields of the spec."""
    model = resolve(str(directory), layers=layers)
    spec = resolve_spec(CompileSpec(**changes), model)
    return make_job(model, spec, environment={}, cache_dir=cache, origins={})
