"""From the MODEL argument to a model, in the order that docs/cli.md gives."""

from __future__ import annotations

import difflib
import re
from functools import partial
from pathlib import Path

from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.models.model import Model
from vllmc.core.models.presets import PRESETS, Preset, find_preset
from vllmc.core.models.remembered import (
    Question,
    directory_question,
    hub_question,
    remembered_model,
)

_ATTRIBUTE = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?$")


def resolve(name: str, *, layers: int | None = None, cache: Path | None = None) -> Model:
    """Finds the model called `name`; `layers` overrides its number of layers.

    What a configuration comes to is remembered in the directory `cache`, so that Transformers need
    not be imported for it again. Raises `VllmcError`: `unknown-model`, `bad-config`, `bad-model`
    or `unsupported-model`.
    """
    if layers is not None and layers < 1:
        raise UsageError(
            "bad-layers", f"a model of {layers} layers has nothing to compile", hint="--layers 1"
        )
    if _ATTRIBUTE.match(name):
        from vllmc.core.models.module_model import load_module

        if layers is not None:
            raise UsageError(
                "bad-layers",
                f"--layers cannot change {name}: only its own code decides how many it makes",
                hint="leave --layers out, or make the factory read the number",
            )
        return load_module(name)
    # Transformers takes seconds to import, so a bad name is refused before.
    directory = Path(name)
    if directory.is_dir():
        _require_config(name, directory)
        return _of_directory(name, directory, layers, cache)
    if (preset := find_preset(name)) is not None:
        return _of_preset(preset, layers, cache)
    if hub := _HUB_ID.match(name):
        return _of_hub(name, hub, layers, cache)
    near = difflib.get_close_matches(name, [preset.name for preset in PRESETS], n=1)
    raise VllmcError(
        "unknown-model",
        f"there is no model '{name}'",
        context={"tried": "module:attribute, directory, preset, hub id"},
        hint=f"did you mean '{near[0]}'?" if near else "vllmc models lists the presets",
    )


def _of_preset(preset: Preset, layers: int | None, cache: Path | None) -> Model:
    def load() -> Model:
        from vllmc.core.models.transformers_model import load_preset

        return load_preset(preset.name, preset.config, layers)

    def ask() -> Question:
        return Question(fields=["preset", preset.config], layers=layers)

    return remembered_model(preset.name, ask, load, cache)


def _of_directory(name: str, directory: Path, layers: int | None, cache: Path | None) -> Model:
    def load() -> Model:
        from vllmc.core.models.transformers_model import load_directory

        return load_directory(name, directory, layers)

    return remembered_model(name, partial(directory_question, directory, layers), load, cache)


def _of_hub(name: str, hub: re.Match[str], layers: int | None, cache: Path | None) -> Model:
    def load() -> Model:
        from vllmc.core.models.transformers_model import load_hub

        return load_hub(name, hub["id"], hub["revision"], layers)

    ask = partial(hub_question, hub["id"], hub["revision"], layers)
    return remembered_model(name, ask, load, cache)


def _require_config(name: str, directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise VllmcError(
            "unknown-model",
            f"the directory {name} holds no config.json",
            context={"directory": str(directory)},
            hint="give a directory in the Transformers layout, as save_pretrained writes it",
        )
