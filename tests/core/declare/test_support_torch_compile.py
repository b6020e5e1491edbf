"""Declared modules, called: what is compiled, how often, and that it computes the same."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from vllmc.core import (
    CompileRange,
    CompileSpec,
    ignore_torch_compile,
    plainly,
    support_torch_compile,
)
from vllmc.core.errors import CheckFailed, UsageError, VllmcError

TOKENS = {0: "tokens"}


class Embedder(torch.nn.Module):
    """What the modules below have in common."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(32, 8)
        self.linear = torch.nn.Linear(8, 8)
        self.eval()


@support_torch_compile(dynamic_arg_dims={"ids": TOKENS, "positions": {-1: "tokens"}})
class Model(Embedder):
    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.linear(self.embedding(ids)) * positions[:, None]


class IntermediateTensors:
    tensors: dict[str, Tensor]

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


class Pair(NamedTuple):
    first: Tensor
    second: int


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, 32, (tokens,), generator=generator), torch.arange(tokens)


def same(model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
    """The compiled call returns what the plain forward does."""
    with torch.no_grad():
        with plainly():
            expected = model(*args, **kwargs)
        torch.testing.assert_close(model(*args, **kwargs), expected)


def test_every_size_runs_one_program(seen: Any) -> None:
    model = Model()
    for tokens in (1, 2, 7, 1, 64):
        same(model, *batch(tokens))
    assert (seen.captures, seen.units) == (1, ["compiled"])


def test_a_call_takes_arguments_as_the_forward_does(seen: Any) -> None:
    model = Model()
    ids, positions = batch(3)
    expected = model.forward(ids, positions)
    for result in (model(ids, positions=positions), model(positions=positions, ids=ids)):
        torch.testing.assert_close(result, expected)
    with pytest.raises(TypeError, match="positions"):
        model(ids)
    assert len(seen.units) == 1


def test_sizes_of_one_shape_id_that_differ_are_an_error_that_names_both() -> None:
    model = Model()
    ids, _ = batch(7)
    for _ in range(2):  # also before anything was compiled
        with pytest.raises(VllmcError) as caught:
            model(ids, torch.arange(8))
        assert caught.value.code == "size-mismatch"
        for part in ("ids.shape[0] has 7", "positions.shape[0] has 8", "'tokens'"):
            assert part in caught.value.message
        assert any("hint: " in note for note in caught.value.__notes__)
    same(model, *batch(7))


@support_torch_compile
class Inferred(Embedder):
    def forward(
        self,
        ids: Tensor,
        stage: IntermediateTensors | None = None,
        extra: dict[str, torch.Tensor] | None = None,
        scale: float = 1.0,
    ) -> Any:
        hidden = self.embedding(ids)
        if stage is not None:
            hidden = hidden + stage["hidden"]
        if extra is not None:
            hidden = hidden + extra["bias"]
        return IntermediateTensors({"hidden": self.linear(hidden) * scale})


def test_annotations_say_what_varies_and_containers_pass_between_stages(seen: Any) -> None:
    model = Inferred()
    for tokens in (5, 1, 9):
        ids, _ = batch(tokens)
        hidden = torch.randn(tokens, 8)
        with torch.no_grad():
            for stage in (None, IntermediateTensors({"hidden": hidden})):
                result, expected = model(ids, stage), model.forward(ids, stage)
                assert type(result) is type(expected)
                torch.testing.assert_close(result["hidden"], expected["hidden"])
            result = model(ids, extra={"bias": hidden}, scale=2.0)
            expected = model.forward(ids, extra={"bias": hidden}, scale=2.0)
            torch.testing.assert_close(result["hidden"], expected["hidden"])
    assert seen.captures == 3, "one for each kind of call"


@pytest.mark.parametrize(
    "dims",
    [{"x": 0, "y": 0}, {"x": [0], "y": [-2]}, {"x": {0: "n"}, "y": {0: "n"}}, None],
    ids=["int", "list", "ids", "inferred"],
)
@pytest.mark.parametrize("kind", ["unbacked", "backed", "backed-size-oblivious"])
def test_a_relation_holds_however_it_was_declared(
    dims: Any, kind: str, session: Any, seen: Any
) -> None:
    @support_torch_compile(dynamic_arg_dims=dims)
    class Sum(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x + y) * 2

    with session(dynamic_shapes=kind):
        model = Sum().eval()
    for tokens in (4, 1, 33):
        same(model, torch.randn(tokens, 3), torch.randn(tokens, 3))
    assert seen.captures == 1
    with pytest.raises(VllmcError) as caught:
        model(torch.randn(4, 3), torch.randn(5, 3))
    assert caught.value.code == "size-mismatch"
    assert "x.shape[0]" in caught.value.message
    assert "y.shape[0]" in caught.value.message


def test_results_come_as_the_forward_makes_them() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS})
    class Many(torch.nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x + 1
            return {"y": y, 3: [None, x, (y * 2, x.shape[0])]}, Pair(y.sum(0), x.shape[0] * 2), 0.5

    model = Many().eval()
    for tokens in (5, 1):
        x = torch.randn(tokens, 2)
        result, expected = model(x), model.forward(x)
        torch.testing.assert_close(result[0], expected[0])
        assert result[0][3][1] is x
        assert type(result[1]) is Pair
        torch.testing.assert_close(tuple(result[1]), tuple(expected[1]))
        assert result[2] == 0.5


def test_enable_if_is_asked_with_the_spec(seen: Any) -> None:
    asked: list[CompileSpec] = []

    @support_torch_compile(dynamic_arg_dims={"x": 0}, enable_if=lambda s: bool(asked.append(s)))
    class Disabled(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    model = Disabled()
    assert model(torch.zeros(2)).tolist() == [1, 1]
    assert model(torch.zeros(3)).tolist() == [1, 1, 1]
    assert [(spec.device, spec.dtype, spec.backend) for spec in asked] == [
        ("cpu", "float32", "eager")
    ]
    assert seen.captures == 0


def test_the_last_range_of_an_encoder_has_no_end(session: Any, seen: Any) -> None:
    def make(*, is_encoder: bool) -> torch.nn.Module:
        @support_torch_compile(dynamic_arg_dims={"x": 0}, is_encoder=is_encoder)
        class Encoder(torch.nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x * 2

        with session(ranges=(CompileRange(1, 4), CompileRange(5, 8))):
            return Encoder().eval()

    for tokens in (2, 8, 9, 10_000):
        same(make(is_encoder=True), torch.randn(tokens))
    with pytest.raises(VllmcError) as caught:
        make(is_encoder=False)(torch.randn(9))
    assert caught.value.code == "size-out-of-range"


def test_subclasses_are_compiled_declared_anew_or_ignored(seen: Any) -> None:
    class Inherits(Model):
        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return super().forward(ids, positions) + 1

    @support_torch_compile(dynamic_arg_dims={"ids": TOKENS, "other": TOKENS})
    class Redeclared(Model):
        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            return super().forward(ids, other) + 2

    @ignore_torch_compile
    class Ignored(Model):
        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return super().forward(ids, positions) + 3

    for cls, captures in ((Ignored, 0), (Inherits, 1), (Redeclared, 2), (Model, 3)):
        model = cls()
        same(model, *batch(5))
        same(model, *batch(1))
        assert seen.captures == captures


def test_a_subclass_of_an_ignored_class_can_be_declared(seen: Any) -> None:
    @ignore_torch_compile
    class Plain(Embedder):
        def forward(self, ids: Tensor) -> Tensor:
            return self.embedding(ids)

    @support_torch_compile(dynamic_arg_dims={"ids": 0})
    class Declared(Plain):
        pass

    same(Plain(), batch(3)[0])
    assert seen.captures == 0
    same(Declared(), batch(3)[0])
    assert seen.captures == 1


def test_a_declared_module_in_another_is_part_of_its_graph(seen: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"ids": TOKENS, "positions": TOKENS})
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return self.inner(ids, positions).relu()

    same(Outer().eval(), *batch(5))
    assert (seen.captures, seen.units) == (1, ["compiled"])


def test_torch_compile_takes_a_declared_module_in(seen: Any) -> None:
    model = Model()
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: model(*args), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch(3)), model.forward(*batch(3)))
    assert seen.captures == 0
    torch._dynamo.reset()


def test_instances_share_what_is_compiled(seen: Any) -> None:
    first, second = Model(), Model()
    with torch.no_grad():
        second.linear.weight.mul_(2)
    same(first, *batch(3))
    same(second, *batch(3))
    assert (seen.captures, seen.units) == (1, ["compiled"])


def test_a_later_process_may_be_forbidden_to_compile(session: Any, seen: Any) -> None:
    same(Model(), *batch(3))
    with session(may_compile=False):
        warm, other = Model(), Model()
    same(warm, *batch(4))
    assert len(seen.units) == 1
    other.linear.bias = None
    with pytest.raises(CheckFailed) as caught:
        other(*batch(4))
    assert caught.value.code == "would-miss"


def test_tensors_that_are_moved_or_written_are_those_that_a_call_uses() -> None:
    model = Model()
    same(model, *batch(3))
    with torch.no_grad():
        model.linear.weight.add_(1)
    same(model, *batch(3))
    other = Model()
    torch.nn.init.ones_(other.linear.weight)
    model.load_state_dict(other.state_dict())
    same(model, *batch(3))
    model.double()
    assert model(*batch(3)).dtype is torch.float64
    same(model, *batch(3))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_runs_its_own_weights(twin: Any, seen: Any) -> None:
    model = Model()
    same(model, *batch(3))
    copied = twin(model)
    with torch.no_grad():
        copied.linear.weight.zero_()
    same(copied, *batch(3))
    same(model, *batch(3))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_call_computes_the_same_in_every_mode_and_gives_no_gradient(mode: Any) -> None:
    model = Model()
    for tokens in (3, 1):
        with mode():
            result = model(*batch(tokens))
        assert not result.requires_grad
        torch.testing.assert_close(result, model.forward(*batch(tokens)).detach())


def test_training_and_inference_are_programs_of_their_own() -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Drops(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, 0.5, self.training) + 1

    model = Drops().eval()
    x = torch.ones(64)
    assert model(x).tolist() == [2] * 64
    trained = model.train()(x)
    assert set(trained.tolist()) == {1, 3}
    assert model.eval()(x).tolist() == [2] * 64


def test_threads_that_call_at_once_compile_once(seen: Any) -> None:
    model = Model()
    results: list[Tensor] = []

    def call() -> None:
        results.append(model(*batch(5)))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.captures == 1
    for result in results:
        torch.testing.assert_close(result, model.forward(*batch(5)).detach())
    assert len(results) == 4


def test_a_dimension_can_be_unbacked_whatever_the_kind(session: Any, seen: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS}, mark_unbacked_dims={"x": 0})
    class Unbacked(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    with session(dynamic_shapes="backed"):
        model = Unbacked().eval()
    same(model, torch.randn(1))
    same(model, torch.randn(5))
    assert seen.units == ["compiled"], "backed, a range from 1 is compiled as 1 and the rest"


def test_without_a_size_that_varies_the_one_program_is_used(seen: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": TOKENS})
    class Optional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor | None = None) -> Tensor:
            return self.weight * 2 if x is None else self.weight.sum() * x

    model = Optional().eval()
    same(model)
    same(model)
    same(model, torch.ones(4))
    assert seen.captures == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("self.steps = self.steps + 1", "self.steps"),
        ("self.last = x * 2", "self.last"),
        ("self.seen.append(1)", "self.seen"),
        ("self.buffers_['n'] = x", "self.buffers_"),
        ("held['y'] = x + 1", "the argument held"),
    ],
)
def test_what_a_forward_leaves_behind_is_refused_by_name(change: str, says: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def forward(self, x, held):\n    {change}\n    return x + held['x']", namespace)

    class Leaves(torch.nn.Module):
        forward = namespace["forward"]

        def __init__(self) -> None:
            super().__init__()
            self.steps, self.last, self.seen, self.buffers_ = 0, None, [], {}
            self.eval()

    model = support_torch_compile(dynamic_arg_dims={"x": 0})(Leaves)()
    before = copy.deepcopy({k: v for k, v in vars(model).items() if k != "_vllmc_compiled"})
    with pytest.raises(VllmcError, match=f"changes {says}, besides") as caught:
        model(torch.ones(3), {"x": torch.ones(3)})
    assert caught.value.code == "unsupported-model"
    after = {k: v for k, v in vars(model).items() if k != "_vllmc_compiled"}
    assert after == before, "the module is as it was"


def test_hooks_of_the_module_itself_are_refused() -> None:
    model = Model()
    handle = model.register_forward_hook(lambda *_: None)
    with pytest.raises(VllmcError) as caught:
        model(*batch(3))
    assert caught.value.code == "has-hooks"
    with plainly():
        model(*batch(3))
    handle.remove()
    same(model, *batch(3))


@pytest.mark.parametrize("value", [torch.Generator(), object(), lambda: 1])
def test_an_argument_that_no_record_can_hold_is_refused_by_name(value: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Takes(torch.nn.Module):
        def forward(self, x: Tensor, how: Any = None) -> Tensor:
            return x + 1

    with pytest.raises(UsageError, match="how is a") as caught:
        Takes()(torch.ones(3), value)
    assert caught.value.code == "bad-argument"


def test_constants_that_are_equal_and_not_the_same_are_told_apart(seen: Any) -> None:
    @support_torch_compile(dynamic_arg_dims={"x": 0})
    class Scaled(torch.nn.Module):
        def forward(self, x: Tensor, by: Any = 1, name: str = "") -> Tensor:
            return x * by if name != "half" else x * by / 2

    model = Scaled().eval()
    x = torch.arange(3)
    for by in (1, 1.0, True, 2):
        assert model(x, by).dtype == model.forward(x, by).dtype
        same(model, x, by)
    same(model, x, 2, name="half")
    assert seen.captures == 5


@pytest.mark.parametrize("thing", [3, Model(), lambda x: x, dict])
def test_only_classes_of_modules_are_declared(thing: Any) -> None:
    with pytest.raises(UsageError) as caught:
        support_torch_compile(thing)
    assert caught.value.code == "not-a-module"


def test_a_wrong_argument_name_is_an_error_at_decoration() -> None:
    with pytest.raises(UsageError, match="'idz' is no argument"):

        @support_torch_compile(dynamic_arg_dims={"idz": 0})
        class Wrong(torch.nn.Module):
            def forward(self, ids: Tensor) -> Tensor:
                return ids


def test_inductor_runs_what_a_module_declares(session: Any, seen: Any) -> None:
    with session(backend="inductor"):
        model, again = Model(), Model()
    for tokens in (1, 2, 7, 64):
        same(model, *batch(tokens))
    assert seen.units == ["compiled"]
    same(again, *batch(9))
    assert seen.units == ["compiled"]
