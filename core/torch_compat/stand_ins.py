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
from types import CodeType
from typing import Any, Final

import torch
import torch.fx as fx
from torch._dynamo.convert_frame import compile_lock
from torch._dynamo.decorators import allow_in_graph, assume_constant_result

GlobalState = tuple[object, ...]
"""What of torch's state decides how a layer is traced."""

_NUMBER: Final = "vllmc_layer_number"
_MODEL: Final = "vllmc_layer_model"
_FORWARD: Final = "vllmc_plain_forward"
_OWN: Final = (f"M[{__name__!r}]", _NUMBER, _MODEL, f".{_FORWARD}", f"'{_FORWARD}' in ")


@dataclass(slots=True)
class Traced:
    """What the marked and stood-in calls of one capture left besides nodes, by layer number."""

    results: dict[int, object] = field(default_factory=dict)
    states: dict[int, set[GlobalState]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    models: Mapping[int, int]
    traced: Traced


_RECORDING: ContextVar[_Recording | None] = ContextVar("vllmc_stand_ins", default=None)


@contextlib.contextmanager
def standing_in(layers: Sequence[torch.nn.Module], models: Mapping[int, int]) -> Iterator[Traced]:
    """Within it, a capture sees one node for each of `layers` that `models` maps to another.

    Both are numbers in `layers`. The layers that others are mapped to are marked; all must be
    traced before those that they stand for. Another thread may run the layers meanwhile, but none
    may compile them: it waits.
    """
    traced = Traced()
    shown = {number: models.get(number, number) for number in {*models, *models.values()}}
    classes = {owner_of_forward(type(layers[number])) for number in shown}
    with compile_lock:
        token = _RECORDING.set(_Recording(models=models, traced=traced))
        for cls in classes:
            setattr(cls, _FORWARD, vars(cls)["forward"])
            setattr(cls, _NUMBER, None)
            cls.forward = _forward
        for number, model in shown.items():
            vars(layers[number]).update({_NUMBER: number, _MODEL: model})
        try:
            yield traced
        finally:
            for number in shown:
                for name in (_NUMBER, _MODEL):
                    del vars(layers[number])[name]
            for cls in classes:
                cls.forward = vars(cls)[_FORWARD]
                for name in (_FORWARD, _NUMBER):
                    delattr(cls, name)
            _RECORDING.reset(token)


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
    """The number of the layer that ends at `node`; its arguments are `call_of(node)`."""
    return _number(node, _end)


def stands_for(node: fx.Node) -> int | None:
    """The number of the layer that `node` stands for; its arguments are `call_of(node)`."""
    return _number(node, _stand_in)


def call_of(node: fx.Node) -> tuple[Any, Any]:
    """The positional and named arguments of the layer at a node that ends or stands for one."""
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
    number = self.vllmc_layer_number
    # Another thread may run the layer meanwhile, or one that is none of the layers.
    if number is None or not _is_recording():
        return self.vllmc_plain_forward(*args, **kwargs)
    if self.vllmc_layer_model != number:
        return _stand_in(number, args, kwargs)
    _begin(number)
    result = self.vllmc_plain_forward(*args, **kwargs)
    # Arguments are shown at the end, as a layer may leave some of them untouched till then.
    _end(number, args, kwargs, result)
    return result


@assume_constant_result
def _is_recording() -> bool:
    """Dynamo asks in the thread that traces."""
    return _RECORDING.get() is not None


@allow_in_graph
def _begin(number: int) -> None:
    pass


@allow_in_graph
def _end(number: int, _args: Any, _kwargs: Any, result: Any) -> None:
    if (recording := _RECORDING.get()) is not None:
        recording.traced.results[number] = result
        recording.traced.states.setdefault(number, set()).add(_state())


@allow_in_graph
def _stand_in(number: int, _args: Any, _kwargs: Any) -> Any:
    recording = _RECORDING.get()
    assert recording is not None
    recording.traced.states.setdefault(number, set()).add(_state())
    return _like(recording.traced.results[recording.models[number]])


def _like(result: Any) -> Any:
    """Another value of the same form, in memory of its own."""
    if type(result) in (tuple, list):
        return type(result)(map(_like, result))
    if result is None:
        return None
    return torch.empty_strided(
        result.shape, result.stride(), dtype=result.dtype, device=result.device
    )


def _state() -> GlobalState:
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
