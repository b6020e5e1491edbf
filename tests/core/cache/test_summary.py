from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllmc.core.cache.key import Factor, key_of
from vllmc.core.cache.record import CorruptRecord, encode
from vllmc.core.cache.summary import (
    program_summaries,
    summarize_program,
    summarize_unit,
    unit_summaries,
)

PURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = st.text(min_size=1, max_size=20) | st.sampled_from(
    ['"', '","key":"', '","units":[', ',"units":[]}', '"model":', "\\", "é\n"]
)
LEAVES = NAMES | st.integers() | st.none()
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.sampled_from(["key", "model", "units"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@PURE
@given(model=NAMES, value=VALUES, pieces=st.lists(NAMES, max_size=3))
def test_a_program_s_summary_is_what_its_record_says(make_unit, make_program, model, value, pieces):
    factors = (Factor(group="model", name="config", value=value),)
    made = make_program((make_unit(b"one"), make_unit(b"two")), model=model, factors=factors)
    units = tuple(dataclasses.replace(unit, pieces=tuple(pieces)) for unit in made.units)
    record = dataclasses.replace(
        made, units=units, program=value, guarded={"x": value}, created=1.5e9
    )
    summary = summarize_program(encode(record), record.key, record.id)
    assert dataclasses.asdict(summary) == {
        "key": record.key,
        "id": record.id,
        "model": record.model,
        "created": record.created,
        "units": tuple(dataclasses.asdict(unit) for unit in record.units),
    }


@PURE
@given(value=VALUES, seconds=st.floats(0, 1e9), created=st.floats(0, 9e10), format=NAMES)
def test_a_unit_s_summary_is_what_its_record_says(make_unit, value, seconds, created, format):
    factors = (Factor(group="graph", name="digest", value=value),)
    record = dataclasses.replace(
        make_unit(b"one"),
        key=key_of(factors),
        factors=factors,
        seconds=seconds,
        created=created,
        format=format,
    )
    summary = summarize_unit(encode(record), record.key)
    assert summary.key == record.key
    assert (summary.artifact, summary.code) == (record.artifact, record.code)
    assert (summary.bytes, summary.seconds) == (record.bytes, record.seconds)


def test_a_flipped_byte_anywhere_is_noticed(make_unit, make_program):
    unit = make_unit(b"one")
    program = make_program((unit,))
    for data, summarize in (
        (encode(unit), lambda data: summarize_unit(data, unit.key)),
        (encode(program), lambda data: summarize_program(data, program.key, program.id)),
    ):
        for place in range(len(data)):
            broken = bytearray(data)
            broken[place] ^= 0x04
            with pytest.raises(CorruptRecord):
                summarize(bytes(broken))


def test_the_record_of_something_else_is_refused(make_unit, make_program):
    unit = make_unit(b"one")
    program = make_program((unit,))
    for call in (
        lambda: summarize_unit(encode(unit), "0" * 64),
        lambda: summarize_unit(encode(program), unit.key),
        lambda: summarize_program(encode(program), "0" * 64, program.id),
        lambda: summarize_program(encode(unit), unit.key, program.id),
    ):
        with pytest.raises(CorruptRecord):
            call()


def test_what_cannot_be_read_is_left_out(store, warm):
    kept, broken = warm(b"one", model="kept"), warm(b"two", model="broken")
    record = broken.program
    store.layout.program(record.key, record.id).write_bytes(b"{}")
    store.layout.unit(broken.units[0].key).write_bytes(b"{}")
    assert [program.key for program in program_summaries(store.walk("programs"))] == [
        kept.program.key
    ]
    assert [unit.key for unit in unit_summaries(store.walk("units"))] == [kept.units[0].key]
    assert store.compile_seconds(u.key for w in (kept, broken) for u in w.units) == 1.5
