from __future__ import annotations

import io
import json
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.text import Text

from vllmc.cli.output import Output, make_console
from vllmc.core.errors import VllmcError
from vllmc.core.events import Observer, SilentObserver


@dataclass(frozen=True)
class Sink:
    """An output, and what it has written to stdout and stderr."""

    output: Output
    stdout: io.StringIO
    stderr: io.StringIO


def make_sink(*, json: bool = False, verbosity: int = 0, terminal: bool = False) -> Sink:
    out, err = io.StringIO(), io.StringIO()

    def console(file: io.StringIO) -> Console:
        environment = {"TERM": "xterm"} if terminal else {"TERM": "dumb"}
        return Console(
            file=file, width=80, force_terminal=terminal, no_color=True, _environ=environment
        )

    output = Output(
        command="some thing",
        json=json,
        verbosity=verbosity,
        stdout=console(out),
        stderr=console(err),
    )
    return Sink(output=output, stdout=out, stderr=err)


def work(observer: Observer) -> None:
    observer.stage("capture")
    observer.waiting("another process compiles this model")
    observer.unit_started("piece_0 for 1:8192 tokens", 0, 2)
    observer.warning("corrupt-artifact", "an artifact was corrupt", "nothing to do")
    observer.unit_finished("piece_0 for 1:8192 tokens", "compiled", 1.25)
    observer.unit_started("piece_2 for 1:8192 tokens", 1, 2)
    observer.unit_finished("piece_2 for 1:8192 tokens", "dup", 0.5)


def test_data_is_one_json_object_with_its_header_or_what_a_person_reads() -> None:
    plain, machine = make_sink(), make_sink(json=True)
    for sink in (plain, machine):
        sink.output.data({"answer": [1, "é"]}, lambda: Text("the answer is 1"))
        assert sink.stderr.getvalue() == ""
    assert plain.stdout.getvalue() == "the answer is 1\n"
    assert json.loads(machine.stdout.getvalue()) == {
        "schema_version": 1,
        "command": "some thing",
        "answer": [1, "é"],
    }
    assert machine.stdout.getvalue().isascii()


def test_nothing_is_rendered_under_json() -> None:
    def render() -> Text:
        raise AssertionError("rendered")

    make_sink(json=True).output.data({}, render)


def test_plain_text_is_not_wrapped() -> None:
    sink = make_sink(terminal=True)
    path = "/" + "x" * 300
    sink.output.data({}, lambda: path)
    assert sink.stdout.getvalue() == path + "\n"


def test_brackets_in_messages_are_not_markup() -> None:
    sink = make_sink()
    sink.output.error(
        VllmcError("bad-range", "[red] is no range", context={"a": "[b]"}, hint="[c]")
    )
    assert sink.stderr.getvalue() == "error[bad-range]: [red] is no range\n  a: [b]\n  hint: [c]\n"


def test_progress_is_lines_where_there_is_no_terminal() -> None:
    sink = make_sink()
    with sink.output.progress() as observer:
        work(observer)
    assert sink.stderr.getvalue().splitlines() == [
        "capture",
        "waiting: another process compiles this model",
        "warning[corrupt-artifact]: an artifact was corrupt",
        "  hint: nothing to do",
        "[1/2] piece_0 for 1:8192 tokens: compiled, 1.2 s",
        "[2/2] piece_2 for 1:8192 tokens: dup, 500 ms",
    ]
    assert sink.stdout.getvalue() == ""


def test_with_v_the_lines_say_when_a_unit_begins() -> None:
    sink = make_sink(verbosity=1)
    with sink.output.progress() as observer:
        observer.unit_started("piece_0 for 1:8192 tokens", 0, 2)
    assert sink.stderr.getvalue() == "[1/2] piece_0 for 1:8192 tokens\n"


def test_each_line_names_its_own_unit_where_several_are_at_work() -> None:
    sink = make_sink(verbosity=1)
    with sink.output.progress() as observer:
        observer.unit_started("piece_0 for 1 token", 0, 2)
        observer.unit_started("piece_2 for 1 token", 1, 2)
        observer.unit_finished("piece_0 for 1 token", "compiled", 1.2)
        observer.remark("a remark")
    assert sink.stderr.getvalue().splitlines() == [
        "[1/2] piece_0 for 1 token",
        "[2/2] piece_2 for 1 token",
        "[1/2] piece_0 for 1 token: compiled, 1.2 s",
        "a remark",
    ]


def test_the_bar_counts_what_is_done_and_says_how_many_are_at_work() -> None:
    sink = make_sink(terminal=True)
    with sink.output.progress() as observer:
        for index in range(3):
            observer.unit_started(f"piece_{index}", index, 3)
        # One whose worker died begins again.
        observer.unit_started("piece_1", 1, 3)
        observer.unit_finished("piece_1", "compiled", 1.0)
        observer.unit_finished("piece_0", "compiled", 1.0)
    shown = sink.stderr.getvalue()
    assert "piece_2" in shown
    assert "2/3" in shown
    sink = make_sink(terminal=True)
    with sink.output.progress() as observer:
        observer.unit_started("piece_0", 0, 3)
        observer.unit_started("piece_1", 1, 3)
    assert "piece_0 and 1 more" in sink.stderr.getvalue()


def test_progress_is_a_bar_on_a_terminal() -> None:
    sink = make_sink(terminal=True)
    with sink.output.progress() as observer:
        work(observer)
    shown = sink.stderr.getvalue()
    assert "piece_2 for 1:8192 tokens" in shown
    assert "2/2" in shown
    assert "0:00:00" in shown
    assert "warning[corrupt-artifact]" in Text.from_ansi(shown).plain


def test_the_bar_shows_the_stage_before_the_first_unit() -> None:
    sink = make_sink(terminal=True)
    with sink.output.progress() as observer:
        observer.stage("capture")
    assert "capture" in sink.stderr.getvalue()
    sink = make_sink(terminal=True)
    with sink.output.progress() as observer:
        observer.waiting("another process")
    assert "waiting: another process" in sink.stderr.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_with_q_only_warnings_are_shown(terminal: bool) -> None:
    sink = make_sink(terminal=terminal, verbosity=-1)
    with sink.output.progress() as observer:
        work(observer)
    sink.output.note("a remark")
    assert Text.from_ansi(sink.stderr.getvalue()).plain.splitlines() == [
        "warning[corrupt-artifact]: an artifact was corrupt",
        "  hint: nothing to do",
    ]


@pytest.mark.parametrize(("verbosity", "count"), [(-1, 0), (0, 1), (1, 2), (2, 3)])
def test_remarks_are_shown_up_to_the_verbosity(verbosity: int, count: int) -> None:
    sink = make_sink(verbosity=verbosity)
    for level in range(3):
        sink.output.note(f"level {level}", level=level)
    assert sink.stderr.getvalue().splitlines() == [f"level {n}" for n in range(count)]


def test_an_observer_may_look_away() -> None:
    work(SilentObserver())


def test_what_is_piped_is_plain_and_never_wrapped(
    workplace: object, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "word " * 100
    make_console().print(Text(line, style="bold red"))
    assert capsys.readouterr().out == line + "\n"
