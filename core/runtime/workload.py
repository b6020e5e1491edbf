"""A workload for a program: prompts, run at one batch size after another, with recompiles seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from vllmc.core.diagnose.live import watch_recompiles
from vllmc.core.diagnose.recompiles import Recompile
from vllmc.core.graph.layout import AttentionSite
from vllmc.core.runtime.engine import Engine, EngineConfig, Output, Step, Timings
from vllmc.core.runtime.program import Program
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.spec import CompileRange
from vllmc.kernels.experts import Experts
from vllmc.kernels.kv_cache import KVCacheSpec, blocks_needed

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model allows: `vocab_size` tokens, sequences of `max_position` (None: any)."""

    vocab_size: int
    max_position: int | None
    dtype: torch.dtype
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadResult:
    """The outputs of the last batch size; timings are sums, `first_token_seconds` the first's."""

    outputs: tuple[Output, ...]
    timings: tuple[Timings, ...]
    recompiles: tuple[Recompile, ...]
    seconds: float


def run_workload(
    program: Program,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    limits: Limits,
    *,
    batch_sizes: Sequence[int] = (),
) -> WorkloadResult:
    """Generates for `prompts`, repeated or cut to each of `batch_sizes` (none: as they are).

    Raises what `Engine.generate` raises.
    """
    batches = [repeat(prompts, size) for size in batch_sizes] or [list(prompts)]
    engine = make_engine(
        program,
        program.layout.attention,
        batches,
        params,
        limits,
        max_tokens=program.max_tokens,
        token_counts=program.ranges,
        experts=program.experts,
    )
    started = time.perf_counter()
    with watch_recompiles() as report:
        results = [engine.generate(batch, params) for batch in batches]
    return WorkloadResult(
        outputs=results[-1].outputs,
        timings=tuple(result.timings for result in results),
        recompiles=report.recompiles,
        seconds=time.perf_counter() - started,
    )


def repeat(prompts: Sequence[Sequence[int]], size: int) -> list[Sequence[int]]:
    """`size` prompts: those given, over and over."""
    return list(itertools.islice(itertools.cycle(prompts), size))


def make_engine(
    step: Step,
    attention: Sequence[AttentionSite],
    batches: Sequence[Sequence[Sequence[int]]],
    params: SamplingParams,
    limits: Limits,
    *,
    max_tokens: int,
    token_counts: tuple[CompileRange, ...] = (),
    experts: Mapping[str, Experts] = MappingProxyType({}),
) -> Engine:
    """An engine for `step`, with caches that are large enough for each of `batches`.

    `max_tokens` and `token_counts` are what a step may hold, as in `EngineConfig`; `experts` are
    those of its mixtures, as in `Engine`.
    """
    needed = max(
        sum(blocks_needed(len(p) + params.max_new_tokens, BLOCK_SIZE) for p in batch)
        for batch in batches
    )
    return Engine(
        step,
        [
            KVCacheSpec(
                layer_name=site.layer,
                num_kv_heads=site.kv_heads,
                key_size=site.key_size,
                value_size=site.value_size,
            )
            for site in attention
        ],
        EngineConfig(
            vocab_size=limits.vocab_size,
            max_position=limits.max_position,
            max_tokens_per_step=max_tokens,
            token_counts=token_counts,
            num_blocks=max(needed, 1),
            block_size=BLOCK_SIZE,
            dtype=limits.dtype,
            device=limits.device,
        ),
        experts,
    )
