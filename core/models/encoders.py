"""Which Transformers models are encoders, and how they count positions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.model import EncoderInfo

if TYPE_CHECKING:
    from transformers.configuration_utils import PretrainedConfig

PositionRule: TypeAlias = Literal["from-zero", "after-padding"]

ENCODERS: Final[Mapping[str, PositionRule]] = MappingProxyType(
    {
        "albert": "from-zero",
        "bert": "from-zero",
        "camembert": "after-padding",
        "data2vec-text": "after-padding",
        "distilbert": "from-zero",
        "electra": "from-zero",
        "ernie": "from-zero",
        "eurobert": "from-zero",
        "gte": "from-zero",
        "jina_embeddings_v3": "from-zero",
        "modernbert": "from-zero",
        "nomic_bert": "from-zero",
        "roberta": "after-padding",
        "roberta-prelayernorm": "after-padding",
        "xlm-roberta": "after-padding",
        "xlm-roberta-xl": "after-padding",
    }
)
"""The families of encoders, by `model_type`, with how each counts positions.

Each was compared with eager Transformers (tests/core/models/test_encoders.py). Others
have an attention of their own, masks, or something that mixes the tokens of a batch.
"""

_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")


def encoder_info(name: str, config: PretrainedConfig) -> EncoderInfo | None:
    """How the encoder of `config` counts positions; None where it is no encoder.

    A model is an encoder if it is of a family in `ENCODERS`, unless its configuration says
    `is_decoder`: BERT and its kin can be either, and their attention is causal then. `name` is for
    errors. Raises `VllmcError` (`unsupported-model`) where the configuration contradicts itself:
    `is_decoder` is false, and `architectures` names a causal language model.
    """
    rule = ENCODERS.get(config.model_type)
    if rule is None or getattr(config, "is_decoder", False):
        return None
    architectures = config.architectures or ()
    if causal := [a for a in architectures if a.endswith(_CAUSAL_HEADS)]:
        raise unsupported_model(
            name,
            f"its configuration names {causal[0]}, and does not say is_decoder",
            hint="a causal language model of this family has is_decoder true; an encoder names "
            "another architecture",
        )
    if rule == "from-zero":
        return EncoderInfo()
    padding = getattr(config, "pad_token_id", None)
    if padding is None:
        raise unsupported_model(
            name, "it counts positions from its padding token's id on, and has no pad_token_id"
        )
    return EncoderInfo(padding_id=padding)


def limits(config: object, encoder: EncoderInfo | None) -> tuple[int | None, int | None]:
    """The longest sequence and the sliding window that `config` speaks of, as `ModelInfo` has them.

    `encoder` is what `encoder_info` says. Transformers' windows of encoders do not count the token
    itself, those of decoders do.
    """
    max_position: int | None = getattr(config, "max_position_embeddings", None)
    window: int | None = getattr(config, "sliding_window", None)
    if encoder is not None and max_position is not None:
        max_position -= encoder.first_position
    if encoder is not None and window is not None:
        window += 1
    return max_position, window
