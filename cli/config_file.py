"""Config files: TOML whose keys are the names of options; `[inductor]` and `[functorch]` tables."""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vllmc.cli.option_table import OPTIONS, SCOPES, Option, RawOption, Setting, option_named
from vllmc.cli.paths import expanded
from vllmc.cli.toml_lines import KeyPath, leaves, line_numbers
from vllmc.core.errors import UsageError

CONFIG_NAME = "vllmc.toml"
CONFIG_VARIABLE = "VLLMC_CONFIG"

_KINDS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {"text": (str, "a text"), "integer": (int, "a number"), "truth": (bool, "true or false")}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What a config file says; all its keys are known and their types are right."""

    path: Path
    settings: Mapping[str, Setting]
    options: tuple[RawOption, ...]


def read_config(
    flag: Path | None, environment: Mapping[str, str], directory: Path
) -> ConfigFile | None:
    """The file that the flag, the variable or the working directory names; None where none does.

    Raises `UsageError` (`no-config-file`, `bad-config-file`, `unknown-setting`, `bad-setting`),
    and `VllmcError` (`no-home-directory`).
    """
    named = flag or (Path(text) if (text := environment.get(CONFIG_VARIABLE)) else None)
    if named:
        path = directory / expanded(named)
        text = read_text(path, "--config" if flag else CONFIG_VARIABLE)
        return _parse_config(path, text, ("tool", "vllmc") if _is_project(path) else ())
    if (path := directory / CONFIG_NAME).is_file():
        return _parse_config(path, read_text(path, "working directory"), ())
    if (path := directory / "pyproject.toml").is_file():
        text = read_text(path, "working directory")
        # Most projects' files do not concern us; a broken one is then not ours to report.
        return _parse_config(path, text, ("tool", "vllmc")) if "vllmc" in text else None
    return None


def _is_project(path: Path) -> bool:
    return path.name == "pyproject.toml"


def read_text(path: Path, named_by: str, kind: str = "config file") -> str:
    """The text of a file that `named_by` (`--config`) names, with `\\n` as its line ends.

    Raises `UsageError` (`no-config-file`, `bad-config-file`).
    """
    context = {"file": str(path), "named by": named_by}
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise UsageError(
            "no-config-file",
            f"there is no {kind} {path}",
            context=context,
            hint=f"correct {named_by}, or leave it out",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            "bad-config-file",
            f"the {kind} {path} cannot be read: {error}",
            context=context,
            hint="it should be a TOML file in UTF-8 that this user may read",
        ) from error


def _parse_config(path: Path, text: str, table: KeyPath) -> ConfigFile | None:
    contents: Any = parse_toml(path, text, "config file")
    lines = line_numbers(text)
    for depth, name in enumerate(table):
        contents = contents.get(name)
        if contents is None:
            return None
        if not isinstance(contents, dict):
            where = f"{path.name}:{lines.get(table[: depth + 1], 1)}"
            raise bad_setting(".".join(table[: depth + 1]), where, "a table", contents)
    reader = Reader(
        file=path.name, lines={p[len(table) :]: n for p, n in lines.items() if _below(p, table)}
    )
    return ConfigFile(
        path=path, settings=reader.settings(contents), options=reader.options(contents)
    )


def parse_toml(path: Path, text: str, kind: str) -> dict[str, Any]:
    """The contents of `path`, which is a `kind` (`config file`).

    Raises `UsageError` (`bad-config-file`).
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise UsageError(
            "bad-config-file",
            f"the {kind} {path} is not TOML: {error}",
            context={"file": str(path), "line": int(line[1]) if line else len(text.split("\n"))},
            hint='texts take quotes, lists brackets: compile-range = ["1:512"]',
        ) from error


def _below(path: KeyPath, table: KeyPath) -> bool:
    return path[: len(table)] == table and len(path) > len(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """Turns a parsed config table into settings; `lines` says where each key stands in `file`.

    `known` are the options that the table may set, `others` the keys that are none.
    """

    file: str
    lines: Mapping[KeyPath, int]
    known: tuple[Option, ...] = OPTIONS
    others: tuple[str, ...] = SCOPES

    def settings(self, table: Mapping[str, Any]) -> dict[str, Setting]:
        """The options of the table, which are all its keys but `others`."""
        found = {}
        for name, value in table.items():
            if name in self.others:
                continue
            if name not in [option.name for option in self.known]:
                raise self._unknown(name)
            if not option_named(name).in_file:
                raise self._not_here(option_named(name))
            values = self._values(option_named(name), value)
            found[name] = Setting(values=values, origin=f"file:{self.where((name,))}")
        return found

    def options(self, table: Mapping[str, Any]) -> tuple[RawOption, ...]:
        """The options of the tables `[inductor]` and `[functorch]`."""
        found = []
        for scope in SCOPES:
            rows = table.get(scope, {})
            if not isinstance(rows, dict):
                raise bad_setting(scope, self.where((scope,)), "a table", rows)
            for path, value in leaves(rows):
                if value == {}:  # a table that sets nothing
                    continue
                where = self.where((scope, *path))
                name = ".".join(path)
                text = _option_text(f"{scope}.{name}", where, value)
                found.append(RawOption(scope=scope, name=name, text=text, origin=f"file:{where}"))
        return tuple(found)

    def where(self, path: KeyPath) -> str:
        """The place of a key, or of the innermost around it that has a line of its own."""
        around = next(p for n in range(len(path) + 1) if (p := path[: len(path) - n]) in self.lines)
        return f"{self.file}:{self.lines[around]}"

    def _unknown(self, name: str) -> UsageError:
        known = [option.name for option in self.known] + list(self.others)
        near = difflib.get_close_matches(name, known, n=1)
        return UsageError(
            "unknown-setting",
            f"{self.where((name,))} sets '{name}', which vllmc does not know",
            context={"origin": f"file:{self.where((name,))}", "known": known},
            hint=f"did you mean '{near[0]}'?" if near else "see the options in docs/cli.md",
        )

    def _not_here(self, option: Option) -> UsageError:
        return UsageError(
            "unknown-setting",
            f"{self.where((option.name,))} sets '{option.name}', which no file may set",
            context={"origin": f"file:{self.where((option.name,))}"},
            hint=f"give --{option.name}, or set {option.variable}",
        )

    def _values(self, option: Option, value: object) -> tuple[str, ...]:
        kind, noun = _KINDS[option.kind]
        where = self.where((option.name,))
        if option.repeatable:
            if option.separator == os.pathsep and isinstance(value, str):
                value = value.split(os.pathsep)
            if not isinstance(value, list) or any(type(item) is not kind for item in value):
                raise bad_setting(option.name, where, f"a list, each item {noun}", value)
            return tuple(str(item) for item in value)
        if type(value) is not kind:
            raise bad_setting(option.name, where, noun, value)
        return (str(value).lower() if kind is bool else str(value),)


def _option_text(name: str, where: str, value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        expected = "a text, number, truth value or list of these"
        raise bad_setting(name, where, expected, value) from None


def bad_setting(name: str, where: str, expected: str, found: object) -> UsageError:
    """The error for the value `found` of the key `name`, which should be `expected`."""
    return UsageError(
        "bad-setting",
        f"{where}: '{name}' should be {expected}, and is {found!r}",
        context={"origin": f"file:{where}"},
        hint='for example: device = "cpu", compile-size = [1, 8], compile-range = ["1:512"]',
    )
