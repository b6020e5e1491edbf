"""`vllmc_factors.json`, which vllmc's plugin writes beside what vLLM stored: the fields of a key.

vLLM records hashes of config, code and compiler alone. The groups are those of `vllm_factors`,
whose factors called `hash` the fields stand for; what is recorded and not hashed by vLLM is
provenance. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from vllmc.core.cache.key import REDACTED, Factor, JsonValue, canonical_json, sha256_hex
from vllmc.core.diagnose.foreign_files import Unreadable, clean_json, parse_json
from vllmc.core.diagnose.vllm_factors import ENVIRONMENT, HASHES, VARIABLES, KeyFacts, key_facts
from vllmc.core.diagnose.vllm_recorded_format import FORMAT, VERSION

Tree: TypeAlias = Literal["compile", "aot"]

PROVENANCE: Final = ("vllm.versions", "vllm.compilation", "vllm.private", VARIABLES)
PLACE: Final = "place."
"""What stands before a package's name where the factor is the directory that it lies in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """What one file says.

    `rebuilds` says that vLLM's own key was made again of what is recorded; `unread` is what the
    plugin could not read. `facts` are what `cache_key_factors.json` has, the fields included.
    """

    tree: Tree
    key: str
    facts: KeyFacts
    hashes: Mapping[str, str]
    rebuilds: bool
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a start of vLLM's would hash before it traces anything.

    `trees` are those that it looks in, none where it compiles nothing by pieces or its cache is
    off, which `reason` then says. `ranks` are the directories of this node's processes. `beside`
    is what is compiled beside the model.
    """

    model: str
    facts: KeyFacts
    trees: tuple[Tree, ...]
    reason: str
    ranks: tuple[str, ...]
    beside: tuple[str, ...]
    unread: tuple[str, ...]


def read_start(text: str) -> Start:
    """What a start that was asked about printed. Raises `Unreadable` with vLLM's own error."""
    value = clean_json(parse_json(text))
    if isinstance(value, dict) and "error" in value:
        raise Unreadable(str(value["error"]))
    recorded = read_recorded(text)
    assert isinstance(value, dict), "read_recorded read it"
    mode = str(_table(value, "compilation").get("mode"))
    reason = ""
    if mode != "VLLM_COMPILE":
        reason = f"it compiles in mode {mode}, which does not use vLLM's cache"
    elif disabled := value.get("disabled"):
        reason = f"{disabled} switches vLLM's cache off"
    trees: list[Tree] = ["aot" if tree == "aot" else "compile" for tree in _texts(value, "trees")]
    return Start(
        model=str(value.get("model", "")),
        facts=recorded.facts,
        trees=() if reason else tuple(trees),
        reason=reason,
        ranks=_texts(value, "ranks"),
        beside=_texts(value, "beside"),
        unread=recorded.unread,
    )


def read_recorded(text: str) -> Recorded:
    """The file's contents. Raises `Unreadable` where it is of another format or version."""
    value = clean_json(parse_json(text))
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise Unreadable("it is not of vllmc's format")
    if value.get("version") != VERSION:
        raise Unreadable(f"its format has version {value.get('version')}, and {VERSION} is known")
    hashes = {name: str(digest) for name, digest in _table(value, "hashes").items()}
    return Recorded(
        tree="aot" if value.get("tree") == "aot" else "compile",
        key=str(value.get("key", "")),
        facts=_facts(value, hashes),
        hashes=hashes,
        rebuilds=value.get("rebuilds") is True,
        unread=_texts(value, "not_read"),
    )


def _facts(value: Mapping[str, JsonValue], hashes: dict[str, str]) -> KeyFacts:
    hidden = {name: str(digest) for name, digest in _table(value, "hidden").items()}
    code = tuple(_code(value))
    if value.get("tree") == "aot":
        # The key has no sources; a model that was made of others is not used all the same.
        hashes = hashes | {"code": sha256_hex(canonical_json([f.to_json() for f in code]))}
    known = {name: hashes[name] for name in HASHES if hashes.get(name)}
    facts = key_facts(_table(value, "env"), known, hashes.get("env", ""))
    secrets = tuple(
        (name.removeprefix("env."), digest)
        for name, digest in hidden.items()
        if name.startswith("env.")
    )
    fields = (
        *_factors("config", HASHES["config"], value, hidden),
        *code,
        *_factors("compiler", HASHES["compiler"], value, hidden),
        *(f for name in PROVENANCE for f in _provenance(name, value, hidden)),
    )
    return replace(facts, fields=fields, hidden=secrets, complete=True)


def _factors(
    table: str,
    group: str,
    value: Mapping[str, JsonValue],
    hidden: Mapping[str, str],
    *,
    affects_key: bool = True,
) -> Iterator[Factor]:
    for name, item in sorted(_table(value, table).items()):
        yield Factor(
            group=group,
            name=name,
            value=item,
            origin="probe",
            is_default=False,
            affects_key=affects_key,
            hidden=hidden.get(f"{table}.{name}", "") if REDACTED in canonical_json(item) else "",
        )


def _provenance(
    group: str, value: Mapping[str, JsonValue], hidden: Mapping[str, str]
) -> Iterator[Factor]:
    table = group.removeprefix(f"{ENVIRONMENT.partition('.')[0]}.")
    yield from _factors(table, group, value, hidden, affects_key=False)


def _code(value: Mapping[str, JsonValue]) -> Iterator[Factor]:
    """Of each file its digest, of each package the directory, and of a whole model its function."""
    files = value.get("sources")
    rows = [row for row in files if isinstance(row, dict)] if isinstance(files, list) else []
    times = Counter(str(row.get("name")) for row in rows)
    places: dict[str, JsonValue] = {}
    digests: dict[str, JsonValue] = {}
    for row in rows:
        name, root = str(row.get("name")), str(row.get("root", ""))
        places.setdefault(f"{PLACE}{name.partition('/')[0]}", root)
        digests[f"{root}/{name}" if times[name] > 1 else name] = row.get("digest")
    forward = {"forward": value["forward"]} if value.get("forward") else {}
    for name, item in (*places.items(), *digests.items(), *forward.items()):
        yield Factor(group=HASHES["code"], name=name, value=item, origin="probe", is_default=False)


def _table(value: Mapping[str, JsonValue], name: str) -> dict[str, JsonValue]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def _texts(value: Mapping[str, JsonValue], name: str) -> tuple[str, ...]:
    found = value.get(name)
    return tuple(map(str, found)) if isinstance(found, list) else ()
