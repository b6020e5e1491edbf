"""What a failed guard of Dynamo's says: its class, its subject, what it expected and what came.

The texts are those of torch 2.1 to 2.13: guards with and without "expected X, actual Y", names as
`x` or `L['x']`. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.key import REDACTED
from vllmc.core.cache.redaction import redact, scrub
from vllmc.core.diagnose.foreign_files import clean

RecompileClass: TypeAlias = Literal[
    "shape-0-1", "shape", "dtype", "layout", "int", "string", "object-id", "global-state",
    "index-width", "type", "other",
]  # fmt: skip

_MAX_LENGTH: Final = 400
_INT32_MAX: Final = 2**31 - 1
_REMEMBERED: Final = 4096

_ENTRY = re.compile(r"^\s*-?\s*(?P<id>[!\d]\d*(?:/\d+)+)(?:_\d+)?:\s*")
_COMMENT = re.compile(r"\s+#\s.*$", re.DOTALL)
_LOCAL = re.compile(r"L\[\s*(['\"])(.*?)\1\s*\]")
_TENSOR = re.compile(
    r"tensor '(?P<subject>.+)' (?P<what>[\w ]+?) mismatch(?: at index (?P<dim>\d+))?\."
    r"?(?: expected (?P<expected>.+?)(?:, actual (?P<observed>.+))?)?$"
)
_TYPE = re.compile(
    r"expected type of '(?P<subject>.+)' to be (?P<expected>.+?)[, ']* but found (?P<observed>.+)$"
)
_CHECK_TYPE = re.compile(
    r"___check_type_id\((?P<subject>.+), \d+\)(?:, type=<class '(?P<expected>[^']+)'>)?"
)
_CHECK_OBJECT = re.compile(
    r"___check_obj_id\((?P<subject>.+), \d+\)(?:, type=<class '(?P<expected>[^']+)'>)?"
)
_GLOBAL_STATE = re.compile(r"GLOBAL_STATE changed: ?(?P<subject>.*)$")
_OTHER_GLOBAL_STATE = re.compile(
    r"___check_global_state|___check_torch_function|utils_device\.CURRENT_DEVICE"
    r"|___check_current_backend|torch_function_mode_stack|___needs_nopython"
)
_DEALLOCATED = re.compile(r"(?P<subject>\S+) got deallocated")
_MARKING = re.compile(r"^_has_\w*(?:dynamic|dynamo|unbacked)\w*|_dynamo_(?:dynamic|unbacked)\w*")
_DIMENSION = re.compile(r"[\w.\[\]'\"()]*?\.(?P<what>size|stride)\(\)\[\d+\]")
_EQUALS = re.compile(r"^(?P<subject>[^=]+?) == (?P<expected>.+)$", re.DOTALL)
_IS = re.compile(r"^(?P<subject>\S+) is (?:not )?(?P<expected>\S+)$")
_NUMBERS = re.compile(r"(?<![\w.\[])\d+(?![\w.\]])")
_STRING = re.compile(r"(?s)'.*'|\".*\"|\w*Name\(.*\)")
_QUOTED = re.compile(r"['\"]")
_NAMES = re.compile(r"\w+")
# Where an object lay says nothing, and differs from run to run.
_ADDRESS = re.compile(r"(?<=, )\d{9,}(?=\))|\b0x[0-9a-f]{6,}")

_MISMATCHES: Final[dict[str, RecompileClass]] = {
    "size": "shape",
    "rank": "shape",
    "dtype": "dtype",
    "stride": "layout",
    "strides": "layout",
    "storage offset": "layout",
}
# Dynamo checks the global state first, then values and each tensor's properties, its sizes before
# its strides, and relations between sizes last: an entry that failed late was nearest to being
# used. A guard on a value checks the type too, so neither of the two is nearer.
_NEARNESS: Final[dict[RecompileClass, int]] = {
    "global-state": 0,
    "other": 1,
    "type": 2,
    "object-id": 2,
    "string": 2,
    "int": 2,
    "dtype": 3,
    "shape": 4,
    "shape-0-1": 4,
    "layout": 5,
    "index-width": 6,
}
_SYMBOLIC: Final = 6
_NOT_0_1: Final = ">= 2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """One guard that failed; `entry` is the compilation whose guard it is (`0/1`), or empty.

    `subject` is spelled without `L[...]`. `expected` and `observed` are empty where Dynamo does
    not say; `nearness` grows with how late the guard is checked.
    """

    entry: str
    text: str
    klass: RecompileClass
    subject: str = ""
    expected: str = ""
    observed: str = ""
    nearness: int = 0


def begins_entry(line: str) -> bool:
    """Whether a line starts the failures of another earlier compilation (`- 0/1: ...`)."""
    return bool(_ENTRY.match(line))


@lru_cache(_REMEMBERED)
def read_guard(reason: str) -> Guard:
    """The guard that one entry of a recompile's reasons is about.

    What shows to be a secret is redacted in every part of it.
    """
    entry = match["id"] if (match := _ENTRY.match(reason)) else ""
    text = reason[match.end() :] if match else reason.strip().removeprefix("- ")
    line = text.lstrip().partition("\n")[0]
    plain = scrub(clean(_COMMENT.sub("", line).strip()))
    guard = _classify(_LOCAL.sub(r"\2", plain))
    # A tensor may well be called `token`; only text is ever secret.
    if _QUOTED.search(guard.expected) and _is_secret(guard):
        plain = f"{plain.partition(' == ')[0]} == {REDACTED}"
        guard = replace(guard, expected=REDACTED)
    return replace(
        guard,
        entry=entry,
        text=shortened(_ADDRESS.sub("ID", plain)),
        expected=shortened(guard.expected),
        nearness=guard.nearness or _NEARNESS[guard.klass],
    )


def deciding(guards: Iterable[Guard]) -> Guard:
    """The informative one of all entries that failed: that which was nearest to being used.

    Among equals it is that of the latest compilation. What it observed is taken from the others
    where it does not say it itself.
    """
    listed = list(guards)
    best = max(listed, key=lambda guard: (guard.nearness, _number(guard.entry)))
    if best.observed:
        return best
    seen = (g.observed for g in listed if g.subject == best.subject and g.observed)
    best = replace(best, observed=next(seen, ""))
    if best.klass == "shape" and best.observed in ("0", "1"):
        return replace(best, klass="shape-0-1")
    if best.expected == _NOT_0_1 and not best.observed:
        return replace(best, observed="0 or 1")
    return best


def _classify(text: str) -> Guard:
    found = _tensor(text) or _type(text) or _identity(text) or _state(text)
    found = found or _sizes(text) or _value(text)
    return found or Guard(entry="", text=text, klass="other")


def _tensor(text: str) -> Guard | None:
    if (match := _TENSOR.search(text)) is None:
        return None
    subject, what = match["subject"], match["what"]
    klass = _MISMATCHES.get(what, "other")
    expected = (match["expected"] or "").rstrip(".")
    observed = match["observed"] or ""
    if what == "size":
        subject = f"{subject}.size()[{match['dim']}]"
        if {expected, observed} & {"0", "1"}:
            klass = "shape-0-1"
    elif klass == "layout":
        subject = f"{subject}.stride()[{match['dim'] or 0}]"
    elif klass != "dtype":
        subject = f"{subject}.{_ATTRIBUTES.get(what, what.replace(' ', '_'))}"
        expected = expected.removeprefix("requires_grad=")
    return Guard(
        entry="", text=text, klass=klass, subject=subject, expected=expected, observed=observed
    )


_ATTRIBUTES: Final = {"rank": "ndim", "dispatch key set": "device"}


def _type(text: str) -> Guard | None:
    if match := _TYPE.search(text):
        observed = match["observed"].removeprefix("<class '").removesuffix("'>")
        expected = match["expected"].removeprefix("a ")
        return Guard(
            entry="", text=text, klass="type", subject=match["subject"],
            expected=expected, observed=observed,
        )  # fmt: skip
    if match := _CHECK_TYPE.search(text):
        return Guard(
            entry="", text=text, klass="type", subject=match["subject"],
            expected=match["expected"] or "",
        )  # fmt: skip
    match = _IS.match(text)
    if match and match["expected"] == "None":
        return Guard(
            entry="", text=text, klass="type", subject=match["subject"],
            expected="something" if " is not " in text else "None",
        )  # fmt: skip
    return None


def _identity(text: str) -> Guard | None:
    if match := _CHECK_OBJECT.search(text) or _DEALLOCATED.search(text):
        expected = match.groupdict().get("expected")
        return Guard(
            entry="", text=text, klass="object-id", subject=match["subject"],
            expected=f"the same {expected}" if expected else "the same object",
        )  # fmt: skip
    if text.startswith("BACKEND_MATCH"):
        return Guard(
            entry="", text=text, klass="object-id", subject="backend", expected="the same object"
        )
    return None


def _state(text: str) -> Guard | None:
    if match := _GLOBAL_STATE.search(text):
        return Guard(
            entry="", text=text.rstrip(), klass="global-state", subject=match["subject"].strip()
        )
    if _OTHER_GLOBAL_STATE.search(text):
        return Guard(entry="", text=text, klass="global-state", subject=text.partition("(")[0])
    return None


def _sizes(text: str) -> Guard | None:
    """A condition on sizes or strides, or on how a dimension was marked."""
    if _MARKING.match(text):
        return Guard(entry="", text=text, klass="shape", subject="", expected="the same marks")
    if (match := _DIMENSION.search(text)) is None:
        return None
    subject, numbers = match[0].lstrip("("), {int(n) for n in _NUMBERS.findall(text)}
    expected = text
    klass: RecompileClass = "layout" if match["what"] == "stride" else "shape"
    if any(number >= _INT32_MAX for number in numbers):
        klass = "index-width"
    elif text == f"2 <= {subject}":
        klass, expected = "shape-0-1", _NOT_0_1
    elif equal := re.fullmatch(r"(==|!=) (\d+)", text.removeprefix(f"{subject} ")):
        klass = "shape-0-1" if klass == "shape" and equal[2] in ("0", "1") else klass
        expected = equal[2] if equal[1] == "==" else text
    return Guard(
        entry="", text=text, klass=klass, subject=subject, expected=expected, nearness=_SYMBOLIC
    )


def _value(text: str) -> Guard | None:
    if (match := _EQUALS.match(text)) is None:
        return None
    expected = match["expected"].strip()
    klass: RecompileClass = "other"
    if re.fullmatch(r"-?\d+", expected):
        klass = "int"
    elif _STRING.fullmatch(expected):
        klass = "string"
    return Guard(
        entry="", text=text, klass=klass, subject=match["subject"].strip(), expected=expected,
        nearness=_NEARNESS["int"],
    )  # fmt: skip


def _number(entry: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", entry))


def _is_secret(guard: Guard) -> bool:
    names = _NAMES.findall(guard.subject)
    return redact(names[-1] if names else "", guard.expected) == REDACTED


def shortened(text: str) -> str:
    """`text` as far as a report shows it."""
    return text if len(text) <= _MAX_LENGTH else text[: _MAX_LENGTH - 1] + "…"
