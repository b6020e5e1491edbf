from __future__ import annotations

import pytest

from vllmc.core.events import UnitOutcome
from vllmc.core.graph.names import NamedArgument, NamedPieces
from vllmc.core.layer_names import cost_of
from vllmc.core.obtain import UnitResult


def named(
    argument: str = "name", *, op: str = "mine::update", schema: str = "", signature: bool = False
) -> NamedArgument:
    return NamedArgument(
        op=op,
        argument=argument,
        schema=schema or f"{op}(Tensor x, str {argument}) -> Tensor",
        by_signature=signature,
        values=("layers.1", "layers.2", "layers.3"),
        pieces=("piece_2", "piece_4", "piece_6"),
    )


def found(*arguments: NamedArgument) -> NamedPieces:
    return NamedPieces(unique=5, extra=("piece_4", "piece_6"), arguments=arguments)


def unit(piece: str, outcome: UnitOutcome, artifact: str, seconds: float = 0.0) -> UnitResult:
    return UnitResult(
        pieces=(piece, f"{piece} again"),
        range="1:8",
        outcome=outcome,
        key="00",
        artifact=artifact,
        data=artifact.encode(),
        seconds=seconds,
    )


def fix(*arguments: NamedArgument) -> list[str]:
    ops = cost_of(found(*arguments), []).to_json()["ops"]
    assert isinstance(ops, list)
    fixes = {op["fix"] for op in ops if isinstance(op, dict)}
    [text] = fixes
    assert isinstance(text, str)
    return text.splitlines()


def test_the_cost_is_that_of_the_pieces_beyond_the_first() -> None:
    cost = cost_of(
        found(named()),
        [
            unit("piece_0", "compiled", "first", 1.0),
            unit("piece_2", "compiled", "second", 2.0),
            unit("piece_4", "compiled", "third", 4.0),
            unit("piece_6", "hit", "fourth"),
        ],
    )
    assert (cost.compiled, cost.seconds, cost.bytes) == (1, 4.0, len("third") + len("fourth"))


def test_code_that_is_the_same_in_spite_of_the_names_takes_no_bytes() -> None:
    cost = cost_of(
        found(named()),
        [
            unit("piece_2", "compiled", "one", 2.0),
            unit("piece_4", "dup", "one", 4.0),
            unit("piece_6", "compiled", "other", 8.0),
            unit("piece_6", "dup", "other", 16.0),
        ],
    )
    assert (cost.compiled, cost.seconds, cost.bytes) == (3, 28.0, len("other"))


def test_the_json_says_how_many_pieces_there_would_be() -> None:
    row = cost_of(found(named()), []).to_json()
    assert (row["unique"], row["would_be"]) == (5, 3)
    assert row["ops"] == [
        {
            "op": "mine::update",
            "argument": "name",
            "values": 3,
            "examples": ["layers.1", "layers.3"],
            "pieces": ["piece_2", "piece_4", "piece_6"],
            "fix": "\n".join(fix(named())),
        }
    ]


@pytest.mark.parametrize(
    ("schema", "declared"),
    [
        ("o(Tensor x, str name) -> Tensor", "o(Tensor x, {LAYER_NAME_TYPE} name) -> Tensor"),
        ("o.text(str name, str mode) -> ()", "o.text({LAYER_NAME_TYPE} name, str mode) -> ()"),
        ("o(*, str? name=None) -> ()", "o(*, {LAYER_NAME_TYPE}? name=None) -> ()"),
        ('o(str names, str name="a, \\"b") -> ()', "o(str names, {LAYER_NAME_TYPE} name) -> ()"),
    ],
)
def test_the_fix_declares_the_op_anew(schema: str, declared: str) -> None:
    assert fix(named(schema=f"mine::{schema}")) == [
        "from vllmc.kernels.layer_name import LAYER_NAME_TYPE, LayerName",
        f'library.define(f"{declared}")',
        "self.name = LayerName('layers.1')"
        "  # in __init__ of each layer; the op's code reads name.value",
    ]


def test_all_names_of_an_op_are_declared_at_once() -> None:
    schema = "mine::update(Tensor x, str name, str cache) -> Tensor"
    lines = fix(named(schema=schema), named("cache", schema=schema))
    declared = "update(Tensor x, {LAYER_NAME_TYPE} name, {LAYER_NAME_TYPE} cache) -> Tensor"
    assert lines[1] == f'library.define(f"{declared}")'
    assert [line.partition(" = ")[0] for line in lines[2:]] == ["self.name", "self.cache"]


def test_an_op_made_from_a_function_is_annotated() -> None:
    imports, annotation, _ = fix(named(signature=True))
    assert imports == "from vllmc.kernels.layer_name import LayerName"
    assert annotation.startswith("name: LayerName  #")


def test_the_cure_of_our_own_op_is_an_option() -> None:
    assert fix(named(op="vllmc::attention")) == ["--layer-names hoisted"]
