"""`--cuda-graphs`: whether decode steps replay CUDA graphs, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias, get_args

import typer

from vllmc.cli.option_table import choice
from vllmc.cli.options import counts
from vllmc.cli.output import Output
from vllmc.cli.settings import Settings
from vllmc.core.errors import UsageError

if TYPE_CHECKING:
    from vllmc.core.cache.key import Factor
    from vllmc.core.runtime.cuda_graphs import GraphReport

_INDUCTORS_OWN: Final = ("inductor", "triton.cudagraphs")

GraphMode: TypeAlias = Literal["none", "piecewise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFlags:
    """Whether CUDA graphs are recorded, and for which numbers of tokens."""

    cuda_graphs: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(get_args(GraphMode)),
            show_default="piecewise on a GPU, none on a CPU",
            help="Whether decode steps replay CUDA graphs of the pieces; needs a GPU.",
        ),
    ] = None
    cuda_graph_size: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N",
            show_default="1 to 8, and every eighth up to 64",
            help="Record decode steps of N sequences; repeatable, in place of the default.",
        ),
    ] = None

    @property
    def given(self) -> tuple[str, ...]:
        """The flags that were given, as they are written."""
        values = {"--cuda-graphs": self.cuda_graphs, "--cuda-graph-size": self.cuda_graph_size}
        return tuple(name for name, value in values.items() if value)

    def sizes(self, settings: Settings, device: str, factors: Iterable[Factor]) -> tuple[int, ...]:
        """The numbers of tokens to record on `device`; none where nothing is recorded.

        `factors` are those of the program's key: what its options are, whoever set them.
        Raises `UsageError`: `bad-value`, and `needs-gpu` where graphs are asked for on a CPU.
        """
        from vllmc.core.runtime.cuda_graphs import DEFAULT_SIZES

        on_gpu = device.startswith("cuda")
        flags = () if self.cuda_graphs is None else (self.cuda_graphs,)
        # Inductor's own graphs cannot be recorded within others.
        inner = next((f for f in factors if f.identity == _INDUCTORS_OWN and f.value), None)
        default = "piecewise" if on_gpu and inner is None else "none"
        asked = settings.find("cuda-graphs", flags, default=(default,))
        mode = choice("cuda-graphs", asked, get_args(GraphMode))
        given = settings.find("cuda-graph-size", self.cuda_graph_size or (), default=())
        sizes = counts("cuda-graph-size", given)
        if mode == "piecewise" and not on_gpu:
            raise UsageError(
                "needs-gpu",
                f"CUDA graphs need a GPU, and the program runs on {device}",
                context={"origin": asked.origin},
                hint="leave --cuda-graphs out, or give --device cuda on a machine with a GPU",
            )
        if mode == "piecewise" and inner is not None:
            raise UsageError(
                "bad-value",
                f"--cuda-graphs piecewise with -O {inner.name}=true, which records its own",
                context={"origin": asked.origin, inner.name: inner.origin},
                hint="leave one of them out",
            )
        if mode == "none" and given.origin == "flag":
            raise UsageError(
                "bad-value",
                "--cuda-graph-size where no CUDA graphs are recorded",
                hint="leave it out, or give --cuda-graphs piecewise on a GPU",
            )
        return () if mode == "none" else tuple(sorted(set(sizes))) or DEFAULT_SIZES


def graphs_row(report: GraphReport | None) -> dict[str, Any] | None:
    """What the JSON says of the graphs of a run; None where none were to be recorded."""
    if report is None:
        return None
    return {
        "sizes": list(report.sizes),
        "graphs": report.graphs,
        "replayed_steps": report.replayed,
        "bytes": report.bytes,
        "plain": dict(report.plain),
        "failed": dict(report.failed),
    }


def tell_of_graphs(output: Output, report: GraphReport | None) -> None:
    """Warns of pieces that could not be recorded; with -v also says what was, and what is not."""
    if report is None:
        return
    for piece, cause in report.failed.items():
        output.warn(
            "cuda-graph-failed",
            f"{piece} runs without a CUDA graph: {cause}",
            "--cuda-graphs none does not try",
        )
    for piece, cause in report.plain.items():
        output.note(f"{piece} runs without a CUDA graph: {cause}", level=1)
    if not report.sizes:
        output.note("no CUDA graphs: no decode step came up often enough", level=1)
        return
    sizes = ", ".join(map(str, report.sizes))
    output.note(
        f"{report.graphs} CUDA graphs for {sizes} sequences, {report.bytes / 1e6:.1f} MB: "
        f"{report.replayed} steps replayed",
        level=1,
    )
