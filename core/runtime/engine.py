"""A small generation engine: continuous batching over a paged KV cache.

Each step runs the new tokens of several sequences as one flattened batch. A prompt and a
continuation are the same to it: a sequence has tokens, of which some are computed; a step computes
more of them, and where it reaches the last one a token is sampled. So prompts are prefilled in
chunks, and chunks share steps with decodes, without either being a case of its own.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch

from vllmc.core.errors import VllmcError
from vllmc.core.runtime.sampler import Sampler, SamplingParams, TokenLogprobs
from vllmc.core.spec import CompileRange
from vllmc.kernels.copies import sent_numbers
from vllmc.kernels.experts import Experts
from vllmc.kernels.forward_context import (
    AttentionMetadata,
    ForwardContext,
    SequenceSpan,
    forward_context,
)
from vllmc.kernels.kv_cache import (
    BlockAllocator,
    BlockTable,
    KVCacheSpec,
    LayerCache,
    OutOfBlocksError,
    blocks_needed,
)

Step: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""`(ids [1, T], positions [1, T], logits_indices [B]) -> logits [B, vocab]`; arguments int64."""

FinishReason: TypeAlias = Literal["length", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The engine's limits, and where its caches are.

    A step holds at most `max_tokens_per_step` tokens, and a number that one of `token_counts` holds
    (none: any) where there are enough tokens for one. A prompt and its continuation hold at most
    `max_position` tokens (None: no limit), each below `vocab_size`. The cache of each layer holds
    `num_blocks` blocks of `block_size` tokens, in `dtype` on `device`.
    """

    vocab_size: int
    max_position: int | None
    max_tokens_per_step: int
    token_counts: tuple[CompileRange, ...] = ()
    num_blocks: int
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One prompt's continuation.

    `token_ids` are the generated tokens, a stop token included; `logprobs` has one entry for each
    if they were asked for. `finish_reason` is `stop` after a stop token, else `length`.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprobs, ...] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """What was computed and how long it took, in tokens and seconds.

    Prefill is the computation of prompt tokens, decode that of generated ones (of which the last
    is never fed back). A step that holds both is divided by their numbers. `first_token_seconds`
    is the time until the first token of any prompt, 0 when none was generated.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    first_token_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """The continuations in the order of the prompts."""

    outputs: tuple[Output, ...]
    timings: Timings


class Engine:
    """Generates with a model given as one step function, and its attention layers' cache specs.

    `experts` are those of its mixture layers by layer name, if its ops look for them.
    """

    def __init__(
        self,
        step: Step,
        kv_specs: Iterable[KVCacheSpec],
        config: EngineConfig,
        experts: Mapping[str, Experts] = MappingProxyType({}),
    ) -> None:
        self._step = step
        self._config = config
        self._experts = experts
        self._caches = {
            spec.layer_name: LayerCache.allocate(
                spec,
                config.num_blocks * config.block_size,
                dtype=config.dtype,
                device=config.device,
            )
            for spec in kv_specs
        }

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> GenerationResult:
        """Continues each prompt (token ids) by up to `params.max_new_tokens` tokens.

        Prompts that do not fit the cache beside the others wait until some are done. Raises
        `VllmcError`, before anything is computed: `empty-prompt`, `bad-token-id`,
        `prompt-too-long`, `out-of-blocks` (a prompt that the empty cache could not hold).
        """
        config = self._config
        check_prompts(
            prompts,
            params.max_new_tokens,
            vocab_size=config.vocab_size,
            max_position=config.max_position,
        )
        for prompt in prompts:
            needed = blocks_needed(_stored_tokens(prompt, params.max_new_tokens), config.block_size)
            if params.max_new_tokens and needed > config.num_blocks:
                raise OutOfBlocksError(needed, config.num_blocks)
        sequences = [_Sequence(prompt, params) for prompt in prompts]
        # Nothing is differentiated; compiled pieces were captured under `no_grad`, and under
        # `inference_mode` would be handed tensors of another kind.
        with torch.no_grad():
            run = _Run(self._step, self._caches, self._experts, self._config, params)
            timings = run.generate(sequences)
        return GenerationResult(outputs=tuple(s.output() for s in sequences), timings=timings)


def check_prompts(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    *,
    vocab_size: int,
    max_position: int | None,
    purpose: str = "",
) -> None:
    """Whether a model can continue each prompt (token ids) by `new_tokens` tokens.

    `purpose` says in errors what they are for, where that is not plain.

    Raises `VllmcError`: `empty-prompt`, `bad-token-id`, `prompt-too-long`.
    """
    for number, prompt in enumerate(prompts):
        called = f"prompt {number}{purpose}"
        if not prompt:
            raise VllmcError(
                "empty-prompt",
                f"{called} holds no tokens",
                context={"prompt": number},
                hint="give at least one token, such as the model's beginning-of-sequence token",
            )
        strange = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if strange is not None:
            raise VllmcError(
                "bad-token-id",
                f"{called} holds the token id {strange}; the model's vocabulary has "
                f"{vocab_size} tokens, from 0",
                context={"prompt": number, "token_id": strange, "vocab_size": vocab_size},
                hint="tokenize with this model's own tokenizer",
            )
        total = len(prompt) + new_tokens
        if max_position is not None and total > max_position:
            longer = f", with {new_tokens} new ones {total}" if new_tokens else ""
            raise VllmcError(
                "prompt-too-long",
                f"{called} has {len(prompt)} tokens{longer}; the model's maximum is {max_position}",
                context={
                    "prompt": number,
                    "prompt_tokens": len(prompt),
                    "new_tokens": new_tokens,
                    "max_position": max_position,
                },
                hint="shorten the prompt" + (" or generate fewer tokens" if new_tokens else ""),
            )


def _stored_tokens(prompt: Sequence[int], new_tokens: int) -> int:
    """How many tokens of a sequence are stored at most: the last one generated never is."""
    return len(prompt) + new_tokens - 1


class _Sequence:
    """A prompt and what has been generated after it. `tokens[:computed]` are in the cache."""

    def __init__(self, prompt: Sequence[int], params: SamplingParams) -> None:
        self.prompt_len = len(prompt)
        self.tokens = list(prompt)
        self.computed = 0
        self.table: BlockTable | None = None
        self.finish_reason: FinishReason | None = "length" if not params.max_new_tokens else None
        self._params = params
        self._logprobs: list[TokenLogprobs] = []

    def append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Adds a generated token, and finishes the sequence if it is the last."""
        self.tokens.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if not self._params.ignore_eos and token_id in self._params.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) - self.prompt_len == self._params.max_new_tokens:
            self.finish_reason = "length"

    def output(self) -> Output:
        assert self.finish_reason is not None
        return Output(
            prompt_ids=tuple(self.tokens[: self.prompt_len]),
            token_ids=tuple(self.tokens[self.prompt_len :]),
            finish_reason=self.finish_reason,
            logprobs=tuple(self._logprobs) if self._params.logprobs is not None else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """The tokens of one step, and the sequences that a token is sampled for after it."""

    ids: list[int]
    positions: list[int]
    slots: list[int]
    spans: tuple[SequenceSpan, ...]
    logits_indices: list[int]
    sampled: tuple[_Sequence, ...]
    prefill_tokens: int


class _Run:
    """One call of `generate`: which sequences run, which wait, and what has taken how long."""

    def __init__(
        self,
        step: Step,
        caches: dict[str, LayerCache],
        experts: Mapping[str, Experts],
        config: EngineConfig,
        params: SamplingParams,
    ) -> None:
        self._step = step
        self._caches = caches
        self._experts = experts
        self._config = config
        self._max_new_tokens = params.max_new_tokens
        self._sampler = Sampler(params, config.device)
        self._allocator = BlockAllocator(config.num_blocks)
        self._running: list[_Sequence] = []

    def generate(self, sequences: Iterable[_Sequence]) -> Timings:
        waiting = deque(s for s in sequences if s.finish_reason is None)
        prefill_tokens = decode_tokens = 0
        prefill_seconds = decode_seconds = first_token_seconds = 0.0
        start = now = time.perf_counter()
        while waiting or self._running:
            self._admit(waiting)
            batch = self._next_batch()
            self._compute(batch)
            self._retire()
            before, now = now, time.perf_counter()
            total = len(batch.ids)
            prefill_tokens += batch.prefill_tokens
            decode_tokens += total - batch.prefill_tokens
            prefill_seconds += (now - before) * batch.prefill_tokens / total
            decode_seconds += (now - before) * (total - batch.prefill_tokens) / total
            if batch.sampled and not first_token_seconds:
                first_token_seconds = now - start
        return Timings(
            prefill_tokens=prefill_tokens,
            prefill_seconds=prefill_seconds,
            decode_tokens=decode_tokens,
            decode_seconds=decode_seconds,
            first_token_seconds=first_token_seconds,
        )

    def _admit(self, waiting: deque[_Sequence]) -> None:
        """Starts waiting sequences, in order, while there are blocks for all that they may need.

        Reserving the whole at once never has to evict a sequence that runs, and keeps its blocks
        side by side.
        """
        config = self._config
        while waiting:
            stored = _stored_tokens(waiting[0].tokens, self._max_new_tokens)
            needed = blocks_needed(stored, config.block_size)
            if needed > self._allocator.num_free:
                return
            sequence = waiting.popleft()
            ids = self._allocator.allocate(needed)
            sequence.table = BlockTable.of(ids, config.block_size, config.device)
            self._running.append(sequence)

    def _next_batch(self) -> _Batch:
        """New tokens of the running sequences, the oldest sequence first, up to a step's limit."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[SequenceSpan] = []
        logits_indices: list[int] = []
        sampled: list[_Sequence] = []
        prefill_tokens = 0
        limit = self._step_tokens(sum(len(s.tokens) - s.computed for s in self._running))
        for sequence in self._running:
            begin = sequence.computed
            count = min(len(sequence.tokens) - begin, limit - len(ids))
            if not count:
                break
            end, table = begin + count, sequence.table
            assert table is not None, "a sequence runs without blocks"
            spans.append(
                SequenceSpan(query_start=len(ids), query_len=count, total_len=end, table=table)
            )
            ids.extend(sequence.tokens[begin:end])
            positions.extend(range(begin, end))
            slots.extend(table.slots[begin:end])
            prefill_tokens += max(0, min(end, sequence.prompt_len) - begin)
            if end == len(sequence.tokens):
                logits_indices.append(len(ids) - 1)
                sampled.append(sequence)
            sequence.computed = end
        return _Batch(
            ids=ids,
            positions=positions,
            slots=slots,
            spans=tuple(spans),
            logits_indices=logits_indices,
            sampled=tuple(sampled),
            prefill_tokens=prefill_tokens,
        )

    def _step_tokens(self, new: int) -> int:
        """How many of `new` tokens the next step takes: as many as a program is compiled for."""
        most = min(new, self._config.max_tokens_per_step)
        held = [min(r.end, most) for r in self._config.token_counts if r.start <= most]
        return max(held, default=most)

    def _compute(self, batch: _Batch) -> None:
        """Runs the model on `batch` and appends the sampled tokens."""
        device = self._config.device
        metadata = AttentionMetadata(
            slots=sent_numbers(batch.slots, device),
            sequences=batch.spans,
        )
        # One row of logits even where none is wanted: no program is asked for an empty result.
        rows = batch.logits_indices or [len(batch.ids) - 1]
        context = ForwardContext(metadata=metadata, caches=self._caches, experts=self._experts)
        with forward_context(context):
            logits = self._step(
                sent_numbers([batch.ids], device),
                sent_numbers([batch.positions], device),
                sent_numbers(rows, device),
            )
        if not batch.sampled:
            return
        result = self._sampler.sample(logits)
        logprobs = result.logprobs or (None,) * len(result.token_ids)
        for sequence, token, logprob in zip(batch.sampled, result.token_ids, logprobs, strict=True):
            sequence.append(token, logprob)

    def _retire(self) -> None:
        """Drops the finished sequences from the batch and frees their blocks."""
        if all(sequence.finish_reason is None for sequence in self._running):
            return
        for sequence in self._running:
            if sequence.finish_reason is not None:
                assert sequence.table is not None, "a sequence ran without blocks"
                self._allocator.release(sequence.table.ids)
        self._running = [s for s in self._running if s.finish_reason is None]
