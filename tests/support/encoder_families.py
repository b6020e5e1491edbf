"""Tiny encoders of every family that vllmc knows, and what eager Transformers makes of a prompt.

Read by tests and, to write docs/models.md, by scripts/gen_models_doc.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.job import Job, make_job, resolve_spec
from vllmc.core.models.resolve import resolve
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.embeddings import Embedder
from vllmc.core.spec import CompileSpec

VOCAB = 128
MAX_POSITION = 64
# A window of 4 tokens on either side ends within most; all seven are longer than MAX_POSITION.
PROMPTS = tuple(
    torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (19, 1, 7, 33, 2, 12, 5)
)

BATCHES = (1, 2, 7)

_FIELDS = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITION,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_AFTER_PADDING = {**_FIELDS, "bos_token_id": 0, "pad_token_id": 1}


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """A tiny configuration. `core` marks those that go through the command line in tests."""

    name: str
    exercises: str
    config: Mapping[str, Any]
    core: bool = False


def _family(
    name: str, exercises: str, fields: Mapping[str, Any], *, core: bool = False, **more: Any
) -> EncoderFamily:
    config = {"model_type": name, **fields, **more}
    return EncoderFamily(name=name, exercises=exercises, config=config, core=core)


ENCODERS = (
    _family("albert", "one layer's weights in all layers", _FIELDS, embedding_size=16),
    _family("bert", "learned positions, token types, norms after", _FIELDS, core=True),
    _family("camembert", "positions after the padding token's id", _AFTER_PADDING),
    _family("data2vec-text", "positions after the padding token's id", _AFTER_PADDING),
    _family(
        "distilbert",
        "no token types",
        _FIELDS,
        core=True,
        dim=32,
        hidden_dim=48,
        n_layers=3,
        n_heads=4,
        sinusoidal_pos_embds=True,
    ),
    _family("electra", "smaller embeddings, projected", _FIELDS, embedding_size=16),
    _family("ernie", "task types", _FIELDS, use_task_id=True),
    _family(
        "eurobert",
        "rotary positions, grouped queries, RMSNorm",
        _FIELDS,
        num_key_value_heads=2,
        mask_token_id=4,
    ),
    _family("gte", "rotary positions, gated GELU", _AFTER_PADDING),
    _family("jina_embeddings_v3", "rotary positions, token types", _AFTER_PADDING),
    _family(
        "modernbert",
        "windows on either side, other rotary frequencies in them",
        _FIELDS,
        core=True,
        local_attention=8,
        cls_token_id=1,
        sep_token_id=2,
    ),
    _family("nomic_bert", "rotary positions, token types, gated SiLU", _FIELDS),
    _family("roberta", "positions after the padding token's id", _AFTER_PADDING, core=True),
    _family("roberta-prelayernorm", "norms before", _AFTER_PADDING),
    _family("xlm-roberta", "positions after the padding token's id", _AFTER_PADDING),
    _family("xlm-roberta-xl", "norms before", _AFTER_PADDING),
)


def make_encoder(family: EncoderFamily) -> PreTrainedModel:
    """The family's model with weights of its own: no norm is one, no bias is zero."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(
        AutoConfig.for_model(**family.config), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            scale = 0.3 if tensor.dim() > 1 else 0.2
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=scale)
    return model.eval()


def save_encoder(family: EncoderFamily, directory: Path) -> PreTrainedModel:
    """Saves the family's model with its weights, and returns it."""
    model = make_encoder(family)
    model.save_pretrained(directory)
    return model


def hidden_states(model: PreTrainedModel, prompt: Sequence[int]) -> torch.Tensor:
    """The last hidden states `[tokens, H]` of one prompt alone, by eager Transformers."""
    with torch.no_grad():
        states: torch.Tensor = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    return states


def obtain_encoder(directory: Path, cache: Path, backend: str) -> tuple[Job, Ready]:
    """The program of the encoder saved in `directory`, compiled into the cache directory."""
    model = resolve(str(directory))
    spec = resolve_spec(CompileSpec(device="cpu", backend=backend), model)
    job = make_job(model, spec, environment={}, cache_dir=cache, origins={})
    return job, obtain_program(job, Store(cache), SilentObserver())


def embeddings(job: Job, ready: Ready) -> dict[int, torch.Tensor]:
    """The mean embeddings `[n, H]` of the first n prompts in one batch, for each n of BATCHES."""
    entry = job.model.build("real", job.spec)
    encoder = job.model.info.encoder
    assert encoder is not None
    program = open_program(ready, entry)
    embedder = Embedder(step=program, encoder=encoder, pooling="mean", device="cpu")
    return {n: embedder.embed(PROMPTS[:n]) for n in BATCHES}


def same_embeddings(model: PreTrainedModel, found: Mapping[int, torch.Tensor]) -> bool:
    """Whether `found` (as `embeddings` returns them) is what eager Transformers gives `model`."""
    alone = torch.stack([hidden_states(model, prompt).mean(dim=0) for prompt in PROMPTS])
    return all(torch.allclose(e, alone[:n], rtol=1e-5, atol=1e-5) for n, e in found.items())
