"""What a configuration resolves to, remembered: then Transformers is imported only to build it.

To import Transformers and a configuration's class takes a second, to tell what both come to. That
follows from the configuration, the source files of whatever took part, Python and torch. The
configuration names the fact (`vllmc.core.cache.facts`), and the fact lists the source files with
their digests, which are compared each time.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch

from vllmc.core.cache import facts
from vllmc.core.cache.key import Factor, JsonValue, canonical_json, key_of, sha256_hex
from vllmc.core.cache.record import NO_DIGEST, SourceFile
from vllmc.core.cache.sources import collect, verify
from vllmc.core.errors import VllmcError
from vllmc.core.models.configured import ConfiguredModel
from vllmc.core.models.model import (
    EncoderInfo,
    Model,
    ModelInfo,
    OwnQuantization,
    Scales,
    Weights,
)
from vllmc.core.spec import CompileSpec

_FORM: Final = 2
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ELSEWHERE: Final = frozenset({"auto_map", "configuration_files"})
"""The fields by which a config.json names other files."""

_PACKAGES: Final = ("transformers", "huggingface_hub", "vllmc.core")
"""Whose code decides what a configuration means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A configuration to resolve: `fields` is all of it that is read, `directory` where it lies."""

    fields: JsonValue
    layers: int | None
    directory: Path | None = None

    @property
    def fact(self) -> str:
        """The name under which the answer is remembered."""
        versions = [_FORM, platform.python_version(), str(torch.__version__)]
        return f"model-{sha256_hex(canonical_json([self.fields, self.layers, versions]))}"


Ask: TypeAlias = Callable[[], Question | None]
"""What is to be resolved; None where more decides it than can be told."""


def directory_question(directory: Path, layers: int | None) -> Question | None:
    """The question that a directory's configuration asks; None where more than that is read."""
    config, generation = directory / "config.json", directory / "generation_config.json"
    texts = [_text(config), _text(generation)]
    unreadable = texts[1] is None and generation.is_file()
    if unreadable or not _stands_alone(texts[0]):
        return None
    return Question(fields=["directory", *texts], layers=layers, directory=directory)


def hub_question(hub_id: str, revision: str | None, layers: int | None) -> Question | None:
    """The question of a configuration in the Transformers cache.

    None where it is not there, or the hub may have a newer one.
    """
    from huggingface_hub import constants

    model = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    commit = revision if revision and _COMMIT.fullmatch(revision) else None
    if commit is None and constants.HF_HUB_OFFLINE:
        commit = _text(model / "refs" / (revision or "main"))
    text = _text(model / "snapshots" / commit / "config.json") if commit else None
    return Question(fields=["hub", text], layers=layers) if _stands_alone(text) else None


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _stands_alone(text: str | None) -> bool:
    """Whether it is a config.json that names no other file."""
    try:
        fields = json.loads(text or "")
    except ValueError:
        return False
    return isinstance(fields, dict) and _ELSEWHERE.isdisjoint(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What is asked of a model that nobody builds."""

    info: ModelInfo
    factors: tuple[Factor, ...]


def remembered_model(name: str, ask: Ask, load: Callable[[], Model], cache: Path | None) -> Model:
    """The model that `load` makes, without calling it where the answer is remembered in `cache`.

    Once Transformers is there it is asked itself: whoever imported it may have changed it.
    """
    if cache is None or "transformers" in sys.modules or (question := ask()) is None:
        return load()
    if (answer := _recall(cache, question)) is not None:
        return RememberedModel(name, answer, lambda: _answered(ask, load, cache))
    return _answered(ask, load, cache)


class RememberedModel(ConfiguredModel):
    """A Transformers model that has been resolved before."""

    def __init__(self, name: str, answer: Answer, load: Callable[[], Model]) -> None:
        super().__init__(name)
        self._answer = answer
        self._load = load

    @property
    def info(self) -> ModelInfo:
        """See `Model.info`."""
        return self._answer.info

    def factors(self) -> tuple[Factor, ...]:
        """See `Model.factors`."""
        return self._answer.factors

    def build(self, weights: Weights, spec: CompileSpec, *, seed: int = 0) -> torch.nn.Module:
        """See `Model.build`. Raises `VllmcError` (`model-changed`) if it is another by now."""
        return self._loaded().build(weights, spec, seed=seed)

    def own_scales(self) -> Mapping[str, Scales]:
        """See `Model.own_scales`. Raises `VllmcError` (`model-changed`) as `build` does."""
        return self._loaded().own_scales()

    def _loaded(self) -> Model:
        model = self._load()
        if (model.info, key_of(model.factors())) != (self.info, key_of(self.factors())):
            raise VllmcError(
                "model-changed",
                f"the model '{self.name}' is no longer what its key was made of",
                hint="its configuration or Transformers was replaced meanwhile: run it again",
            )
        return model


def _answered(ask: Ask, load: Callable[[], Model], cache: Path) -> Model:
    """The model, loaded; the answer is remembered if it is this that imports Transformers."""
    since = time.time() if "transformers" not in sys.modules else None
    question = ask()
    model = load()
    # The configuration may have been replaced while it was loaded.
    if since is None or question is None or ask() != question:
        return model
    if (text := _encode(_answer_of(model), since)) is not None:
        facts.remember(cache, question.fact, text)
    return model


def _answer_of(model: Model) -> Answer:
    return Answer(info=model.info, factors=model.factors())


def _recall(cache: Path, question: Question) -> Answer | None:
    text = facts.recall(cache, question.fact)
    if text is None:
        return None
    known = json.loads(text)
    sources = [
        SourceFile(package=package, path=path, digest=digest, functions=())
        for package, path, digest in known["sources"]
    ]
    return None if verify(sources) else _decode(known, question.directory)


def _encode(answer: Answer, since: float) -> str | None:
    """The answer as text; None where it is not surely that of the source files that are there.

    A file that changed at or after `since` may not be what was imported.
    """
    files = {
        file: ()
        for name, module in list(sys.modules.items())
        if any(name == package or name.startswith(f"{package}.") for package in _PACKAGES)
        and (file := getattr(module, "__file__", None))
    }
    sources = collect(files, since=since, covered=frozenset())
    if any(source.digest == NO_DIGEST for source in sources):
        return None
    row = {
        "info": dataclasses.asdict(dataclasses.replace(answer.info, directory=None)),
        "factors": [factor.to_json() for factor in answer.factors],
        "sources": [[source.package, source.path, source.digest] for source in sources],
    }
    text = json.dumps(row)
    return text if _decode(json.loads(text), answer.info.directory) == answer else None


def _decode(known: dict[str, Any], directory: Path | None) -> Answer:
    info = known["info"]
    encoder, quantization = info["encoder"], info["quantization"]
    return Answer(
        info=ModelInfo(
            **info
            | {
                "layer_types": tuple(info["layer_types"]),
                "stop_token_ids": tuple(info["stop_token_ids"]),
                "encoder": None if encoder is None else EncoderInfo(**encoder),
                "quantization": None
                if quantization is None
                else OwnQuantization(
                    **{name: tuple(value) for name, value in quantization.items()}
                ),
                "directory": directory,
            }
        ),
        factors=tuple(map(Factor.from_json, known["factors"])),
    )
