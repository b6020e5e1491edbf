"""The XML is held against what Jenkins' and Ant's schemas demand of it, told below as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from vllmc.cli.junit import write_junit
from vllmc.cli.options import CompileFlags, compile_request
from vllmc.cli.prewarm import Place, Result, Task
from vllmc.cli.settings import load_settings
from vllmc.core.errors import VllmcError

ATTRIBUTES = {
    "testsuites": set(),
    "testsuite": {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors",
                  "time"},
    "properties": set(),
    "testcase": {"name", "classname", "time"},
    "failure": {"message", "type"},
    "system-out": set(),
    "system-err": set(),
}  # fmt: skip


@pytest.fixture
def result(tmp_path: Path) -> Any:
    settings = load_settings(environment={}, directory=tmp_path)
    request = compile_request(settings, CompileFlags(), "tiny-llama")

    def make(outcome: str, name: str, error: VllmcError | None = None, **fields: Any) -> Result:
        place = Place(file=Path("ci/warm.toml"), line=4)
        row = {"outcome": outcome, "seconds": {"total": 1.5}, "miss": None} | fields
        task = Task(name=name, request=request, settings=settings, place=place)
        return Result(task=task, row=row, error=error)

    return make


def written(tmp_path: Path, *results: Result) -> ElementTree.Element:
    path = tmp_path / "reports" / "warm.xml"
    write_junit(path, results, started=1_700_000_000.0)
    text = path.read_text(encoding="utf-8")
    assert text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n')
    root = ElementTree.fromstring(text)
    for element in root.iter():
        assert set(element.attrib) == ATTRIBUTES[element.tag]
    return root


def test_each_result_is_a_case_and_what_does_not_hold_a_failure(
    result: Any, tmp_path: Path
) -> None:
    error = VllmcError("broken", "it broke", hint="mend it")
    tuned = result("failed", "tuned", error, reason="it broke")
    tuned.row["error"] = {"code": "broken", "hint": "mend it"}
    root = written(
        tmp_path,
        result("hit", "plain"),
        tuned,
        result("would-miss", "third", reason="nothing is stored"),
    )
    [suite] = root
    assert suite.get("name") == "vllmc warm"
    assert suite.get("timestamp") == "2023-11-14T22:13:20"
    assert [suite.get(n) for n in ("tests", "failures", "errors", "time")] == [
        "3",
        "2",
        "0",
        "4.500",
    ]
    tags = ["properties", "testcase", "testcase", "testcase", "system-out", "system-err"]
    assert [child.tag for child in suite] == tags
    plain, failed, third = suite.findall("testcase")
    assert (plain.attrib, list(plain)) == (
        {"name": "plain", "classname": "vllmc.warm", "time": "1.500"},
        [],
    )
    [failure] = failed
    assert failure.attrib == {"message": "it broke", "type": "broken"}
    assert failure.text == "ci/warm.toml:4: it broke (hint: mend it)"
    assert third[0].attrib == {"message": "nothing is stored", "type": "would-miss"}


def test_what_xml_cannot_hold_is_replaced(result: Any, tmp_path: Path) -> None:
    root = written(
        tmp_path, result("unknown", "<&\"'>\x1b[1m", reason="\x00a\ud800\ufffe\U0001f600")
    )
    case = next(root.iter("testcase"))
    assert case.get("name") == "<&\"'>?[1m"
    assert case[0].get("message") == "?a??\U0001f600"


def test_a_file_that_cannot_be_written_is_an_error(result: Any, tmp_path: Path) -> None:
    with pytest.raises(VllmcError) as caught:
        write_junit(tmp_path, [result("hit", "plain")], started=0.0)
    assert caught.value.code == "not-writable"
    assert caught.value.message.startswith("--junit cannot be written to ")
