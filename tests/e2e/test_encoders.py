"""Families of encoders: what vllmc makes of a tiny one of each, against Transformers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from encoder_families import (
    ENCODERS,
    EncoderFamily,
    embeddings,
    obtain_encoder,
    same_embeddings,
    save_encoder,
)
from repeating import plans, told

TRACED_BY_DEFAULT = {"albert", "bert", "modernbert"}


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.name)
def test_embeddings_are_those_of_transformers(family: EncoderFamily, tmp_path: Path) -> None:
    model = save_encoder(family, tmp_path / "model")
    job, ready = obtain_encoder(tmp_path / "model", tmp_path / "cache", "eager")
    found = embeddings(job, ready)
    assert same_embeddings(model, found)
    assert not same_embeddings(model, {n: e + 1e-3 for n, e in found.items()})


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            family,
            id=family.name,
            marks=() if family.name in TRACED_BY_DEFAULT else pytest.mark.thorough,
        )
        for family in ENCODERS
    ],
)
def test_tracing_equal_layers_once_gives_the_graph_of_tracing_all(
    family: EncoderFamily, tmp_path: Path
) -> None:
    save_encoder(family, tmp_path)
    repeating, whole, stood_in = plans(str(tmp_path))
    assert told(repeating) == told(whole)
    # ALBERT calls one layer again and again.
    assert (stood_in > 0) == (family.name != "albert")
