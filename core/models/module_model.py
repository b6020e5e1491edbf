"""Models given as `module.path:attribute`: a class, a factory or an instance."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from vllmc.core.cache.key import Factor, JsonValue
from vllmc.core.cache.redaction import redact, scrub
from vllmc.core.declare.calls import Call, example_call
from vllmc.core.declare.declaration import Declaration, declaration_of
from vllmc.core.errors import VllmcError
from vllmc.core.models.described import class_digest, describe
from vllmc.core.models.encoders import limits
from vllmc.core.models.guarded import HOOKS
from vllmc.core.models.model import ModelInfo, Scales, Weights
from vllmc.core.models.pretrained import is_pretrained
from vllmc.core.spec import CompileSpec, open_ended
from vllmc.core.torch_compat.config_values import stable
from vllmc.core.torch_compat.forward import EXCHANGED

_OF_OTHERS = ("class torch.", "class transformers.")


class ModuleModel:
    """A model that Python code makes. Its identity is the tree of modules that comes out."""

    def __init__(self, name: str, make: Callable[[], torch.nn.Module] | torch.nn.Module) -> None:
        self._name = name
        self._make = make
        self._sample = self._instantiate("fake", "cpu", None, seed=0)

    @property
    def name(self) -> str:
        """The name under which the user asked for it."""
        return scrub(self._name)

    @property
    def info(self) -> ModelInfo:
        """What the model's `config` says, if it has one, and its parameters' dtype."""
        config = getattr(self._sample, "config", None)
        parameter = next(self._sample.parameters(), None)
        dtype = parameter.dtype if parameter is not None else torch.float32
        transformers = is_pretrained(self._sample)
        encoder = None
        if transformers:
            from vllmc.core.models.building import encoder_of

            config = self._sample.config.get_text_config(decoder=True)
            encoder = encoder_of(self._name, self._sample)
        stop = getattr(config, "eos_token_id", None)
        max_position, window = limits(config, encoder)
        return ModelInfo(
            dtype=str(dtype).removeprefix("torch."),
            vocab_size=getattr(config, "vocab_size", None),
            max_position=max_position,
            layers=getattr(config, "num_hidden_layers", None) if transformers else None,
            layer_types=tuple(getattr(config, "layer_types", None) or ()),
            sliding_window=window,
            stop_token_ids=() if stop is None else tuple(stop if type(stop) is list else [stop]),
            encoder=encoder,
        )

    def factors(self) -> tuple[Factor, ...]:
        """A factor for each module of the tree, and one for the code of each class in it.

        Also of the classes of torch and Transformers, whose methods others may have replaced.
        """
        with EXCHANGED:
            return self._factors()

    def _factors(self) -> tuple[Factor, ...]:
        rows: dict[str, JsonValue] = {}
        classes: dict[str, type] = {}
        tensors: dict[int, str] = {}
        dtype = getattr(torch, self.info.dtype)
        if not self.runs_in_engine:
            rows["arguments"] = self._describe_call()
        for path, module in self._sample.named_modules():
            cls = type(module)
            classes[f"{cls.__module__}.{cls.__qualname__}"] = cls
            rows[path or "."] = _describe(module, path, tensors, dtype)
        sources: dict[str, JsonValue] = {
            f"class {name}": class_digest(cls) for name, cls in classes.items()
        }
        # What a person wants to see first: which code of their own makes it.
        return tuple(
            Factor(
                group="model",
                name=name,
                value=value,
                origin="probe",
                is_default=not name.startswith("class ") or name.startswith(_OF_OTHERS),
            )
            for name, value in [*rows.items(), *sources.items()]
        )

    @property
    def made_by_code(self) -> bool:
        """Yes."""
        return True

    @property
    def runs_in_engine(self) -> bool:
        """Whether its class declares nothing: then it is called as a language model."""
        return declaration_of(self._sample) is None

    def adapt(self, spec: CompileSpec) -> CompileSpec:
        """See `Model.adapt`."""
        if spec.quantize is not None:
            self._require_quantizable()
        if self.runs_in_engine:
            return open_ended(spec) if self.info.encoder is not None else spec
        if self._declaration().is_encoder:
            spec = open_ended(spec)
        call = self._sample_call
        if call.sizes and call.sizes[0] in call.unbacked:
            spec = replace(spec, dynamic_shapes="unbacked")
        return spec

    def _require_quantizable(self) -> None:
        """Refuses what is called in a way of its own, and what would be changed for its owner."""
        if not self.runs_in_engine:
            cause, hint = "it declares its own arguments", "quantise it in its own code"
        elif isinstance(self._make, torch.nn.Module):
            cause, hint = "it is there already, and is not changed", "give a factory that makes it"
        else:
            return
        raise VllmcError("cannot-quantize", f"{self.name} is not quantised: {cause}", hint=hint)

    def call(self, entry: torch.nn.Module) -> Call:
        """See `Model.call`."""
        return example_call(self.name, entry)

    @cached_property
    def _sample_call(self) -> Call:
        """The call that is compiled: to guess one runs the forward."""
        return self.call(self._sample)

    def _declaration(self) -> Declaration:
        declaration = declaration_of(self._sample)
        assert declaration is not None
        return declaration

    def _describe_call(self) -> JsonValue:
        """What a declared class is called with; `model` stands for the dtype of its weights."""
        call = self._sample_call
        dtype = self.info.dtype
        tensors: list[JsonValue] = [
            [a.path, "model" if a.dtype == dtype else a.dtype, *a.shape] for a in call.arguments
        ]
        return {"tensors": tensors, "constants": describe(dict(call.constants))}

    def build(self, weights: Weights, spec: CompileSpec, *, seed: int = 0) -> torch.nn.Module:
        """See `Model.build`."""
        from vllmc.core.models.building import build_entry

        dtype = getattr(torch, spec.dtype)
        return build_entry(self._instantiate(weights, spec.device, dtype, seed=seed), spec)

    def own_scales(self) -> Mapping[str, Scales]:
        """See `Model.own_scales`: none."""
        return {}

    def _instantiate(
        self, weights: Weights, device: str, dtype: torch.dtype | None, *, seed: int
    ) -> torch.nn.Module:
        if isinstance(self._make, torch.nn.Module):
            # An instance brings its own weights, which are there already.
            return self._make.to(device, dtype)
        from vllmc.core.models.building import weights_of

        with weights_of(weights, device, seed):
            return _to_dtype(self._call(self._make), dtype).eval()

    def _call(self, make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        try:
            inspect.signature(make).bind()
        except TypeError as error:
            raise VllmcError(
                "bad-model",
                f"{self._name} cannot be called without arguments",
                context={"cause": str(error)},
                hint="give a factory that takes none and returns the module",
            ) from error
        # What the user's own code raises is the user's to see whole.
        made = make()
        if not isinstance(made, torch.nn.Module):
            raise VllmcError(
                "bad-model",
                f"{self._name} gave a {type(made).__name__}, not a torch.nn.Module",
                hint="give a class, a factory or an instance of torch.nn.Module",
            )
        return made


def load_module(name: str) -> ModuleModel:
    """Imports `module.path:attribute`. Raises `VllmcError` (`unknown-model`, `bad-model`)."""
    module_name, _, attribute = name.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise VllmcError(
            "unknown-model",
            f"the model '{name}' cannot be imported",
            context={"cause": str(error)},
            hint="run in the directory that holds the module, or set PYTHONPATH",
        ) from error
    except SyntaxError as error:
        raise VllmcError(
            "bad-model",
            f"the module of {name} is not valid Python",
            context={"cause": str(error)},
            hint="correct it, and see that this Python imports it",
        ) from error
    if not isinstance(found, torch.nn.Module) and not callable(found):
        raise VllmcError(
            "bad-model",
            f"{name} is a {type(found).__name__}, not a torch.nn.Module nor a way to make one",
            hint="give a class, a factory or an instance of torch.nn.Module",
        )
    return ModuleModel(name, found)


def _to_dtype(model: torch.nn.Module, dtype: torch.dtype | None) -> torch.nn.Module:
    if dtype is None:
        return model
    for tensor in model.parameters():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor.data = tensor.data.to(dtype)
    return model


def _describe(
    module: torch.nn.Module, path: str, known: dict[int, str], dtype: torch.dtype
) -> JsonValue:
    """What a module is. `known` has the names of the tensors of those before it, and takes its.

    Parameters of the model's `dtype`, which is a factor of its own, are told so.
    """
    tensors: dict[str, JsonValue] = {}
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        told = None if tensor is None else _describe_tensor(tensor, f"{path}.{name}", known)
        if isinstance(told, list) and name in module._parameters and tensor.dtype is dtype:
            told[0] = "model"
        tensors[name] = told
    # Where Transformers read a model from says nothing of what it is.
    plain = {
        name: value
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name != "name_or_path"
    }
    cls = type(module)
    # Their keys count the hooks of the process.
    hooks: dict[str, JsonValue] = {
        name: [describe(hook) for hook in getattr(module, name).values()]
        for name in HOOKS
        if getattr(module, name)
    }
    return {
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "modules": [*module._modules],
        "tensors": tensors,
        # What the graph depends on of a secret, capture guards on.
        "attributes": {name: redact(name, value) for name, value in _plain(plain)},
        **({"hooks": hooks} if hooks else {}),
    }


def _describe_tensor(tensor: torch.Tensor, name: str, known: dict[int, str]) -> JsonValue:
    """Its dtype and sizes, and strides that do not follow from them; of a shared one the name."""
    if (same := known.setdefault(id(tensor), name)) != name:
        return {"same": same}
    told: list[JsonValue] = [str(tensor.dtype).removeprefix("torch."), *tensor.shape]
    return told if tensor.is_contiguous() else [*told, {"strides": [*tensor.stride()]}]


def _plain(attributes: dict[str, Any]) -> Iterator[tuple[str, JsonValue]]:
    for name, value in attributes.items():
        match value:
            case None | bool() | int() | str():
                yield name, stable(value)
            case float():
                yield name, repr(value)
            case list() | tuple() if all(isinstance(v, (bool, int, str)) for v in value):
                yield name, stable(value)
            case torch.dtype() | torch.device():
                yield name, str(value)
            case _ if callable(value):
                yield name, describe(value)
