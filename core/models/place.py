"""Places in a model's source: how an error names the module and line that stood in the way.

Imports no torch.
"""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary

from vllmc.core.syntax import parse_module

_FRAME = re.compile(r'File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)')


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A line of source code: `module` is `Class.function`, `file` its path from the package on."""

    module: str
    file: str
    line: int
    source: str

    def context(self) -> dict[str, str]:
        """The place as context of an error."""
        return {"module": self.module, "line": f"{self.file}:{self.line}", "source": self.source}


def place_of_frames(frames: Iterable[FrameSummary]) -> Place | None:
    """The innermost of `frames` (outermost first) that is not torch's own code."""
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith("<")]
    if not own:
        return None
    frame = own[-1]
    owner = _enclosing_class(frame.filename, frame.lineno or 0)
    return Place(
        module=f"{owner}.{frame.name}" if owner else frame.name,
        file=_from_package(frame.filename),
        line=frame.lineno or 0,
        source=(frame.line or "").strip(),
    )


def place_of_trace(trace: str) -> Place | None:
    """As `place_of_frames`, for the text of a stack trace."""
    return place_of_frames(
        FrameSummary(found["file"], int(found["line"]), found["function"])
        for found in _FRAME.finditer(trace)
    )


def place_in_class(cls: type, member: str = "forward") -> Place | None:
    """Where `cls` defines `member`, a function or a plain attribute, itself or in a base."""
    owner = next((base for base in cls.__mro__ if member in vars(base)), None)
    if owner is None:
        return None
    found = inspect.unwrap(vars(owner)[member])
    try:
        if inspect.isfunction(found):
            file, line = found.__code__.co_filename, _definition_line(found)
        else:
            file, line = inspect.getfile(owner), _assignment_line(owner, member)
    except (OSError, TypeError):
        return None
    return Place(
        module=f"{cls.__name__}.{member}",
        file=_from_package(file),
        line=line,
        source=linecache.getline(file, line).strip(),
    )


def _definition_line(function: object) -> int:
    """The line of `def`, below any decorators."""
    lines, first = inspect.getsourcelines(function)  # type: ignore[arg-type]
    return first + next(i for i, line in enumerate(lines) if line.lstrip().startswith("def "))


def _assignment_line(cls: type, name: str) -> int:
    lines, first = inspect.getsourcelines(cls)
    return first + next((i for i, text in enumerate(lines) if text.lstrip().startswith(name)), 0)


def _from_package(file: str) -> str:
    """`file` without the directories that differ between machines."""
    root = Path(file).parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return Path(file).relative_to(root).as_posix()


def _enclosing_class(file: str, line: int) -> str:
    try:
        module = parse_module(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    return next(
        (
            node.name
            for node in module.body
            if isinstance(node, ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)
        ),
        "",
    )
