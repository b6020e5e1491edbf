"""The linkable description of a program: what a warm start needs instead of a graph.

Imports no torch. It is what a program record stores (`ProgramRecord.program`): what a call brings,
where each input of the graph comes from, the pieces and splitting ops in their order, and what a
call returns. Values are called `p0`, `p1`, ... (inputs) and `v0`, `v1`, ... (results).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from vllmc.core.cache.key import JsonValue
from vllmc.core.errors import UnsafeCacheError

InputKind: TypeAlias = Literal["activation", "size", "attribute", "layer-name"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """A tensor that a call brings, contiguous; `path` is how the forward reads it.

    The path is an argument's name, or leads into a container: `hidden['residual']`. In `shape` a
    number is a fixed size, and a text the name of one that varies: in one call all sizes of one
    name are equal.
    """

    path: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphInput:
    """One input of the graph.

    `activation`: the tensor that a call brings as `name`, a path. `size`: its `shape[dim]`.
    `attribute`: a tensor of this `dtype`, `shape` and `stride` (in elements) that the module
    holds at the dotted path `name`. `layer-name`: the hoisted name of the layer `name`.
    """

    kind: InputKind
    name: str
    dim: int = -1
    dtype: str = ""
    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite:
    """A call of the attention op: the KV cache that its layer needs. Sizes in elements.

    Without `causal` tokens attend both ways, and nothing is cached.
    """

    layer: str
    kv_heads: int
    key_size: int
    value_size: int
    window: int | None
    causal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsSite:
    """A layer whose experts the program's ops find by name: the tensors that the module there has.

    Each is an input of the kind `attribute`, though no input of the graph.
    """

    layer: str
    tensors: tuple[GraphInput, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Obstacle:
    """Unique piece number `piece` cannot be recorded as a CUDA graph, because of `cause`."""

    piece: int
    cause: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitStep:
    """Runs unique piece number `piece`."""

    piece: int
    args: tuple[str, ...]
    results: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class OpStep:
    """Runs one operation of a splitting piece. `args` and `kwargs` are encoded (see `encode`)."""

    target: str
    args: tuple[JsonValue, ...]
    kwargs: dict[str, JsonValue]
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The whole program: a call brings `arguments` and returns `result` (see `results.describe`).

    `pieces` names each unique piece by the first piece that is it, in the order in which steps
    count them; `ranges` are the token counts (`A:B` or `N`) for which it was compiled. Of the
    sizes of a call, `demands` must hold, and `promises` are taken for granted: see `conditions`.
    `written` are the arguments that the program writes to, by path; `obstacles` say of pieces that
    they run without a CUDA graph.
    """

    arguments: tuple[Argument, ...]
    pieces: tuple[str, ...]
    ranges: tuple[str, ...]
    inputs: tuple[GraphInput, ...]
    steps: tuple[UnitStep | OpStep, ...]
    result: JsonValue
    attention: tuple[AttentionSite, ...]
    experts: tuple[ExpertsSite, ...] = ()
    demands: tuple[str, ...] = ()
    promises: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()

    @property
    def sizes(self) -> tuple[str, ...]:
        """The names of the sizes that vary, the token count first, in the order of the arguments.

        Empty where nothing varies: a static graph.
        """
        return size_names(self.arguments)

    def to_json(self) -> dict[str, JsonValue]:
        """The layout as JSON."""
        steps = [
            {"step": "unit" if isinstance(s, UnitStep) else "op", **asdict(s)} for s in self.steps
        ]
        data: dict[str, JsonValue] = json.loads(json.dumps({**asdict(self), "steps": steps}))
        return data

    @classmethod
    def from_json(cls, data: Any) -> Layout:
        """Reads what `to_json` wrote. Raises `UnsafeCacheError` (`bad-record`) for all else."""
        try:
            return cls(
                arguments=tuple(
                    Argument(**{**row, "shape": tuple(row["shape"])}) for row in data["arguments"]
                ),
                pieces=tuple(data["pieces"]),
                ranges=tuple(data["ranges"]),
                inputs=_inputs(data["inputs"]),
                steps=tuple(_step(row) for row in data["steps"]),
                result=data["result"],
                attention=tuple(AttentionSite(**row) for row in data["attention"]),
                experts=tuple(
                    ExpertsSite(layer=row["layer"], tensors=_inputs(row["tensors"]))
                    for row in data["experts"]
                ),
                demands=tuple(data["demands"]),
                promises=tuple(data["promises"]),
                written=tuple(data["written"]),
                obstacles=tuple(Obstacle(**row) for row in data["obstacles"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnsafeCacheError(
                "bad-record",
                "a program record describes no program that this vllmc can link",
                context={"cause": str(error)},
                hint="compile it again: vllmc warm --force",
            ) from error


def size_names(arguments: Iterable[Argument]) -> tuple[str, ...]:
    """The names of the sizes that vary among `arguments`, each once, in their order."""
    found = [size for argument in arguments for size in argument.shape if isinstance(size, str)]
    return tuple(dict.fromkeys(found))


def _inputs(rows: Iterable[Mapping[str, Any]]) -> tuple[GraphInput, ...]:
    return tuple(
        GraphInput(**{**row, "shape": tuple(row["shape"]), "stride": tuple(row["stride"])})
        for row in rows
    )


def _step(row: Mapping[str, Any]) -> UnitStep | OpStep:
    fields = {key: value for key, value in row.items() if key != "step"}
    if row["step"] == "unit":
        return UnitStep(
            piece=fields["piece"], args=tuple(fields["args"]), results=tuple(fields["results"])
        )
    return OpStep(
        target=fields["target"],
        args=tuple(fields["args"]),
        kwargs=dict(fields["kwargs"]),
        result=fields["result"],
    )
