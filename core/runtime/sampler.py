"""Choosing the next token of each sequence from its logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllmc.core.errors import UsageError
from vllmc.kernels.logprobs import GatheredLogprobs, gather_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a batch of prompts is continued.

    `temperature` 0 is greedy. `top_p` keeps the fewest most probable tokens whose probabilities
    add up to it. `seed` makes sampling repeatable (None: a new seed each time). `logprobs` asks for
    each token's log-probability and the K most probable ones (None: neither). A token of
    `stop_token_ids` ends its sequence, unless `ignore_eos`. Raises `UsageError` (`bad-sampling`).
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise _bad(f"{self.max_new_tokens} new tokens", "give a number of at least 0")
        # Written so that a NaN fails.
        if not 0.0 <= self.temperature < float("inf"):
            raise _bad(f"a temperature of {self.temperature}", "give one of at least 0 (greedy)")
        if not 0.0 < self.top_p <= 1.0:
            raise _bad(f"a top-p of {self.top_p}", "give one above 0 and up to 1")
        if self.logprobs is not None and self.logprobs < 0:
            raise _bad(f"{self.logprobs} log-probabilities", "give a number of at least 0")


def _bad(what: str, hint: str) -> UsageError:
    return UsageError("bad-sampling", f"{what} cannot be sampled with", hint=hint)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities under the model, before temperature and top-p.

    `logprob` is that of the token chosen and `rank` its place among all, 1 the most probable; `top`
    the most probable tokens with their log-probabilities, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """One token for each row of logits, and their log-probabilities if they were asked for."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None


class Sampler:
    """Samples by `params`, from one generator: what it returns depends on all calls before."""

    def __init__(self, params: SamplingParams, device: torch.device | str) -> None:
        self._params = params
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: torch.Tensor) -> Sampled:
        """Chooses one token for each row of `logits` `[B, vocab]` (any floating dtype)."""
        logits = logits.float()
        chosen = logits.argmax(dim=-1) if self._params.temperature == 0.0 else self._draw(logits)
        token_ids = tuple(chosen.tolist())
        if self._params.logprobs is None:
            return Sampled(token_ids=token_ids, logprobs=None)
        gathered = gather_logprobs(logits, chosen, self._params.logprobs)
        return Sampled(token_ids=token_ids, logprobs=_token_logprobs(token_ids, gathered))

    def _draw(self, logits: torch.Tensor) -> torch.Tensor:
        """`[B]` token ids, drawn with temperature and top-p."""
        # Relative to the best logit, so that a small temperature does not overflow.
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / self._params.temperature
        probs = scaled.softmax(dim=-1)
        if self._params.top_p == 1.0:
            return torch.multinomial(probs, 1, generator=self._generator)[:, 0]
        probs, order = probs.sort(dim=-1, descending=True)
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= self._params.top_p, 0.0)
        drawn = torch.multinomial(probs, 1, generator=self._generator)
        return order.gather(1, drawn)[:, 0]


def _token_logprobs(
    token_ids: tuple[int, ...], gathered: GatheredLogprobs
) -> tuple[TokenLogprobs, ...]:
    rows = zip(
        token_ids,
        gathered.token_logprobs.tolist(),
        gathered.token_ranks.tolist(),
        gathered.top_ids.tolist(),
        gathered.top_logprobs.tolist(),
        strict=True,
    )
    return tuple(
        TokenLogprobs(
            token_id=token, logprob=logprob, rank=rank, top=tuple(zip(ids, values, strict=True))
        )
        for token, logprob, rank, ids, values in rows
    )
