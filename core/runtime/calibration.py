"""Calibration: how large what each linear is given gets, while a model runs prompts as it is."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Final

import torch

from vllmc.core.declare.session import plainly
from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import AttentionSite
from vllmc.core.models.building import model_of
from vllmc.core.models.expert_modules import experts_in
from vllmc.core.models.model import EncoderInfo
from vllmc.core.models.watched import watching
from vllmc.core.runtime.embeddings import Embedder
from vllmc.core.runtime.sampler import SamplingParams
from vllmc.core.runtime.workload import Limits, make_engine

_MAX_TOKENS: Final = 2048
"""How many tokens are computed at once."""

_PROMPTS: Final = 8
_LENGTH: Final = 64


def random_prompts(limits: Limits) -> tuple[tuple[int, ...], ...]:
    """Prompts of random tokens, always the same: 8 of 64 tokens, or of as many as the model takes.

    For want of better ones: what a model makes of them may be larger or smaller than of text.
    """
    # Calibrating generates a token after them.
    length = min(_LENGTH, (limits.max_position or _LENGTH + 1) - 1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(limits.vocab_size, (_PROMPTS, length), generator=generator)
    return tuple(map(tuple, ids.tolist()))


def in_batches(prompts: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """`prompts` in groups of at most 2048 tokens, one that is longer alone.

    A cache for all of a long file of prompts would take more memory than the model.
    """
    batches: list[list[Sequence[int]]] = [[]]
    tokens = 0
    for prompt in prompts:
        tokens += len(prompt)
        if tokens > _MAX_TOKENS and batches[-1]:
            batches.append([])
            tokens = len(prompt)
        batches[-1].append(prompt)
    return batches


def calibrate(
    entry: torch.nn.Module,
    paths: Collection[str],
    prompts: Sequence[Sequence[int]],
    *,
    attention: Sequence[AttentionSite],
    limits: Limits,
    encoder: EncoderInfo | None,
) -> dict[str, float]:
    """The largest magnitude of what each module was given, by its path below the model.

    `entry` is run as it is: nothing is compiled. `attention` are the layers that need a cache,
    `encoder` is set for an encoder. Raises `VllmcError`: `not-finite`, and what `Engine.generate`
    raises.
    """
    largest = dict.fromkeys(paths, 0.0)

    def see(path: str, x: torch.Tensor) -> None:
        amax = float(x.abs().amax())
        if not math.isfinite(amax):
            raise VllmcError(
                "not-finite",
                f"{path} is given infinities or NaN",
                hint="try --dtype float32, and check the model's weights",
            )
        largest[path] = max(largest[path], amax)

    with plainly(), watching(model_of(entry), paths, see):
        if encoder is not None:
            embedder = Embedder(step=entry, encoder=encoder, pooling="mean", device=limits.device)
            for prompt in prompts:
                embedder.embed([prompt])
        else:
            params = SamplingParams(max_new_tokens=1)
            # What does not fit its caches waits.
            engine = make_engine(
                entry,
                attention,
                in_batches(prompts),
                params,
                limits,
                max_tokens=_MAX_TOKENS,
                experts=experts_in(entry),
            )
            engine.generate(prompts, params)
    return largest
