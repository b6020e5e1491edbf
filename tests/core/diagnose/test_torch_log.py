from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from vllmc.core.diagnose.recompiles import Event, summarize
from vllmc.core.diagnose.torch_log import GraphBreak, read_log_events
from vllmc.core.errors import VllmcError

LOGS = Path(__file__).parent / "recompiles"
GLOG = re.compile(r"^([VW])\d{4} \S+ (\d+) (\S+)\] (\[\d/\d\])(?: \[__\w+\])? ", re.MULTILINE)
OTHERS = (
    "INFO 11-21 17:00:00 [loggers.py:123] Engine 000: running 3 requests",
    "    - an item of somebody's list",
    "Traceback (most recent call last):",
    '  File "/app/x.py", line 3, in f',
    "",
)
HEADER = "Recompiling function f in /app/m.py:3"
TRIGGER = "    triggered by the following guard failure(s):"


def real(name: str) -> str:
    return (LOGS / f"{name}.log").read_text(encoding="utf-8")


def events(path: Path, text: str) -> list[Event]:
    log = path / "some.log"
    log.write_text(text, encoding="utf-8")
    return [event for event in read_log_events(log) if isinstance(event, Event)]


def bracketed(text: str) -> str:
    """As torch 2.1 wrote it."""
    return GLOG.sub(
        r"[2023-11-21 12:12:21,348] \4 torch._dynamo.guards.__recompiles: [DEBUG] ", text
    )


@pytest.mark.parametrize(
    "spelled",
    [
        lambda text: re.sub("^", "[rank3]:", text, flags=re.MULTILINE),
        lambda text: re.sub("^", "[rank3]: ", text, flags=re.MULTILINE),
        lambda text: re.sub("^", "(EngineCore_DP0 pid=7) ", text, flags=re.MULTILINE),
        bracketed,
        lambda text: GLOG.sub("", text),
        lambda text: text.replace("\n", "\r\n"),
    ],
    ids=["rank", "rank and space", "process", "bracketed", "none", "line ends of Windows"],
)
@pytest.mark.parametrize("name", ["shape", "string", "kind.verbose", "shape_0_1.verbose"])
def test_every_form_of_prefix_says_the_same(
    tmp_path: Path, name: str, spelled: Callable[[str], str]
) -> None:
    text = real(name)
    there = spelled(text)
    assert there != text
    found = events(tmp_path, there)
    assert found == events(tmp_path, text)
    assert found


def test_lines_of_others_in_between_change_nothing(tmp_path: Path) -> None:
    for text in (real("string"), GLOG.sub("", real("string"))):
        mixed = "\n".join(line for own in text.splitlines() for line in (own, *OTHERS))
        assert summarize(events(tmp_path, mixed)) == summarize(events(tmp_path, text))


def test_blocks_of_ranks_that_wrote_at_once_are_told_apart(tmp_path: Path) -> None:
    one, other = real("dtype").splitlines(), real("layout").splitlines()
    pairs = zip(one, other, strict=True)
    text = "\n".join(f"[rank0]:{a}\n[rank1]:{b}" for a, b in pairs)
    rows = summarize(events(tmp_path, text))
    assert [(row.klass, row.count) for row in rows] == [("dtype", 1), ("layout", 1)]


def test_thousands_of_repeats_are_counted(tmp_path: Path) -> None:
    [row] = summarize(events(tmp_path, real("dtype") * 3000))
    assert row.count == 3000


@pytest.mark.parametrize("kept", [1, 2])
def test_a_block_that_is_cut_counts_without_its_reasons(tmp_path: Path, kept: int) -> None:
    [found] = events(tmp_path, "\n".join(real("dtype").splitlines()[:kept]))
    assert found.reasons == ()
    [row] = summarize([found])
    assert (row.klass, row.guard, row.count) == ("other", "", 1)
    assert "cut off" in row.fix


def test_a_line_that_is_cut_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    text = real("shape").rstrip("\n")
    for length in range(len(text) - 80, len(text)):
        rows = summarize(events(tmp_path, text[:length]))
        assert sum(row.count for row in rows) == 3
        assert rows[0].klass == "shape"


def test_a_block_ends_where_the_next_begins(tmp_path: Path) -> None:
    text = f"{HEADER}\n{TRIGGER}\n{HEADER}\n{TRIGGER}\n    - 0/0: k == 2"
    assert [event.reasons for event in events(tmp_path, text)] == [(), ("0/0: k == 2",)]


def test_guards_without_the_number_of_their_entry_are_read(tmp_path: Path) -> None:
    text = f"{HEADER}\n{TRIGGER}\n    - L['k'] == 2\n    - L['k'] == 1\n"
    [event] = events(tmp_path, text)
    assert event.reasons == ("L['k'] == 2", "L['k'] == 1")


def test_the_warning_of_the_limit_alone_names_frame_and_cause(tmp_path: Path) -> None:
    lines = real("counter").splitlines()
    warnings = "\n".join(line for line in lines if line.startswith("W"))
    [row] = summarize(events(tmp_path, warnings))
    assert row.frame.endswith(" in forward")
    assert (row.klass, row.expected, row.count, row.limit_hit) == ("int", "7", 1, True)


def test_the_warning_is_no_recompile_of_its_own(tmp_path: Path) -> None:
    [row] = summarize(events(tmp_path, real("counter")))
    assert (row.count, row.limit_hit) == (8, True)
    assert row.pattern == "a counter that grows by one, from 0 to 7"


def test_graph_breaks_are_no_recompiles() -> None:
    found = list(read_log_events(LOGS / "graph_break.log"))
    assert len([item for item in found if isinstance(item, GraphBreak)]) == 2
    rows = summarize(item for item in found if isinstance(item, Event))
    assert [row.count for row in rows] == [1, 1]
    assert "behind its graph break in line" in rows[1].fix


def test_a_long_log_is_never_held(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    with log.open("w", encoding="utf-8") as file:
        for _ in range(3000):
            file.write(real("shape"))
        file.write("x" * 5_000_000)
    tracemalloc.start()
    try:
        rows = summarize(event for event in read_log_events(log) if isinstance(event, Event))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row.count for row in rows] == [9000]
    assert log.stat().st_size > 8_000_000
    assert peak < 2_000_000


def test_any_bytes_are_read(tmp_path: Path) -> None:
    text = real("dtype").encode()
    noise = bytes(range(256)) * 1000
    log = tmp_path / "noisy.log"
    log.write_bytes(noise + b"\n" + text + noise)
    assert len(list(read_log_events(log))) == 1


def test_what_would_move_a_cursor_is_not_repeated(tmp_path: Path) -> None:
    text = f"Recompiling function f\x1b[2J in /app/m.py:3\n{TRIGGER}\n    - 0/0: k == '\x1b[2J'\n"
    [row] = summarize(events(tmp_path, text))
    assert "\x1b" not in str(row)


def test_a_log_that_cannot_be_read_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(VllmcError, match=r"unreadable-log: .*missing\.log") as caught:
        list(read_log_events(tmp_path / "missing.log"))
    assert "TORCH_LOGS" in caught.value.hint
