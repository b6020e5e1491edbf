from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllmc.core.cache.key import JsonValue
from vllmc.core.diagnose.torch_trace import Entry, find_logs, is_trace, read_log
from vllmc.core.errors import VllmcError

PREFIX = "V1121 12:12:21.348000 31490 torch/_logging/_internal.py:1328]"


def everything(kind: str, data: JsonValue) -> bool:
    return True


def write(tmp_path: Path, *lines: str, name: str = "dedicated_log_torch_trace_0.log") -> Path:
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def one(path: Path) -> Entry:
    [entry] = read_log(path, everything).entries
    return entry


def test_an_entry_has_a_kind_a_compilation_and_a_payload(tmp_path: Path) -> None:
    head = {"artifact": {"name": "x"}, "frame_id": 0, "frame_compile_id": 1, "attempt": 0}
    path = write(tmp_path, f"{PREFIX} {json.dumps(head)}", "\t{", '\t\t"a": 1', "\t", "\t}")
    entry = one(path)
    assert (entry.kind, entry.data, entry.compile_id) == ("artifact", {"name": "x"}, "0/1")
    assert entry.payload == '{\n\t"a": 1\n\n}'
    assert entry.rank is None
    assert entry.fields() == {"name": "x"}


@pytest.mark.parametrize(
    ("prefix", "rank"),
    [
        (PREFIX, None),
        (f"[rank3]:{PREFIX}", 3),
        (f"[rank3]: {PREFIX} [0/1]", 3),
        ("I20261121 12:12:21.348 31490 /elsewhere/x.py:1]", None),
    ],
)
def test_prefixes_come_in_several_forms(tmp_path: Path, prefix: str, rank: int | None) -> None:
    entry = one(write(tmp_path, f'{prefix} {{"dynamo_start": {{}}, "frame_id": 0}}'))
    assert (entry.kind, entry.rank) == ("dynamo_start", rank)


@pytest.mark.parametrize(
    ("context", "spelled"),
    [
        ({}, ""),
        ({"frame_id": 2, "frame_compile_id": 0}, "2/0"),
        ({"compiled_autograd_id": 1}, "!1"),
        ({"compiled_autograd_id": 1, "frame_id": 2, "frame_compile_id": 0}, "!1/2/0"),
    ],
)
def test_a_compilation_is_spelled_as_torch_does(
    tmp_path: Path, context: dict[str, int], spelled: str
) -> None:
    entry = one(write(tmp_path, f"{PREFIX} {json.dumps({'graph': {}} | context)}"))
    assert entry.compile_id == spelled


def test_strings_are_a_table_and_no_entries(tmp_path: Path) -> None:
    path = write(tmp_path, f'{PREFIX} {{"str": ["/app/a.py", 1]}}', f'{PREFIX} {{"str": "odd"}}')
    log = read_log(path, everything)
    assert (dict(log.strings), log.entries) == ({1: "/app/a.py"}, ())


def test_the_rank_is_that_of_the_file_or_of_its_entries(tmp_path: Path) -> None:
    line = f'{PREFIX} {{"graph": {{}}, "rank": 5}}'
    named = write(tmp_path, line, name="dedicated_log_torch_trace_rank_2_ab.log")
    assert read_log(named, everything).rank == 2
    assert read_log(write(tmp_path, line), everything).rank == 5


def test_entries_that_nobody_wants_are_passed_over(tmp_path: Path) -> None:
    path = write(tmp_path, f'{PREFIX} {{"a": {{}}}}', "\tlong", f'{PREFIX} {{"b": {{}}}}')
    log = read_log(path, lambda kind, data: kind == "b")
    assert [(entry.kind, entry.payload) for entry in log.entries] == [("b", "")]


def test_what_is_no_entry_is_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path, "hello", "", f'{PREFIX} {{"a": {{}}}}', "\tpayload", "[1]", f'{PREFIX} {{"b": 1}}'
    )
    log = read_log(path, everything)
    assert (log.odd_lines, log.cut, len(log.entries)) == (2, False, 2)


def test_a_last_line_that_is_cut_is_told_from_an_odd_one(tmp_path: Path) -> None:
    path = write(tmp_path, f'{PREFIX} {{"a": {{}}}}', f'{PREFIX} {{"b": {{"na')
    log = read_log(path, everything)
    assert (log.odd_lines, log.cut, len(log.entries)) == (0, True, 1)


def test_a_trace_is_told_by_its_contents(tmp_path: Path, traces: Path) -> None:
    assert is_trace(traces / "cold")
    assert [log.name for log in find_logs(traces / "cold")] == ["dedicated_log_torch_trace_0.log"]
    assert is_trace(find_logs(traces / "cold")[0])
    assert not is_trace(traces), "the logs are a level below"
    other = write(
        tmp_path, 'INFO 11-21 12:12:21 [engine.py:1] {"a": 1}', '{"factors": []}', name="other.log"
    )
    assert not is_trace(other)
    assert not is_trace(tmp_path)
    assert not is_trace(tmp_path / "missing")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.log")
    assert find_logs(tmp_path) == find_logs(tmp_path / "pipe.log") == ()


def test_a_log_that_cannot_be_read_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(VllmcError, match=r"unreadable-trace: .*missing\.log") as caught:
        read_log(tmp_path / "missing.log", everything)
    assert "TORCH_TRACE" in caught.value.hint
