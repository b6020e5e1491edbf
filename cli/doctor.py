"""`vllmc doctor`: what on this machine would make the cache useless. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllmc.cli import render
from vllmc.cli.config_file import CONFIG_VARIABLE
from vllmc.cli.option_table import OPTIONS
from vllmc.cli.options import CommonFlags, command
from vllmc.cli.settings import Settings
from vllmc.core.diagnose.doctor import LEVELS, examine
from vllmc.core.diagnose.doctor_places import Named
from vllmc.core.diagnose.doctor_probe import Configured, gather
from vllmc.core.errors import CheckFailed

Row = Mapping[str, Any]

_STYLES: Final = {"problem": "bold red", "warning": "yellow", "note": "cyan"}
_VERDICTS: Final = {
    "problem": "the next start cannot count on the cache",
    "warning": "the next start may not find what it needs in the cache",
    "note": "nothing here makes the cache useless",
}


@command
def doctor(common: CommonFlags) -> int:
    """Say what on this machine would make the cache useless on the next start, and what to do.

    It looks at the packages, the GPU, the C++ compiler, the directories of the cache (what they lie
    on, who may use them, how much room there is), the variables and the config file. It compiles
    and changes nothing, and imports no torch: where there is a GPU, torch is asked in a process of
    its own. docs/doctor.md explains each finding.

    It exits 3 when there is a problem; warnings and notes leave it at 0.

    With --json: findings (id, level: problem, warning or note; what, why, fix), the gravest first,
    and facts: vllmc, python, platform, packages (name, oldest, version: of its metadata,
    file_version: of its files), device (toolkit, hidden, driver, gpus: name, capability;
    torch_sees_gpu, torch_failure, architectures), compiler (program, version, c_program,
    python_headers), memory_files, layers (place, given, origin, role: written or read; programs,
    newest, untrusted, unreadable, leftovers, leftover_bytes), trust_unsigned, temporary (a place:
    where Inductor compiles), temporary_files, user (uid, name, home, sudo_user), host, container,
    started, ci, config_file, config_named, hub (path, exists, offline), variables,
    unknown_variables, empty_variables. A place has path, state (directory, missing, not-a-directory
    or unreachable), reason, resolved, existing, owner, mode, readable, writable, mount (point,
    root, kind, options) and space (free_bytes, total_bytes, free_inodes, total_inodes); null is
    what could not be found out.
    """
    settings = common.settings()
    facts = gather(_configured(settings, common), settings.environment)
    findings = [dataclasses.asdict(finding) for finding in examine(facts)]
    shown = dataclasses.asdict(facts)
    for place in (*(layer["place"] for layer in shown["layers"]), shown["temporary"]):
        if place is not None and place["mode"] is not None:
            place["mode"] = f"{place['mode']:04o}"
    row = {"findings": findings, "facts": shown}
    common.output("doctor").data(row, lambda: _page(findings, shown))
    return CheckFailed.exit_code if any(f["level"] == "problem" for f in findings) else 0


def _configured(settings: Settings, common: CommonFlags) -> Configured:
    given = settings.find("cache-dir", [str(path) for path in common.cache_dir or ()], default=())
    # As `load_settings` reads them: empty ones do not count, and without any there is the default.
    texts = [text for text in given.values if text] or [""]
    return Configured(
        layers=[
            Named(path=path, given=text, origin=settings.cache_dir_origin)
            for path, text in zip(settings.cache_dirs, texts, strict=True)
        ],
        trust=settings.trust,
        config_file=settings.config.path if settings.config else None,
        config_named=bool(common.config or settings.environment.get(CONFIG_VARIABLE)),
        known_variables=(*(option.variable for option in OPTIONS), CONFIG_VARIABLE),
    )


def _page(findings: Sequence[Row], facts: Row) -> RenderableType:
    parts: list[RenderableType] = [render.facts(*_lines(facts))]
    for finding in findings:
        parts += ["", _finding(finding)]
    return Group(*parts, "", _verdict(findings))


def _finding(row: Row) -> RenderableType:
    told = [f"{row['what']}.", row["why"], *([f"fix: {row['fix']}"] if row["fix"] else ())]
    body = Table.grid(padding=(0, 0, 0, 2), pad_edge=True)
    body.add_column(overflow="fold")
    for line in told:
        body.add_row(line)
    head = Text.assemble((row["level"], _STYLES[row["level"]]), "  ", (row["id"], "bold"))
    return Group(head, body)


def _verdict(findings: Sequence[Row]) -> Text:
    levels = [finding["level"] for finding in findings]
    if not levels:
        return Text(_VERDICTS["note"], style="green")
    counts = [render.count(levels.count(level), level) for level in LEVELS if level in levels]
    gravest = levels[0]
    return Text.assemble((", ".join(counts), _STYLES[gravest]), f": {_VERDICTS[gravest]}")


def _lines(facts: Row) -> Iterator[tuple[str, str]]:
    yield "vllmc", f"{facts['vllmc'] or '-'} on {facts['python']}, {facts['platform']}"
    yield "packages", ", ".join(f"{p['name']} {p['version'] or '-'}" for p in facts["packages"])
    yield "device", _device(facts["device"])
    compiler = facts["compiler"]
    yield (
        "compiler",
        f"{compiler['program']}: {compiler['version']}" if compiler["program"] else "-",
    )
    for layer in facts["layers"]:
        held = render.count(layer["programs"], "program")
        where = f"{_place(layer['place'])}, {held}, from {layer['origin']}"
        yield "cache" if layer["role"] == "written" else "  below it", where
    yield "compiles in", _place(facts["temporary"]) if facts["temporary"] else "-"
    user = facts["user"]
    around = [f"in {kind}" for kind in (facts["container"], facts["ci"]) if kind]
    yield "user", " ".join([user["name"] or str(user["uid"]), *around])
    yield "config file", facts["config_file"] or "-"


def _device(device: Row) -> str:
    gpus = [f"{gpu['name']} ({gpu['capability']})" for gpu in device["gpus"]]
    driver = [f"driver {device['driver']}"] if device["driver"] else []
    built = [f"torch built for {device['toolkit']}"] if device["toolkit"] else []
    return ", ".join([*(gpus or ["CPU"]), *driver, *built])


def _place(place: Row) -> str:
    told = [place["path"], *([place["state"]] if place["state"] != "directory" else ())]
    if place["mode"] is not None:
        told.append(f"mode {place['mode']}")
    if place["mount"] is not None:
        told.append(place["mount"]["kind"])
    if place["space"] is not None:
        told.append(f"{render.size(place['space']['free_bytes'])} free")
    return ", ".join(told)
