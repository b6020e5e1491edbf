"""Layers that Dynamo does not look into: a call of one is a single node of the captured graph.

Dynamo takes a tenth of a second for a decoder layer, and five milliseconds for such a node. So of
layers that are alike one is traced, between two nodes that mark where it begins and ends, and the
others are stood in for (`vllmc.core.graph.repeats` puts what was traced in their place).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType, MethodType
from typing import Any, Final

import torch
import torch.fx as fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.decorators import allow_in_graph, assume_constant_result
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew
from torch._dynamo.variables.misc import NewGlobalVariable

from vllmc.core.torch_compat.forward import EXCHANGED

GlobalState = tuple[object, ...]
"""What of the process's state decides how a layer is traced."""

_NUMBER: Final = "vllmc_layer_number"
_STOOD_IN_FOR: Final = "vllmc_stood_in_for"
_FORWARD: Final = "vllmc_plain_forward"
_OWN: Final = (f"M[{__name__!r}]", _NUMBER, _STOOD_IN_FOR, f".{_FORWARD}", f"'{_FORWARD}' in ")


@dataclass(slots=True, kw_only=True)
class Traced:
    """What the calls of layers left in one capture besides nodes, by the layers' numbers.

    `states` are those in which each was entered and left.
    """

    models: Mapping[int, int]
    results: dict[int, object] = field(default_factory=dict)
    states: dict[int, set[GlobalState]] = field(default_factory=dict)
    mutations: int = 0

    def note(self, number: int) -> None:
        """Notes the state of torch and of Python's objects."""
        self.states.setdefault(number, set()).add((*_state_of_torch(), self.mutations))


_RECORDING: ContextVar[Traced | None] = ContextVar("vllmc_stand_ins", default=None)


@contextlib.contextmanager
def standing_in(layers: Sequence[torch.nn.Module], models: Mapping[int, int]) -> Iterator[Traced]:
    """Within it, a capture sees one node for each of `layers` that `models` maps to another.

    Both are numbers in `layers`. The layers that others are mapped to are marked; all must be
    traced before those that they stand for. Another thread may run the layers meanwhile, but none
    may compile them or tell what they are: it waits.
    """
    traced = Traced(models=models)
    shown = {number: models.get(number, number) for number in {*models, *models.values()}}
    classes = {owner_of_forward(type(layers[number])) for number in shown}
    with (
        compile_lock,
        EXCHANGED,
        _counting_mutations(traced),
        contextlib.ExitStack() as changes,
    ):
        changes.callback(_RECORDING.reset, _RECORDING.set(traced))
        for cls in classes:
            plain = vars(cls)["forward"]
            for name, value in ((_FORWARD, plain), (_NUMBER, None), (_STOOD_IN_FOR, False)):
                changes.callback(_forget, cls, name)
                setattr(cls, name, value)
            changes.callback(setattr, cls, "forward", plain)
            cls.forward = _forward
        for number, model in shown.items():
            layer = layers[number]
            own: dict[str, object] = {_NUMBER: number, _STOOD_IN_FOR: model != number}
            if model != number:
                own |= {name: MethodType(f, layer) for name, f in _UNTOLD.items()}
            for name in own:
                changes.callback(vars(layer).pop, name, None)
            vars(layer).update(own)
        yield traced


def _forget(cls: type, name: str) -> None:
    if name in vars(cls):
        delattr(cls, name)


@contextlib.contextmanager
def _counting_mutations(traced: Traced) -> Iterator[None]:
    """Counts what the traced Python does to objects that were there before: others may read it."""
    store_attr, mutation = SideEffects.store_attr, SideEffects.mutation

    def count(variable: Any) -> None:
        new = isinstance(variable.mutation_type, (AttributeMutationNew, ValueMutationNew))
        # A global that is set is a new variable, and may have been there before.
        traced.mutations += not new or isinstance(variable, NewGlobalVariable)

    def counted_store_attr(self: Any, item: Any, *args: Any, **kwargs: Any) -> None:
        count(item)
        store_attr(self, item, *args, **kwargs)

    def counted_mutation(self: Any, variable: Any) -> None:
        count(variable)
        mutation(self, variable)

    SideEffects.store_attr, SideEffects.mutation = counted_store_attr, counted_mutation
    try:
        yield
    finally:
        SideEffects.store_attr, SideEffects.mutation = store_attr, mutation


def owner_of_forward(cls: type[torch.nn.Module]) -> Any:
    """The class that defines the forward of `cls`: itself or one of its bases."""
    return next(base for base in cls.__mro__ if "forward" in vars(base))


def without_own(expressions: Iterable[str]) -> Iterator[str]:
    """The guarded expressions of the model alone, without those of what this module added."""
    for expression in expressions:
        if not any(part in expression for part in _OWN):
            yield expression.replace(f"['{_FORWARD}']", "['forward']")


def is_own_code(code: CodeType) -> bool:
    """Whether a traced function is one of this module."""
    return code.co_filename == __file__


def begins(node: fx.Node) -> int | None:
    """The number of the layer that begins at `node`, if it is such a mark."""
    return _number(node, _begin)


def ends(node: fx.Node) -> int | None:
    """The number of the layer that ends at `node`."""
    return _number(node, _end)


def stands_for(node: fx.Node) -> int | None:
    """The number of the layer that `node` stands for."""
    return _number(node, _stand_in)


def called(node: fx.Node) -> int | None:
    """The number of the layer whose call `node` shows: that ends there, or that it stands for."""
    number = ends(node)
    return stands_for(node) if number is None else number


def call_of(node: fx.Node) -> tuple[Any, Any]:
    """The positional and named arguments of the layer that is `called` at `node`."""
    _, args, kwargs, *_ = node.args
    return args, kwargs


def result_of(node: fx.Node) -> Any:
    """What the layer returns that ends at `node`."""
    return node.args[3]


def _number(node: fx.Node, function: Callable[..., object]) -> int | None:
    if node.op != "call_function" or node.target is not function:
        return None
    number = node.args[0]
    assert isinstance(number, int)
    return number


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Another thread may run the layer meanwhile, or one that is none of the layers.
    if self.vllmc_stood_in_for and _is_recording():
        return _stand_in(self.vllmc_layer_number, args, kwargs)
    number = self.vllmc_layer_number
    if number is None or not _is_recording():
        return self.vllmc_plain_forward(*args, **kwargs)
    _begin(number)
    result = self.vllmc_plain_forward(*args, **kwargs)
    # Arguments are shown at the end, as a layer may leave some of them untouched till then.
    _end(number, args, kwargs, result)
    return result


def _named_parameters(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).named_parameters(self, *args, **kwargs)


def _named_buffers(self: Any, *args: Any, **kwargs: Any) -> Any:
    return type(self).named_buffers(self, *args, **kwargs)


# Of each module that it meets Dynamo lists the tensors, to have names for them, unless a class has
# methods of its own for that. Those that it does not look into need no names.
_UNTOLD: Final = {"named_parameters": _named_parameters, "named_buffers": _named_buffers}


@assume_constant_result
def _is_recording() -> bool:
    """Dynamo asks in the thread that traces."""
    return _RECORDING.get() is not None


@allow_in_graph
def _begin(number: int) -> None:
    if (traced := _RECORDING.get()) is not None:
        traced.note(number)


@allow_in_graph
def _end(number: int, _args: Any, _kwargs: Any, result: Any) -> None:
    if (traced := _RECORDING.get()) is not None:
        traced.note(number)
        traced.results[number] = result


@allow_in_graph
def _stand_in(number: int, _args: Any, _kwargs: Any) -> Any:
    traced = _RECORDING.get()
    assert traced is not None
    traced.note(number)
    return _like(traced.results[traced.models[number]])


def _like(result: Any) -> Any:
    """Another value of the same form, in memory of its own."""
    if type(result) in (tuple, list):
        return type(result)(map(_like, result))
    if result is None:
        return None
    return torch.empty_strided(
        result.shape, result.stride(), dtype=result.dtype, device=result.device
    )


def _state_of_torch() -> GlobalState:
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
    )
