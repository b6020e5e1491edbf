import dataclasses
import typing
from typing import Generic, NamedTuple, TypedDict, TypeVar

import pytest
import torch
from torch import Tensor

from vllmc.core.declare.annotations import holds_tensors

T = TypeVar("T")


@dataclasses.dataclass
class Batch:
    size: int
    ids: "torch.Tensor | None"


Stages = dict[str, Tensor]


@dataclasses.dataclass
class Outputs:
    stages: "Stages"


class Longer(Batch):
    name: str


@dataclasses.dataclass
class Node:
    next: "Node | None"
    value: Tensor


@dataclasses.dataclass
class Chain:
    next: "Chain | None"


@dataclasses.dataclass
class Generation(Generic[T]):
    logits: Tensor
    extra: T


class Pair(NamedTuple):
    count: int
    ids: Tensor


class Hidden(TypedDict):
    residual: typing.NotRequired[Tensor]


class IntermediateTensors:
    tensors: dict[str, Tensor]


class Stage(dict[str, Tensor]):
    pass


class Names(NamedTuple):
    tensors: list[str]


class Layer:
    weight: Tensor


# What the annotations below name, as the module of a forward has it.
NAMESPACE = vars(typing) | globals()


@pytest.mark.parametrize(
    "text",
    [
        "Tensor",
        "torch.Tensor",
        "torch.nn.Parameter",
        "torch.FloatTensor",
        "torch.LongTensor | None",
        "None | Tensor",
        "Optional[Tensor]",
        "Union[int, Tensor, None]",
        "Annotated[Tensor, 'tokens', 3]",
        "Annotated[Tensor | None, 'tokens']",
        "dict[str, Tensor]",
        "typing.Dict[str, Tensor]",
        "Mapping[str, Tensor | None]",
        "collections.abc.Mapping[str, Tensor]",
        "list[Tensor]",
        "typing.List[torch.Tensor] | None",
        "Sequence[Tensor]",
        "collections.abc.Sequence[Tensor] | None",
        "tuple[Tensor, ...]",
        "tuple[int, Tensor]",
        "dict[str, list[Optional[Tensor]]]",
        "Batch",
        "Optional[Batch]",
        "list[Batch]",
        "Longer",
        "Node",
        "Generation[int]",
        "Pair",
        "Hidden",
        "IntermediateTensors | None",
        "Stage",
        "Optional['Batch']",
        "list['Pair']",
    ],
)
def test_annotations_of_what_holds_tensors(text: str) -> None:
    assert holds_tensors(text, NAMESPACE)
    assert holds_tensors(eval(text, NAMESPACE), NAMESPACE)


@pytest.mark.parametrize(
    "text",
    [
        "int",
        "None",
        "Any",
        "str | None",
        "dict[str, int]",
        "dict[Tensor, int]",
        "list",
        "type[Tensor]",
        "Callable[[Tensor], Tensor]",
        "Literal['Tensor']",
        "Annotated[int, Tensor]",
        "Chain",
        "Names",
        "Layer",
        "torch.dtype",
        "T",
        "Generic",
    ],
)
def test_annotations_of_what_holds_none(text: str) -> None:
    assert not holds_tensors(text, NAMESPACE)
    assert not holds_tensors(eval(text, NAMESPACE), NAMESPACE)


@pytest.mark.parametrize(
    "text",
    [
        "Tensor",
        "Tensor | None",
        "'Tensor'",
        "th.Tensor",
        "th.nn.FloatTensor | np.ndarray",
        "IntermediateTensors",
        "pkg.IntermediateTensors | None",
        "Optional[Tensor]",
        "t.Union[Missing, t.Annotated[Tensor, 'tokens']]",
        "Mapping[str, Tensor]",
        "dict[Missing, Tensor]",
        "List[Tensor]",
        "tuple[Missing, Tensor]",
    ],
)
def test_names_for_type_checkers_alone_are_read_for_what_they_say(text: str) -> None:
    assert holds_tensors(text, {})


@pytest.mark.parametrize(
    "text",
    [
        "Missing",
        "int | Missing",
        "np.ndarray",
        "TensorMetadata",
        "Mapping[Tensor, int]",
        "Iterator[Tensor]",
        "Missing[Tensor]",
        "Literal['Tensor']",
        "no annotation",
        "\0",
        "",
    ],
)
def test_names_that_cannot_be_looked_up_are_not_all_tensors(text: str) -> None:
    assert not holds_tensors(text, {})


def test_a_name_that_can_be_looked_up_is_what_it_is() -> None:
    assert holds_tensors("Alias | None", {"Alias": dict[str, Tensor]})
    assert not holds_tensors("MyTensor", {"MyTensor": int})
    assert not holds_tensors("this.MyTensor", {"this": type("this", (), {"MyTensor": int})})


def test_text_in_a_class_is_looked_up_in_the_module_of_that_class() -> None:
    assert holds_tensors(Outputs, {"Stages": int})
    assert holds_tensors(type("Local", (Outputs,), {"__module__": "elsewhere"}), {})
