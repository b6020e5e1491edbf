from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.key import canonical_json
from vllmc.core.diagnose.foreign_files import (
    Unreadable,
    clean,
    clean_json,
    content_of,
    parse_json,
    parse_literal,
    places_in,
    read_text,
)


def test_a_file_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x" * 10)
    assert read_text(path, 10) == "x" * 10
    with pytest.raises(Unreadable, match="larger"):
        read_text(path, 9)


def test_what_is_no_file_of_text_says_why(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"text\xff")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, why in {
        "binary": "no UTF-8 text, at byte 4",
        "pipe": "no plain file",
        "dangling": "No such file",
        "missing": "No such file",
        ".": "no plain file",
    }.items():
        with pytest.raises(Unreadable, match=why):
            read_text(tmp_path / name)


@pytest.mark.parametrize("text", ["", "{", '{"a": hunter2}', "[" * 100_000, "9" * 5000])
def test_text_that_is_no_json_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_json(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "print('hunter2')", "a.b", "\0", "(" * 5000, "{[]: 1}", "-'hunter2'", "'\\d"]
)
def test_text_that_is_no_literal_is_refused_without_quoting_it(text: str) -> None:
    with pytest.raises(Unreadable) as caught:
        parse_literal(text)
    assert "hunter2" not in str(caught.value)


def test_a_literal_is_a_value_and_nothing_is_run() -> None:
    assert parse_literal("{(1, 2): ('a', None)}") == {(1, 2): ("a", None)}
    with pytest.raises(Unreadable):
        parse_literal("__import__('os').getcwd()")


def test_values_of_any_kind_become_json_that_can_be_stored_and_printed() -> None:
    deep: object = "bottom"
    for _ in range(100):
        deep = [deep]
    value = {
        1: (1, 2),
        "nan": float("nan"),
        "infinite": float("inf"),
        "bytes": b"x",
        "set": {1},
        "huge": 1 << 5000,
        "escape": "\x1b[2J\ud800",
        "deep": deep,
    }
    cleaned = clean_json(value)
    assert isinstance(cleaned, dict)
    assert cleaned["1"] == [1, 2]
    assert cleaned["nan"] == "nan"
    assert cleaned["huge"] == "<an integer of 5001 bits>"
    assert cleaned["escape"] == r"\x1b[2J\ud800"
    assert "nested too deeply" in canonical_json(cleaned)


@given(st.text())
def test_cleaned_text_can_be_encoded_and_moves_no_cursor(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode("utf-8")
    assert not any(c < " " and c not in "\t\n" for c in cleaned)


def test_equal_contents_have_equal_digests_and_others_have_not(tmp_path: Path) -> None:
    for name, data in {"a": b"same", "b": b"same", "c": b"other"}.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}_unpacked/sub").mkdir(parents=True)
        (tmp_path / f"{name}_unpacked/sub/file").write_bytes(data)
    for suffix in ("", "_unpacked"):
        a, b, c = (content_of(tmp_path / f"{name}{suffix}") for name in "abc")
        assert (a.digest, a.bytes) == (b.digest, 4)
        assert a.digest != c.digest
    assert content_of(tmp_path / "a").digest != content_of(tmp_path / "a_unpacked").digest


def test_the_names_in_a_directory_are_part_of_its_contents(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(b"same")
    assert content_of(tmp_path / "a").digest != content_of(tmp_path / "b").digest


@pytest.mark.parametrize(
    ("data", "places"),
    [
        (b"# /c/vllm/torch_compile_cache/ab/x.py", "/c/vllm/torch_compile_cache"),
        (b"'/tmp/torchinductor_root/xy/cxy.py'", "/tmp/torchinductor_root"),
        (b"\0\x94\x8c\x61/opt/v/lib/site-packages/vllm", "/opt/v/lib/site-packages"),
        (b"lib/python3.12/site-packages/vllm", ""),
        (b"/home/u/notes.txt", ""),
        (b"/home/u/site-packages-of-mine/x", ""),
    ],
)  # fmt: skip
def test_the_directories_that_a_file_mentions_are_found(data: bytes, places: str) -> None:
    assert places_in(data) == ({places} if places else set())


def test_a_place_that_straddles_two_reads_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    mention = b" /root/.cache/vllm/torch_compile_cache/x "
    path.write_bytes(bytes((1 << 20) - 20) + mention + bytes(100))
    assert content_of(path).places == {"/root/.cache/vllm/torch_compile_cache"}


def test_the_search_for_places_does_not_run_away() -> None:
    assert places_in(b"/a" * 200_000) == set()
    assert places_in(b"/" + b"a" * 200_000) == set()


def test_json_numbers_beyond_floats_are_text() -> None:
    assert clean_json(parse_json("[NaN, -Infinity, 1e999]")) == ["nan", "-inf", "inf"]
    assert json.dumps(clean_json(parse_json("[1.5]")), allow_nan=False) == "[1.5]"
