from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllmc.core.cache.key import Factor, canonical_json
from vllmc.core.cache.record import (
    PIECE_COUNTS,
    CorruptRecord,
    FormatTooNew,
    ProgramRecord,
    ProgramUnit,
    SourceFile,
    UnitRecord,
    decode,
    encode,
    open_body,
    outline,
    seal,
)
from vllmc.core.cache.redaction import hide
from vllmc.core.cache.summary import summarize_program, summarize_unit

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.text(min_size=1, max_size=12)
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
seconds = st.floats(0, 9e10)
factors = st.lists(
    st.builds(
        Factor,
        group=names,
        name=names,
        value=json_values | st.sampled_from(["sk-" + "aB3" * 8, ["sk-" + "aB4" * 8]]),
        origin=names,
        is_default=st.booleans(),
        affects_key=st.booleans(),
    ).map(hide),
    max_size=4,
    unique_by=lambda factor: factor.identity,
).map(tuple)
units = st.builds(
    UnitRecord,
    key=digests,
    artifact=digests,
    format=names,
    code=digests,
    bytes=st.integers(min_value=0),
    seconds=seconds,
    created=seconds,
    factors=factors,
)
programs = st.builds(
    ProgramRecord,
    key=digests,
    model=names,
    created=seconds,
    factors=factors,
    sources=st.lists(
        st.builds(
            SourceFile,
            package=names,
            path=st.sampled_from(["__init__.py", "models/llama/modeling_llama.py", "ops/x.py"]),
            digest=st.binary(min_size=16, max_size=16).map(bytes.hex),
            functions=st.lists(names, max_size=2).map(tuple),
        ),
        max_size=3,
        unique_by=lambda source: (source.package, source.path),
    ).map(tuple),
    guarded=st.dictionaries(names, json_values, max_size=3),
    units=st.lists(
        st.builds(
            ProgramUnit,
            key=digests,
            artifact=digests,
            range=names,
            pieces=st.lists(names, max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
    pieces=st.fixed_dictionaries({name: st.integers(min_value=0) for name in PIECE_COUNTS}),
    program=json_values,
)


def sealed(body: bytes, *, name: str = "vllmc.unit", version: int = 1) -> bytes:
    """A record file of any body, under a checksum that is right for it."""
    return seal(name, version, body)


def rewritten(data: bytes, *, version: int = 1, **fields: object) -> bytes:
    """The record with other fields in its body, under a checksum that is right for them."""
    document = json.loads(data)
    body = canonical_json(document["body"] | fields).encode()
    return sealed(body, name=document["format"], version=version)


@given(units | programs)
def test_a_record_survives_the_round_trip(record):
    assert decode(encode(record)) == record


@given(programs)
def test_the_same_record_is_always_the_same_bytes_of_json(record):
    data = encode(record)
    assert encode(decode(data)) == data
    assert json.loads(data)["format"] == "vllmc.program"
    assert json.loads(data)["version"] == 1


def test_a_flip_of_any_bit_is_detected(make_unit, make_program):
    for record in (make_unit(b"one"), make_program((make_unit(b"one"),))):
        data = encode(record)
        for offset in range(len(data)):
            for bit in range(8):
                broken = bytearray(data)
                broken[offset] ^= 1 << bit
                with pytest.raises(CorruptRecord):
                    decode(bytes(broken))


def test_a_truncation_or_an_addition_anywhere_is_detected(make_unit):
    data = encode(make_unit(b"one"))
    for length in range(len(data)):
        with pytest.raises(CorruptRecord):
            decode(data[:length])
    with pytest.raises(CorruptRecord):
        decode(data + b"\n")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_record(data):
    with pytest.raises(CorruptRecord):
        decode(data)


def test_a_later_version_is_told_from_damage(make_unit):
    with pytest.raises(FormatTooNew) as caught:
        decode(rewritten(encode(make_unit(b"one")), version=2, whatever="it holds"))
    assert caught.value.code == "format-too-new"
    assert "upgrade" in caught.value.hint


def test_the_rewriting_of_these_tests_is_itself_right(make_unit):
    data = encode(make_unit(b"one"))
    assert rewritten(data) == data


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("key", "A" * 64, "64 hex digits"),
        ("key", "a" * 63, "64 hex digits"),
        ("key", ["a"], "64 hex digits"),
        ("artifact", "a" * 64 + "\n", "64 hex digits"),
        ("code", None, "64 hex digits"),
        ("format", "", "text"),
        ("bytes", -1, "count"),
        ("bytes", 1.0, "count"),
        ("bytes", True, "count"),
        ("seconds", "1", "number of seconds"),
        ("created", -1.0, "number of seconds"),
        ("compiler_key", "", "64 hex digits"),
        ("factors", [], "object"),
        ("factors", {"default": {}}, "lacks fields"),
        ("factors", {"default": [], "other": []}, "object"),
        ("factors", {"default": {"g": []}, "other": []}, "object"),
        ("factors", {"default": {"g": {"": 1}}, "other": []}, "text"),
        ("factors", {"default": {}, "other": {}}, "list"),
        ("factors", {"default": {}, "other": [{"group": "g"}]}, "lacks fields"),
        ("surplus", 1, "surplus"),
    ],
)
def test_a_field_of_another_kind_is_refused(make_unit, field, value, reason):
    with pytest.raises(CorruptRecord, match=reason):
        decode(rewritten(encode(make_unit(b"one")), **{field: value}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"is_default": 1}, "is_default"),
        ({"group": None}, "group"),
        ({"origin": 3}, "origin"),
    ],
)
def test_a_factor_of_another_kind_is_refused(make_unit, change, reason):
    data = encode(make_unit(b"one"))
    found = json.loads(data)["body"]["factors"]
    other = [found["other"][0] | change, *found["other"][1:]]
    with pytest.raises(CorruptRecord, match=reason):
        decode(rewritten(data, factors=found | {"other": other}))


def test_a_factor_listed_twice_is_refused(make_unit):
    data = encode(make_unit(b"one"))
    found = json.loads(data)["body"]["factors"]
    row = found["other"][0]
    usual = found["default"] | {row["group"]: {row["name"]: row["value"]}}
    for factors in (found | {"other": [row, row]}, found | {"default": usual}):
        with pytest.raises(CorruptRecord, match="listed twice"):
            decode(rewritten(data, factors=factors))


@given(programs)
def test_an_outline_says_what_the_whole_record_says(record):
    found = outline(encode(record), record.id)
    assert (found.key, found.id, found.model, found.created) == (
        record.key,
        record.id,
        record.model,
        record.created,
    )
    assert {k: canonical_json(v) for k, v in found.values.items()} == {
        f.identity: canonical_json(f.compared) for f in record.factors if f.affects_key
    }
    assert found.units == record.units


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"factors":{}}', b'{"factors":{"default":[]}}'])
def test_the_outline_of_something_else_is_refused(body):
    with pytest.raises(CorruptRecord):
        outline(sealed(body, name="vllmc.program"), "a" * 64)
    with pytest.raises(CorruptRecord):
        outline(sealed(body), "a" * 64)


@pytest.mark.parametrize(
    "fields",
    [{"units": [{"key": "a"}]}, {"model": 3}, {"created": "now"}, {"key": "../x"}],
    ids=str,
)
def test_an_outline_holds_nothing_that_a_record_cannot(make_program, fields):
    data = encode(make_program())
    outline(data, "a" * 64)
    with pytest.raises(CorruptRecord):
        outline(rewritten(data, **fields), "a" * 64)


def test_a_unit_knows_the_key_of_its_compiler_alone(make_unit):
    one, two = make_unit(b"one"), make_unit(b"two")
    assert one.key != two.key
    assert one.compiler_key == two.compiler_key
    assert one.compiler_key.encode() in encode(one)
    other = Factor(group="inductor", name="max_autotune", value=True)
    changed = dataclasses.replace(one, factors=(one.factors[0], other))
    assert changed.compiler_key != one.compiler_key


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x.py", "a/../x.py", "a//x.py", "a\\x.py", "./x.py", ""]
)
def test_a_source_path_that_leaves_its_package_is_refused(make_program, path):
    data = encode(make_program())
    row = json.loads(data)["body"]["sources"][0]
    with pytest.raises(CorruptRecord):
        decode(rewritten(data, sources=[row | {"path": path}]))


@pytest.mark.parametrize("pieces", [{}, {"total": 1}, dict.fromkeys(PIECE_COUNTS, "1")])
def test_piece_counts_must_be_the_four_named_ones(make_program, pieces):
    with pytest.raises(CorruptRecord):
        decode(rewritten(encode(make_program()), pieces=pieces))


@pytest.mark.parametrize("body", [b"NaN", b"[" * 200_000, b'{"key":Infinity}', b"\xff", b"[]"])
def test_a_body_that_is_no_json_object_is_refused_whatever_its_checksum(body):
    with pytest.raises(CorruptRecord):
        decode(sealed(body))


def test_a_number_that_json_does_not_have_is_refused_anywhere(make_program):
    body = json.dumps(json.loads(encode(make_program()))["body"] | {"program": math.nan})
    with pytest.raises(CorruptRecord, match="NaN"):
        decode(sealed(body.encode(), name="vllmc.program"))


@pytest.mark.parametrize(("name", "version"), [("vllmc.other", 1), ("vllmc.unit", 0)])
def test_an_unknown_format_or_version_zero_is_refused(name, version):
    with pytest.raises(CorruptRecord, match="never wrote"):
        decode(sealed(b"{}", name=name, version=version))


def test_what_a_file_cannot_hold_is_our_own_mistake(make_unit):
    nan = Factor(group="inductor", name="limit", value=math.nan)
    with pytest.raises((AssertionError, ValueError)):
        encode(dataclasses.replace(make_unit(b"one"), factors=(nan,)))


def test_the_id_follows_the_key_the_sources_and_the_guarded_values_alone(make_program):
    record = make_program()
    [source] = record.sources

    def replaced(**changes):
        return dataclasses.replace(record, **changes).id

    def with_source(**changes):
        return replaced(sources=(dataclasses.replace(source, **changes),))

    assert len(record.id) == 64
    assert replaced(created=5.0, model="other", program=None) == record.id
    assert with_source(functions=()) == record.id
    assert replaced(key="0" * 64) != record.id
    assert replaced(guarded={"M['m'].SCALE": 2.0}) != record.id
    assert with_source(digest="b" * 32) != record.id
    assert with_source(path="other.py") != record.id
    assert with_source(package="torch") != record.id


def test_the_id_does_not_depend_on_the_order_of_the_sources(make_program):
    record = make_program()
    other = dataclasses.replace(record.sources[0], path="a.py")
    forward = dataclasses.replace(record, sources=(other, *record.sources))
    backward = dataclasses.replace(record, sources=(*record.sources, other))
    assert forward.id == backward.id


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
NUMBERS = st.sampled_from(["1e999", "-1e999", "1-2", "1" + "0" * 400, "9" * 5000, "1e308", "-1"])


@given(data=st.data(), record=units | programs)
def test_no_body_under_a_right_checksum_gives_its_reader_more_than_a_clean_error(data, record):
    name, body = open_body(encode(record))
    fields = json.loads(body)
    field = data.draw(st.sampled_from(sorted(fields)))
    fields[field] = data.draw(ANYTHING | st.just("@@"))
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    file = seal(name, 1, text.replace('"@@"', data.draw(NUMBERS)).encode())
    for read in (
        decode,
        lambda file: encode(decode(file)),
        lambda file: outline(file, "a" * 64),
        lambda file: summarize_program(file, record.key, "a" * 64),
        lambda file: summarize_unit(file, record.key),
    ):
        with suppress(CorruptRecord):
            read(file)


@given(st.binary(max_size=300))
def test_no_bytes_give_a_reader_more_than_a_clean_error(data):
    for file in (data, sealed(data), sealed(data, name="vllmc.program")):
        for read in (decode, lambda file: outline(file, "a" * 64)):
            with pytest.raises(CorruptRecord):
                read(file)
