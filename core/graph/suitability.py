"""Whether a model can run as vllmc runs models: what is refused, before its capture and after.

A program keeps nothing between steps but the keys and values of its attention layers, and a step
holds tokens of several sequences. So tokens may meet in the attention op only, each brings its
position, and the forward may leave nothing behind in the module.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.fx as fx
from transformers import PreTrainedModel

from vllmc.core.errors import VllmcError
from vllmc.core.graph.aliases import memory_of, written_memory
from vllmc.core.graph.layout import AttentionSite, GraphInput
from vllmc.core.graph.normalize import symbols_of, value_of
from vllmc.core.models.attention import LAYER_NAME_ATTRIBUTE, check_windows
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.model import Model
from vllmc.core.models.place import Place, place_in_class, place_of_trace

_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention"})
_Layers: TypeAlias = tuple[tuple[str, torch.nn.Module], ...]
_ONE_BATCH = "vllmc runs tokens of several sequences as one batch"


def check_module(model: Model, entry: torch.nn.Module) -> None:
    """Refuses the built `model` if some of its layers are seen to do without the attention op.

    Raises `VllmcError` (`unsupported-model`).
    """
    decoder = _transformers_model(entry)
    if decoder is None:
        return
    kinds = model.info.layer_types
    layers = _decoder_layers(model, entry)
    for index, kind in enumerate(kinds):
        if kind not in _ATTENTION_KINDS:
            raise unsupported_model(
                model.name,
                f"its layer {index} is of the kind '{kind}', neither full nor sliding attention",
                place=_mixer_place(layers[index][1]) if len(layers) == len(kinds) else None,
            )
    if decoder._is_stateful and not kinds:
        raise unsupported_model(
            model.name,
            f"Transformers calls {type(decoder).__name__} stateful: some of its layers keep "
            "state outside attention",
            place=place_in_class(type(decoder), "_is_stateful"),
        )
    attending = [n for n, m in entry.named_modules() if hasattr(m, LAYER_NAME_ATTRIBUTE)]
    if (missing := _first_without(attending, layers)) is not None:
        raise _not_attending(model, attending, missing)


def check_graph(
    model: Model,
    entry: torch.nn.Module,
    graph: fx.Graph,
    inputs: Sequence[GraphInput],
    sites: Sequence[AttentionSite],
) -> None:
    """Refuses a captured `graph` in which tokens meet outside the attention op, as far as it shows.

    Raises `VllmcError` (`unsupported-model`).
    """
    _check_attention(model, entry, sites)
    _check_positions(model, entry, graph)
    _check_writes(model, graph, inputs)


def place_of_node(node: fx.Node) -> Place | None:
    """The line of the model that `node` was captured from."""
    return place_of_trace(node.stack_trace or "")


def _check_attention(model: Model, entry: torch.nn.Module, sites: Sequence[AttentionSite]) -> None:
    info = model.info
    if not sites or (info.layers is not None and len(sites) != info.layers):
        attending = [site.layer for site in sites]
        missing = _first_without(attending, _decoder_layers(model, entry))
        raise _not_attending(model, attending, missing)
    seen: set[str] = set()
    for site in sites:
        if site.causal != (info.encoder is None):
            how = "only to what came before" if site.causal else "to tokens that are yet to come"
            raise unsupported_model(
                model.name,
                f"its layer {site.layer} attends {how}",
                place=_layer_place(entry, site.layer),
            )
        # One cache would hold the keys of both. An encoder has none.
        if site.layer in seen and info.encoder is None:
            raise unsupported_model(
                model.name,
                f"its layer {site.layer} attends more than once in a step",
                place=_layer_place(entry, site.layer),
            )
        seen.add(site.layer)
    check_windows(
        model.name,
        info.layer_types,
        [site.window for site in sites],
        sliding_window=info.sliding_window,
    )


def _check_positions(model: Model, entry: torch.nn.Module, graph: fx.Graph) -> None:
    """A model that counts tokens by itself would take a batch for one sequence.

    A module of the user's own may: it was written for batches of several.
    """
    if _transformers_model(entry) is None:
        return
    for node in graph.nodes:
        if _counts_tokens(node):
            raise unsupported_model(
                model.name,
                "it counts the tokens of the batch, where it should use their position_ids",
                place=place_of_node(node),
                hint=f"{_ONE_BATCH}, so each token must bring its position",
            )


def _counts_tokens(node: fx.Node) -> bool:
    if node.target not in (torch.arange, torch.cumsum, "cumsum"):
        return False
    if not symbols_of(value_of(node)):
        return False
    # Written into another tensor, a count is a permutation: tokens sorted by expert and back.
    return any(user.target is not operator.setitem for user in node.users)


def _check_writes(model: Model, graph: fx.Graph, inputs: Sequence[GraphInput]) -> None:
    written = written_memory(graph)
    for node, given in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        if given.kind == "attribute" and not memory_of(node).isdisjoint(written):
            raise unsupported_model(
                model.name,
                f"its forward writes to the module's own tensor {given.name}",
                place=_place_of_write(node),
                hint=f"{_ONE_BATCH}: what one of them leaves in the module, all would see",
            )


def _place_of_write(tensor: fx.Node) -> Place | None:
    in_place = [user for user in tensor.users if str(user.target).endswith("_")]
    return place_of_node(in_place[0]) if in_place else None


def _decoder_layers(model: Model, entry: torch.nn.Module) -> _Layers:
    """The names and modules of a Transformers decoder's layers, where they can be told."""
    inner = _transformers_model(entry)
    if inner is None:
        return ()
    names = {module: name for name, module in entry.named_modules()}
    for module in inner.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.info.layers:
            return tuple((names[layer], layer) for layer in module)
    return ()


def _first_without(attending: Sequence[str], layers: _Layers) -> torch.nn.Module | None:
    """The first of `layers` that holds none of the modules called `attending`."""
    for name, layer in layers:
        if not any(module.startswith(f"{name}.") for module in attending):
            return layer
    return None


def _not_attending(
    model: Model, attending: Sequence[str], missing: torch.nn.Module | None
) -> VllmcError:
    return unsupported_model(
        model.name,
        f"{len(attending)} of its {model.info.layers or 'unknown number of'} layers attend "
        "through Transformers' attention interface",
        place=_mixer_place(missing) if missing is not None else None,
        hint="every layer must call the function that ALL_ATTENTION_FUNCTIONS has for its "
        "configuration",
    )


def _layer_place(entry: torch.nn.Module, name: str) -> Place | None:
    """Where the layer attends; a module of the user's own may call it by any name."""
    layer = dict(entry.named_modules()).get(name)
    return None if layer is None else place_in_class(type(layer))


def _mixer_place(layer: torch.nn.Module) -> Place | None:
    """Where `layer` attends, or what it does instead."""
    named = (m for m in layer.modules() if "Attention" in type(m).__name__)
    return place_in_class(type(next(named, layer)))


def _transformers_model(entry: torch.nn.Module) -> PreTrainedModel | None:
    inner = getattr(entry, "model", None)
    return inner if isinstance(inner, PreTrainedModel) else None
