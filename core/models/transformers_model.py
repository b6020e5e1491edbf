"""Decoder-only and encoder-only Transformers models: from a preset, a directory or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, AutoConfig

from vllmc.core.cache.key import Factor, JsonValue
from vllmc.core.cache.redaction import redact
from vllmc.core.errors import VllmcError
from vllmc.core.models.checkpoint import read_quantization, read_scales
from vllmc.core.models.config_classes import import_validators
from vllmc.core.models.configured import ConfiguredModel
from vllmc.core.models.encoders import encoder_info, limits
from vllmc.core.models.errors import unsupported_model
from vllmc.core.models.model import ModelInfo, Scales, Weights
from vllmc.core.spec import CompileSpec
from vllmc.core.torch_compat.config_values import stable

if TYPE_CHECKING:
    import torch

import_validators()

NOT_IDENTITY = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "dtype",
        "eos_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of a configuration that change no graph: names, tokens and what `generate` does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigSource:
    """Where a configuration was read: `text` is its JSON, `label` names it in origins."""

    label: str
    text: str = ""
    directory: Path | None = None
    hub_id: str | None = None
    revision: str | None = None


class TransformersModel(ConfiguredModel):
    """A causal language model or encoder that Transformers can build from a configuration."""

    def __init__(
        self, name: str, config: PretrainedConfig, source: ConfigSource, layers: int | None
    ) -> None:
        super().__init__(name)
        self._source = source
        self._layers = layers
        self._config = _with_layers(config, layers)

    @property
    def info(self) -> ModelInfo:
        """What the configuration says."""
        config = self._config.get_text_config(decoder=True)
        dtype = getattr(self._config, "dtype", None)
        encoder = encoder_info(self._name, self._config)
        max_position, window = limits(config, encoder)
        return ModelInfo(
            dtype=str(dtype).removeprefix("torch.") if dtype is not None else "float32",
            vocab_size=getattr(config, "vocab_size", None),
            max_position=max_position,
            layers=getattr(config, "num_hidden_layers", None),
            layer_types=tuple(getattr(config, "layer_types", None) or ()),
            sliding_window=window,
            stop_token_ids=self._stop_token_ids(),
            directory=self._source.directory,
            encoder=encoder,
            quantization=read_quantization(self._name, self._quantization_config()),
        )

    def factors(self) -> tuple[Factor, ...]:
        """One factor for each field of the configuration that can change the graph."""
        defaults = dict(_flatten(type(self._config)().to_dict()))
        rows = [
            Factor(
                group="model",
                name=name,
                # No architecture reads a secret; whoever changes one keeps the key.
                value=redact(name, stable(value)),
                origin=self._origin(name, defaults, value),
                is_default=name in defaults and defaults[name] == value,
            )
            for name, value in _flatten(self._config.to_dict())
        ]
        rows.append(
            Factor(
                group="model",
                name="class",
                value=type(self._config).__name__,
                origin=self._source.label,
                is_default=False,
            )
        )
        return tuple(rows)

    def build(self, weights: Weights, spec: CompileSpec, *, seed: int = 0) -> torch.nn.Module:
        """See `Model.build`. Raises `VllmcError` (`bad-weights`, `unsupported-model`)."""
        # Transformers' modeling code takes two seconds to import, which a prediction does without.
        from vllmc.core.models.building import (
            build_entry,
            initialize,
            load_dequantized,
            load_weights,
        )

        config = type(self._config).from_dict(self._config.to_dict())
        if (own := self.info.quantization) is not None:
            # Transformers would quantise the model in its own way.
            del config.quantization_config
        if own and weights == "real" and (directory := self._quantized_weights()) is not None:
            model = load_dequantized(self._name, config, directory, own, spec.dtype)
            model = model.to(spec.device)
        elif weights == "real" and (source := self._weights_source()) is not None:
            revision = self._source.revision
            model = load_weights(self._name, config, source, revision, spec.dtype)
            model = model.to(spec.device)
        else:
            model = initialize(
                self._name, config, weights, device=spec.device, dtype=spec.dtype, seed=seed
            )
        return build_entry(model, spec)

    def own_scales(self) -> Mapping[str, Scales]:
        """See `Model.own_scales`."""
        directory = self._quantized_weights()
        return {} if directory is None else read_scales(directory)

    def _quantization_config(self) -> Mapping[str, Any]:
        return getattr(self._config, "quantization_config", None) or {}

    def _quantized_weights(self) -> Path | None:
        """The directory of weights that are quantised already, if the model has any."""
        source = None if self.info.quantization is None else self._weights_source()
        if source is None or self._source.hub_id is None:
            return None if source is None else Path(source)
        return Path(
            snapshot_download(
                source,
                revision=self._source.revision,
                allow_patterns=["*.safetensors", "*.safetensors.index.json"],
            )
        )

    def _weights_source(self) -> str | None:
        """The directory or hub id that the weights come from, if the model has any."""
        directory = self._source.directory
        if directory is None:
            return self._source.hub_id
        return str(directory) if any(directory.glob("*.safetensors")) else None

    def _stop_token_ids(self) -> tuple[int, ...]:
        stop = getattr(self._config.get_text_config(decoder=True), "eos_token_id", None)
        directory = self._source.directory
        if directory is not None and (directory / "generation_config.json").is_file():
            # Whatever else the file holds, `generate` would read its stop tokens from here.
            stop = _read_json(directory / "generation_config.json").get("eos_token_id", stop)
        if stop is None:
            return ()
        return tuple(stop) if isinstance(stop, (list, tuple)) else (int(stop),)

    def _origin(self, name: str, defaults: Mapping[str, JsonValue], value: JsonValue) -> str:
        if name == "num_hidden_layers" and self._layers is not None:
            return "flag"
        field = name.split(".")[-1]
        for number, line in enumerate(self._source.text.splitlines(), start=1):
            if line.lstrip().startswith(f'"{field}"'):
                return f"file:{self._source.label}:{number}"
        if name in defaults and defaults[name] == value:
            return "default"
        return "vllmc" if not self._source.text else "default"


def load_preset(name: str, fields: Mapping[str, Any], layers: int | None) -> TransformersModel:
    """The preset `name`, whose configuration is `fields`."""
    config = AutoConfig.for_model(**fields)
    return TransformersModel(name, config, ConfigSource(label="vllmc"), layers)


def load_directory(name: str, directory: Path, layers: int | None) -> TransformersModel:
    """The model of a directory with a `config.json`. Raises `VllmcError` (`bad-config`)."""
    path = directory / "config.json"
    fields = _read_json(path)
    if "model_type" not in fields:
        raise _bad_config(path, "it names no 'model_type'")
    if "auto_map" in fields and fields["model_type"] not in CONFIG_MAPPING_NAMES:
        raise unsupported_model(
            name, "its code lies in its own directory, and vllmc runs none of it"
        )
    source = ConfigSource(label="config.json", text=path.read_text(), directory=directory)
    return TransformersModel(name, _read_config(name, str(directory), None), source, layers)


def load_hub(name: str, hub_id: str, revision: str | None, layers: int | None) -> TransformersModel:
    """The model `hub_id`, through the Transformers cache. Raises `VllmcError` (`unknown-model`)."""
    config = _read_config(name, hub_id, revision)
    source = ConfigSource(label="hub", hub_id=hub_id, revision=revision)
    return TransformersModel(name, config, source, layers)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad_config(path, str(error)) from error
    if not isinstance(fields, dict):
        raise _bad_config(path, "it holds no JSON object")
    return fields


def _read_config(name: str, source: str, revision: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except OSError as error:
        raise VllmcError(
            "unknown-model",
            f"the model '{name}' is neither in the Transformers cache nor to be had from the hub",
            context={"cause": str(error).splitlines()[0]},
            hint="check the name and the connection (HF_HUB_OFFLINE), or give a directory",
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VllmcError(
            "bad-config",
            f"Transformers cannot read the configuration of '{name}'",
            context={"cause": cause},
            hint="check config.json against the model's published one",
        ) from error


def _with_layers(config: PretrainedConfig, layers: int | None) -> PretrainedConfig:
    if layers is None:
        return config
    fields = config.to_dict()
    text = config.get_text_config(decoder=True)
    # A configuration of several parts holds that of its decoder under a name.
    part = next((name for name in config.sub_configs if getattr(config, name) is text), None)
    inner = fields if part is None else fields[part]
    for key in ("layer_types", "mlp_layer_types"):
        if pattern := inner.get(key):
            inner[key] = [pattern[i % len(pattern)] for i in range(layers)]
    inner[text.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return type(config).from_dict(fields)


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    for key, value in sorted(fields.items(), key=lambda item: str(item[0])):
        if not prefix and (key in NOT_IDENTITY or key.startswith("_")):
            continue
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            # Infinities, as in a state space model's `time_step_limit`, are no JSON: kept as text.
            text = json.dumps(value, default=str)
            yield f"{prefix}{key}", json.loads(text, parse_constant=str)


def _bad_config(path: Path, cause: str) -> VllmcError:
    return VllmcError(
        "bad-config",
        f"{path} is not a model's configuration",
        context={"cause": cause},
        hint="a Transformers directory holds a config.json as save_pretrained writes it",
    )
