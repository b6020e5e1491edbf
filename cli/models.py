"""`vllmc models`: the built-in presets. Imports no torch."""

from __future__ import annotations

from vllmc.cli import render
from vllmc.cli.options import CommonFlags, command
from vllmc.core.models.presets import PRESETS


@command
def models(common: CommonFlags) -> None:
    """List the built-in models, with the published shapes of real ones."""
    rows = [
        {
            "name": preset.name,
            "architecture": preset.architecture,
            "layers": preset.layers,
            "hidden_size": preset.hidden_size,
            "parameters": preset.parameters,
        }
        for preset in PRESETS
    ]
    common.output("models").data({"models": rows}, lambda: render.models(rows))
