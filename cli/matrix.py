"""The matrix file of `warm --from`: what to warm, one `[[warm]]` table each. Imports no torch.

```toml
[[warm]]
model = "qwen3-0.6b"
dtype = "bfloat16"
compile-range = ["1:512", "513:8192"]

[[warm]]
name = "tuned"              # what reports call it; without one, the model
model = "models/chat"       # a directory is looked for beside this file
[warm.inductor]             # as -O KEY=VALUE
max_autotune = true
```

The other keys are those options of the config file that shape the compilation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from vllmc.cli.config_file import ConfigFile, Reader, bad_setting, parse_toml, read_text
from vllmc.cli.option_table import OPTIONS, SCOPES
from vllmc.cli.toml_lines import KeyPath, line_numbers
from vllmc.core.errors import UsageError

_KIND: Final = "matrix file"
_TABLE: Final = "warm"
_MODEL: Final = "model"
_NAME: Final = "name"
_SHAPING: Final = tuple(option for option in OPTIONS if option.shapes)
_HINT: Final = 'for example a line [[warm]] and below it model = "tiny-llama"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One table of a matrix file: `config` is what it sets, `line` where it begins."""

    name: str
    model: str
    line: int
    config: ConfigFile


def read_matrix(path: Path) -> tuple[Entry, ...]:
    """The entries of the matrix file `path`, at least one, each with a name of its own.

    Raises `UsageError`: `no-config-file`, `bad-config-file`, `unknown-setting`, `bad-setting`.
    """
    text = read_text(path, "--from", _KIND)
    contents = parse_toml(path, text, _KIND)
    lines = line_numbers(text)
    for key, value in contents.items():
        where = f"{path.name}:{lines[key,]}"
        if key != _TABLE:
            raise UsageError(
                "unknown-setting",
                f"{where} sets '{key}', and a matrix file holds [[{_TABLE}]] tables alone",
                context={"origin": f"file:{where}"},
                hint="what is to hold for all entries goes into vllmc.toml, or on the command line",
            )
        if not isinstance(value, list) or any(not isinstance(item, dict) for item in value):
            raise bad_setting(key, where, f"a list of tables, each begun by [[{key}]]", value)
    tables = contents.get(_TABLE, [])
    if not tables:
        raise UsageError(
            "bad-config-file",
            f"the {_KIND} {path} has no [[{_TABLE}]] table",
            context={"file": str(path)},
            hint=_HINT,
        )
    entries: dict[str, Entry] = {}
    for number, table in enumerate(tables):
        entry = _entry(path, table, _below(lines, (_TABLE, str(number)), lines[_TABLE,]))
        if (first := entries.setdefault(entry.name, entry)) is not entry:
            raise UsageError(
                "bad-setting",
                f"{path.name}:{entry.line}: '{entry.name}' is what the entry in line {first.line} "
                "is called",
                context={"origin": f"file:{path.name}:{entry.line}"},
                hint=f'give one of them a name of its own: name = "{entry.name}, tuned"',
            )
    return tuple(entries.values())


def _below(lines: Mapping[KeyPath, int], table: KeyPath, first: int) -> dict[KeyPath, int]:
    """The lines of a table's keys by their paths in it; that of the table itself by ()."""
    depth = len(table)
    # Tables written in one line have none of their own.
    return {(): first} | {p[depth:]: n for p, n in lines.items() if p[:depth] == table}


def _entry(path: Path, table: Mapping[str, Any], lines: Mapping[KeyPath, int]) -> Entry:
    others = (_MODEL, _NAME, *SCOPES)
    reader = Reader(file=path.name, lines=lines, known=_SHAPING, others=others)
    config = ConfigFile(path=path, settings=reader.settings(table), options=reader.options(table))
    own = {key: value for key, value in table.items() if key in (_MODEL, _NAME)}
    for key, value in own.items():
        if not isinstance(value, str) or not value.strip() or re.search(r"[\x00-\x1f]", value):
            raise bad_setting(key, reader.where((key,)), "a text in one line", value)
    if _MODEL not in own:
        where = reader.where(())
        raise UsageError(
            "bad-setting",
            f"{where}: this entry names no model",
            context={"origin": f"file:{where}"},
            hint=_HINT,
        )
    return Entry(
        name=own.get(_NAME, own[_MODEL]),
        model=_located(own[_MODEL], path.parent),
        line=lines[()],
        config=config,
    )


def _located(model: str, directory: Path) -> str:
    """The MODEL to resolve: a directory that is given relative to the file's is found there."""
    with suppress(RuntimeError):  # a home that nobody has
        if (beside := directory / Path(model).expanduser()).is_dir():
            return str(beside)
    return model
