from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vllmc.core.errors import VllmcError
from vllmc.core.models.attention import (
    ATTENTION_NAME,
    LAYER_NAME_ATTRIBUTE,
    attach_layer_names,
    attend,
    attend_both_ways,
    check_windows,
    register_attention,
)
from vllmc.kernels.forward_context import forward_context, whole_sequences
from vllmc.kernels.layer_name import LayerName, LayerNameKind

TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}


def tiny(family: str = "llama", **fields: Any) -> Any:
    register_attention()
    config = AutoConfig.for_model(family, **{**TINY, **fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION_NAME)
    return model.eval().requires_grad_(False)


class Entry(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.model = model
        self.kwargs = kwargs

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        output = self.model(
            input_ids=ids,
            position_ids=positions,
            logits_to_keep=rows,
            use_cache=False,
            **self.kwargs,
        )
        return output.logits[0]


def capture(entry: torch.nn.Module) -> fx.Graph:
    ids, positions = (torch.zeros(1, 17, dtype=torch.int64) for _ in range(2))
    rows = torch.zeros(3, dtype=torch.int64)
    for tensor, dim, shape_id in ((ids, 1, "t"), (positions, 1, "t"), (rows, 0, "b")):
        mark_unbacked(tensor, dim, shape_id=shape_id)
    torch._dynamo.reset()
    with torch.no_grad(), get_metrics_context(), dynamo_timed("capture"):
        captured = fullgraph_capture(entry, (ids, positions, rows))
    assert captured.backend_input is not None
    return captured.backend_input.graph_module.graph


def attention_ops(graph: fx.Graph) -> list[fx.Node]:
    overloads = torch.ops.vllmc.unified_attention_with_output
    return [n for n in graph.nodes if n.target in (overloads.default, overloads.str)]


def test_hoisted_layer_names_are_inputs_of_the_captured_graph() -> None:
    entry = Entry(tiny())
    attach_layer_names(entry, "hoisted")
    ops = attention_ops(capture(entry))
    assert [op.args[4].op for op in ops] == ["placeholder", "placeholder"]
    assert [op.args[4].type for op in ops] == [LayerName, LayerName]
    assert ops[0].args[4] is not ops[1].args[4]


def test_baked_layer_names_are_constants_of_the_captured_graph() -> None:
    entry = Entry(tiny())
    names = attach_layer_names(entry, "baked")
    assert names == ("model.model.layers.0.self_attn", "model.model.layers.1.self_attn")
    assert tuple(op.args[4] for op in attention_ops(capture(entry))) == names


def test_the_graph_allocates_the_output_from_single_sizes() -> None:
    entry = Entry(tiny())
    attach_layer_names(entry, "hoisted")
    graph = capture(entry)
    assert not [n for n in graph.nodes if n.target is torch.Size]
    for op in attention_ops(graph):
        output = op.args[3]
        assert output.target is torch.empty
        sizes = output.args[0]
        assert [type(size) for size in sizes] == [int, fx.Node, int, int]


def test_windows_softcap_and_scale_reach_the_op() -> None:
    entry = Entry(
        tiny(
            "gemma2",
            sliding_window=5,
            attn_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
            layer_types=["sliding_attention", "full_attention"],
        )
    )
    attach_layer_names(entry, "hoisted")
    ops = attention_ops(capture(entry))
    assert [op.args[5:8] for op in ops] == [(0.25, 5, 3.0), (0.25, None, 3.0)]


def test_registering_again_changes_nothing() -> None:
    register_attention()
    before = dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    register_attention()
    assert ALL_ATTENTION_FUNCTIONS._global_mapping == before
    assert before[ATTENTION_NAME] is attend


@pytest.mark.parametrize("kind", ["hoisted", "baked"])
def test_only_attention_modules_are_named(kind: LayerNameKind) -> None:
    model = tiny("gpt_neox", intermediate_size=32)
    names = attach_layer_names(model, kind)
    assert names == ("gpt_neox.layers.0.attention", "gpt_neox.layers.1.attention")
    named = {n for n, m in model.named_modules() if hasattr(m, LAYER_NAME_ATTRIBUTE)}
    assert named == set(names)


class FakeAttention(torch.nn.Module):
    """Has what `attend` reads of an attention module."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.vllmc_layer_name = LayerName("layer")
        for name, value in attributes.items():
            setattr(self, name, value)


def call(module: torch.nn.Module, function: Callable[..., Any] = attend, **kwargs: Any) -> None:
    arguments: dict[str, Any] = {
        "query": torch.zeros(1, 4, 3, 8),
        "key": torch.zeros(1, 2, 3, 8),
        "value": torch.zeros(1, 2, 3, 8),
        "attention_mask": None,
        **kwargs,
    }
    function(module, **arguments)


@pytest.mark.parametrize(
    ("attributes", "arguments", "named"),
    [
        ({}, {"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({}, {"is_causal": False}, "is_causal"),
        ({"is_causal": False}, {}, "is_causal"),
        ({"is_cross_attention": True}, {}, "key"),
        ({}, {"key": torch.zeros(1, 2, 5, 8)}, "key"),
        ({}, {"query": torch.zeros(2, 4, 3, 8)}, "query"),
        ({}, {"position_bias": torch.zeros(1)}, "position_bias"),
        ({}, {"head_mask": torch.zeros(4)}, "head_mask"),
        ({}, {"alibi": torch.zeros(4)}, "alibi"),
        ({}, {"indices": torch.zeros(4)}, "indices"),
        ({}, {"cu_seq_lens_q": torch.zeros(4)}, "cu_seq_lens_q"),
        ({}, {"output_attentions": True}, "output_attentions"),
        ({}, {"something_new": 0}, "something_new"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_the_result_is_refused_by_name(
    attributes: dict[str, Any], arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(VllmcError, match="FakeAttention") as caught:
        call(FakeAttention(**attributes), **arguments)
    assert caught.value.code == "unsupported-model"
    assert caught.value.context["argument"] == named
    assert caught.value.context["module"] == "FakeAttention.forward"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"is_causal": True},
        {"is_causal": None},
        {"dropout": 0.1},
        {"position_ids": torch.zeros(1, 3)},
        {"head_mask": None},
        {"output_attentions": False},
    ],
    ids=lambda value: ",".join(value),
)
def test_what_changes_nothing_reaches_the_op(arguments: dict[str, Any]) -> None:
    # The op is reached, and misses its forward context.
    with pytest.raises(VllmcError) as caught:
        call(FakeAttention(), **arguments)
    assert caught.value.code == "no-forward-context"


@pytest.mark.parametrize(
    ("attributes", "arguments", "named"),
    [
        ({}, {"is_causal": True}, "is_causal"),
        ({"is_causal": True}, {}, "is_causal"),
        ({}, {"attention_mask": torch.zeros(1, 1, 3, 3)}, "attention_mask"),
        ({}, {"position_bias": torch.zeros(1)}, "position_bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_encoder_s_attention_refuses_what_is_causal_and_what_it_does_not_know(
    attributes: dict[str, Any], arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(VllmcError, match="FakeAttention") as caught:
        call(FakeAttention(**attributes), attend_both_ways, **arguments)
    assert caught.value.code == "unsupported-model"
    assert caught.value.context["argument"] == named


@pytest.mark.parametrize("attributes", [{}, {"is_causal": False}], ids=str)
def test_an_encoder_s_attention_reaches_the_op(attributes: dict[str, Any]) -> None:
    with pytest.raises(VllmcError) as caught:
        call(FakeAttention(**attributes), attend_both_ways)
    assert caught.value.code == "no-forward-context"
    with forward_context(whole_sequences((2, 1))):
        call(FakeAttention(**attributes), attend_both_ways)


def test_an_explicit_request_for_causal_attention_beats_the_module() -> None:
    with pytest.raises(VllmcError) as caught:
        call(FakeAttention(is_causal=False), is_causal=True)
    assert caught.value.code == "no-forward-context"


def test_a_module_without_a_layer_name_is_refused() -> None:
    with pytest.raises(VllmcError, match=r"Linear.*no layer name"):
        call(torch.nn.Linear(1, 1))


def test_a_refusal_leaves_capture_as_it_is() -> None:
    entry = Entry(tiny(), position_bias=torch.zeros(1))
    attach_layer_names(entry, "hoisted")
    with pytest.raises(VllmcError, match=r"LlamaAttention.*position_bias") as caught:
        capture(entry)
    assert caught.value.code == "unsupported-model"


def check(layer_types: list[str], windows: list[int | None], window: int | None) -> None:
    check_windows("some-model", layer_types, windows, sliding_window=window)


@pytest.mark.parametrize(
    ("layer_types", "windows", "window"),
    [
        ([], [None, None], None),
        # Nothing is known of the configuration.
        ([], [5, None], None),
        ([], [5, 5], 5),
        (["full_attention"] * 2, [None, None], None),
        # Qwen2 keeps a window in its configuration that no layer uses.
        (["full_attention"] * 2, [None, None], 5),
        (["sliding_attention", "full_attention"], [5, None], 5),
        (["sliding_attention", "full_attention"], [5, None], None),
    ],
)
def test_windows_that_agree_with_the_configuration_pass(
    layer_types: list[str], windows: list[int | None], window: int | None
) -> None:
    check(layer_types, windows, window)


@pytest.mark.parametrize(
    ("layer_types", "windows", "window", "says"),
    [
        (["sliding_attention"], [None], 5, "layer 0.*no window"),
        ([], [5, None], 5, "layer 1.*no window"),
        (["full_attention", "full_attention"], [None, 5], 5, "layer 1.*window of 5"),
        (["sliding_attention"], [4], 5, "window of 4 .*says 5"),
        (["chunked_attention"], [None], None, "chunked_attention"),
        (["full_attention", "linear_attention"], [None, None], None, "layer 1.*linear_attention"),
        (["full_attention"] * 2, [None], None, "1 attention layers and types for 2"),
    ],
)
def test_windows_that_disagree_with_the_configuration_are_refused(
    layer_types: list[str], windows: list[int | None], window: int | None, says: str
) -> None:
    with pytest.raises(VllmcError, match=f"some-model.*{says}") as caught:
        check(layer_types, windows, window)
    assert caught.value.code == "unsupported-model"
