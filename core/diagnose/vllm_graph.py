"""vLLM's `computation_graph.py`: what it tells of a graph, and of the sources it came from.

The file is what FX prints of the split graph: a class with one nested class per piece, and
comments that quote the source line of each operation. Imports no torch.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.redaction import redact
from vllmc.core.diagnose.foreign_files import clean

_PIECE: Final = re.compile(r"^\s+class (submod_\w+)\(")
_QUOTE: Final = re.compile(r"^\s*# File: (?P<path>.+?):(?P<line>\d+) in (?P<rest>.*)$")
_LAYER_TEXT: Final = re.compile(r"""(['"])[\w.]*\blayers\.\d+[\w.]*\1""")
_LAYER_INDEX: Final = re.compile(r"(?<=layers\.)\d+|(?<=layers_)\d+|(?<=modules_)\d+(?=_)")
_PATH: Final = re.compile(r"(?<![\w.])/(?:[\w.@+~-]+/)+")
_PACKAGES: Final = re.compile(r"^(?P<root>.*/(?:site|dist)-packages)/(?P<name>.+)$")
_CONTEXT: Final = 60

Sameness: TypeAlias = Literal["identical", "names", "different"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A source line that an operation came from: the file's path, the line's number and text."""

    path: str
    line: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A printed graph: its pieces' names, its lines without comments, what the comments quote."""

    pieces: tuple[str, ...]
    lines: tuple[str, ...]
    quotes: tuple[Quote, ...]

    @property
    def sources(self) -> tuple[str, ...]:
        """The paths of the quoted files."""
        return tuple(sorted({quote.path for quote in self.quotes}))


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphComparison:
    """Whether two graphs are the same, and the first line in which they differ.

    `names` means that they differ in the names of layers and in paths alone. `piece` is the one
    that the line belongs to, empty outside of them.
    """

    sameness: Sameness
    piece: str = ""
    before: str = ""
    after: str = ""


def read_graph(text: str) -> Graph:
    """What is found in `text`; nothing of it needs to be a graph."""
    pieces, lines, quotes = [], [], []
    for line in text.splitlines():
        if (quote := _QUOTE.match(line)) is not None:
            quotes.append(
                Quote(
                    path=clean(quote["path"]),
                    line=int(quote["line"][:9]),
                    text=clean(quote["rest"]),
                )
            )
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        lines.append(line.rstrip())
        if (piece := _PIECE.match(line)) is not None:
            pieces.append(piece[1])
    return Graph(pieces=tuple(pieces), lines=tuple(lines), quotes=tuple(quotes))


def compare_graphs(before: Graph, after: Graph) -> GraphComparison:
    """Compares the code of two graphs."""
    if before.lines == after.lines:
        return GraphComparison(sameness="identical")
    left, right = _normal(before.lines), _normal(after.lines)
    if left == right:
        return GraphComparison(sameness="names")
    at = next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )
    pieces = (_PIECE.match(line) for line in before.lines[: at + 1])
    names = [piece[1] for piece in pieces if piece is not None]
    lines = ["".join(side[at : at + 1]) for side in (left, right)]
    start = len(posixpath.commonprefix(lines))
    return GraphComparison(
        sameness="different",
        piece=names[-1] if names else "",
        before=_around(lines[0], start),
        after=_around(lines[1], start),
    )


def package_roots(paths: Iterable[str]) -> tuple[str, ...]:
    """The directories that hold the packages of these source files, `.../site-packages`."""
    matches = (_PACKAGES.match(path) for path in paths)
    return tuple(sorted({match["root"] for match in matches if match is not None}))


def source_roots(paths: Iterable[str]) -> tuple[str, ...]:
    """The directories that hold these source files, those of installed packages first."""
    everything = tuple(paths)
    loose = {str(PurePosixPath(p).parent) for p in everything if _PACKAGES.match(p) is None}
    absolute = [place for place in loose if place.startswith("/")]
    shared = (posixpath.commonpath(absolute),) if absolute else ()
    return (*package_roots(everything), *shared)


def package_path(path: str) -> str:
    """A source file's path below the directory of packages; as it is where there is none."""
    match = _PACKAGES.match(path)
    return match["name"] if match is not None else path


def moved_quotes(before: Graph, after: Graph) -> tuple[str, ...]:
    """The files, below their packages, of which the two graphs quote other lines.

    Their contents differ, or another branch of them was traced.
    """
    left, right = _quotes_by_file(before), _quotes_by_file(after)
    return tuple(name for name in sorted(left.keys() & right.keys()) if left[name] != right[name])


def _quotes_by_file(graph: Graph) -> dict[str, set[tuple[int, str]]]:
    files: dict[str, set[tuple[int, str]]] = {}
    for quote in graph.quotes:
        files.setdefault(package_path(quote.path), set()).add((quote.line, quote.text))
    return files


def _normal(lines: Sequence[str]) -> list[str]:
    return [
        _PATH.sub("<path>/", _LAYER_INDEX.sub("N", _LAYER_TEXT.sub("'<layer>'", line)))
        for line in lines
    ]


def _around(line: str, place: int) -> str:
    """The part of a line around a place: a signature can be longer than a screen."""
    first = max(0, place - _CONTEXT)
    last = place + _CONTEXT
    text = clean(line[first:last].strip())
    shown = f"{'... ' if first else ''}{text}{' ...' if last < len(line) else ''}"
    return str(redact("", shown))
