"""Records whose checksums are right, and which vllmc never wrote: others may write to a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.cache.record import encode, open_body, seal

PLACE = "@@"
DEEP = "[" * 960 + "]" * 960
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def planted(record: Any, path: Path, raw: str = "", **fields: Any) -> None:
    """Puts another record in the place of `record`; `raw` is spelled in the place of `PLACE`."""
    name, body = open_body(encode(record))
    text = json.dumps(json.loads(body) | fields, sort_keys=True, separators=(",", ":"))
    path.write_bytes(seal(name, 1, text.replace(f'"{PLACE}"', raw).encode()))


@pytest.fixture
def looked_at(vllmc, stored) -> Callable[[], None]:
    """Looks at the cache with each command that does, and checks that each says something clear."""

    def look() -> None:
        program, unit = stored.program.key[:12], stored.unit.key[:12]
        for words in (
            ("cache", "ls"),
            ("cache", "ls", "--json"),
            ("cache", "show", program),
            ("cache", "show", unit),
            ("cache", "stats"),
            ("cache", "stats", "--json"),
            ("cache", "verify"),
            ("cache", "prune", "--max-count", "0", "--dry-run"),
            ("inspect-key", program),
            ("diff-config", program, unit),
        ):
            done = vllmc(*words)
            assert "error[internal]" not in done.err, (words, done.err)
            assert "error[os-error]" not in done.err, (words, done.err)
            (done.out + done.err).encode()
            assert not CONTROL.search(done.out + done.err), words

    return look


@pytest.mark.parametrize(
    ("fields", "raw"),
    [
        ({"model": "\x1b]0;title\x07\x1b[31mred\x9b"}, ""),
        ({"model": "\ud800"}, ""),
        ({"created": 1e308}, ""),
        ({"created": PLACE}, "1" + "0" * 400),
        ({"created": PLACE}, "1e+-"),
        ({"guarded": {"x": PLACE}}, "1e999"),
        ({"guarded": {"x": PLACE}}, DEEP),
        ({"program": PLACE}, DEEP),
        ({"factors": {"default": {"inductor": {"x": PLACE}}, "other": []}}, "1e999"),
        ({"units": [{"key": ["x"], "artifact": [], "range": 1, "pieces": 1}]}, ""),
        ({"units": [{"key": "a", "artifact": "../../etc/passwd", "range": "", "pieces": []}]}, ""),
        ({"units": {"a": 1}}, ""),
        ({"pieces": {"total": 10**30, "splitting": 0, "compilable": 0, "unique": 0}}, ""),
        (
            {"sources": [{"package": "..", "path": "x\0", "digest": "0" * 32, "functions": []}]},
            "",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_program_that_others_planted_is_clear_to_whoever_looks(fields, raw, stored, looked_at):
    path = stored.store.layout.program(stored.program.key, stored.program.id)
    planted(stored.program, path, raw, **fields)
    looked_at()


@pytest.mark.parametrize(
    ("fields", "raw"),
    [
        ({"seconds": PLACE}, "1-2"),
        ({"seconds": PLACE}, "1e999"),
        ({"seconds": 1e300}, ""),
        ({"created": 1e300}, ""),
        ({"bytes": 10**40}, ""),
        ({"format": "\x1b[2J"}, ""),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_unit_that_others_planted_is_clear_to_whoever_looks(fields, raw, stored, looked_at):
    planted(stored.unit, stored.store.layout.unit(stored.unit.key), raw, **fields)
    looked_at()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
SHARED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SHARED
@given(data=st.data())
def test_no_value_in_a_record_crashes_who_looks_at_it(data, stored, looked_at):
    record = data.draw(st.sampled_from([stored.program, stored.unit]))
    layout = stored.store.layout
    path = layout.unit(record.key)
    if record is stored.program:
        path = layout.program(record.key, record.id)
    _, body = open_body(encode(record))
    name = data.draw(st.sampled_from(sorted(json.loads(body))))
    before = path.read_bytes()
    planted(record, path, **{name: data.draw(JSON)})
    looked_at()
    path.write_bytes(before)


@SHARED
@given(value=JSON | st.binary(max_size=60), name=st.sampled_from(["", "at", "programs", "source"]))
def test_no_note_of_an_import_crashes_who_looks_at_it(value, name, vllmc, stored):
    key = stored.program.key
    row: Any = {"source": "x", "at": 1.0, "signed_by": "", "key": "", "programs": [key]}
    whole = isinstance(value, bytes)
    text = value if whole else json.dumps(row | {name: value} if name else value).encode()
    path = stored.store.layout.imported("a" * 64)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    done = vllmc("cache", "show", key[:12])
    assert done.code == 0, done.err
    assert not CONTROL.search(done.out)


def test_notes_of_an_import_that_are_nested_or_dated_without_end_are_left_out(vllmc, stored):
    path = stored.store.layout.imported("a" * 64)
    path.parent.mkdir()
    key = stored.program.key
    for text in (
        "[" * 100_000,
        f'{{"at":1e999,"source":"x","signed_by":"","key":"","programs":["{key}"]}}',
        f'{{"at":1{"0" * 400},"source":"x","signed_by":"","key":"","programs":["{key}"]}}',
    ):
        path.write_text(text)
        done = vllmc("cache", "show", key[:12])
        assert (done.code, "from x" in done.out) == (0, False), done.err


def test_who_looks_at_a_cache_that_is_not_trusted_sees_it_but_no_word_on_who_signed(vllmc, stored):
    key = stored.program.key
    path = stored.store.layout.imported("a" * 64)
    path.parent.mkdir()
    row = {"source": "release", "at": 1.0, "signed_by": "ci", "key": "ab", "programs": [key]}
    path.write_text(json.dumps(row))
    assert vllmc("cache", "show", key[:12], "--json").json["imports"][0]["signed_by"] == "ci"
    stored.store.root.chmod(0o777)
    shown = vllmc("cache", "show", key[:12], "--json")
    assert (shown.code, shown.json["imports"]) == (0, [])
    unit = stored.unit.key[:12]
    for words in (("cache", "show", unit), ("inspect-key", key[:12]), ("diff-config", key, unit)):
        assert vllmc(*words).code == 0, words
    # These would load the model that it names, and set its options.
    for words in (("current",), ("defaults",), (unit, "--prove", "tiny-llama")):
        assert vllmc("diff-config", key[:12], *words).code == 4, words
    assert vllmc("cache", "export", key[:12], "-o", "x").code == 4
