"""Ranges of token counts. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from vllmc.core.errors import UsageError

OPEN_END: Final = 2**31 - 1
"""The end of a range without one, written `inf`; as far as torch's smaller indices reach."""


@dataclass(frozen=True, slots=True, order=True)
class CompileRange:
    """An inclusive range of token counts. A range of one count is a compile size."""

    start: int
    end: int

    @classmethod
    def parse(cls, text: str) -> CompileRange:
        """Reads `A:B`, `N` for `N:N`, or `A:inf`. Raises `UsageError` for anything else."""
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+|inf)\s*)?", text)
        if match is None:
            raise UsageError(
                "bad-range",
                f"'{text}' is not a range of token counts",
                hint="write it as A:B, both inclusive, for example 1:8192",
            )
        start = int(match[1])
        end = start if match[2] is None else OPEN_END if match[2] == "inf" else int(match[2])
        if start < 1:
            raise UsageError(
                "bad-range",
                f"the range {text} starts below 1: a batch of zero tokens is never run",
                hint=f"start it at 1: 1:{max(end, 1)}",
            )
        if end < start:
            raise UsageError(
                "bad-range",
                f"the range {text} is empty: its end lies below its start",
                hint=f"did you mean {end}:{start}?",
            )
        return cls(start, end)

    @property
    def is_size(self) -> bool:
        """Whether the range holds a single token count."""
        return self.start == self.end

    @property
    def tokens(self) -> str:
        """The range in words: `1 token`, `2:64 tokens`."""
        return f"{self} token{'' if self == CompileRange(1, 1) else 's'}"

    def __contains__(self, tokens: object) -> bool:
        return isinstance(tokens, int) and self.start <= tokens <= self.end

    def __str__(self) -> str:
        if self.is_size:
            return str(self.start)
        return f"{self.start}:{'inf' if self.end == OPEN_END else self.end}"
