"""Settings: the only reader of environment variables and config files.

A flag beats the environment, the environment beats the file; every value says where it came from.
The file's keys are the options' names, and the tables `[inductor]` and `[functorch]` hold what
`-O` does on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllmc.cli.config_file import ConfigFile, read_config
from vllmc.cli.option_table import RawOption, Setting, option_named, truth
from vllmc.cli.paths import at_home, expanded
from vllmc.core.cache.signing import load_signing_key
from vllmc.core.cache.trust import Trust

if TYPE_CHECKING:
    from vllmc.core.cache.store import Store


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
    file = read_config(config, variables, here)
    place = _find("cache-dir", [str(path) for path in cache_dir], variables, file)
    paths = [Path(text) for text in place.values if text] if place else []
    unsigned = _find("trust-unsigned", ["true"] if trust_unsigned else [], variables, file)
    keys = _find("trust-dir", (), variables, file)
    signing = _find("sign-key", [] if sign_key is None else [str(sign_key)], variables, file)
    return Settings(
        environment=variables,
        config=file,
        cache_dirs=tuple(here / expanded(path) for path in paths or [_default_cache_dir()]),
        cache_dir_origin=place.origin if place else "default",
        trust=Trust(
            keys=None if keys is None else here / expanded(Path(keys.value)),
            unsigned=unsigned is not None and truth("trust-unsigned", unsigned),
        ),
        sign_key=None if signing is None else here / expanded(Path(signing.value)),
    )


def _default_cache_dir() -> Path:
    # Most small commands are given the directory, and spend their time on imports.
    import platformdirs

    with at_home("the user's cache directory"):
        return platformdirs.user_cache_path("vllmc")


def _find(
    name: str, flags: Sequence[str], environment: Mapping[str, str], config: ConfigFile | None
) -> Setting | None:
    if flags:
        return Setting(values=tuple(flags), origin="flag")
    option = option_named(name)
    # An empty variable counts as unset, so that a script can clear it.
    if text := environment.get(option.variable, "").strip():
        parts = text.split(option.separator) if option.repeatable else [text]
        values = tuple(part.strip() for part in parts)
        return Setting(values=values, origin=f"env:{option.variable}")
    return config.settings.get(name) if config else None
