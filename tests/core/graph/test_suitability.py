"""Small Llamas, each with one thing in it that vllmc must not run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vllmc.core.errors import VllmcError
from vllmc.core.graph.capture import Capture, capture
from vllmc.core.models.module_model import ModuleModel
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.minors import TORCH
from vllmc.core.torch_compat.minors.torch_2_12 import Torch212


class Small(LlamaForCausalLM):
    def __init__(self) -> None:
        super().__init__(
            LlamaConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            )
        )


def captured(kind: type[torch.nn.Module]) -> Capture:
    spec = CompileSpec()
    model = ModuleModel("small", kind)
    entry = model.build("fake", spec)
    return capture(model, entry, spec)


def refusal(kind: type[torch.nn.Module]) -> VllmcError:
    with pytest.raises(VllmcError) as caught:
        captured(kind)
    assert caught.value.code == "unsupported-model"
    return caught.value


class Writing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, **kwargs: Any) -> Any:
        self.seen.add_(1)
        return super().forward(**kwargs)


class Keeping(Small):
    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        self.last = output.logits * 2
        return output


class Counting(Small):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids=input_ids, **kwargs)


class Summing(Small):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.ones_like(input_ids).cumsum(-1) - 1
        return super().forward(input_ids=input_ids, **kwargs)


class Repeating(Small):
    def __init__(self) -> None:
        super().__init__()
        self.model.layers[1] = self.model.layers[0]


class OwnAttention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        scores = hidden_states @ hidden_states.transpose(1, 2)
        return scores.softmax(-1) @ hidden_states, None


class Mixed(Small):
    def __init__(self) -> None:
        super().__init__()
        self.model.layers[1].self_attn = OwnAttention()


class SkippingLayer(LlamaDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states + self.mlp(hidden_states)


class Bypassing(Small):
    def __init__(self) -> None:
        super().__init__()
        self.model.layers[1] = SkippingLayer(self.config, 1)


class Raising(Small):
    def forward(self, **kwargs: Any) -> Any:
        kwargs["labels"] = {}["labels"]
        return super().forward(**kwargs)


class Failing(Small):
    def forward(self, **kwargs: Any) -> Any:
        output = super().forward(**kwargs)
        output.logits = output.logits + kwargs.get("mask")
        return output


class Branching(Small):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.sum() > 3:
            input_ids = input_ids + 1
        return super().forward(input_ids=input_ids, **kwargs)


class Sizing(Small):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.shape[1] > 40:
            input_ids = input_ids + 1
        return super().forward(input_ids=input_ids, **kwargs)


class Stateful(Small):
    _is_stateful = True


class SmallEncoder(BertModel):
    def __init__(self) -> None:
        super().__init__(
            BertConfig(
                vocab_size=64,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
            ),
            add_pooling_layer=False,
        )


class MixedEncoder(SmallEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.layer[1].attention = OwnAttention()


class CausalEncoder(SmallEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.encoder.layer[1].attention.self.is_causal = True


class CountingEncoder(SmallEncoder):
    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        kwargs["position_ids"] = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    ("kind", "says", "source"),
    [
        (Writing, "writes to the module's own tensor model.seen", "self.seen.add_(1)"),
        (Keeping, "changes self.model.last", "self.last = output.logits * 2"),
        (Counting, "counts the tokens", "torch.arange(input_ids.shape[1])[None]"),
        (Summing, "counts the tokens", "torch.ones_like(input_ids).cumsum(-1) - 1"),
        (Repeating, "layer model.model.layers.0.self_attn attends more than once", "def forward("),
        (Mixed, "1 of its 2 layers", "def forward(self, hidden_states: torch.Tensor"),
        (Bypassing, "1 of its 2 layers", "def forward("),
        (Raising, "it raises KeyError", '{}["labels"]'),
        (Failing, "an operation fails: TypeError: unsupported operand", 'kwargs.get("mask")'),
        (Branching, "branches on the values of a tensor", "if input_ids.sum() > 3:"),
        (Sizing, "u0 > 40 (u0 is the number of tokens)", "if input_ids.shape[1] > 40:"),
        (Stateful, "keep state outside attention", "_is_stateful = True"),
        (MixedEncoder, "1 of its 2 layers", "def forward(self, hidden_states: torch.Tensor"),
        (CausalEncoder, "its attention is causal", "def forward("),
        (CountingEncoder, "counts the tokens", "torch.arange(input_ids.shape[1])[None]"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_what_cannot_run_in_a_batch_of_sequences_is_refused_with_its_line(
    kind: type[torch.nn.Module], says: str, source: str
) -> None:
    error = refusal(kind)
    assert says in error.message
    assert source in str(error.context["source"])
    assert error.hint


def test_a_model_that_does_none_of_it_is_captured() -> None:
    assert [site.layer for site in captured(Small).attention] == [
        "model.model.layers.0.self_attn",
        "model.model.layers.1.self_attn",
    ]


def test_an_encoder_that_does_none_of_it_is_captured() -> None:
    sites = captured(SmallEncoder).attention
    assert [site.layer for site in sites] == [
        "model.encoder.layer.0.attention.self",
        "model.encoder.layer.1.attention.self",
    ]
    assert not any(site.causal for site in sites)


class Hybrid(Small):
    def __init__(self) -> None:
        super().__init__()
        self.config.layer_types = ["full_attention", "linear_attention"]


def test_a_layer_of_another_kind_than_attention_is_refused_before_any_capture() -> None:
    error = refusal(Hybrid)
    assert "layer 1 is of the kind 'linear_attention'" in error.message
    assert error.context["module"] == "LlamaAttention.forward"


class Ignorant(torch.nn.Module):
    """A module of the user's own, in which no token knows its place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small().model.layers[0].self_attn
        self.embedding = torch.nn.Embedding(64, 16)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids)
        turn = torch.ones(1, 1, 8), torch.zeros(1, 1, 8)
        self.inner.config._attn_implementation = "vllmc"
        return self.inner(hidden, position_embeddings=turn, attention_mask=None)[0]


@pytest.mark.skipif(
    isinstance(TORCH, Torch212), reason="this torch traces the attention that was set before"
)
def test_a_module_of_the_users_own_may_do_without_positions() -> None:
    assert len(captured(Ignorant).attention) == 1


class Foreseeing(Ignorant):
    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(input_ids).view(1, -1, 2, 8)
        output = torch.empty_like(hidden)
        op = torch.ops.vllmc.unified_attention_with_output.str
        op(hidden, hidden, hidden, output, "inner", 1.0, causal=False)
        return output.flatten(2)


def test_a_language_model_cannot_attend_to_tokens_that_are_yet_to_come() -> None:
    assert "its layer inner attends to tokens that are yet to come" in refusal(Foreseeing).message
