"""Quantised models from a directory to the logits of the compiled program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import tiny_models
import torch
from quantized_reference import PROMPTS, VOCAB, input_scales, logits_of, make_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.graph.layout import Layout
from vllmc.core.job import Job
from vllmc.core.models.built import build_model
from vllmc.core.obtain import Policy
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.calibration import calibrate
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, make_engine

*CALIBRATION, PROMPT = PROMPTS


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in a directory, and what it makes of the prompt in the dtype."""

    directory: Path
    model: PreTrainedModel
    dtype: str
    plain: torch.Tensor
    scales: dict[str, torch.Tensor]


def case_maker(root: Path) -> Callable[[str, str], Case]:
    """Makes each model once below `root`: `make(name, dtype)`."""
    known: dict[tuple[str, str], Case] = {}

    def make(name: str, dtype: str) -> Case:
        if not (root / name).exists():
            make_model(name).save_pretrained(root / name)
        if (name, dtype) not in known:
            model = AutoModelForCausalLM.from_pretrained(
                root / name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
            ).eval()
            known[name, dtype] = Case(
                directory=root / name,
                model=model,
                dtype=dtype,
                plain=logits_of(model, PROMPT),
                scales=input_scales(model, CALIBRATION),
            )
        return known[name, dtype]

    return make


def job_of(case: Case, cache: Path, **changes: Any) -> Job:
    """The job of the case's model; `changes` are fields of the spec, and `layers`."""
    return tiny_models.job_of(case.directory, cache, dtype=case.dtype, **changes)


def warm(job: Job, cache: Path, *, texts: bool = False) -> Ready:
    """The job's program, from the cache or compiled."""
    policy = Policy(force=texts, texts=texts)
    return obtain_program(job, Store(cache), SilentObserver(), policy=policy)


def logits(job: Job, ready: Ready) -> torch.Tensor:
    """What the program makes of the prompt, after each token: `[T, vocab]`, in float64."""
    layout = Layout.from_json(ready.record.program)
    dtype = getattr(torch, job.spec.dtype)
    limits = Limits(vocab_size=VOCAB, max_position=128, dtype=dtype, device="cpu")
    how = partial(
        calibrate,
        prompts=CALIBRATION,
        attention=layout.attention,
        limits=limits,
        encoder=None,
    )
    static = job.spec.quantize == "fp8-static"
    program = open_program(ready, build_model(job.model, job.spec, "real", how if static else None))
    found = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found.append(program(ids, positions, torch.arange(ids.shape[1])))
        return found[-1][rows]

    params = SamplingParams(max_new_tokens=1)
    engine = make_engine(step, layout.attention, [[PROMPT]], params, limits, max_tokens=64)
    engine.generate([PROMPT], params)
    return found[0].double()
