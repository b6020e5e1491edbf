from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.moe import use_experts_implementation

from vllmc.core.errors import VllmcError
from vllmc.core.graph.layout import Argument, ExpertsSite, GraphInput, Layout, OpStep, UnitStep
from vllmc.core.runtime.program import Program, Variant, link
from vllmc.core.spec import CompileRange
from vllmc.kernels.layer_name import LayerName


def layout(**fields: Any) -> Layout:
    """`linear(input_ids)` as a piece of its own, then doubled by an op."""
    given: dict[str, Any] = {
        "arguments": (
            Argument(path="input_ids", dtype="int64", shape=(1, "tokens")),
            Argument(path="position_ids", dtype="int64", shape=(1, "tokens")),
            Argument(path="logits_indices", dtype="int64", shape=("rows",)),
        ),
        "pieces": ("piece_0",),
        "ranges": ("1:8",),
        "inputs": (
            GraphInput(kind="activation", name="input_ids"),
            GraphInput(kind="size", name="input_ids", dim=1),
            GraphInput(
                kind="attribute", name="weight", dtype="float32", shape=(2, 3), stride=(3, 1)
            ),
        ),
        "steps": (
            UnitStep(piece=0, args=("p0", "p1", "p2"), results=("v0",)),
            OpStep(
                target="call_function:_operator.mul",
                args=({"ref": "v0"}, 2),
                kwargs={},
                result="v1",
            ),
        ),
        "result": {"ref": "v1"},
        "attention": (),
    }
    return Layout(**(given | fields))


def entry(weight: torch.Tensor | None = None) -> torch.nn.Module:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.ones(2, 3) if weight is None else weight)
    return module


def variant(start: int, end: int, *pieces: Any) -> Variant:
    return Variant(range=CompileRange(start, end), pieces=pieces or (lambda args: (args[0],),))


def tagged(tag: int) -> Any:
    """A piece that returns its range's tag, as a tensor."""
    return lambda args: (torch.tensor([tag]),)


def batch(tokens: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    return ids, ids.clone(), torch.zeros(rows, dtype=torch.int64)


def code_of(caught: pytest.ExceptionInfo[VllmcError]) -> str:
    return caught.value.code


def test_a_piece_is_given_activations_sizes_and_the_models_tensors() -> None:
    seen: list[Any] = []

    def piece(args: list[Any]) -> tuple[torch.Tensor]:
        seen.extend(args)
        args.clear()
        return (torch.tensor([3]),)

    module = entry()
    program = link(layout(), module, [variant(1, 8, piece)])
    ids, positions, rows = batch(5)
    assert program(ids, positions, rows).tolist() == [6]
    assert seen[0] is ids
    assert seen[1] == 5
    assert seen[2].data_ptr() == module.weight.data_ptr()
    assert not seen[2].requires_grad


def test_a_hoisted_layer_name_is_bound() -> None:
    seen: list[Any] = []
    given = layout(
        inputs=(GraphInput(kind="layer-name", name="layers.3"),),
        steps=(UnitStep(piece=0, args=("p0",), results=("v0",)),),
        result={"ref": "v0"},
    )

    def piece(args: list[Any]) -> tuple[torch.Tensor]:
        seen.extend(args)
        return (torch.zeros(1),)

    link(given, entry(), [variant(1, 8, piece)])(*batch(1))
    assert seen == [LayerName("layers.3")]


@pytest.fixture
def sized() -> Program:
    """Sizes 1 and 6, ranges 1:4 and 6:9; each variant returns its number."""
    variants = [
        variant(1, 1, tagged(1)),
        variant(6, 6, tagged(6)),
        variant(1, 4, tagged(14)),
        variant(6, 9, tagged(69)),
    ]
    ranges = ("1", "6", "1:4", "6:9")
    return link(
        layout(ranges=ranges, steps=layout().steps[:1], result={"ref": "v0"}), entry(), variants
    )


@pytest.mark.parametrize(("tokens", "tag"), [(1, 1), (2, 14), (4, 14), (6, 6), (7, 69), (9, 69)])
def test_the_token_count_chooses_and_a_size_beats_a_range(
    sized: Program, tokens: int, tag: int
) -> None:
    assert sized(*batch(tokens)).tolist() == [tag]


@pytest.mark.parametrize("tokens", [5, 10, 1000])
def test_a_count_outside_of_every_range_names_them(sized: Program, tokens: int) -> None:
    with pytest.raises(VllmcError, match=str(tokens)) as caught:
        sized(*batch(tokens))
    assert code_of(caught) == "size-out-of-range"
    assert caught.value.context["ranges"] == ["1", "1:4", "6", "6:9"]
    assert f"1:{max(tokens, 9)}" in caught.value.hint


def test_zero_tokens_are_refused(sized: Program) -> None:
    with pytest.raises(VllmcError) as caught:
        sized(*batch(0))
    assert code_of(caught) == "zero-tokens"


def test_a_program_for_one_size_alone_is_used_for_it() -> None:
    program = link(
        layout(ranges=("1",), steps=layout().steps[:1], result={"ref": "v0"}),
        entry(),
        [variant(1, 1, tagged(1))],
    )
    assert program(*batch(1)).tolist() == [1]
    assert program.max_tokens == 1
    with pytest.raises(VllmcError) as caught:
        program(*batch(2))
    assert code_of(caught) == "size-out-of-range"


def test_the_largest_count_is_that_of_a_range_or_size(sized: Program) -> None:
    assert sized.max_tokens == 9
    assert [str(r) for r in sized.ranges] == ["1", "1:4", "6", "6:9"]


@pytest.mark.parametrize(
    "args",
    [
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), torch.zeros(1).long()),
        (torch.zeros(3).long(), torch.zeros(3).long(), torch.zeros(1).long()),
        (torch.zeros(1, 3).int(), torch.zeros(1, 3).long(), torch.zeros(1).long()),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3), torch.zeros(1).long()),
        (torch.zeros(1, 6).long()[:, ::2], torch.zeros(1, 3).long(), torch.zeros(1).long()),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.zeros(1, 1).long()),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.zeros(1).int()),
        (torch.zeros(1, 3).long(), torch.zeros(1, 3).long(), torch.zeros(0).long()),
    ],
    ids=[
        "two rows of ids",
        "flat ids",
        "32-bit ids",
        "float positions",
        "strided ids",
        "rows of two dimensions",
        "32-bit rows",
        "no rows",
    ],
)
def test_inputs_that_compiled_code_would_misread_are_refused(sized: Program, args: Any) -> None:
    with pytest.raises(VllmcError) as caught:
        sized(*args)
    assert code_of(caught) == "bad-input"


def test_sizes_of_one_shape_id_that_differ_are_named(sized: Program) -> None:
    ids, positions, rows = batch(4)
    with pytest.raises(VllmcError) as caught:
        sized(ids, positions[:, :3].clone(), rows)
    assert code_of(caught) == "size-mismatch"
    assert caught.value.message == (
        "input_ids.shape[1] has 4 and position_ids.shape[1] has 3, and both are 'tokens'"
    )
    assert caught.value.context["shape_id"] == "tokens"


def test_a_demand_of_the_model_is_made_of_every_call() -> None:
    given = layout(demands=("d0 % 2 == 0 or d1 > d0",), result={"ref": "p0"}, steps=())
    program = link(given, entry(), [Variant(range=CompileRange(1, 8), pieces=())])
    for tokens, rows in ((2, 1), (3, 4), (6, 6)):
        assert program(*batch(tokens, rows)).shape == (1, tokens)
    with pytest.raises(VllmcError) as caught:
        program(*batch(3, 3))
    assert code_of(caught) == "size-mismatch"
    assert "tokens % 2 == 0 or rows > tokens" in caught.value.message
    assert caught.value.context == {"input_ids.shape[1]": 3, "logits_indices.shape[0]": 3}


@pytest.mark.parametrize("text", ["d0.real", "d2 > 1", "__import__('os')", "[d0]", "d0 >", "1/0"])
def test_a_condition_that_is_none_is_a_bad_record(text: str) -> None:
    with pytest.raises(VllmcError) as caught:
        link(layout(demands=(text,)), entry(), [variant(1, 8)])
    assert code_of(caught) == "bad-record"


def test_two_ranges_that_hold_a_count_are_named() -> None:
    program = link(layout(), entry(), [variant(1, 5), variant(4, 8)])
    with pytest.raises(VllmcError, match="4 tokens") as caught:
        program(*batch(4))
    assert code_of(caught) == "ambiguous-size"
    assert caught.value.context["ranges"] == ["1:5", "4:8"]


def test_a_static_graph_has_one_variant_that_is_always_used() -> None:
    arguments = (Argument(path="x", dtype="int64", shape=(1, 3)),)
    given = layout(
        arguments=arguments,
        inputs=(),
        steps=(UnitStep(piece=0, args=(), results=("v0",)),),
        result={"ref": "v0"},
    )
    program = link(given, entry(), [variant(1, 1, tagged(7)), variant(2, 8, tagged(7))])
    assert program(torch.zeros(1, 3).long()).tolist() == [7]


def test_results_come_in_the_containers_that_the_forward_returns() -> None:
    given = layout(
        steps=(),
        result={
            "dict": [
                ["both", {"tuple": [{"ref": "p0"}, {"list": [{"ref": "a1"}, None]}]}],
                [{"float": (0.5).hex()}, {"call": ["fractions", "Fraction"], "args": [1, 2]}],
                ["made", {"object": ["types", "SimpleNamespace"], "state": [["x", {"ref": "p1"}]]}],
            ]
        },
    )  # fmt: skip
    ids, positions, rows = batch(3)
    program = link(given, entry(), [Variant(range=CompileRange(1, 8), pieces=())])
    result = program(ids, positions, rows)
    assert result["both"][0] is ids
    assert result["both"][1] == [positions, None]
    assert result[0.5] == 0.5
    assert result["made"].x == 3


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 2),
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(3, 2).t(),
        None,
    ],
    ids=["shape", "dtype", "stride", "missing"],
)
def test_a_model_with_other_tensors_is_refused(weight: torch.Tensor | None) -> None:
    module = torch.nn.Module() if weight is None else entry(weight)
    with pytest.raises(VllmcError, match="weight") as caught:
        link(layout(), module, [variant(1, 8)])
    assert code_of(caught) == "weights-mismatch"


class Mixture(torch.nn.Module):
    """Experts of a user's own, as Transformers' decorator wants them."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.ones(experts, 4, 3))
        self.down_proj = torch.nn.Parameter(torch.ones(experts, 3, 2))
        self.act_fn = torch.nn.SiLU()


def mixture(experts: int) -> torch.nn.Module:
    module = entry()
    cls = type("Mixture", (Mixture,), {"forward": lambda self, x: x, "__init__": no_config})
    module.mlp = use_experts_implementation(cls)(None, experts)
    return module


def no_config(self: Any, _: None, experts: int) -> None:
    Mixture.__init__(self, experts)


def with_experts() -> Layout:
    shapes = {"gate_up_proj": (5, 4, 3), "down_proj": (5, 3, 2)}
    tensors = tuple(
        GraphInput(
            kind="attribute",
            name=f"mlp.{name}",
            dtype="float32",
            shape=shape,
            stride=(shape[1] * shape[2], shape[2], 1),
        )
        for name, shape in shapes.items()
    )
    return layout(experts=(ExpertsSite(layer="mlp", tensors=tensors),))


def test_a_program_has_the_experts_that_its_ops_look_for() -> None:
    module: Any = mixture(5)
    program = link(with_experts(), module, [variant(1, 8)])
    [(name, experts)] = program.experts.items()
    assert name == "mlp"
    assert experts.down.data_ptr() == module.mlp.down_proj.data_ptr()
    assert link(layout(), module, [variant(1, 8)]).experts == {}


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (mixture(6), r"mlp\.gate_up_proj as float32 \[5, 4, 3\].* it has float32 \[6, 4, 3\]"),
        (entry(), r"mlp\.gate_up_proj .* it has none"),
    ],
    ids=["number", "missing"],
)
def test_a_model_with_other_experts_is_refused(module: torch.nn.Module, says: str) -> None:
    with pytest.raises(VllmcError, match=says) as caught:
        link(with_experts(), module, [variant(1, 8)])
    assert code_of(caught) == "weights-mismatch"


def test_tensors_of_experts_in_a_module_of_another_kind_are_refused() -> None:
    module = entry()
    module.mlp = Mixture(5)
    with pytest.raises(VllmcError, match="the module there holds no experts") as caught:
        link(with_experts(), module, [variant(1, 8)])
    assert code_of(caught) == "weights-mismatch"


def test_an_op_that_is_not_registered_is_named() -> None:
    steps = (OpStep(target="call_function:torch.ops.nowhere.op", args=(), kwargs={}, result="v0"),)
    with pytest.raises(VllmcError, match=r"nowhere\.op") as caught:
        link(layout(steps=steps, result={"ref": "v0"}), entry(), [variant(1, 8)])
    assert code_of(caught) == "unknown-op"


def test_arguments_of_every_kind_reach_the_op() -> None:
    args = (
        {"ref": "p0"},
        {"list": [1, {"tuple": [True, None]}]},
        {"slice": [None, {"ref": "p1"}, 2]},
        {"float": (-0.0).hex()},
        {"float": "inf"},
        {"ellipsis": True},
        {"torch": "bfloat16", "of": "dtype"},
        {"torch": "cpu", "of": "device"},
        {"torch": "contiguous_format", "of": "memory_format"},
        "a 'quoted' \\ text",
    )
    seen: list[Any] = []
    steps = (
        OpStep(target="call_function:builtins.tuple", args=({"tuple": list(args)},), kwargs={},
               result="v0"),
        UnitStep(piece=0, args=("v0",), results=("v1",)),
    )  # fmt: skip

    def piece(given: list[Any]) -> tuple[torch.Tensor]:
        seen.extend(given[0])
        return (torch.zeros(1),)

    ids, positions, rows = batch(5)
    link(layout(steps=steps, result={"ref": "v1"}), entry(), [variant(1, 8, piece)])(
        ids, positions, rows
    )
    assert seen[0] is ids
    assert seen[1] == [1, (True, None)]
    assert seen[2] == slice(None, 5, 2)
    assert str(seen[3]) == "-0.0"
    assert seen[4:] == [
        float("inf"),
        ...,
        torch.bfloat16,
        torch.device("cpu"),
        torch.contiguous_format,
        "a 'quoted' \\ text",
    ]


def test_a_method_is_called_with_keywords() -> None:
    steps = (
        OpStep(
            target="call_method:sum",
            args=({"ref": "p0"},),
            kwargs={"dim": 1, "keepdim": True},
            result="v0",
        ),
    )
    no_pieces = Variant(range=CompileRange(1, 8), pieces=())
    program = link(layout(pieces=(), steps=steps, result={"ref": "v0"}), entry(), [no_pieces])
    assert program(*batch(4)).shape == (1, 1)


def test_values_are_let_go_after_their_last_use() -> None:
    import weakref

    alive: list[Any] = []

    def first(args: list[Any]) -> tuple[torch.Tensor]:
        made = torch.zeros(3)
        alive.append(weakref.ref(made))
        return (made,)

    def last(args: list[Any]) -> tuple[torch.Tensor]:
        assert alive[0]() is None
        return (torch.ones(1),)

    given = layout(
        pieces=("piece_0", "piece_1"),
        steps=(
            UnitStep(piece=0, args=("p0",), results=("v0",)),
            OpStep(target="call_method:clone", args=({"ref": "v0"},), kwargs={}, result="v1"),
            UnitStep(piece=1, args=("v1",), results=("v2",)),
        ),
        result={"ref": "v2"},
    )
    assert link(given, entry(), [variant(1, 8, first, last)])(*batch(2)).tolist() == [1]


def test_a_piece_without_results_is_run() -> None:
    calls: list[int] = []
    given = layout(steps=(UnitStep(piece=0, args=("p1",), results=()),), result={"ref": "p0"})

    def piece(args: list[Any]) -> tuple[()]:
        calls.append(args[0])
        return ()

    ids, positions, rows = batch(3)
    assert link(given, entry(), [variant(1, 8, piece)])(ids, positions, rows) is ids
    assert calls == [3]


def test_guards_are_given_the_sizes_of_each_call_that_runs() -> None:
    seen: list[list[int]] = []
    program = link(layout(), entry(), [variant(1, 8)], lambda sizes: seen.append([*sizes]))
    ids, rows = torch.ones(1, 4, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    program(ids, ids, rows)
    long = torch.ones(1, 9, dtype=torch.int64)
    with pytest.raises(VllmcError, match="no compiled range holds 9 tokens"):
        program(long, long, rows)
    assert seen == [[4, 2]]
