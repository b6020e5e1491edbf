"""Layers that are alike are traced once; the graph is what tracing all of them gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from vllmc.core.errors import VllmcError
from vllmc.core.graph import capture, repeats
from vllmc.core.graph.layers import find_layers
from vllmc.core.models.module_model import ModuleModel
from vllmc.core.spec import ATTENTION_OP, CompileRange
from vllmc.core.torch_compat.capture import capture_full_graph
from vllmc.core.torch_compat.stand_ins import standing_in, stands_for

TABLE = {3: 4.0}
CURRENT = {"number": 0, "sign": 1}


class Layer(nn.Module):
    """A residual layer with an attribute that every layer has for itself."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.scale = 0.5
        self.linear = nn.Linear(8, 8)
        self.register_buffer("shift", torch.full((8,), number / 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.ops.vllmc_test.cut(self.linear(x) * self.scale) + self.shift


class Halved(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class Square(nn.Module):
    """A layer of another class."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllmc_test.cut(x * x)


class Numbered(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * (self.number + 1)


class Third(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x) if self.number == 3 else super().forward(x)


class Tabled(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * TABLE.get(self.number, 1.0)


class InPlace(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += torch.ops.vllmc_test.cut(self.linear(x))
        return x


class Handing(Layer):
    """What it is given is what it returns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.ops.vllmc_test.cut(self.linear(x))
        return x


class Counting(Layer):
    """How many rows it keeps only the values decide."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = torch.nonzero(x[0, :, 0] > 0)[:, 0]
        return super().forward(x) + self.linear(x[0, rows]).sum()


class Rowed(Layer):
    """Makes a number out of a size, which Dynamo computes in the first layer alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        places = torch.arange(x.shape[1] * 2)
        return super().forward(x) + places[: x.shape[1], None]


class Experts(Layer):
    """With a list of modules of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(expert(x) for expert in self.experts)


class Two(Layer):
    """As layers of vLLM do it: takes and gives a residual, which the first is not given."""

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, *, twice: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x if residual is None else x + residual
        y = torch.ops.vllmc_test.cut(self.linear(residual))
        return (y * 2 if twice else y), residual


class Entry(nn.Module):
    """Five layers after an embedding of ids below 32; `walk(layers, x)` calls them."""

    def __init__(self, layers: list[nn.Module], walk: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(8)
        self.walk = walk

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_indices: torch.Tensor,
    ) -> torch.Tensor:
        x = self.walk(self.layers, self.embedding(input_ids) + position_ids[..., None])
        return self.norm(x)[0, logits_indices]


def in_turn(layers: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def entry_of(
    *classes: Callable[[int], nn.Module],
    walk: Callable[..., torch.Tensor] = in_turn,
    **attributes: Any,
) -> Entry:
    """An entry of one layer of each class, with `attributes` of the layers by name."""
    torch.manual_seed(0)
    layers = [cls(number) for number, cls in enumerate(classes)]
    for name, values in attributes.items():
        for layer, value in zip(layers, values, strict=True):
            setattr(layer, name, value)
    return Entry(list(layers), walk).eval().requires_grad_(False)


@pytest.fixture
def check(link_toy: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Checks that an entry is captured as a whole capture does it, and computes what it should.

    `check(entry, *stood_in, **changes of the spec)`: how many layers were stood in for in each
    attempt. It is run with each number of `tokens`.
    """

    def run(
        entry: nn.Module, *stood_in: int, tokens: tuple[int, ...] = (1, 2, 9), **changes: Any
    ) -> None:
        attempts: list[int] = []

        def counting(*args: Any) -> Any:
            raw = capture_full_graph(*args)
            attempts.append(sum(stands_for(node) is not None for node in raw.module.graph.nodes))
            return raw

        with monkeypatch.context() as patch:
            patch.setattr(repeats, "capture_full_graph", counting)
            found = link_toy(entry, **changes)
            patch.setattr(capture, "capture_repeating", capture_full_graph)
            whole = link_toy(entry, **changes)
        assert found.plan.layout == whole.plan.layout
        assert pieces_of(found) == pieces_of(whole)
        assert found.captured.functions == whole.captured.functions
        # Of a class Dynamo says more than once that it is the same.
        missing = {*whole.captured.guarded} - {*found.captured.guarded}
        assert {e for e in missing if "type(" not in e} == set()
        assert tuple(attempts) == stood_in
        found.check(*tokens)

    return run


def pieces_of(toy: Any) -> list[tuple[str, tuple[str, ...]]]:
    return [(unique.piece.digest, unique.names) for unique in toy.plan.unique]


@pytest.fixture(params=["unbacked", "backed", "backed-size-oblivious"])
def kind(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def test_of_equal_layers_one_is_traced(check: Any, kind: str) -> None:
    check(entry_of(*[Layer] * 5), 4, dynamic_shapes=kind)


def test_layers_of_one_look_are_traced_once_each(check: Any) -> None:
    check(entry_of(*[Layer] * 5, scale=[0.5, 2.0, 0.5, 2.0, 0.5]), 3)
    check(entry_of(Square, Layer, Layer, Layer, Square), 3)


def test_layers_that_differ_at_the_ends(check: Any) -> None:
    check(entry_of(*[Layer] * 5, scale=[1.0, 0.5, 0.5, 0.5, 2.0]), 2)


def test_a_layer_that_reads_its_number_is_like_no_other(check: Any) -> None:
    check(entry_of(*[Numbered] * 5), 4, 0)


def test_a_number_that_only_some_layers_look_at(check: Any) -> None:
    # The first was traced under `0 == 3`: for another number nothing is known.
    check(entry_of(*[Third] * 5), 4, 0)
    check(entry_of(*[Tabled] * 5), 4, 0)


def test_what_cannot_be_copied_is_traced(check: Any) -> None:
    check(entry_of(*[Handing] * 5), 4, 0)
    check(entry_of(*[Counting] * 5), 4, 0)
    # Which memory is written to shows only in what is traced: it takes two attempts to see it.
    check(entry_of(*[InPlace] * 5), 4, 2, 0)


def test_sizes_that_dynamo_computes_once_for_all_layers(check: Any, link_toy: Any) -> None:
    entry = entry_of(*[Rowed] * 5)
    check(entry, 4)
    # The first piece has the embedding besides, the last the norm; the others are one.
    assert len(link_toy(entry).plan.unique) == 3


def test_lists_within_layers_are_no_layers(check: Any) -> None:
    entry = entry_of(*[Experts] * 5)
    assert find_layers(entry).paths == tuple(f"layers.{n}" for n in range(5))
    check(entry, 4)


def test_a_first_layer_that_is_called_otherwise(check: Any) -> None:
    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for number, layer in enumerate(layers):
            x, residual = layer(x, residual, twice=number == 2)
        return x + residual

    check(entry_of(*[Two] * 6, walk=walk), 5, 3)


def test_what_differs_only_from_the_first(check: Any) -> None:
    class Doubling(Two):
        """Its first residual is what it was given, so that the first layer cannot be copied."""

        def forward(
            self, x: torch.Tensor, residual: torch.Tensor | None, **_: bool
        ) -> tuple[torch.Tensor, torch.Tensor]:
            residual = x if residual is None else x + residual
            return torch.ops.vllmc_test.cut(self.linear(residual)), residual

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        residual = None
        for layer in layers:
            x, residual = layer(x, residual)
        return x + residual

    check(entry_of(*[Doubling] * 6, walk=walk), 5, 4)


def test_one_tensor_in_two_places_is_not_two_tensors(check: Any) -> None:
    class Adding(Layer):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return super().forward(x if x is y else x - y)

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            x = layer(x, x if number < 2 else x * 2)
        return x

    check(entry_of(*[Adding] * 5, walk=walk), 4, 3)


class Holding(Layer):
    """A layer that holds one tensor in two places."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.inner = nn.Module()
        self.inner.register_buffer("shift", self.shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.inner.shift


def test_a_tensor_that_a_layer_holds_twice(check: Any) -> None:
    check(entry_of(*[Holding] * 5), 4)


def test_a_layer_that_holds_two_tensors_where_others_hold_one(check: Any) -> None:
    entry = entry_of(*[Holding] * 5)
    entry.layers[2].inner.shift = entry.layers[2].shift.clone()
    check(entry, 3)


def test_a_module_that_a_layer_holds_twice(check: Any) -> None:
    entry = entry_of(*[Holding] * 5)
    for layer in entry.layers:
        layer.again = layer.inner
    assert find_layers(entry).models == {}
    check(entry, 0)


def test_layers_under_another_state_of_torch(check: Any) -> None:
    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers[:2]:
                x = layer(x)
        return in_turn(layers[2:], x)

    # A piece cannot end within autocast: this is one piece.
    check(entry_of(*[Layer] * 5, walk=walk), 4, 3, splitting_ops=(ATTENTION_OP,))


def test_a_layer_that_is_called_twice(check: Any) -> None:
    check(entry_of(*[Layer] * 5, walk=lambda layers, x: layers[3](in_turn(layers, x))), 5)
    # What was traced twice cannot be told apart.
    check(entry_of(*[Layer] * 5, walk=lambda layers, x: layers[0](in_turn(layers, x))), 4, 0)


def test_a_layer_that_is_not_called(check: Any) -> None:
    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        return in_turn(layers[:3], x) + layers[4].linear.weight[0]

    check(entry_of(*[Layer] * 5, walk=walk), 2, 2)


def test_layers_that_return_more_than_tensors(check: Any) -> None:
    class Telling(Layer):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int, None]:
            return super().forward(x), 2, None

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            x, factor, _ = layer(x)
            x = x * factor
        return x

    # Nothing but tensors can stand in: the first attempt fails within Dynamo.
    check(entry_of(*[Telling] * 4, walk=walk), 0)


def test_a_graph_without_inputs(check: Any) -> None:
    class Constant(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.number = number

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.vllmc_test.cut(x) + 1

    class Deaf(Entry):
        """Looks at none of its arguments."""

        def forward(self, input_ids: Any, position_ids: Any, logits_indices: Any) -> torch.Tensor:
            return self.walk(self.layers, torch.ones(1, 8))

    check(Deaf([Constant(n) for n in range(4)], in_turn).eval().requires_grad_(False), 3)


def test_a_list_that_the_layers_write_to(check: Any) -> None:
    class Noting(Layer):
        def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
            seen.append(x)
            return super().forward(x) + len(seen)

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        for layer in layers:
            x = layer(x, seen)
        return x + sum(seen)

    check(entry_of(*[Noting] * 4, walk=walk), 3, 2, 1, 0)


def test_a_list_that_only_the_first_layer_finds_empty(check: Any) -> None:
    class Flagging(Layer):
        def forward(self, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
            first = not seen
            seen.clear()
            seen.append(1)
            return super().forward(x) * (2 if first else 1)

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        seen: list[int] = []
        for layer in layers:
            x = layer(x, seen)
        return x

    check(entry_of(*[Flagging] * 4, walk=walk), 3, 0)


def test_what_is_changed_between_layers(check: Any) -> None:
    class Current(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * CURRENT["number"]

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            CURRENT["number"] = number
            x = layer(x)
        return x

    check(entry_of(*[Current] * 4, walk=walk), 3, 0)


def test_what_is_changed_by_layers(check: Any) -> None:
    class Flipping(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            CURRENT["sign"] = -CURRENT["sign"]
            return super().forward(x) * CURRENT["sign"]

    # An even number of them leaves it as it was.
    check(entry_of(*[Flipping] * 4), 3, 2, 1, 0)


def test_an_argument_that_is_no_part_of_a_graph(check: Any) -> None:
    class Box:
        def __init__(self, value: float) -> None:
            self.value = value

    class Boxed(Layer):
        def forward(self, x: torch.Tensor, box: Box) -> torch.Tensor:
            return super().forward(x) * box.value

    def walk(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            x = layer(x, Box(number))
        return x

    # The first attempt fails within Dynamo.
    check(entry_of(*[Boxed] * 4, walk=walk), 0)


def test_layers_that_share_weights_or_have_hooks_are_left_alone(check: Any) -> None:
    tied = entry_of(*[Layer] * 4)
    tied.layers[2].linear.weight = tied.layers[0].linear.weight
    assert find_layers(tied).models == {}
    check(tied, 0)
    hooked = entry_of(*[Layer] * 4)
    hooked.layers[1].linear.register_forward_hook(lambda module, args, result: result * 2)
    assert find_layers(hooked).models == {2: 0, 3: 0}
    check(hooked, 2)


def test_tensors_of_another_form_or_none_at_all(check: Any) -> None:
    class Biased(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            return y if self.extra is None else y + self.extra

    plain = [None, torch.ones(8), torch.ones(1, 8), torch.ones(8), None]
    check(entry_of(*[Biased] * 5, extra=plain), 3, 2)


def test_what_others_read_or_write_in_a_layer(check: Any) -> None:
    def reading(layers: Any, x: torch.Tensor) -> torch.Tensor:
        return in_turn(layers, x + layers[2].linear.weight.sum())

    def writing(layers: Any, x: torch.Tensor) -> torch.Tensor:
        layers[1].shift.mul_(2)
        x = in_turn(layers, x)
        layers[1].shift.mul_(0.5)
        return x

    def listing(layers: Any, x: torch.Tensor) -> torch.Tensor:
        total = sum(p.sum() for layer in layers for p in layer.parameters())
        return in_turn(layers, x * len(list(layers[1].named_parameters()))) + total

    check(entry_of(*[Layer] * 4, walk=reading), 3, 2)
    check(entry_of(*[Layer] * 4, walk=writing), 3, 2)
    check(entry_of(*[Layer] * 4, walk=listing), 3, 0)


def test_a_layer_keeps_a_method_of_its_own(check: Any) -> None:
    entry = entry_of(*[Layer] * 4)
    own = entry.layers[2].named_parameters
    entry.layers[2].named_parameters = own
    check(entry, 2)
    assert vars(entry.layers[2])["named_parameters"] is own


class Asking(Layer):
    """A layer that may know others: what it does hangs on which one it is."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.known: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y * 3 if self.is_special() else y

    def is_special(self) -> bool:
        return self.known[0] is self


def test_a_layer_that_asks_which_one_it_is(check: Any) -> None:
    class ById(Asking):
        def is_special(self) -> bool:
            return id(self) in self.known

    class ByChild(Asking):
        def is_special(self) -> bool:
            return self.known[0] is self.linear

    for cls, known in (
        (Asking, lambda layer: layer),
        (ById, id),
        (ByChild, lambda layer: layer.linear),
    ):
        entry = entry_of(*[cls] * 4)
        for layer in entry.layers:
            layer.known.append(known(entry.layers[2]))
        check(entry, 3, 0)


def test_conditions_and_numbers_that_layers_are_given(check: Any) -> None:
    class Given(Layer):
        def forward(self, x: torch.Tensor, given: Any = None) -> torch.Tensor:
            return super().forward(x) * (2 if given else 3)

    class Compared(Layer):
        def forward(self, x: torch.Tensor, given: Any = None) -> torch.Tensor:
            return super().forward(x) * (2 if given > 2 else 3)

    def conditions(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            x = layer(x, x.shape[1] > (0 if number < 2 else 400))
        return x

    def quotients(layers: Any, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(layers):
            x = layer(x, x.shape[1] / (1 if number < 2 else 400))
        return x

    backed = {"dynamic_shapes": "backed", "ranges": (CompileRange(5, 64),)}
    check(entry_of(*[Given] * 4, walk=conditions), 3, 2, tokens=(9,), **backed)
    check(entry_of(*[Compared] * 4, walk=quotients), 3, 2, tokens=(9,), **backed)


def test_a_class_beneath_another_s_forward(check: Any) -> None:
    # `Halved.forward` calls that of `Layer`, which must not count as a layer's then.
    check(entry_of(Layer, Halved, Halved, Layer, Layer), 1)


def test_names_as_strings_are_part_of_the_graph(check: Any) -> None:
    class Named(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(torch.ops.vllmc_test.named(x, self.name))

    check(entry_of(*[Named] * 3, name=["one", "three", "seven"]), 2, 0)


def test_a_model_that_cannot_be_captured_says_why(link_toy: Any) -> None:
    class Printing(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if bool((x > 0).all()) else x

    with pytest.raises(VllmcError) as raised:
        link_toy(entry_of(*[Printing] * 3))
    assert raised.value.code == "unsupported-model"
    assert "test_repeats.py" in str(raised.value.context)


@pytest.fixture
def stood_in() -> Iterator[Entry]:
    entry = entry_of(*[Layer] * 3)
    with standing_in(list(entry.layers), {1: 0, 2: 0}):
        yield entry


def test_other_threads_run_the_layers_meanwhile(stood_in: Entry, toy_batch: Any, ops: Any) -> None:
    expected = entry_of(*[Layer] * 3)(*toy_batch(3))
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(stood_in(*toy_batch(3))))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_nothing_is_left_of_it(ops: Any) -> None:
    entry = entry_of(Layer, Halved, Halved)
    before = [dict(vars(entry.layers[0])), dict(vars(Layer)), dict(vars(Halved))]
    with standing_in(list(entry.layers), {2: 1}):
        assert dict(vars(Halved)) != before[2]
    assert [dict(vars(entry.layers[0])), dict(vars(Layer)), dict(vars(Halved))] == before


def test_what_layers_are_is_told_as_it_was_before(ops: Any) -> None:
    entry = entry_of(*[Layer] * 3)
    model = ModuleModel("toy", entry)
    before, found = model.factors(), []
    thread = threading.Thread(target=lambda: found.append(model.factors()))
    with standing_in(list(entry.layers), {1: 0, 2: 0}):
        thread.start()
        thread.join(0.5)
        assert found == []
    thread.join()
    assert found == [before]
