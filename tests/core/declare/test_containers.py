import collections
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vllmc.core.declare.containers import leaves, map_tensors
from vllmc.core.torch_compat.capture import _source_name


class Batch(NamedTuple):
    ids: Tensor


@dataclasses.dataclass
class Step:
    ids: Tensor
    count: int
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    ids: Tensor


class IntermediateTensors:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def x() -> Tensor:
    return torch.ones(3, 2)


def tensors(value: Any) -> dict[str, Tensor]:
    return {path: leaf for path, leaf in leaves("batch", value) if isinstance(leaf, Tensor)}


VALUES: dict[str, Callable[[], Any]] = {
    "tensor": x,
    "dict": lambda: {"residual": x(), 'it\'s "h"\n': x(), "count": 3, "absent": None},
    "dict of other keys": lambda: {0: x(), (1, "b"): x(), 1.5: x()},
    "OrderedDict": lambda: collections.OrderedDict(b=x(), a=x()),
    "mappingproxy": lambda: types.MappingProxyType({"a": x()}),
    "list": lambda: [x(), None, x()],
    "tuple": lambda: (x(), (x(), 1)),
    "NamedTuple": lambda: Batch(x()),
    "namedtuple": lambda: collections.namedtuple("Pair", "ids positions")(x(), x()),
    "dataclass": lambda: Step(x(), 3),
    "frozen dataclass": lambda: Slotted(x()),
    "object with tensors": lambda: IntermediateTensors({"hidden": x(), "residual": x()}),
    "nested": lambda: {"steps": [Step(x(), 1, x())], "stage": IntermediateTensors({"a": x()})},
}


def read(value: Any) -> list[Tensor]:
    """The tensors of `value`, read as a forward would read them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, IntermediateTensors):
        return [value[name] for name in value.tensors]
    if isinstance(value, Step):
        return [value.ids] if value.mask is None else [value.ids, value.mask]
    if isinstance(value, Slotted):
        return [value.ids]
    if isinstance(value, (list, tuple)):
        return [tensor for held in value for tensor in read(held)]
    if isinstance(value, Mapping):
        return [tensor for held in value.values() for tensor in read(held)]
    return []


@pytest.mark.parametrize("kind", VALUES)
def test_a_tensor_in_an_argument_has_the_name_that_dynamo_gives_it(kind: str) -> None:
    names: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(_source_name(node) for node in module.graph.find_nodes(op="placeholder"))
        return module.forward

    def forward(batch: Any) -> Tensor:
        return sum(read(batch))

    value = VALUES[kind]()
    torch._dynamo.reset()
    torch.compile(forward, backend=backend, fullgraph=True)(value)
    found = tensors(value)
    assert sorted(names) == sorted(f"L['batch']{path.removeprefix('batch')}" for path in found)


@pytest.mark.parametrize("kind", VALUES)
def test_the_name_of_a_tensor_reads_it(kind: str) -> None:
    value = VALUES[kind]()
    found = tensors(value)
    assert [id(tensor) for tensor in found.values()] == [id(tensor) for tensor in read(value)]
    for name, tensor in found.items():
        assert eval(name, {"batch": value}) is tensor


def test_tensors_are_named_in_the_order_of_their_container() -> None:
    value = {"b": [x(), x()], "a": Step(x(), 1, x()), "c": IntermediateTensors({"h": x()})}
    assert list(tensors(value)) == [
        "batch['b'][0]",
        "batch['b'][1]",
        "batch['a'].ids",
        "batch['a'].mask",
        "batch['c'].tensors['h']",
    ]


@pytest.mark.parametrize("kind", VALUES)
def test_tensors_are_replaced_in_containers_of_the_same_kind(kind: str) -> None:
    value = VALUES[kind]()
    before = tensors(value)
    made = map_tensors("batch", value, lambda path, tensor: torch.full((1,), len(path)))
    assert type(made) is type(value)
    assert {path: int(tensor) for path, tensor in tensors(made).items()} == {
        path: len(path) for path in before
    }
    others = [leaf for _, leaf in leaves("batch", made) if not isinstance(leaf, Tensor)]
    assert others == [leaf for _, leaf in leaves("batch", value) if not isinstance(leaf, Tensor)]
    now = tensors(value)
    assert now.keys() == before.keys()
    assert all(now[path] is before[path] for path in now), "the value itself is as before"
