"""What tests of whole programs on a GPU share; without one they are skipped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from graphed import expected, save, warm
from tiny_models import job_of
from transformers import PreTrainedModel

from vllmc.core.job import Job
from vllmc.core.pipeline import Ready


@pytest.fixture(scope="session", autouse=True)
def _deprecated_import() -> None:
    """torch.utils.mkldnn, which Dynamo imports, uses what torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch.utils.mkldnn  # noqa: F401


@pytest.fixture(scope="session")
def cuda() -> str:
    """The device that the tests run on."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return "cuda:0"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A tiny model in a directory, and what Transformers generates with it on the GPU."""

    directory: Path
    model: PreTrainedModel
    expected: list[tuple[int, ...]]


@pytest.fixture(scope="session")
def subject(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    """The subject of a family, made once."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Subject] = {}

    def make(name: str) -> Subject:
        if name not in made:
            model = save(name, root / name)
            made[name] = Subject(
                directory=root / name, model=model, expected=expected(model.to(cuda))
            )
        return made[name]

    return make


@dataclass(frozen=True, kw_only=True)
class Warmed:
    """A program that was compiled for the GPU with no weights, or found."""

    job: Job
    ready: Ready


@pytest.fixture(scope="session")
def warmed(
    cuda: str, subject: Callable[[str], Subject], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Warmed]:
    """`warmed(name, **changes of the spec)`, all of them in one cache."""
    cache = tmp_path_factory.mktemp("cache")

    def make(name: str, **changes: Any) -> Warmed:
        job = job_of(subject(name).directory, cache, device=cuda, **changes)
        return Warmed(job=job, ready=warm(job, cache))

    return make
