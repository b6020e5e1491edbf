from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from vllmc.core.models.presets import DEFAULT_PRESET, PRESETS, Preset, find_preset

each_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


@each_preset
def test_a_preset_says_what_the_module_is(preset: Preset) -> None:
    config = AutoConfig.for_model(**preset.config)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    assert type(module).__name__ == preset.architecture
    assert config.num_hidden_layers == preset.layers
    assert config.hidden_size == preset.hidden_size
    assert sum(p.numel() for p in module.parameters()) == preset.parameters


@each_preset
def test_transformers_knows_every_field_of_a_preset(preset: Preset) -> None:
    config = AutoConfig.for_model(**preset.config).to_dict()
    known = AutoConfig.for_model(preset.config["model_type"]).to_dict()
    assert preset.config.keys() <= known.keys() | {"dtype"}
    for name, value in preset.config.items():
        assert config[name] == value, name


def test_names_are_unique_and_found() -> None:
    assert len({preset.name for preset in PRESETS}) == len(PRESETS)
    for preset in PRESETS:
        assert find_preset(preset.name) is preset
    assert find_preset("no-such-model") is None


def test_the_default_preset_is_small() -> None:
    preset = find_preset(DEFAULT_PRESET)
    assert preset is not None
    assert (preset.layers, preset.hidden_size) == (2, 256)
    assert preset.parameters < 10_000_000


def test_a_configuration_can_be_changed_without_changing_the_preset() -> None:
    preset = find_preset("llama-3.2-1b")
    assert preset is not None
    preset.config["rope_parameters"]["factor"] = 1.0
    assert preset.config["rope_parameters"]["factor"] == 32.0
