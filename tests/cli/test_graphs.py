"""What `--cuda-graphs` comes to, by device, flag, environment and config file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.graphs import GraphFlags, graphs_row, tell_of_graphs
from vllmc.cli.output import Output, make_console
from vllmc.cli.settings import load_settings
from vllmc.core.cache.key import Factor
from vllmc.core.errors import UsageError
from vllmc.core.runtime.cuda_graphs import DEFAULT_SIZES, GraphReport

REPORT = GraphReport(
    sizes=(1, 8),
    graphs=6,
    replayed=20,
    bytes=3_500_000,
    plain={"piece_2": "vllm::sync may not be recorded"},
    failed={"piece_4": "operation not permitted when stream is capturing"},
)


def sizes(
    tmp_path: Path,
    device: str,
    *,
    environment: Mapping[str, str] | None = None,
    factors: Sequence[Factor] = (),
    **flags: Any,
) -> tuple[int, ...]:
    settings = load_settings(environment=environment or {}, directory=tmp_path)
    return GraphFlags(**flags).sizes(settings, device, factors)


def test_decode_sizes_are_recorded_on_a_gpu_and_nothing_on_a_cpu(tmp_path: Path) -> None:
    assert sizes(tmp_path, "cuda:1") == DEFAULT_SIZES
    assert sizes(tmp_path, "cpu") == ()


def test_none_records_nothing(tmp_path: Path) -> None:
    assert sizes(tmp_path, "cuda", cuda_graphs="none") == ()
    assert sizes(tmp_path, "cuda", environment={"VLLMC_CUDA_GRAPHS": "none"}) == ()
    (tmp_path / "vllmc.toml").write_text('cuda-graphs = "none"')
    assert sizes(tmp_path, "cuda") == ()
    assert sizes(tmp_path, "cuda", cuda_graphs="piecewise") == DEFAULT_SIZES


def test_sizes_take_the_place_of_the_default(tmp_path: Path) -> None:
    assert sizes(tmp_path, "cuda", cuda_graph_size=["12", "5", "12"]) == (5, 12)
    (tmp_path / "vllmc.toml").write_text("cuda-graph-size = [3, 9]")
    assert sizes(tmp_path, "cuda") == (3, 9)
    # A file that is shared with a machine that has no GPU is no mistake.
    assert sizes(tmp_path, "cpu") == ()


@pytest.mark.parametrize("origin", ["flag", "env:TORCHINDUCTOR_CUDAGRAPHS"])
def test_inductor_s_own_graphs_are_not_recorded_within_others(tmp_path: Path, origin: str) -> None:
    own = Factor(group="inductor", name="triton.cudagraphs", value=True, origin=origin)
    assert sizes(tmp_path, "cuda", factors=[own]) == ()
    assert sizes(tmp_path, "cuda", factors=[replace(own, value=False)]) == DEFAULT_SIZES
    with pytest.raises(UsageError, match="records its own") as caught:
        sizes(tmp_path, "cuda", factors=[own], cuda_graphs="piecewise")
    assert caught.value.context["triton.cudagraphs"] == origin


@pytest.mark.parametrize(
    ("device", "flags", "code"),
    [
        ("cpu", {"cuda_graphs": "piecewise"}, "needs-gpu"),
        ("cpu", {"cuda_graph_size": ["5"]}, "bad-value"),
        ("cuda", {"cuda_graphs": "none", "cuda_graph_size": ["5"]}, "bad-value"),
        ("cuda", {"cuda_graphs": "full"}, "bad-value"),
        ("cuda", {"cuda_graph_size": ["0"]}, "bad-value"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(
    tmp_path: Path, device: str, flags: dict[str, Any], code: str
) -> None:
    with pytest.raises(UsageError) as caught:
        sizes(tmp_path, device, **flags)
    assert caught.value.code == code
    assert caught.value.hint


@pytest.mark.parametrize("verbosity", [0, 1])
def test_failures_are_warned_of_and_the_rest_is_said_to_who_asks(
    capsys: pytest.CaptureFixture[str], verbosity: int
) -> None:
    output = Output(command="run", verbosity=verbosity, stderr=make_console(stderr=True))
    tell_of_graphs(output, REPORT)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "warning[cuda-graph-failed]: piece_4 runs without a CUDA graph: operation not permitted "
        "when stream is capturing",
        "  hint: --cuda-graphs none does not try",
    ]
    more = [
        "piece_2 runs without a CUDA graph: vllm::sync may not be recorded",
        "6 CUDA graphs for 1, 8 sequences, 3.5 MB: 20 steps replayed",
    ]
    assert said[2:] == (more if verbosity else [])


def test_the_json_has_the_whole_report() -> None:
    assert graphs_row(None) is None
    assert graphs_row(REPORT) == {
        "sizes": [1, 8],
        "graphs": 6,
        "replayed_steps": 20,
        "bytes": 3_500_000,
        "plain": {"piece_2": "vllm::sync may not be recorded"},
        "failed": {"piece_4": "operation not permitted when stream is capturing"},
    }
