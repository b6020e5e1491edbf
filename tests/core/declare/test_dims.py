import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vllmc.core.declare.dims import Declared, DynamicDim, declare, dims_of
from vllmc.core.errors import UsageError


class Model(torch.nn.Module):
    def forward(self, ids, positions, hidden=None, *rest, scale=1.0, **options): ...


def declared(dynamic: Any = None, unbacked: Any = None, forward: Any = Model.forward) -> Declared:
    return declare(forward, dynamic, unbacked)


def dims(dynamic: Any = None, unbacked: Any = None, forward: Any = Model.forward) -> Any:
    """What is declared, each dimension as (dim, shape id, unbacked)."""
    found = declared(dynamic, unbacked, forward).dims
    return {name: [(d.dim, d.shape_id, d.unbacked) for d in given] for name, given in found.items()}


# What is declared


def test_a_dimension_is_given_alone_in_a_list_or_with_a_shape_id() -> None:
    assert dims({"ids": 0, "positions": [-1, 0], "hidden": {0: "t", -1: "h"}}) == {
        "ids": [(0, None, False)],
        "positions": [(-1, None, False), (0, None, False)],
        "hidden": [(0, "t", False), (-1, "h", False)],
    }
    assert dims({"ids": (0, 1)}) == {"ids": [(0, None, False), (1, None, False)]}


def test_arguments_come_in_the_order_of_the_signature() -> None:
    found = declared({"scale": 0, "hidden": 0, "ids": 0}, {"positions": 0})
    assert list(found.dims) == ["ids", "positions", "hidden", "scale"]
    assert not found.inferred


def test_what_is_declared_cannot_be_changed() -> None:
    given: dict[str, Any] = {"ids": [0]}
    found = declared(given)
    given["ids"].append(1)
    given["positions"] = 0
    assert list(found.dims) == ["ids"]
    assert found.dims["ids"] == (DynamicDim(dim=0),)
    with pytest.raises(TypeError):
        found.dims["ids"] = ()


def test_dimensions_marked_unbacked_vary_and_keep_their_shape_id() -> None:
    assert dims({"ids": {0: "t", 1: "b"}, "positions": 0}, {"ids": 0, "hidden": [1]}) == {
        "ids": [(0, "t", True), (1, "b", False)],
        "positions": [(0, None, False)],
        "hidden": [(1, None, True)],
    }
    assert dims({"ids": 0}, {"ids": {0: "t"}}) == {"ids": [(0, "t", True)]}
    assert dims({"ids": {0: "t"}}, {"ids": {0: "t"}}) == {"ids": [(0, "t", True)]}


def test_no_dimension_but_those_marked_unbacked() -> None:
    assert dims({}, {"ids": 0}) == {"ids": [(0, None, True)]}


# What is inferred


class Batch(NamedTuple):
    ids: Tensor


Stages = dict[str, Tensor]


class Annotated(torch.nn.Module):
    def forward(
        self,
        ids: torch.Tensor,
        scale: float,
        positions: torch.Tensor | None,
        hidden: "Stages | None" = None,
        batch: Batch | None = None,
        unknown=None,
        *rest: Tensor,
        last: "Missing | Tensor | None" = None,  # noqa: F821
        **options: Tensor,
    ): ...


def test_the_first_dimension_of_arguments_annotated_as_tensors_is_inferred() -> None:
    names = ["ids", "positions", "hidden", "batch", "last"]
    assert dims(forward=Annotated.forward) == {name: [(0, None, False)] for name in names}
    assert declared(forward=Annotated.forward).inferred


def test_inferred_dimensions_may_be_marked_unbacked() -> None:
    found = dims(None, {"ids": 0, "unknown": 1}, forward=Annotated.forward)
    assert found["ids"] == [(0, None, True)]
    assert found["unknown"] == [(1, None, True)]
    assert found["positions"] == [(0, None, False)]


def test_nothing_is_inferred_where_dimensions_are_declared() -> None:
    assert list(dims({"unknown": 0}, forward=Annotated.forward)) == ["unknown"]


def test_a_decorated_forward_has_the_annotations_of_its_own() -> None:
    found = dims(forward=torch.no_grad()(Annotated.forward))
    assert list(found) == ["ids", "positions", "hidden", "batch", "last"]


def test_a_function_and_a_bound_method_have_no_self() -> None:
    def function(x: Tensor): ...

    assert dims(forward=function) == {"x": [(0, None, False)]}
    assert list(dims(forward=Annotated().forward)) == list(dims(forward=Annotated.forward))


# What cannot be meant


@pytest.mark.parametrize("option", ["dynamic_arg_dims", "mark_unbacked_dims"])
def test_an_unknown_argument_is_an_error_that_names_the_nearest(option: str) -> None:
    with pytest.raises(UsageError) as caught:
        declare(Model.forward, **{option: {"position": 0}})
    assert caught.value.code == "unknown-argument"
    assert caught.value.message == (
        "'position' is no argument of Model.forward whose dimensions can be declared; "
        "there are ids, positions, hidden, scale"
    )
    assert caught.value.hint == "did you mean 'positions'?"


@pytest.mark.parametrize("name", ["self", "rest", "options"])
def test_arguments_without_a_name_of_their_own_cannot_be_declared(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is no argument of Model.forward") as caught:
        declared({name: 0})
    assert "the module itself, or collects arguments" in caught.value.hint


@pytest.mark.parametrize(
    ("dynamic", "unbacked", "message"),
    [
        ({"ids": True}, {}, "True is given for a dimension of argument 'ids' in dynamic_arg_dims"),
        ({"ids": [0, False]}, {}, "False is given for a dimension"),
        ({"ids": {True: "t"}}, {}, "True is given for a dimension"),
        ({"ids": "0"}, {}, "'0' is given for a dimension"),
        ({"ids": None}, {}, "None is given for a dimension"),
        ({"ids": 1.0}, {}, "1.0 is given for a dimension"),
        ({"ids": {"t": 0}}, {}, "0 is given for the shape id of dimension t"),
        ({"ids": {0: ""}}, {}, "'' is given for the shape id of dimension 0 of argument 'ids'"),
        ({"ids": {0: " "}}, {}, "' ' is given for the shape id"),
        ({"ids": {0: None}}, {}, "None is given for the shape id"),
        ({"ids": {}}, {}, "no dimension of argument 'ids' in dynamic_arg_dims is given"),
        ({"ids": 0}, {"ids": []}, "no dimension of argument 'ids' in mark_unbacked_dims is given"),
        ({"ids": [0, 1, 0]}, {}, "dimension 0 of argument 'ids' in dynamic_arg_dims is declared"),
        ({"ids": {0: "t"}}, {"ids": {0: "b"}}, "has two shape ids, 't' and 'b'"),
        (["ids"], {}, "dynamic_arg_dims is \\['ids'\\], which is no mapping"),
        ({"ids": 0}, "ids", "mark_unbacked_dims is 'ids', which is no mapping"),
    ],
)
def test_dimensions_that_cannot_be_meant_are_errors(
    dynamic: Any, unbacked: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        declared(dynamic, unbacked)
    assert caught.value.code == "bad-dims"


@pytest.mark.parametrize("dynamic", [None, {}])
def test_without_any_dimension_there_is_an_error_with_one_to_paste(dynamic: Any) -> None:
    with pytest.raises(UsageError, match="is annotated as a tensor") as caught:
        declared(dynamic)
    assert caught.value.code == "no-dynamic-dims"
    given = caught.value.hint.removeprefix("declare them: dynamic_arg_dims=")
    assert given == '{"ids": 0}'
    assert dims(json.loads(given)) == {"ids": [(0, None, False)]}


def test_a_forward_that_only_collects_arguments_is_told_to_name_them() -> None:
    def forward(self, *args: Tensor, **options: Tensor): ...

    with pytest.raises(UsageError, match="no-dynamic-dims") as caught:
        declared(forward=forward)
    assert caught.value.hint == "name the tensors among its arguments"


# The dimensions of one tensor


def test_dimensions_are_counted_from_the_first_for_each_tensor() -> None:
    found = declared({"hidden": {-1: "h", 0: "t"}}, {"hidden": -2})
    assert dims_of(found, "hidden", torch.ones(4, 5, 6)) == {
        2: DynamicDim(dim=2, shape_id="h"),
        0: DynamicDim(dim=0, shape_id="t"),
        1: DynamicDim(dim=1, unbacked=True),
    }
    assert dims_of(found, "hidden", torch.ones(4, 5)) == {
        1: DynamicDim(dim=1, shape_id="h"),
        0: DynamicDim(dim=0, shape_id="t", unbacked=True),
    }
    assert dims_of(found, "ids", torch.ones(4)) == {}


@pytest.mark.parametrize(
    ("dim", "shape", "message"),
    [
        (2, [3, 4], r"dimension 2 of argument 'ids' .* a tensor of rank 2, of shape \[3, 4\]"),
        (-3, [3, 4], r"dimension -3 of argument 'ids' .* a tensor of rank 2"),
        (0, [], r"dimension 0 of argument 'ids' .* a tensor of rank 0, of shape \[\]"),
    ],
)
def test_a_dimension_that_a_tensor_has_not_is_an_error(
    dim: int, shape: list[int], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        dims_of(declared({"ids": dim}), "ids", torch.ones(shape))
    assert caught.value.code == "dim-out-of-range"


def test_a_tensor_without_dimensions_has_none_inferred() -> None:
    found = declared(None, {"positions": 0}, forward=Annotated.forward)
    assert dims_of(found, "ids", torch.tensor(1)) == {}
    with pytest.raises(UsageError, match="a tensor of rank 0"):
        dims_of(found, "positions", torch.tensor(1))


@pytest.mark.parametrize(
    ("given", "message"),
    [([0, -2], "declared twice"), ({0: "t", -2: "t"}, "declared twice")],
)
def test_one_dimension_declared_from_both_ends_is_an_error(given: Any, message: str) -> None:
    found = declared({"ids": given})
    assert len(dims_of(found, "ids", torch.ones(3, 4, 5))) == 2
    with pytest.raises(UsageError, match=f"dimension 0 of argument 'ids' is {message}"):
        dims_of(found, "ids", torch.ones(3, 4))


def test_two_shape_ids_that_meet_in_one_dimension_are_an_error() -> None:
    found = declared({"ids": {0: "t"}}, {"ids": {-1: "b"}})
    assert len(dims_of(found, "ids", torch.ones(3, 4))) == 2
    with pytest.raises(UsageError, match="has two shape ids, 't' and 'b'"):
        dims_of(found, "ids", torch.ones(3))
