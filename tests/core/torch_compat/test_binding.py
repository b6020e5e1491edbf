from __future__ import annotations

import ast
import itertools
from typing import Any

import pytest
import torch

from vllmc.core.runtime.loader import bind_piece
from vllmc.core.torch_compat.binding import bound_wrapper
from vllmc.core.torch_compat.native import Wrapper

# As Inductor writes it: the method of a class, a list that is emptied, checks and views in between.
GENERATED = """
import torch
assert_size_stride = torch._C._dynamo.guards.assert_size_stride
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu
reinterpret_tensor = torch._C._dynamo.guards._reinterpret_tensor

class Runner:
    def __init__(self, partitions):
        self.partitions = partitions

    def call(self, args):
        arg0_1, arg1_1, arg2_1, arg3_1 = args
        args.clear()
        u0 = arg1_1
        if not u0 <= 9:
            raise RuntimeError('u0 <= 9')
        assert_size_stride(arg0_1, (u0, 3), (3, 1), 'input')
        assert_size_stride(arg2_1, (2, 3), (3, 1), 'input')
        buf0 = empty_strided_cpu((u0, 2), (2, 1), torch.float32)
        product(arg0_1, reinterpret_tensor(arg2_1, (3, 2), (1, 3), 0), buf0)
        assert_size_stride(arg3_1, (2,), (1,), 'input')
        buf1 = buf0
        del buf0
        product(arg0_1, reinterpret_tensor(arg2_1, (3, 2), (1, 3), 0), buf1)
        buf2 = reinterpret_tensor(buf1, (2, u0), (1, 2), 0)
        del arg0_1, arg2_1
        return (buf2, reinterpret_tensor(arg3_1, (1, 2), (2, 1), 0), arg3_1)

runner = Runner(partitions=[])
call = runner.call
recursively_apply_fns = None
"""


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def wrapper(source: str = GENERATED) -> Wrapper:
    return Wrapper(source, {"product": product}, name="toy")


def arguments(rows: int = 4) -> list[Any]:
    return [torch.randn(rows, 3), rows, torch.randn(2, 3), torch.randn(2)]


PLACES = [p for n in range(5) for p in itertools.combinations(range(4), n)]


@pytest.mark.parametrize("held", PLACES, ids=str)
def test_a_bound_wrapper_computes_what_the_wrapper_does(held: tuple[int, ...]) -> None:
    args = arguments()
    expected = wrapper()(list(args))
    bound = wrapper().bind({place: args[place] for place in held})
    assert bound is not None
    for _ in range(2):
        results = bound(*(a for place, a in enumerate(args) if place not in held))
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_what_parameters_alone_decide_is_done_once() -> None:
    module = bound_wrapper(GENERATED, (2, 3))
    assert module is not None
    bind = module.body[-1]
    assert isinstance(bind, ast.FunctionDef)
    assert [argument.arg for argument in bind.args.args] == ["arg2_1", "arg3_1"]
    step = next(s for s in bind.body if isinstance(s, ast.FunctionDef))
    assert [argument.arg for argument in step.args.args] == ["arg0_1", "arg1_1"]
    each, whole = ast.unparse(step), ast.unparse(bind)
    assert each.count("assert_size_stride") == 1, "the check of an argument of the call"
    assert each.count("reinterpret_tensor") == 1, "the view of a result"
    assert whole.count("assert_size_stride") == 3
    assert whole.count("reinterpret_tensor") == 3, "two that are alike are one"
    assert "Runner" not in ast.unparse(module)


def test_a_wrapper_is_bound_to_the_parameters_of_each_layer() -> None:
    shared, args = wrapper(), arguments()
    others = [torch.randn(2, 3) for _ in range(3)]
    layers = [shared.bind({2: weight, 3: args[3]}) for weight in others]
    for weight, layer in zip(others, layers, strict=True):
        assert layer is not None
        torch.testing.assert_close(layer(args[0], 4)[0], (args[0] @ weight.T).T)


def test_a_parameter_of_another_layout_is_refused_when_it_is_bound() -> None:
    with pytest.raises(AssertionError, match="stride"):
        wrapper().bind({2: torch.randn(3, 2).T})


def test_an_argument_of_another_layout_is_refused_in_the_call() -> None:
    bound = wrapper().bind({2: torch.randn(2, 3), 3: torch.randn(2)})
    assert bound is not None
    with pytest.raises(AssertionError, match="stride"):
        bound(torch.randn(3, 4).T, 4)
    with pytest.raises(RuntimeError, match="u0 <= 9"):
        bound(torch.randn(10, 3), 10)


@pytest.mark.parametrize(
    "source",
    [
        "def call(args):\n    return (args[0] + args[1],)\n",
        "def call(args):\n    x, y = args\n    return (x + y,)\n",
        "def call(args):\n    x, y = args\n    args.clear()\n    y = x + y\n    return (y,)\n",
        "def call(args):\n    x, y = args\n    args.clear()\n    args = [x]\n    return (x + y,)\n",
        "def call(args):\n    (x, *y) = args\n    args.clear()\n    return (x + y[0],)\n",
        "class Runner:\n    one = 1\n    def call(self, args):\n        x, y = args\n"
        "        args.clear()\n        return (x + y * self.one,)\n"
        "runner = Runner()\ncall = runner.call\n",
        "call = lambda args: (args[0] + args[1],)\n",
    ],
)
def test_a_wrapper_of_another_form_is_called_as_it_is(source: str) -> None:
    assert bound_wrapper(source, (1,)) is None
    bound = bind_piece(wrapper(source), 2, {1: torch.ones(2)})
    assert bound(torch.ones(2))[0].tolist() == [2.0, 2.0]


def test_a_function_of_the_module_is_bound_as_a_method_is() -> None:
    source = "def call(args):\n    (x, y) = args\n    args.clear()\n    return (x - y, scale)\n"
    bound = Wrapper(source, {"scale": 3}, name="toy").bind({0: torch.ones(2)})
    assert bound is not None
    difference, scale = bound(torch.full((2,), 5.0))
    assert (difference.tolist(), scale) == ([-4.0, -4.0], 3)


def test_names_of_a_comprehension_are_no_parameters() -> None:
    source = (
        "def call(args):\n    x, y = args\n    args.clear()\n"
        "    return tuple(reinterpret_tensor(v, (2,), (1,), 0) for v in (x, y))\n"
    )
    provided = {"reinterpret_tensor": lambda tensor, size, stride, offset: tensor + 1}
    bound = Wrapper(source, provided, name="toy").bind({1: torch.ones(2)})
    assert bound is not None
    assert [t.tolist() for t in bound(torch.zeros(2))] == [[1.0, 1.0], [2.0, 2.0]]
