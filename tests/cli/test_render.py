from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console, RenderableType

from vllmc.cli import render
from vllmc.core.cache.explain import Change
from vllmc.core.cache.key import Factor

FACTORS = [
    Factor(group="inductor", name="max_autotune", value=True, origin="flag").to_json(),
    Factor(group="inductor", name="mode", value="max", origin="env:MODE").to_json(),
    Factor(
        group="compiler", name="cxx", value="g++ 12", origin="probe", affects_key=False
    ).to_json(),
]


def change(**fields: Any) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": "inductor",
        "name": "max_autotune",
        "before": False,
        "after": True,
        "kind": "changed",
        "klass": "codegen",
        "affects_key": True,
        "origin_before": "default",
        "origin_after": "flag",
        "note": "",
    }
    return Change(**row | fields).to_json()


def lines(renderable: RenderableType | str, width: int = 120) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(renderable)
    return [line.rstrip() for line in file.getvalue().splitlines()]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_640_000, "1.6 MB"),
        (99_960, "100 kB"),
        (999_999, "1.0 MB"),
        (5_000_000_000, "5.0 GB"),
        (7e15, "7000 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12"), (134_515_008, "135M"), (70_553_706_496, "70.6B")]
)
def test_quantities(count: float, text: str) -> None:
    assert render.quantity(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0042, "4 ms"),
        (0.9999, "1.0 s"),
        (1.25, "1.2 s"),
        (59.96, "1 min 0 s"),
        (125, "2 min 5 s"),
        (3840, "1 h 4 min"),
        (12 * 86_400, "12 d"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


def test_values_are_json_in_one_line_and_cut_when_long() -> None:
    assert render.plain_value({"b": 1, "a": [None, True]}) == '{"a": [null, true], "b": 1}'
    assert render.plain_value("text") == "text"
    assert render.plain_value("") == '""'
    assert render.plain_value("0123456789ab" + "0" * 52) == "0123456789ab"
    cut = render.plain_value("x" * 1000)
    assert len(cut) == 160
    assert cut.endswith(" ...")


def test_factors_are_grouped_and_provenance_is_marked() -> None:
    assert lines(render.factors(FACTORS)) == [
        "inductor",
        "FACTOR        VALUE  ORIGIN",
        "max_autotune  true   flag",
        "mode          max    env:MODE",
        "",
        "compiler",
        "FACTOR                VALUE   ORIGIN",
        "cxx (not in the key)  g++ 12  probe",
    ]


def test_changes_show_both_sides_the_origin_and_the_class() -> None:
    rows = [
        change(),
        change(name="x", kind="added", before=None, origin_before=None, note="new in torch 2.14"),
        change(name="y", kind="removed", after=None, origin_after=None, affects_key=False),
    ]
    assert lines(render.changes(rows)) == [
        "FACTOR                 CHANGE         ORIGIN   CLASS",
        "inductor.max_autotune  false -> true  flag     codegen",
        "inductor.x             + true         flag     codegen (new in torch 2.14)",
        "inductor.y             - false        default  codegen, not in the key",
    ]


def test_a_long_note_stands_below_the_table() -> None:
    note = "it is long, " * 6 + "and has a line of its own"
    assert lines(render.changes([change(), change(name="x", note=note)])) == [
        "FACTOR                 CHANGE         ORIGIN  CLASS",
        "inductor.max_autotune  false -> true  flag    codegen",
        "inductor.x             false -> true  flag    codegen",
        "",
        f"inductor.x: {note}",
    ]


def test_a_variable_that_is_a_factor_is_not_named_twice() -> None:
    row = change(group="vllm.env", name="VLLM_X", origin_after="env:VLLM_X")
    assert lines(render.changes([row]))[1].split()[-2:] == ["env", "codegen"]


def test_a_few_names_stand_for_many() -> None:
    assert render.names(["a", "b"]) == "a, b"
    assert render.names([f"p{i}" for i in range(32)]) == "p0, p1, p2, p3 and 28 more"


def test_a_narrow_terminal_gets_a_block_of_lines_for_each_row() -> None:
    rows = [change(), change(name="mode", before="default", after="x" * 50)]
    narrow = lines(render.changes(rows), width=36)
    assert max(map(len, narrow)) <= 36
    assert narrow[:5] == [
        "FACTOR  inductor.max_autotune",
        "CHANGE  false -> true",
        "ORIGIN  flag",
        "CLASS   codegen",
        "",
    ]
    assert "".join(narrow).count("x") - "max_autotune".count("x") == 50


def test_long_cells_are_folded_and_not_cut() -> None:
    rows = [change(before="b" * 60, after="a" * 60)]
    shown = lines(render.changes(rows), width=80)
    assert max(map(len, shown)) <= 80
    assert shown[0].split() == ["FACTOR", "CHANGE", "ORIGIN", "CLASS"]
    cells = [line[len("inductor.max_autotune  ") :].split("  ")[0] for line in shown[1:]]
    assert "".join(cells).replace(" ", "") == "b" * 60 + "->" + "a" * 60


def test_a_module_that_is_added_is_told_by_its_class() -> None:
    module = {"class": "torch.nn.modules.linear.Linear", "modules": [], "tensors": {}}
    [_, shown] = lines(render.changes([change(kind="added", before=None, after=module)]))
    assert "+ torch.nn.modules.linear.Linear " in shown
    assert "tensors" not in shown
