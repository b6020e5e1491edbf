"""What a `TORCH_TRACE` says of torch's two compile caches. Imports no torch.

For each compilation the AOTAutograd cache is asked once, and the FX graph cache once for each
graph that Inductor is given (forward, backward, or each piece of a split graph). Every answer is
an `artifact` entry (`fx_graph_cache_miss`) whose payload has the key and the key's components,
each as `[hash] name: value`. Sources, torch 2.13: `compile_fx.py` and `codecache.py` in
torch/_inductor, `autograd_cache.py` and `aot_autograd_result.py` in torch/_functorch/_aot_autograd.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.key import JsonValue, sha256_hex
from vllmc.core.diagnose.foreign_files import clean
from vllmc.core.diagnose.reprs import without_addresses
from vllmc.core.diagnose.torch_trace import (
    Entry,
    TraceLog,
    find_logs,
    json_of,
    read_log,
)
from vllmc.core.errors import VllmcError

Cache: TypeAlias = Literal["aot_autograd", "fx_graph"]
# Where torch asks its caches; `unsaved` is no answer: what was compiled could not be stored.
Answer: TypeAlias = Literal["hit", "miss", "bypass", "disabled", "unsaved"]
Outcome: TypeAlias = Literal["hit", "partial", "miss", "bypass", "disabled", "none"]

UNSAVED: Final = "unsaved"
AOT_DETAILS: Final = "TORCH_LOGS=+torch._functorch._aot_autograd.autograd_cache"

_CACHES: Final[Mapping[str, Cache]] = {
    "aotautograd_cache_": "aot_autograd",
    "fx_graph_cache_": "fx_graph",
    "fx_graph_bundled_cache_": "fx_graph",
}
_ANSWERS: Final[Mapping[str, Answer]] = {
    "hit": "hit",
    "miss": "miss",
    "bypass": "bypass",
    "pickle_failure": UNSAVED,
}
# Torch writes no artifact for a cache that is off, only an event of its timeline.
_DISABLED: Final = "fx_graph_cache_disabled"
_COMPONENT: Final = re.compile(
    r"\[(?P<digest>[^\]\s]+)\] (?P<name>[A-Za-z_]\w*(?:\[[^\]]*\])?): ?(?P<text>.*)", re.DOTALL
)
_COMMENT: Final = re.compile(r"^\s*#.*$|\s+#.*$", re.MULTILINE)
_ANNOTATION: Final = re.compile(r': "[^"]*"')


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One part of a key, such as `inductor_config[max_autotune]`: torch's hash of its value, and
    what torch prints of the value.
    """

    name: str
    digest: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookup:
    """One question to a cache, and its answer.

    `key` is empty where there is none (a bypass); `reason` where torch gave none. AOTAutograd's
    components are there only when its logger was at DEBUG (`AOT_DETAILS`).
    """

    cache: Cache
    answer: Answer
    key: str
    reason: str
    components: tuple[Component, ...]

    @property
    def backward(self) -> bool:
        """Whether it was for a backward graph, as far as the components tell."""
        return any(c.name == "fx_kwargs[is_backward]" and c.text == "True" for c in self.components)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """One compilation: of a frame by Dynamo, or of a graph without one.

    `id` is torch's (`0/1`: the second compilation of the first frame), `frame` spells
    `model.py:12 in forward` where it is known. `graph` is a digest of the code of Dynamo's graph,
    without shapes and places. `functorch` are AOTAutograd's options as the metrics give them.
    """

    id: str
    rank: int | None
    frame: str
    graph: str
    lookups: tuple[Lookup, ...]
    functorch: tuple[Component, ...]

    @property
    def label(self) -> str:
        """How a person is told which: `[0/1] model.py:12 in forward`."""
        rank = "" if self.rank is None else f"rank {self.rank} "
        return f"{rank}[{self.id or '-'}] {self.frame}".rstrip()

    @property
    def outcome(self) -> Outcome:
        """`partial` where one lookup hit and another missed, `none` where no cache was asked."""
        answers = {lookup.answer for lookup in self.lookups} - {UNSAVED}
        if not answers:
            return "none"
        if "bypass" in answers:
            return "bypass"
        if "miss" in answers:
            return "partial" if "hit" in answers else "miss"
        return "hit" if "hit" in answers else "disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchTrace:
    """The compilations of a trace, in the order in which they began, rank by rank.

    `torch` is the version that wrote it (empty where it does not say), `notes` what was not
    understood.
    """

    name: str
    torch: str
    compilations: tuple[Compilation, ...]
    notes: tuple[str, ...]


def read_trace(path: Path) -> TorchTrace:
    """Reads a trace directory or one of its logs, whatever it holds.

    Raises `VllmcError` (`no-trace`, `unreadable-trace`).
    """
    if not (files := find_logs(path)):
        raise VllmcError(
            "no-trace",
            f"{path} holds no log that TORCH_TRACE wrote",
            context={"path": str(path)},
            hint="run the program under TORCH_TRACE=DIR, then give DIR",
        )
    logs = sorted((read_log(file, _wanted) for file in files), key=_order)
    odd: Counter[str] = Counter()
    versions = dict.fromkeys(v for log in logs for v in _versions(log, odd))
    compilations = tuple(c for log in logs for c in _compilations(log, odd))
    return TorchTrace(
        name=str(path),
        torch=", ".join(versions),
        compilations=compilations,
        notes=(*_log_notes(logs), *(f"{what} ({n})" for what, n in odd.items())),
    )


def _wanted(kind: str, data: JsonValue) -> bool:
    if kind == "artifact":
        name = data.get("name") if isinstance(data, dict) else None
        return name == "torch_version" or _cache_of(name) is not None
    return kind in ("dynamo_start", "dynamo_output_graph", "compilation_metrics", "chromium_event")


def _cache_of(name: JsonValue) -> tuple[Cache, str] | None:
    """The cache that an artifact is about, and what it says."""
    if isinstance(name, str):
        for prefix, cache in _CACHES.items():
            if name.startswith(prefix):
                return cache, name.removeprefix(prefix)
    return None


def _order(log: TraceLog) -> tuple[int, str, str]:
    return (-1 if log.rank is None else log.rank, log.began, log.name)


def _log_notes(logs: Iterable[TraceLog]) -> list[str]:
    notes = []
    for log in logs:
        if log.cut:
            notes.append(f"{log.name} ends in the middle of an entry")
        if log.odd_lines:
            lines = "line was" if log.odd_lines == 1 else "lines were"
            notes.append(f"{log.name}: {log.odd_lines} {lines} not understood")
    return notes


def _versions(log: TraceLog, odd: Counter[str]) -> Iterable[str]:
    for entry in log.entries:
        if entry.kind == "artifact" and entry.fields().get("name") == "torch_version":
            match json_of(entry.payload):
                case {"pytorch_version": str(version)}:
                    yield clean(version)
                case _:
                    odd["torch's version could not be read"] += 1


def _compilations(log: TraceLog, odd: Counter[str]) -> Iterable[Compilation]:
    """The compilations of a log: those that had a graph, or asked a cache."""
    grouped: dict[str, list[Entry]] = {}
    for entry in log.entries:
        grouped.setdefault(entry.compile_id, []).append(entry)
    known: dict[str, Component] = {}
    for compile_id, entries in grouped.items():
        lookups = _once(
            found for entry in entries if (found := _lookup(entry, odd, known)) is not None
        )
        graphs = [e.payload for e in entries if e.kind == "dynamo_output_graph"]
        if lookups or graphs:
            yield Compilation(
                id=clean(compile_id),
                rank=log.rank,
                frame=_frame(entries, log.strings),
                graph=_graph(graphs[-1]) if graphs else "",
                lookups=lookups,
                functorch=_functorch(entries, odd),
            )


def _once(lookups: Iterable[Lookup]) -> tuple[Lookup, ...]:
    """The lookups, each miss of a key once.

    Where AOTAutograd's entry is found but the FX graph that it names is not, both caches report
    the one miss.
    """
    found: list[Lookup] = []
    missed: set[tuple[Cache, str]] = set()
    for lookup in lookups:
        identity = (lookup.cache, lookup.key)
        if lookup.answer == "miss" and lookup.key:
            if identity in missed:
                continue
            missed.add(identity)
        found.append(lookup)
    return tuple(found)


def _lookup(entry: Entry, odd: Counter[str], known: dict[str, Component]) -> Lookup | None:
    if entry.kind == "chromium_event":
        return _answer("fx_graph", "disabled") if _DISABLED in entry.payload else None
    if entry.kind != "artifact" or (named := _cache_of(entry.fields().get("name"))) is None:
        return None
    cache, said = named
    if (answer := _ANSWERS.get(said)) is None:
        odd[f"an entry {clean(str(entry.fields()['name']))} is not known"] += 1
        return None
    info = json_of(entry.payload)
    if not isinstance(info, dict):
        odd[f"the details of a {answer} could not be read"] += 1
        return _answer(cache, answer)
    lines = info.get("components")
    components = [_component(line, odd, known) for line in lines] if isinstance(lines, list) else []
    return Lookup(
        cache=cache,
        answer=answer,
        key=clean(key) if isinstance(key := info.get("key"), str) else "",
        reason=_reason(answer, info),
        components=tuple(c for c in components if c is not None),
    )


def _answer(cache: Cache, answer: Answer) -> Lookup:
    return Lookup(cache=cache, answer=answer, key="", reason="", components=())


def _reason(answer: Answer, info: Mapping[str, JsonValue]) -> str:
    match answer, info:
        case "bypass", {"cache_bypass_reason": str(reason)}:
            return _line(reason)
        case "unsaved", {"error": str(error)}:
            return f"what was compiled could not be stored: {_line(error)}"
        case "miss", {"cache_status_detailed": "guard_miss", "cache_status_guard_expr": guards}:
            return f"the key is stored, but not for these sizes: {_line(str(guards))}"
    return ""


def _line(text: str) -> str:
    return " ".join(clean(without_addresses(text)).split())


def _component(line: object, odd: Counter[str], known: dict[str, Component]) -> Component | None:
    if not isinstance(line, str) or (match := _COMPONENT.fullmatch(line)) is None:
        odd["a component of a key was not understood"] += 1
        return None
    # Most lines recur in every lookup of a trace.
    if (component := known.get(line)) is None:
        component = Component(
            name=clean(match["name"]),
            digest=clean(match["digest"]),
            text=clean(match["text"]),
        )
        known[line] = component
    return component


def _frame(entries: Iterable[Entry], strings: Mapping[int, str]) -> str:
    for entry in entries:
        match entry.kind, entry.data:
            case "dynamo_start", {"stack": [*_, {"line": line, "name": name, "filename": file}]}:
                path = strings.get(file, "") if isinstance(file, int) else str(file)
                return _line(f"{PurePath(path).name or '?'}:{line} in {name}")
    return ""


def _graph(code: str) -> str:
    bare = _ANNOTATION.sub("", _COMMENT.sub("", code))
    return sha256_hex("\n".join(line.strip() for line in bare.split("\n") if line.strip()))


def _functorch(entries: Iterable[Entry], odd: Counter[str]) -> tuple[Component, ...]:
    for entry in entries:
        match entry.kind, entry.data:
            case "compilation_metrics", {"functorch_config": str(text)}:
                if isinstance(options := json_of(text), dict):
                    return tuple(_option(name, value) for name, value in options.items())
                odd["the options of AOTAutograd could not be read"] += 1
    return ()


def _option(name: str, value: JsonValue) -> Component:
    text = clean(value if isinstance(value, str) else repr(value))
    return Component(name=clean(f"autograd_config[{name}]"), digest=sha256_hex(text), text=text)
