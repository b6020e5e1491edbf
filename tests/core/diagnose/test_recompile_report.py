from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recompiling

from vllmc.core.diagnose.recompile_report import read_recompiles
from vllmc.core.errors import VllmcError

LOGS = Path(__file__).parent / "recompiles"
CASES = (
    ("shape_0_1", "shape-0-1", "x.size()[0]", ">= 2", "1"),
    ("shape", "shape", "x.size()[0]", "4", "7"),
    ("dtype", "dtype", "x", "Float", "BFloat16"),
    ("layout", "layout", "x.stride()[0]", "8", "1"),
    ("counter", "int", "self.step", "0", "1"),
    ("number", "int", "k", "2", ""),
    ("string", "string", "name", "'model.layers.0'", "'model.layers.1'"),
    ("object_id", "object-id", "f", "the same builtin_function_or_method", ""),
    ("global_state", "global-state", "grad_mode", "", ""),
    ("index_width", "index-width", "x.size()[0]", "2 <= x.size()[0] <= 2147483647", ""),
    ("kind", "type", "k", "int", ""),
    ("other", "other", "", "", ""),
)
NAMES = [case[0] for case in CASES]
PATTERNS = {
    "shape": "one per size",
    "counter": "a counter that grows by one, from 0 to 7",
    "string": "one per layer",
}


@pytest.mark.parametrize(("name", "klass", "subject", "expected", "observed"), CASES)
@pytest.mark.parametrize("form", ["{}.log", "{}.verbose.log", "{}"])
def test_a_real_recompile_is_classified(
    form: str, name: str, klass: str, subject: str, expected: str, observed: str
) -> None:
    report = read_recompiles(LOGS / form.format(name))
    row = next(row for row in report.recompiles if row.klass == klass)
    assert (row.subject, row.expected, row.observed) == (subject, expected, observed)
    assert row.frame.startswith("recompiling.py:")
    assert row.pattern == PATTERNS.get(name, "")
    assert row.limit_hit == (name in ("counter", "string"))
    assert report.graph_breaks == 0


@pytest.mark.parametrize("name", [*NAMES, "graph_break"])
def test_logs_and_traces_say_the_same(name: str) -> None:
    log, verbose, trace = (
        read_recompiles(LOGS / form.format(name)) for form in ("{}.log", "{}.verbose.log", "{}")
    )
    assert verbose == log
    assert all(row.cost_seconds for row in trace.recompiles)
    assert tuple(replace(row, cost_seconds=None) for row in trace.recompiles) == log.recompiles
    assert trace.graph_breaks == log.graph_breaks
    assert (log.first_compilations, trace.notes) == (None, ())


def test_first_compilations_and_graph_breaks_are_told_apart() -> None:
    report = read_recompiles(LOGS / "graph_break")
    assert (report.graph_breaks, report.first_compilations) == (2, 2)
    assert sum(row.count for row in report.recompiles) == 2


@pytest.mark.parametrize(
    "name",
    ["shape_0_1", "shape", "dtype", "layout", "counter", "number", "global_state", "kind"],
)
def test_a_fix_that_is_code_is_what_the_cured_program_has(name: str) -> None:
    source = Path(recompiling.__file__).read_text(encoding="utf-8")
    cured = source.partition(f"def {name}_cured")[2].partition("\ndef ")[0]
    lines = (row.fix.partition("  #")[0] for row in read_recompiles(LOGS / name).recompiles)
    applied = [line for line in lines if line in cured.replace("k: Any", "k")]
    assert applied


@pytest.mark.parametrize(("name", "klass"), [case[:2] for case in CASES if case[0] != "number"])
def test_the_page_shows_each_class_as_it_is_reported(name: str, klass: str) -> None:
    page = Path(__file__).parents[3] / "docs" / "recompiles.md"
    section = page.read_text(encoding="utf-8").partition(f"\n## {klass}\n")[2].partition("\n## ")[0]
    source = inspect.getsource(getattr(recompiling, name))
    assert source in section
    row = next(row for row in read_recompiles(LOGS / name).recompiles if row.klass == klass)
    for value in (row.frame, row.guard, row.expected, row.fix, row.pattern):
        assert value in section


def test_a_trace_that_is_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    text = (LOGS / "shape" / "dedicated_log_torch_trace_0.log").read_text(encoding="utf-8")
    at = text.rindex('{"compilation_metrics"')
    log = tmp_path / "dedicated_log_torch_trace_0.log"
    log.write_text(text[: at + 40], encoding="utf-8")
    [row] = read_recompiles(tmp_path).recompiles
    assert (row.count, row.klass) == (3, "shape")


def test_a_limit_that_fails_the_whole_graph_is_a_limit(tmp_path: Path) -> None:
    text = (LOGS / "string" / "dedicated_log_torch_trace_0.log").read_text(encoding="utf-8")
    refused = re.compile(r'"fail_type": "\w+", "fail_reason": "Dynamo recompile limit[^"]+"')
    assert len(refused.findall(text)) == 1
    whole = '"fail_type": "FailOnRecompileLimitHit", "fail_reason": "Hard failure"'
    (tmp_path / "dedicated_log_torch_trace_0.log").write_text(refused.sub(whole, text))
    assert read_recompiles(tmp_path).recompiles == read_recompiles(LOGS / "string").recompiles


def test_what_holds_nothing_is_said(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text("hello\n")
    report = read_recompiles(log)
    assert (report.recompiles, report.graph_breaks) == ((), 0)
    assert "no line of TORCH_LOGS=recompiles" in report.notes[0]


def test_a_log_cut_behind_a_header_says_so(tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text("Recompiling function f in /app/m.py:3\n")
    assert read_recompiles(log).notes[0] == "the reasons of 1 of the recompiles are cut off"


@pytest.mark.parametrize(("name", "code"), [("missing", "no-such-path"), (".", "no-trace")])
def test_what_is_no_log_is_an_error(tmp_path: Path, name: str, code: str) -> None:
    with pytest.raises(VllmcError, match=code):
        read_recompiles(tmp_path / name)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    program = "from vllmc.cli.app import entry_point; entry_point()"
    return subprocess.run(
        [sys.executable, "-c", program, "recompiles", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_command_prints_the_same_facts_as_json_and_to_a_person() -> None:
    done = command(str(LOGS / "counter"), "--json")
    data: dict[str, Any] = json.loads(done.stdout)
    [row] = data["recompiles"]
    assert (done.returncode, data["command"], data["schema_version"]) == (0, "recompiles", 1)
    assert (data["graph_breaks"], data["first_compilations"], data["notes"]) == (0, 1, [])
    assert row == read_recompiles(LOGS / "counter").recompiles[0].to_json()
    shown = command(str(LOGS / "counter")).stdout
    assert shown.startswith("8 recompiles\n")
    for value in (row["frame"], row["guard"], row["class"], row["pattern"], row["fix"]):
        assert value in shown
    assert "the recompile limit was hit" in shown
    assert "apart from these: 1 first compilation" in shown


def test_a_pipe_is_read_to_its_end() -> None:
    program = "from vllmc.cli.app import entry_point; entry_point()"
    with (LOGS / "dtype.log").open(encoding="utf-8") as log:
        done = subprocess.run(
            [sys.executable, "-c", program, "recompiles", "/dev/stdin"],
            input=log.read(),
            capture_output=True,
            text=True,
            check=True,
        )
    assert done.stdout.startswith("1 recompile\n")


def test_the_command_on_a_missing_file_is_an_error() -> None:
    done = command("missing.log")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error[no-such-path]: ")
