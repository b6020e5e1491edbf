"""What changes after the first call, what calls share, and what is refused: no result is stale."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from vllmc.core import plainly, support_torch_compile
from vllmc.core.declare.held import Held
from vllmc.core.errors import UsageError, VllmcError

TOKENS = {0: "tokens"}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.register_buffer("shift", torch.zeros(4))
        self.scale = 2.0
        self._private = 1.0
        self.eval()


@support_torch_compile(dynamic_arg_dims={"x": TOKENS})
class Model(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale * self._private + self.weight + self.shift


def same(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        with plainly():
            expected = model(*args, **kwargs)
        torch.testing.assert_close(model(*args, **kwargs), expected, equal_nan=True)


def replace(path: str, value: Any) -> Any:
    owner, _, name = path.rpartition(".")
    return lambda model: setattr(model.get_submodule(owner), name, value())


@pytest.mark.parametrize(
    "change",
    [
        replace("linear", lambda: torch.nn.Linear(4, 4)),
        replace("linear", torch.nn.Identity),
        replace("weight", lambda: torch.nn.Parameter(torch.zeros(4))),
        replace("linear.weight", lambda: torch.nn.Parameter(torch.zeros(4, 4))),
        replace("linear.bias", lambda: None),
        replace("shift", lambda: torch.ones(4)),
        replace("scale", lambda: 3.0),
        replace("_private", lambda: 3.0),
        lambda model: model.load_state_dict(Model().state_dict(), assign=True),
    ],
)
def test_what_is_replaced_after_the_first_call_is_seen(change: Any) -> None:
    model, x = Model(), torch.randn(3, 4)
    same(model, x)
    change(model)
    same(model, x)


def test_tensors_that_were_tied_can_be_parted() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model, x = Tied().eval(), torch.randn(3, 4)
    same(model, x)
    model.b.weight = torch.nn.Parameter(torch.randn(4, 4))
    same(model, x)


def test_a_module_from_which_something_was_taken_is_not_what_it_was() -> None:
    model = Model()
    held = Held(model)
    assert held.is_there()
    del model.linear._parameters["bias"]
    assert not held.is_there()


def test_attributes_of_modules_inside_are_those_of_the_first_call() -> None:
    """A documented limit: see docs/declare.md."""

    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(x)

    model, x = Outer().eval(), torch.ones(64)
    same(model, x)
    model.drop.train()
    assert model(x).tolist() == [1] * 64
    anew = Outer().eval()
    anew.drop.train()
    assert set(anew(x).tolist()) == {0, 2}


def test_kinds_of_calls_that_take_turns_keep_their_programs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Model(), torch.randn(3, 4)
    caplog.set_level(logging.INFO, "vllmc")
    for _ in range(3):
        same(model, x)
        same(model, torch.randn(3, 2, 4))
    opened = [r for r in caplog.records if re.search(r"Model: (hit|compiled)", r.getMessage())]
    assert len(opened) == 2


def test_what_loading_took_is_logged_once_for_each_program(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Model(), torch.randn(3, 4)
    caplog.set_level(logging.INFO, "vllmc")
    same(model, x)
    same(model, torch.randn(5, 4))
    loaded = r"Model: loaded and linked, \d+\.\d\d s"
    assert sum(bool(re.search(loaded, r.getMessage())) for r in caplog.records) == 1


def test_classes_of_one_name_with_other_closures_do_not_share_a_program(seen: Any) -> None:
    def make(by: int) -> torch.nn.Module:
        @support_torch_compile(dynamic_arg_dims={"x": 0})
        class Closed(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * by

        return Closed().eval()

    for by in (2, 3, 2):
        same(make(by), torch.ones(3))
    assert seen.captures == 2


class Box:
    def __init__(self, tensors: dict[str, Tensor], by: int) -> None:
        self.tensors, self.by = tensors, by


def test_containers_are_told_apart_by_class_and_by_what_lies_beside_the_tensors() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS, "held": TOKENS})
    class Asks(torch.nn.Module):
        def forward(self, x: Tensor, held: Any = None) -> Tensor:
            if isinstance(held, Box):
                return x + held.tensors["x"] * held.by
            if held is None:
                return x
            return x * (len(held) + 2) + (5 if isinstance(held, list) else 7)

    x = torch.randn(3)
    kinds: list[Any] = [None, [], (), {}, [x], (x,), Box({"x": x}, 1), Box({"x": x}, 2), [None]]
    model = Asks().eval()
    for held in (*kinds, *kinds):
        same(model, x, held)
    for held in kinds:
        same(Asks().eval(), x, held)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -0.0])
def test_floats_that_are_equal_and_not_the_same_are_told_apart(number: float, seen: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor, by: float) -> Tensor:
            return 1 / (x * by)

    model = Scaled().eval()
    for by in (0.0, number, float(str(number))):
        same(model, torch.ones(3), by)
    assert seen.captures == 1 + (str(number) != "0.0")


def test_parameters_by_place_or_by_name_alone_are_passed_as_such() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS, "y": TOKENS, "z": TOKENS})
    class Strict(torch.nn.Module):
        def forward(self, x: Tensor, /, y: Tensor, *, z: Tensor | None = None) -> Tensor:
            return x - y if z is None else x - y - z

    model, x = Strict().eval(), torch.randn(3)
    same(model, x, x * 2)
    same(model, x, y=x * 2, z=x * 3)
    with pytest.raises(TypeError, match="positional-only"):
        model(x=x, y=x)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_an_argument_that_is_written_shares_its_memory_with_no_other(
    backend: str, session: Any
) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS, "y": TOKENS})
    class Writes(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x[:, 1:].add_(1)
            return x + y

    with session(backend=backend):
        model = Writes().eval()
    x, y = torch.zeros(3, 4), torch.ones(3, 4)
    assert model(x, y).tolist() == [[1, 2, 2, 2]] * 3
    assert x.tolist() == [[0, 1, 1, 1]] * 3
    big = torch.zeros(4, 4)
    for first, second in ((x, x), (big[:3], big[1:])):
        with pytest.raises(VllmcError, match="x is written to, and lies in") as caught:
            model(first, second)
        assert caught.value.code == "shared-memory"
    assert not big.any()


def test_a_call_under_autocast_is_refused() -> None:
    model, x = Model(), torch.randn(3, 4)
    for _ in range(2):  # before and after the first call
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(VllmcError) as caught:
            model(x)
        assert caught.value.code == "autocast"
        same(model, x)


def test_tensors_of_a_subclass_are_refused_and_parameters_are_not() -> None:
    class Other(Tensor):
        pass

    model, x = Model(), torch.randn(3, 4)
    for _ in range(2):
        with pytest.raises(UsageError, match="the argument x is a Other"):
            model(x.as_subclass(Other))
        same(model, torch.nn.Parameter(x))


def test_a_module_without_tensors_asks_where_its_arguments_are() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Bare(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Bare().eval()
    same(model, torch.ones(3))
    with pytest.raises(VllmcError, match="no device 'meta'"):
        model(torch.ones(3, device="meta"))


def test_a_class_keeps_its_own_ways_of_being_made_and_moved() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Own(torch.nn.Module):
        moved = False

        def __new__(cls, *_: Any) -> Own:
            made: Own = super().__new__(cls)
            vars(made)["extra"] = 5
            return made

        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            self.moved = True
            return super()._apply(fn, recurse)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by * vars(self)["extra"]

    model = Own(3).eval()
    same(model, torch.ones(3))
    assert model.double().moved


def test_a_call_of_its_own_is_refused_at_decoration() -> None:
    class Calls(torch.nn.Module):
        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args) + 1

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(UsageError, match="__call__ of its own") as caught:
        support_torch_compile(dynamic_arg_dims={"x": 0})(Calls)
    assert caught.value.code == "own-call"


def test_a_forward_calls_its_module_self() -> None:
    class Odd(torch.nn.Module):
        def forward(this, x: Tensor) -> Tensor:  # noqa: N805
            return x

    with pytest.raises(UsageError, match=r"Odd\.forward is this") as caught:
        support_torch_compile(Odd)
    assert caught.value.code == "no-self"
