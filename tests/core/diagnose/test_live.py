from __future__ import annotations

import functools
import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recompiling
import torch

import vllmc.core
from vllmc.core import CompileSpec, compiling, watch_recompiles
from vllmc.core.diagnose.live import LiveReport
from vllmc.core.diagnose.recompile_report import read_recompiles
from vllmc.core.diagnose.recompiles import Recompile

LOGS = Path(__file__).parent / "recompiles"
NAMES = sorted(path.name for path in LOGS.iterdir() if path.is_dir())


@functools.cache
def live(name: str) -> LiveReport:
    """What is reported of a program of tests/support/recompiling.py."""
    torch._dynamo.reset()
    with watch_recompiles() as report:
        getattr(recompiling, name)()
    return report


def alike(rows: tuple[Recompile, ...]) -> tuple[Recompile, ...]:
    """Without what differs between runs (costs) and versions of torch (how it shows an object)."""
    return tuple(
        replace(
            row,
            cost_seconds=None,
            guard=re.sub(r", type=<.*>$", "", row.guard),
            expected=re.sub(r"^the same \w+$", "the same", row.expected),
        )
        for row in rows
    )


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`function` compiled anew."""
    torch._dynamo.reset()
    return torch.compile(function, backend="eager", **options)


def double(x: torch.Tensor, k: Any = 2) -> torch.Tensor:
    return x * 2 if k == "other" else x * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_live_report_says_what_the_log_and_the_trace_of_the_program_say(name: str) -> None:
    report = live(name)
    assert report.recompiles
    logged = read_recompiles(LOGS / f"{name}.log").recompiles
    assert alike(report.recompiles) == alike(logged)
    assert all(row.cost_seconds for row in report.recompiles)
    trace = read_recompiles(LOGS / name)
    assert report.graph_breaks == trace.graph_breaks
    assert report.first_compilations == trace.first_compilations


@pytest.mark.parametrize("name", [name for name in NAMES if name != "graph_break"])
def test_the_fix_of_each_class_is_proven(name: str) -> None:
    assert live(name).recompiles
    assert live(f"{name}_cured").recompiles == ()


@pytest.mark.parametrize(
    ("name", "klass", "advice"),
    [
        ("branch", "shape", "take the branch on x.size()[0] out of clipped"),
        ("closure", "other", "torch.tensor(2.0)  # what f closes over"),
        ("gradient", "other", "x = x.detach()"),
        ("missing", "type", "pass a tensor as y at every call, an empty one"),
        ("length", "int", "torch.stack(xs), with dimension 0 marked"),
        ("rank", "shape", "x.unsqueeze(0)"),
        ("module", "shape-0-1", "mark_unbacked(x, 0)"),
        ("module", "shape-0-1", '@vllmc.core.support_torch_compile(dynamic_arg_dims={"x": {0: '),
    ],
)
def test_the_fix_of_other_subjects_is_proven(name: str, klass: str, advice: str) -> None:
    [row, *_] = live(name).recompiles
    assert row.klass == klass
    assert advice in row.fix
    assert live(f"{name}_cured").recompiles == ()


def test_the_declaration_that_a_fix_gives_is_proven(tmp_path: Path) -> None:
    [row, *_] = live("module").recompiles
    decorator = re.search(r"@vllmc\.core\.(support_torch_compile\(.*\))$", row.fix)
    assert decorator
    declared = eval(decorator[1], {"support_torch_compile": vllmc.core.support_torch_compile})

    class Rows(recompiling.Rows):
        pass

    spec = CompileSpec(device="auto", dtype="auto", backend="eager")
    with compiling(spec, cache_dir=tmp_path), watch_recompiles() as report:
        model = declared(Rows)()
        for batch in (4, 1, 7):
            x = torch.ones(batch, 8)
            torch.testing.assert_close(model(x), x.sum(0))
    assert report.recompiles == ()


def test_strings_given_as_layer_names_to_a_frame_of_their_own_still_recompile() -> None:
    step = compiled(recompiling.named_layer)
    with watch_recompiles() as report:
        for index in range(3):
            step(torch.ones(4), recompiling.LayerName(f"model.layers.{index}"))
    assert [(r.klass, r.subject, r.count) for r in report.recompiles] == [("string", "name", 2)]


@pytest.mark.parametrize(
    ("first", "second", "klass"),
    [
        ((torch.ones(4),), (torch.ones(7),), "shape"),
        ((torch.ones(1),), (torch.ones(7),), "shape-0-1"),
        ((torch.ones(4), "left"), (torch.ones(4), "other"), "string"),
    ],
)
def test_only_what_happens_within_the_block_is_reported(
    first: tuple[Any, ...], second: tuple[Any, ...], klass: str
) -> None:
    step = compiled(double)
    step(*first)
    with watch_recompiles() as report:
        step(*second)
    step(torch.ones(4, dtype=torch.float64))
    [row] = report.recompiles
    assert (row.klass, row.count) == (klass, 1)
    assert row.frame == f"test_live.py:{double.__code__.co_firstlineno} in double"
    assert report.first_compilations == 0


def test_of_all_earlier_compilations_the_informative_one_decides() -> None:
    step = compiled(double)
    for x in (torch.ones(4), torch.ones(4, dtype=torch.float64), torch.ones(4)):
        step(x)
    with watch_recompiles() as report:
        step(torch.ones(7, dtype=torch.float64))
    [row] = report.recompiles
    # Torch lists that for float32 first, which was used last.
    assert (row.klass, row.expected, row.observed) == ("shape", "4", "7")


def test_where_nothing_compiles_again_the_report_is_empty() -> None:
    step = compiled(double)
    with watch_recompiles() as report:
        step(torch.ones(4))
        step(torch.ones(4) * 2)
    assert report.to_json() == {"recompiles": [], "graph_breaks": 0, "first_compilations": 1}
    assert str(report) == "0 recompiles, 0 graph breaks, 1 first compilation"


def test_the_same_facts_are_told_as_json_and_to_a_person() -> None:
    report = live("counter")
    [row] = report.recompiles
    assert report.to_json() == {
        "recompiles": [row.to_json()], "graph_breaks": 0, "first_compilations": 1,
    }  # fmt: skip
    shown = str(report)
    assert shown.startswith("8 recompiles, 0 graph breaks, 1 first compilation\n")
    for value in (row.frame, "8 times", row.guard, row.klass, "0, found 1", row.pattern, row.fix):
        assert value in shown
    assert "the recompile limit was hit" in shown
    assert ", once, " in str(live("dtype"))


def test_the_report_grows_while_the_block_runs() -> None:
    step = compiled(double)
    seen = []
    with watch_recompiles() as report:
        for k in ("a", "b", "c"):
            step(torch.ones(4), k)
            seen.append((report.first_compilations, sum(row.count for row in report.recompiles)))
    assert seen == [(1, 0), (1, 1), (1, 2)]


def test_a_refused_compilation_names_its_frame_though_nothing_else_of_it_was_seen() -> None:
    step = compiled(double)
    for number in range(8):
        step(torch.ones(4), f"name {number}")
    with watch_recompiles() as report:
        step(torch.ones(4), "one more")
        step(torch.ones(4), "and another")
    [row] = report.recompiles
    assert row.frame.endswith(" in double")
    assert (row.limit_hit, row.count, row.cost_seconds) == (True, 1, None)


def test_a_class_that_is_gone_names_its_frame_too() -> None:
    step = compiled(recompiling.apply)
    with watch_recompiles() as report:
        for _ in range(3):

            class Doubled:
                def __call__(self, x: torch.Tensor) -> torch.Tensor:
                    return x * 2

            step(torch.ones(4), Doubled())
            del Doubled
            gc.collect()
    [row] = report.recompiles
    assert row.frame.endswith(" in apply")
    # Python 3.12 has not freed the class yet, so it is known to be another.
    assert row.klass == ("type" if sys.version_info[:2] == (3, 12) else "object-id")
    assert row.count == 2


def test_recompiles_are_reported_however_many_there_are() -> None:
    # Torch keeps the metrics of 64 compilations.
    def plus(x: torch.Tensor, k: str) -> torch.Tensor:
        return x + len(k)

    step = compiled(plus)
    with torch._dynamo.config.patch(recompile_limit=100), watch_recompiles() as report:
        for number in range(70):
            step(torch.ones(2), f"name {number}")
    assert [row.count for row in report.recompiles] == [69]


def test_a_reset_within_the_block_loses_nothing() -> None:
    with watch_recompiles() as report:
        for _ in range(2):
            step = compiled(double)
            step(torch.ones(4))
            step(torch.ones(7))
    assert [row.count for row in report.recompiles] == [2]
    assert report.first_compilations == 2


def test_an_exception_leaves_the_block_and_nothing_behind() -> None:
    step = compiled(double)
    step(torch.ones(4))
    before = state()

    def stopped() -> None:
        with watch_recompiles() as report:
            reports.append(report)
            step(torch.ones(7))
            raise KeyboardInterrupt

    reports: list[LiveReport] = []
    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert state() == before
    assert len(reports[0].recompiles) == 1


def test_a_compilation_that_fails_is_reported_and_fails_as_it_would() -> None:
    def failing(graph: Any, inputs: Any) -> Any:
        if any(isinstance(x, torch.SymInt) for x in inputs):
            raise ValueError("no symbols here")
        return graph

    torch._dynamo.reset()
    step = torch.compile(double, backend=failing)
    with watch_recompiles() as report:
        step(torch.ones(4))
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no symbols here"):
            step(torch.ones(7))
    assert [row.klass for row in report.recompiles] == ["shape"]


def test_nested_blocks_have_reports_of_their_own() -> None:
    step = compiled(double)
    with watch_recompiles() as outer:
        step(torch.ones(4), "a")
        step(torch.ones(4), "b")
        with watch_recompiles() as inner:
            step(torch.ones(4), "c")
        step(torch.ones(4), "d")
    assert [sum(row.count for row in report.recompiles) for report in (outer, inner)] == [3, 1]


def test_blocks_of_several_threads_may_overlap() -> None:
    step = compiled(double)
    step(torch.ones(4), "a")
    within, over = threading.Event(), threading.Event()
    reports = []

    def other() -> None:
        with watch_recompiles() as report:
            reports.append(report)
            within.set()
            over.wait(60)
            step(torch.ones(4), "c")

    thread = threading.Thread(target=other, daemon=True)
    with watch_recompiles() as report:
        thread.start()
        within.wait(60)
        step(torch.ones(4), "b")
    over.set()
    thread.join()
    assert sum(row.count for row in report.recompiles) == 1
    assert sum(row.count for row in reports[0].recompiles) == 2


def test_what_another_thread_compiles_is_reported() -> None:
    step = compiled(double)
    with watch_recompiles() as report:
        for k in ("a", "b"):
            thread = threading.Thread(target=step, args=(torch.ones(4), k))
            thread.start()
            thread.join()
    assert (report.first_compilations, len(report.recompiles)) == (1, 1)


def state() -> dict[str, Any]:
    """Every logger of torch's with its settings, and what Dynamo keeps."""
    found: dict[str, Any] = {
        name: (logger.level, logger.propagate, logger.disabled, *logger.handlers, *logger.filters)
        for name, logger in logging.root.manager.loggerDict.items()
        if name.startswith("torch") and isinstance(logger, logging.Logger)
    }
    log_state = torch._logging._internal.log_state
    return found | {
        "artifacts": set(log_state.artifact_names),
        "levels": dict(log_state.log_qname_to_level),
        "metrics": torch._dynamo.utils._compilation_metrics.maxlen,
        "config": torch._dynamo.config.get_config_copy(),
        "callbacks": list(torch._dynamo.callback_handler.end_callbacks),
        "disabled": logging.root.manager.disable,
    }


def test_logging_is_left_as_it_was_and_nothing_is_printed(capfd: Any) -> None:
    step = compiled(double)
    step(torch.ones(4))
    before = state()
    assert "torch.__trace" in before
    with watch_recompiles() as report:
        step(torch.ones(7))
        within = state()
    assert state() == before
    assert {name for name in within if within[name] != before[name]} == {"torch.__trace"}
    assert len(report.recompiles) == 1
    assert capfd.readouterr() == ("", "")


def test_the_page_shows_a_program_and_what_it_prints(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "recompiles.md").read_text(encoding="utf-8")
    section = page.partition("\n## In a program\n")[2]
    program, printed = re.findall(r"(?s)```(?:python)?\n(.*?)```", section)[:2]
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=True
    )
    without_seconds = re.compile(r"\d+\.\d\d s:")
    assert without_seconds.sub("", done.stdout) == without_seconds.sub("", printed)
    assert done.stderr == ""


REFUSED = """
import contextlib, json, recompiling, torch
import vllmc.core
from vllmc.core import CompileSpec, compiling, watch_recompiles

step = recompiling.compiled(recompiling.layer, fullgraph=True)
with watch_recompiles() as report:
    for index in range(9):
        with contextlib.suppress(torch._dynamo.exc.FailOnRecompileLimitHit):
            step(torch.ones(4), f"model.layers.{index}")
print(json.dumps(report.to_json()))
"""


def test_the_log_and_trace_of_a_watched_program_are_as_whole_as_ever(tmp_path: Path) -> None:
    support = str(Path(recompiling.__file__).parent)
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", REFUSED],
        env={
            **os.environ,
            "PYTHONPATH": path,
            "TORCH_LOGS": "recompiles_verbose",
            "TORCH_TRACE": str(tmp_path / "trace"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    log = tmp_path / "program.log"
    log.write_text(done.stderr)
    [row] = json.loads(done.stdout)["recompiles"]
    assert (row["limit_hit"], row["count"], row["class"]) == (True, 8, "string")
    [traced] = read_recompiles(tmp_path / "trace").recompiles
    assert traced.to_json() == row
    [logged] = read_recompiles(log).recompiles
    assert logged.to_json() == row | {"cost_seconds": None}
