from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vllmc.core.cache.key import REDACTED, Factor, key_of
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.models.model import Model
from vllmc.core.models.module_model import ModuleModel
from vllmc.core.models.resolve import resolve
from vllmc.core.torch_compat.config_values import stable

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "eos_token_id": [1, 5],
}

MODULE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class Scale(torch.nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
    def forward(self, x):
        return x * {operand}

def make():
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers={layers},
                         num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
    model = LlamaForCausalLM(config)
    model.model.norm = torch.nn.Sequential(model.model.norm, Scale({factor}))
    return model

def needs_arguments(size):
    return make()

number = 3
nothing = lambda: 3
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA, indent=2))
    return path


def factor(model: Model, name: str) -> Factor:
    return next(f for f in model.factors() if f.name == name)


def module_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **parts: object) -> str:
    values = {"layers": 2, "factor": 2.0, "operand": "self.factor", **parts}
    name = f"made_{len(list(tmp_path.glob('*')))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "parts.py").write_text(MODULE.format(**values))
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path / name))
        patch.delitem(sys.modules, "parts", raising=False)
        return key_of(resolve("parts:make").factors())


def test_a_directory_is_read_with_the_line_of_each_field(directory: Path) -> None:
    model = resolve(str(directory))
    hidden = factor(model, "hidden_size")
    assert (hidden.value, hidden.origin) == (32, "file:config.json:3")
    assert factor(model, "hidden_act").origin == "default"
    assert model.info.vocab_size == 96
    assert model.info.stop_token_ids == (1, 5)


def test_the_key_of_a_directory_depends_on_its_content_and_not_on_its_place(
    directory: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_text(json.dumps(dict(reversed(LLAMA.items()))))
    assert key_of(resolve(str(copy)).factors()) == key_of(resolve(str(directory)).factors())
    (copy / "config.json").write_text(json.dumps({**LLAMA, "rms_norm_eps": 1e-3}))
    assert key_of(resolve(str(copy)).factors()) != key_of(resolve(str(directory)).factors())


@pytest.mark.parametrize("field", ["eos_token_id", "transformers_version", "_name_or_path"])
def test_what_shapes_no_graph_is_not_in_the_key(directory: Path, field: str) -> None:
    before = key_of(resolve(str(directory)).factors())
    (directory / "config.json").write_text(json.dumps({**LLAMA, field: 7}))
    assert key_of(resolve(str(directory)).factors()) == before


def test_a_path_or_a_secret_in_a_configuration_is_not_told(directory: Path) -> None:
    fields = {"vocabulary_file": str(directory / "v.txt"), "hub": {"auth": "hunter2", "user": "me"}}
    (directory / "config.json").write_text(json.dumps(LLAMA | fields))
    model = resolve(str(directory))
    assert re.fullmatch("path:[0-9a-f]{64}", str(factor(model, "vocabulary_file").value))
    assert factor(model, "hub.auth").value == REDACTED
    assert factor(model, "hub.user").value == "me"


def test_layers_override_the_configuration() -> None:
    model = resolve("gemma-2-2b", layers=3)
    assert model.info.layers == 3
    assert len(model.info.layer_types) == 3
    assert factor(model, "num_hidden_layers").origin == "flag"


def test_layers_override_a_configuration_that_calls_them_otherwise() -> None:
    assert resolve("gpt2", layers=3).info.layers == 3


def test_layers_override_those_of_the_decoder_in_a_configuration_of_several_parts(
    tmp_path: Path,
) -> None:
    text = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
    fields = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **text}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    info = resolve(str(tmp_path), layers=3).info
    assert info.layers == 3
    assert info.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert info.vocab_size == 262_208


def test_no_layers_are_refused() -> None:
    with pytest.raises(UsageError, match="0 layers"):
        resolve("tiny-llama", layers=0)


def test_a_hub_id_is_found_in_the_cache_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--acme--small"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(LLAMA))
    for name in ("main", "v2"):
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert resolve("acme/small").info.vocab_size == 96
    assert resolve("acme/small@v2").info.vocab_size == 96
    with pytest.raises(VllmcError) as caught:
        resolve("acme/missing")
    assert caught.value.code == "unknown-model"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ("{", "bad-config"),
        ("[]", "bad-config"),
        ('{"hidden_size": 3}', "bad-config"),
        ('{"model_type": "no-such-type"}', "bad-config"),
        ('{"model_type": "acme", "auto_map": {"AutoConfig": "a.B"}}', "unsupported-model"),
    ],
)
def test_a_bad_configuration_is_named(directory: Path, config: str, code: str) -> None:
    (directory / "config.json").write_text(config)
    with pytest.raises(VllmcError) as caught:
        resolve(str(directory))
    assert caught.value.code == code


def test_a_directory_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(VllmcError, match=r"holds no config\.json"):
        resolve(str(tmp_path))


def test_an_unknown_name_gets_the_nearest_preset() -> None:
    with pytest.raises(VllmcError) as caught:
        resolve("llama-3-70")
    assert caught.value.hint == "did you mean 'llama-3-70b'?"


class Located(torch.nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 3)
        self.name_or_path = "/data/model"
        self.files = ["/data/a", "b"]
        self.api_key = "hunter2"


def test_a_path_or_a_secret_among_a_module_s_attributes_is_not_told() -> None:
    [row] = [f for f in ModuleModel("x:y", Located).factors() if f.name == "."]
    assert isinstance(row.value, dict)
    attributes: Any = row.value["attributes"]
    assert "name_or_path" not in attributes
    assert attributes["files"] == [stable("/data/a"), "b"]
    assert attributes["api_key"] == REDACTED
    assert "/data" not in json.dumps(row.value)


def test_the_identity_of_a_factory_is_what_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = module_key(tmp_path, monkeypatch)
    assert module_key(tmp_path, monkeypatch) == key
    changed = [{"layers": 3}, {"factor": 3.0}, {"operand": "2"}]
    keys = {module_key(tmp_path, monkeypatch, **part) for part in changed}
    assert len(keys | {key}) == 4


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("parts:missing", "unknown-model"),
        ("no_such_module:make", "unknown-model"),
        ("parts:number", "bad-model"),
        ("parts:nothing", "bad-model"),
        ("parts:needs_arguments", "bad-model"),
    ],
)
def test_an_attribute_that_is_no_model_is_named(
    name: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "parts.py").write_text(MODULE.format(layers=2, factor=1.0, operand="2"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "parts", raising=False)
    with pytest.raises(VllmcError) as caught:
        resolve(name)
    assert caught.value.code == code


def test_layers_cannot_change_a_factory() -> None:
    with pytest.raises(UsageError, match="only its own code decides"):
        resolve("parts:make", layers=4)
