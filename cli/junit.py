"""JUnit XML of `warm`: a test case for each model or entry. Imports no torch.

There is no one schema. This is what the two in use have in common, Jenkins' (junit-10.xsd of its
xunit plugin) and Ant's (windyroad's JUnit.xsd), which is the stricter.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from vllmc.cli.findings import reason
from vllmc.cli.prewarm import Result
from vllmc.cli.side_files import write_text

# Characters that XML 1.0 has no way to write.
_UNWRITABLE: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_junit(path: Path, results: Sequence[Result], *, started: float) -> None:
    """Writes the results of a call that began at `started` (unix seconds).

    A case fails where the model could not be compiled, or would not be found. Raises `VllmcError`
    (`not-writable`).
    """
    ElementTree.indent(root := _suites(results, started))
    text = ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
    write_text(path, f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n', "--junit")


def _suites(results: Sequence[Result], started: float) -> ElementTree.Element:
    root = ElementTree.Element("testsuites")
    seconds = sum(result.row["seconds"]["total"] for result in results)
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {
            "name": "vllmc warm",
            "package": "vllmc",
            "id": "0",
            "timestamp": datetime.fromtimestamp(started, UTC).strftime("%Y-%m-%dT%H:%M:%S"),
            "hostname": socket.gethostname(),
            "tests": str(len(results)),
            "failures": str(sum(result.exit_code != 0 for result in results)),
            "errors": "0",
            "time": f"{seconds:.3f}",
        },
    )
    ElementTree.SubElement(suite, "properties")
    for result in results:
        _case(suite, result)
    ElementTree.SubElement(suite, "system-out")
    ElementTree.SubElement(suite, "system-err")
    return root


def _case(suite: ElementTree.Element, result: Result) -> None:
    row = result.row
    case = ElementTree.SubElement(
        suite,
        "testcase",
        {
            "name": _writable(result.task.name),
            "classname": "vllmc.warm",
            "time": f"{row['seconds']['total']:.3f}",
        },
    )
    if not result.exit_code:
        return
    failure = ElementTree.SubElement(
        case,
        "failure",
        {
            "message": _writable(row["reason"]),
            "type": row.get("error", {}).get("code", row["outcome"]),
        },
    )
    place = result.task.place
    where = f"{place.file}:{place.line}: " if place else ""
    failure.text = _writable(f"{where}{reason(row)}")


def _writable(text: str) -> str:
    return _UNWRITABLE.sub("?", text)
