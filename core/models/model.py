"""What the pipeline needs to know of a model, wherever it came from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from vllmc.core.cache.key import Factor
from vllmc.core.spec import CompileSpec, Quantization

if TYPE_CHECKING:  # importing it takes Dynamo and sympy, which a hit does without
    from vllmc.core.declare.calls import Call

Weights: TypeAlias = Literal["fake", "real"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInfo:
    """How an encoder counts the positions of a sequence's tokens.

    From 0 where `padding_id` is None. Else as RoBERTa does: from `padding_id + 1` on, where a
    padding token has the position `padding_id` and is not counted.
    """

    padding_id: int | None = None

    @property
    def first_position(self) -> int:
        """The position of a sequence's first token."""
        return 0 if self.padding_id is None else self.padding_id + 1

    def positions(self, token_ids: Sequence[int]) -> list[int]:
        """The position of each token of a sequence."""
        counted = itertools.accumulate(int(token != self.padding_id) for token in token_ids)
        return [
            self.first_position + count - 1 if token != self.padding_id else token
            for token, count in zip(token_ids, counted, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnQuantization:
    """How the weights of a checkpoint were quantised.

    `modes` are those that they can be run in, the one that they were made for first. `kept` are
    the modules that were left as they were, as the checkpoint names them.
    """

    modes: tuple[Quantization, ...]
    kept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """The scales that a checkpoint has of a linear; `input` is None where it has none of that."""

    weight: float
    input: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Facts for the engine.

    `layers` is the number of attention layers that a capture must show (None: unknown),
    `layer_types` and `sliding_window` (tokens, with the token itself) what the configuration says
    of their windows, `max_position` the longest sequence in tokens, `directory` where its tokenizer
    would be. `device` is where its weights are, of a model that is there already. `encoder` is set
    where every token attends to the whole of its sequence, `quantization` where its weights are
    quantised already.
    """

    dtype: str
    vocab_size: int | None
    max_position: int | None
    layers: int | None
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    directory: Path | None = None
    device: str | None = None
    encoder: EncoderInfo | None = None
    quantization: OwnQuantization | None = None


class Model(Protocol):
    """A model that can be built any number of times."""

    @property
    def name(self) -> str:
        """The name under which the user asked for it."""

    @property
    def info(self) -> ModelInfo:
        """What the engine must know, without building anything."""

    def factors(self) -> tuple[Factor, ...]:
        """The model's identity: cache key factors of the group `model`."""

    @property
    def made_by_code(self) -> bool:
        """Whether its graph may hang on Python values that no factor holds: the user's code's."""

    @property
    def runs_in_engine(self) -> bool:
        """Whether it is a language model that is called as the engine calls one, or an encoder.

        Then what no batch of several sequences could be run with is refused.
        """

    def adapt(self, spec: CompileSpec) -> CompileSpec:
        """The spec by which it can be compiled: an encoder's last range has no end.

        Raises `VllmcError` (`cannot-quantize`, `quantized-weights`) where `spec.quantize` is
        nothing for the model, or for its weights.
        """

    def call(self, entry: torch.nn.Module) -> Call:
        """The call of `entry`, which `build` made, that is captured."""

    def build(self, weights: Weights, spec: CompileSpec, *, seed: int = 0) -> torch.nn.Module:
        """The entry module, of a class that says what it is called with.

        For the engine: `forward(input_ids, position_ids, logits_indices) -> logits`, `[1, T]`,
        `[1, T]`, `[B]` (all int64) to `[B, vocab]`; of an encoder `forward(input_ids,
        position_ids)`, to hidden states `[T, H]`. Real weights are random ones, drawn from `seed`,
        where the model has none of its own, and quantised ones are brought to `dtype`.
        """

    def own_scales(self) -> Mapping[str, Scales]:
        """The scales of its checkpoint, by the paths of the linears that were quantised.

        Empty where none were. Raises `VllmcError` (`bad-weights`).
        """
