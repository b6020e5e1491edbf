"""Commands that start quickly: each imports its module when it is asked for. Imports no torch.

Most of a small command's time is imports, and no command needs those of another.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias

import typer
from typer.core import TyperCommand, TyperGroup

Markup: TypeAlias = Literal["rich"] | None


def make_group(
    name: str,
    callback: Callable[..., None],
    commands: Mapping[str, str | TyperGroup],
    *,
    markup: Markup,
) -> TyperGroup:
    """A group of commands: each is another group, or where its function lies (`module:function`).

    `callback` runs before the command, also where none is given.
    """
    app = typer.Typer(
        name=name,
        cls=_Group,
        callback=callback,
        invoke_without_command=True,
        add_completion=False,
        rich_markup_mode=markup,
    )
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    group.commands = _Commands(commands, markup=markup)
    return group


class _Commands(UserDict[str, Any]):
    """The commands of a group by name; looking one up imports it."""

    def __init__(self, commands: Mapping[str, str | TyperGroup], *, markup: Markup) -> None:
        super().__init__(commands)
        self._markup = markup

    def __getitem__(self, name: str) -> Any:
        found = super().__getitem__(name)
        if isinstance(found, str):
            module, _, function = found.partition(":")
            app = typer.Typer(add_completion=False, rich_markup_mode=self._markup)
            app.command(name, cls=_Command)(getattr(import_module(module), function))
            found = self[name] = typer.main.get_command(app)
        return found


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> Any:
        return _with_plain_values(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> Any:
        return _with_plain_values(super().get_params(ctx))


class _PlainValue:
    """Makes a parameter's value by `make` alone."""

    def __init__(self, make: Callable[[Any], object]) -> None:
        self._make = make

    def coerce(self, value: Any, **_: object) -> object:
        """The value that the command is given; None where there is none."""
        return None if value is None else self._make(value)


def _paths(values: Any) -> list[Path]:
    return [Path(value) for value in values]


_MAKERS: Mapping[object, Callable[[Any], object]] = {
    bool: bool,
    str: str,
    list[str]: list,
    list[Path]: _paths,
    Path: Path,
}


def _with_plain_values(params: Any) -> Any:
    """Keeps Typer from importing pydantic for flags, counts, texts and paths.

    They need no checking, and the import takes as long as all else that a small command does.
    Numbers are left to Typer, which has used pydantic since 0.29; before, this changes nothing.
    """
    for param in params:
        kind = getattr(getattr(param, "type_descriptor", None), "annotation", None)
        make = int if getattr(param, "count", False) else _MAKERS.get(kind)
        if make is not None:
            param._runtime_param = _PlainValue(make)
    return params
