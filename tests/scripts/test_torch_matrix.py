from pathlib import Path

from torch_matrix import (
    BEGIN,
    END,
    HEAD,
    MINORS,
    PAGE,
    ROOT,
    Outcome,
    counted,
    unpinned,
    updated,
)

from vllmc.core.torch_compat.minors import MINORS as KNOWN
from vllmc.core.torch_compat.version import spelled

REPORT = """<testsuites><testsuite>
<testcase classname="tests.core.test_a" name="test_one"/>
<testcase classname="tests.core.test_a" name="test_two[x|y]"><failure message="no"/></testcase>
<testcase classname="tests.cli.test_b" name="test_three"><error message="no"/></testcase>
<testcase classname="tests.cli.test_b" name="test_four"><skipped message="no"/></testcase>
<testcase classname="tests.cli.test_b" name="test_five"/>
</testsuite></testsuites>"""


def outcome(torch: str, *failed: str) -> Outcome:
    return Outcome(
        torch=torch,
        triton="3.8.0",
        python="3.12.1",
        tests="all",
        passed=7,
        failed=failed,
        skipped=1,
        cold=9.0,
        hit=0.01,
        date="2026-11-22",
    )


def test_each_minor_that_vllmc_knows_is_run() -> None:
    assert [spelled(minor) for minor in KNOWN] == list(MINORS)


def test_the_page_has_a_row_of_all_tests_for_each_minor() -> None:
    table = PAGE.read_text("utf-8").partition(BEGIN + HEAD)[2].partition(END)[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()]
    assert [torch.rpartition(".")[0] for torch, *_ in rows] == list(MINORS)
    assert {tests for _, _, _, tests, *_ in rows} == {"all"}


def test_tests_are_counted_by_what_came_of_them(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    assert counted(report) == (2, ("test_a::test_two[x|y]", "test_b::test_three"), 1)


def test_a_row_is_replaced_and_others_stay_in_their_order() -> None:
    page = f"# Before\n\n{BEGIN}{END}\nAfter\n"
    for torch in ("2.15.0+cu132", "2.11.0", "2.9.0", "2.15.0+cu132"):
        page = updated(page, torch.rpartition(".")[0], outcome(torch))
    page = updated(page, "2.11", outcome("2.11.1", "test_a::test_two[x|y]"))
    rows = page.removeprefix(f"# Before\n\n{BEGIN}{HEAD}").removesuffix(f"{END}\nAfter\n")
    assert [row.split(" | ")[0] for row in rows.splitlines()] == [
        "| 2.9.0",
        "| 2.11.1",
        "| 2.15.0+cu132",
    ]
    assert "| 1<br>`test_a::test_two[x\\|y]` | 1 |" in rows


def test_pins_that_are_for_one_torch_are_left_out() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = list(unpinned(lines, "2.15"))
    assert {line for line in lines if line not in kept} == {
        line for line in lines if line.startswith(("torch==", "triton==", "setuptools=="))
    }
    assert len(lines) == len(kept) + 3
    assert set(unpinned(lines, "2.11")) - set(kept) == {"numpy<2.4"}
