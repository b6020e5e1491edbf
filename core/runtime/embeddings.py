"""Embeddings: whole prompts through an encoder as one flattened batch, a vector for each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from vllmc.core.diagnose.live import watch_recompiles
from vllmc.core.diagnose.recompiles import Recompile
from vllmc.core.models.model import EncoderInfo
from vllmc.core.models.pooling import Pooling
from vllmc.core.runtime.workload import repeat
from vllmc.kernels.copies import sent_numbers
from vllmc.kernels.forward_context import forward_context, whole_sequences

Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""`(input_ids [1, T], position_ids [1, T]) -> hidden states [T, H]`; arguments int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingResult:
    """The embeddings `[prompts, H]` of the last batch size: float32, on the CPU.

    `seconds` and `tokens` are sums over all batch sizes.
    """

    embeddings: torch.Tensor
    recompiles: tuple[Recompile, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """An encoder given as a step, and how it counts positions and pools."""

    step: Step
    encoder: EncoderInfo
    pooling: Pooling
    device: str

    def embed(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The embeddings `[prompts, H]` of `prompts` (token ids, none empty), run as one batch."""
        ids = [token for prompt in prompts for token in prompt]
        positions = [p for prompt in prompts for p in self.encoder.positions(prompt)]
        lengths = [len(prompt) for prompt in prompts]
        with torch.no_grad(), forward_context(whole_sequences(lengths)):
            states = self.step(
                sent_numbers([ids], self.device),
                sent_numbers([positions], self.device),
            )
        states = states.to("cpu", torch.float32)
        return torch.stack([self._pool(part) for part in states.split(lengths)])

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """The embedding of one sequence, from its hidden states `[tokens, H]`."""
        if self.pooling == "mean":
            return states.mean(dim=0)
        return states[0 if self.pooling == "cls" else -1]


def run_embeddings(
    embedder: Embedder, prompts: Sequence[Sequence[int]], *, batch_sizes: Sequence[int] = ()
) -> EmbeddingResult:
    """Embeds `prompts`, repeated or cut to each of `batch_sizes` (none: as they are)."""
    batches = [repeat(prompts, size) for size in batch_sizes] or [list(prompts)]
    started = time.perf_counter()
    with watch_recompiles() as report:
        results = [embedder.embed(batch) for batch in batches]
    return EmbeddingResult(
        embeddings=results[-1],
        recompiles=report.recompiles,
        tokens=sum(len(prompt) for batch in batches for prompt in batch),
        seconds=time.perf_counter() - started,
    )
