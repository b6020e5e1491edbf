"""Tiny models run by compiled programs on any device, with and without recorded steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny_models import continued, save_decoder
from transformers import PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.events import SilentObserver
from vllmc.core.graph.layout import Layout
from vllmc.core.job import Job
from vllmc.core.models.built import build_model
from vllmc.core.obtain import Policy
from vllmc.core.pipeline import Ready, obtain_program, open_program
from vllmc.core.runtime.calibration import calibrate, random_prompts
from vllmc.core.runtime.cuda_graphs import DEFAULT_SIZES, GraphReport, Recorder
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, make_engine, run_workload

VOCAB = 96
NEW_TOKENS = 12
PROMPTS = ([5, 9, 31, 7, 7, 60, 12, 80, 3], [44], [10, 20, 30, 40], [2, 3])
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 16,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


class Replayed:
    """Stands in for CUDA graphs on any device: a replay calls again, with what it was given then.

    As with a graph, results lie where they were when it was recorded, and hold nothing before.
    """

    def __init__(self) -> None:
        self.recorded = 0

    def record(
        self, run: Callable[[], Sequence[Any]]
    ) -> tuple[Sequence[Any], Callable[[], object]]:
        self.recorded += 1
        results = [r.clone() if isinstance(r, torch.Tensor) else r for r in run()]

        def replay() -> None:
            for place, value in zip(results, run(), strict=True):
                if isinstance(place, torch.Tensor):
                    place.copy_(value)

        for place in results:
            if isinstance(place, torch.Tensor):
                place.fill_(math.nan if place.is_floating_point() else 0)
        return results, replay

    def used_bytes(self) -> int:
        return self.recorded * 1000


def save(name: str, directory: Path) -> PreTrainedModel:
    """Saves a tiny model of the family."""
    return save_decoder(directory, name, _SHAPE | FAMILIES[name], spread=0.1)


def expected(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """What Transformers continues each prompt with."""
    return [continued(model, prompt, NEW_TOKENS) for prompt in PROMPTS]


def warm(job: Job, cache: Path, *, may_compile: bool = True) -> Ready:
    """The job's program, from the cache or compiled; captured without weights."""
    return obtain_program(
        job, Store(cache), SilentObserver(), policy=Policy(may_compile=may_compile)
    )


def entry_of(job: Job, ready: Ready) -> torch.nn.Module:
    """The model with its weights, calibrated where it is to be."""
    how = partial(
        calibrate,
        prompts=random_prompts(limits_of(job)),
        attention=Layout.from_json(ready.record.program).attention,
        limits=limits_of(job),
        encoder=None,
    )
    static = job.spec.quantize == "fp8-static"
    return build_model(job.model, job.spec, "real", how if static else None)


def limits_of(job: Job) -> Limits:
    return Limits(
        vocab_size=VOCAB,
        max_position=64,
        dtype=getattr(torch, job.spec.dtype),
        device=job.spec.device,
    )


def generated(
    job: Job,
    ready: Ready,
    recorder: Recorder | None = None,
    *,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    graph_sizes: Sequence[int] = DEFAULT_SIZES,
    batch_sizes: Sequence[int] = (),
) -> tuple[list[tuple[int, ...]], GraphReport | None]:
    """The greedy continuation of each prompt, and what was recorded."""
    program = open_program(ready, entry_of(job, ready), recorder=recorder, graph_sizes=graph_sizes)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    result = run_workload(program, prompts, params, limits_of(job), batch_sizes=batch_sizes)
    report = None if program.graphs is None else program.graphs.report()
    return [output.token_ids for output in result.outputs], report


def logits(job: Job, ready: Ready, prompt: Sequence[int]) -> torch.Tensor:
    """What the program makes of the prompt after each token: `[T, vocab]`, float64, on the CPU."""
    program = open_program(ready, entry_of(job, ready))
    found = []

    def step(ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found.append(program(ids, positions, torch.arange(ids.shape[1], device=ids.device)))
        return found[-1][rows]

    params = SamplingParams(max_new_tokens=1)
    engine = make_engine(
        step,
        program.layout.attention,
        [[prompt]],
        params,
        limits_of(job),
        max_tokens=len(prompt),
        experts=program.experts,
    )
    engine.generate([prompt], params)
    return found[0].cpu().double()
