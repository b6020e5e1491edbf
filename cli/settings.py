"""Settings: the only reader of environment variables and config files.

A flag beats the environment, the environment beats the file; every value says where it came from.
The file's keys are the options' names, and the tables `[inductor]` and `[functorch]` hold what
`-O` does on the command line. `OPTIONS` lists what may be set.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast

from vllmc.cli.toml_lines import KeyPath, leaves, line_numbers
from vllmc.core.cache.signing import load_signing_key
from vllmc.core.cache.trust import Trust
from vllmc.core.errors import UsageError, VllmcError

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store

T = TypeVar("T")

Scope: TypeAlias = Literal["inductor", "functorch"]

SCOPES: tuple[Scope, ...] = ("inductor", "functorch")
CONFIG_NAME = "vllmc.toml"
CONFIG_VARIABLE = "VLLMC_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option that the environment and the config file may set, as well as a flag.

    Some are not for the file: what a directory holds must not say that it is trusted. `shapes`: it
    is one of those that shape the compilation, which a matrix file may set too.
    """

    name: str
    kind: Literal["text", "integer", "truth"] = "text"
    repeatable: bool = False
    separator: str = ","
    in_file: bool = True
    shapes: bool = False

    @property
    def variable(self) -> str:
        """Its environment variable; `separator` is between a repeatable option's values."""
        return f"VLLMC_{self.name.upper().replace('-', '_')}"


_KINDS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {"text": (str, "a text"), "integer": (int, "a number"), "truth": (bool, "true or false")}
)

OPTIONS: tuple[Option, ...] = (
    Option(name="cache-dir", repeatable=True, separator=os.pathsep),
    Option(name="trust-unsigned", kind="truth", in_file=False),
    Option(name="trust-dir", in_file=False),
    Option(name="sign-key", in_file=False),
    Option(name="remote"),
    Option(name="device", shapes=True),
    Option(name="dtype", shapes=True),
    Option(name="compile-range", repeatable=True, shapes=True),
    Option(name="compile-size", kind="integer", repeatable=True, shapes=True),
    Option(name="dynamic-shapes", shapes=True),
    Option(name="layer-names", shapes=True),
    Option(name="experts", shapes=True),
    Option(name="splitting-op", repeatable=True, shapes=True),
    Option(name="pass", repeatable=True, shapes=True),
    Option(name="no-pass", repeatable=True, shapes=True),
    Option(name="split-kv-update", kind="truth", shapes=True),
    Option(name="quantize", shapes=True),
    Option(name="layers", kind="integer", shapes=True),
    Option(name="backend", shapes=True),
    Option(name="jobs", kind="integer"),
    Option(name="weights"),
    Option(name="guards"),
    Option(name="cuda-graphs"),
    Option(name="cuda-graph-size", kind="integer", repeatable=True),
    Option(name="summary"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """An option's value as text, not yet checked, and its origin.

    `origin` is `flag`, `env:NAME`, `file:NAME:LINE` or `default`. An option that is not
    repeatable has one value.
    """

    values: tuple[str, ...]
    origin: str

    @property
    def value(self) -> str:
        """The value of an option that is not repeatable."""
        assert len(self.values) == 1, self
        return self.values[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawOption:
    """An Inductor or functorch option as given: `text` is read once its type is known.

    `name` is dotted below a table (`triton.descriptive_names`). Numbers and truth values of a
    config file stand here as `-O` would take them, lists as JSON.
    """

    scope: Scope
    name: str
    text: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """What a config file says; all its keys are known and their types are right."""

    path: Path
    settings: Mapping[str, Setting]
    options: tuple[RawOption, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The environment as it was at the start, the config file, and what every command needs.

    `entry` is what one entry of a matrix file says, which beats environment and config file.
    """

    environment: Mapping[str, str]
    config: ConfigFile | None
    cache_dirs: tuple[Path, ...]
    cache_dir_origin: str
    trust: Trust
    sign_key: Path | None
    entry: ConfigFile | None = None

    @property
    def cache_dir(self) -> Path:
        """The cache's first layer, which is written to."""
        return self.cache_dirs[0]

    def store(self) -> Store:
        """The cache. Raises `VllmcError` (`bad-signing-key`)."""
        # `vllmc models` and others do without.
        from vllmc.core.cache.store import Store

        signing = None if self.sign_key is None else load_signing_key(self.sign_key)
        first, *below = self.cache_dirs
        return Store(first, tuple(below), self.trust, signing)

    @property
    def step_summary(self) -> Path | None:
        """The file that GitHub Actions shows as this step's summary."""
        path = self.environment.get("GITHUB_STEP_SUMMARY")
        return Path(path) if path else None

    @property
    def on_github(self) -> bool:
        """Whether GitHub Actions reads what this process prints."""
        return self.environment.get("GITHUB_ACTIONS") == "true"

    @property
    def checkout(self) -> Path:
        """The root of the repository that CI checked out; elsewhere the working directory."""
        variables = ("GITHUB_WORKSPACE", "CI_PROJECT_DIR")
        named = [path for name in variables if (path := self.environment.get(name))]
        return Path(named[0]) if named else Path.cwd()

    @property
    def raw_options(self) -> tuple[RawOption, ...]:
        """The `[inductor]` and `[functorch]` tables; of an option given twice the last holds."""
        files = (self.config, self.entry)
        return tuple(option for file in files if file for option in file.options)

    def find(self, name: str, flags: Sequence[str] = (), *, default: Sequence[str]) -> Setting:
        """The option's value: of flags, entry, environment, file and default the first there is."""
        if not flags and self.entry and (setting := self.entry.settings.get(name)):
            return setting
        return _find(name, flags, self.environment, self.config) or Setting(
            values=tuple(default), origin="default"
        )


def load_settings(
    *,
    cache_dir: Sequence[Path] = (),
    config: Path | None = None,
    trust_unsigned: bool = False,
    sign_key: Path | None = None,
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
) -> Settings:
    """Reads environment and config file; the first four are the flags.

    `environment` and `directory` default to the process's own. Raises `VllmcError`
    (`no-config-file`, `bad-config-file`, `unknown-setting`, `bad-setting`, `no-home-directory`).
    """
    variables = dict(os.environ if environment is None else environment)
    here = directory or Path.cwd()
    file = _read_config(config, variables, here)
    place = _find("cache-dir", [str(path) for path in cache_dir], variables, file)
    paths = [Path(text) for text in place.values if text] if place else []
    unsigned = _find("trust-unsigned", ["true"] if trust_unsigned else [], variables, file)
    keys = _find("trust-dir", (), variables, file)
    signing = _find("sign-key", [] if sign_key is None else [str(sign_key)], variables, file)
    return Settings(
        environment=variables,
        config=file,
        cache_dirs=tuple(here / _expanded(path) for path in paths or [_default_cache_dir()]),
        cache_dir_origin=place.origin if place else "default",
        trust=Trust(
            keys=None if keys is None else here / _expanded(Path(keys.value)),
            unsigned=unsigned is not None and truth("trust-unsigned", unsigned),
        ),
        sign_key=None if signing is None else here / _expanded(Path(signing.value)),
    )


def choice(name: str, setting: Setting, choices: tuple[T, ...]) -> T:
    """The one of `choices` that the setting spells; raises `UsageError` (`bad-value`)."""
    if setting.value not in choices:
        raise UsageError(
            "bad-value",
            f"'{setting.value}' is no {name}",
            context={"origin": setting.origin},
            hint=f"--{name} takes one of {', '.join(map(str, choices))}",
        )
    return cast("T", setting.value)


def truth(name: str, setting: Setting) -> bool:
    """What a setting says that is true or false; raises `UsageError` (`bad-value`)."""
    return choice(name, setting, ("false", "true", "0", "1")) in ("true", "1")


def _default_cache_dir() -> Path:
    # Most small commands are given the directory, and spend their time on imports.
    import platformdirs

    return platformdirs.user_cache_path("vllmc")


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise VllmcError(
            "no-home-directory",
            f"the '~' of {path} stands for no directory: {error}",
            context={"path": str(path)},
            hint="set HOME, or write the path out; VLLMC_CACHE_DIR names the cache's directory",
        ) from error


def _find(
    name: str, flags: Sequence[str], environment: Mapping[str, str], config: ConfigFile | None
) -> Setting | None:
    if flags:
        return Setting(values=tuple(flags), origin="flag")
    option = _option(name)
    # An empty variable counts as unset, so that a script can clear it.
    if text := environment.get(option.variable, "").strip():
        parts = text.split(option.separator) if option.repeatable else [text]
        values = tuple(part.strip() for part in parts)
        return Setting(values=values, origin=f"env:{option.variable}")
    return config.settings.get(name) if config else None


def _option(name: str) -> Option:
    [option] = [option for option in OPTIONS if option.name == name]
    return option


def _read_config(
    flag: Path | None, environment: Mapping[str, str], directory: Path
) -> ConfigFile | None:
    named = flag or (Path(text) if (text := environment.get(CONFIG_VARIABLE)) else None)
    if named:
        path = directory / named.expanduser()
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

    Raises `VllmcError` (`no-config-file`, `bad-config-file`).
    """
    context = {"file": str(path), "named by": named_by}
    try:
        return path.read_text(encoding="utf-8").replace("\r\n", "\n")
    except FileNotFoundError:
        raise VllmcError(
            "no-config-file",
            f"there is no {kind} {path}",
            context=context,
            hint=f"correct {named_by}, or leave it out",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise VllmcError(
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

    Raises `VllmcError` (`bad-config-file`).
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise VllmcError(
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
            if not _option(name).in_file:
                raise self._not_here(_option(name))
            values = self._values(_option(name), value)
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

    def _unknown(self, name: str) -> VllmcError:
        known = [option.name for option in self.known] + list(self.others)
        near = difflib.get_close_matches(name, known, n=1)
        return VllmcError(
            "unknown-setting",
            f"{self.where((name,))} sets '{name}', which vllmc does not know",
            context={"origin": f"file:{self.where((name,))}", "known": known},
            hint=f"did you mean '{near[0]}'?" if near else "see the options in docs/cli.md",
        )

    def _not_here(self, option: Option) -> VllmcError:
        return VllmcError(
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


def bad_setting(name: str, where: str, expected: str, found: object) -> VllmcError:
    """The error for the value `found` of the key `name`, which should be `expected`."""
    return VllmcError(
        "bad-setting",
        f"{where}: '{name}' should be {expected}, and is {found!r}",
        context={"origin": f"file:{where}"},
        hint='for example: device = "cpu", compile-size = [1, 8], compile-range = ["1:512"]',
    )
