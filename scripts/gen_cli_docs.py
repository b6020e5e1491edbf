"""Writes docs/cli.md from the command line itself; `--check` only says whether it is up to date."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pages import publish
from typer.core import TyperGroup

from vllmc.cli.app import PIPE_CLOSED, build_app
from vllmc.cli.interrupts import Interrupted
from vllmc.cli.option_table import OPTIONS, Option
from vllmc.cli.options import COMMON_PANEL, SHAPING_PANEL
from vllmc.core.errors import CheckFailed, UnsafeCacheError, UsageError, VllmcError

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"

HEAD = f"""# The command line

<!-- Written by scripts/gen_cli_docs.py: change the commands, then run it. -->

Data goes to stdout, progress and complaints to stderr. `--json` prints exactly one JSON object
with `"schema_version": 1` and `"command"`; an error is then such an object too, under `"error"`,
with its `code`, `message`, `context` and `hint`.

| exit code | meaning |
|---|---|
| 0 | done, and what was asked for holds |
| {VllmcError.exit_code} | an error |
| {UsageError.exit_code} | wrong usage |
| {CheckFailed.exit_code} | what you asked to be checked does not hold |
| {UnsafeCacheError.exit_code} | unsafe: the cache holds something corrupt or not trusted |
| {Interrupted.exit_code} | interrupted with Ctrl-C |
| {PIPE_CLOSED} | nobody reads the output any more |

## Settings

A flag beats the environment, the environment beats the config file. The file is `--config`,
else `VLLMC_CONFIG`, else `vllmc.toml` in the working directory, else `[tool.vllmc]` in its
`pyproject.toml`:

```toml
compile-range = ["1:512", "513:8192"]
dtype = "bfloat16"

[inductor]            # as -O KEY=VALUE
max_autotune = true
triton.descriptive_names = "False"

[functorch]           # as -O functorch.KEY=VALUE
donated_buffer = false
```

| key in the file | environment variable | value |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    settings = "".join(
        f"| {f'`{option.name}`' if option.in_file else 'not there'} | `{option.variable}` "
        f"| {_value(option)} |\n"
        for option in OPTIONS
    )
    commands = tuple(_commands(build_app(), "vllmc"))
    shared = "".join(_shared(panel, commands) for panel in (COMMON_PANEL, SHAPING_PANEL))
    return HEAD + settings + shared + "".join(_section(*item) for item in commands)


def _value(option: Option) -> str:
    noun = {"text": "text", "integer": "number", "truth": "true or false"}[option.kind]
    between = {",": "commas", os.pathsep: "colons"}[option.separator]
    return f"list of {noun}s; in the variable separated by {between}" if option.repeatable else noun


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    for name, command in group.commands.items():
        inner = f"{path} {name}"
        if isinstance(command, TyperGroup):
            yield from _commands(command, inner)
        else:
            yield inner, command, command.make_context(inner, [], resilient_parsing=True)


def _shared(panel: str, commands: Sequence[tuple[str, Any, Any]]) -> str:
    """The options of a panel, once for all commands that take them."""
    for _, command, context in commands:
        if rows := _rows(command, context, lambda param: _panel(param) == panel):
            return f"\n## {panel}\n\n{rows}"
    return ""


def _section(path: str, command: Any, context: Any) -> str:
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    own = _rows(command, context, lambda param: not _panel(param) and param.name != "help")
    takes = {_panel(param) for param in command.params}
    also = [
        f"the {panel[0].lower()}{panel[1:]}"
        for panel in (COMMON_PANEL, SHAPING_PANEL)
        if panel in takes
    ]
    return f"\n## {path}\n\n{command.help}\n\n    {usage}\n\n{own}- and {', '.join(also)}\n"


def _rows(command: Any, context: Any, wanted: Callable[[Any], bool]) -> str:
    params = [param for param in command.get_params(context) if wanted(param)]
    records = [param.get_help_record(context) for param in params]
    return "".join(f"- `{name.strip()}`: {text}\n" for name, text in records)


def _panel(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or ""


if __name__ == "__main__":
    sys.exit(publish(PAGE, page(), "scripts/gen_cli_docs.py"))
