"""What the values that a guard met over time have in common. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from vllmc.core.diagnose.guards import RecompileClass

_FEWEST: Final = 3
_LAYER = re.compile(r"(?<![\w])\w*?\.?(?:layers?|blocks?|h|attn)[._]?\d+|\.\d+(?:\.|['\")]|$)")


def pattern(klass: RecompileClass, values: Sequence[str]) -> str:
    """In words, what changes from value to value; empty where nothing shows.

    `values` are what the guard compared with, in the order of time.
    """
    known = [value for value in values if value]
    if len(known) < _FEWEST:
        return ""
    distinct = list(dict.fromkeys(known))
    if len(distinct) == 2 and all(a != b for a, b in pairwise(known)):
        return f"alternates between {distinct[0]} and {distinct[1]}"
    if klass == "string" and all(map(_LAYER.search, distinct)) and len(distinct) == len(known):
        return "one per layer"
    if all(value.lstrip("-").isdecimal() for value in known):
        return _of_numbers(klass, [int(value) for value in known])
    return ""


def _of_numbers(klass: RecompileClass, numbers: Sequence[int]) -> str:
    by_one = {b - a for a, b in pairwise(numbers)} == {1}
    if klass.startswith("shape"):
        if len(set(numbers)) < len(numbers):
            return ""
        return f"one per size{', growing by one' if by_one else ''}"
    return f"a counter that grows by one, from {numbers[0]} to {numbers[-1]}" if by_one else ""
