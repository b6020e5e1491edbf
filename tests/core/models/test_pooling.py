from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.errors import VllmcError
from vllmc.core.models.pooling import steps_left_out, stored_pooling

MODES = (
    "pooling_mode_cls_token",
    "pooling_mode_mean_tokens",
    "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens",
    "pooling_mode_lasttoken",
)


def flags(*on: str) -> dict[str, Any]:
    return {
        "word_embedding_dimension": 32,
        **{mode: mode.removeprefix("pooling_mode_") in on for mode in MODES},
        "include_prompt": True,
    }


def write(directory: Path, config: Any) -> Path:
    (directory / "1_Pooling").mkdir()
    text = config if isinstance(config, str) else json.dumps(config)
    (directory / "1_Pooling" / "config.json").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        (flags("cls_token"), "cls"),
        (flags("mean_tokens"), "mean"),
        (flags("lasttoken"), "last"),
        ({"embedding_dimension": 32, "pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["cls"]}, "cls"),
    ],
)
def test_the_pooling_is_the_one_that_the_model_s_directory_names(
    config: Any, pooling: str, tmp_path: Path
) -> None:
    assert stored_pooling(write(tmp_path, config)) == pooling


def test_a_directory_without_the_file_names_none(tmp_path: Path) -> None:
    assert stored_pooling(tmp_path) is None
    assert stored_pooling(None) is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (flags("max_tokens"), "pooling_mode_max_tokens"),
        (flags("cls_token", "mean_tokens"), "pooling_mode_cls_token and pooling_mode_mean_tokens"),
        ({"pooling_mode": "weightedmean"}, "weightedmean"),
        ({"pooling_mode": ["cls", "max"]}, "cls and max"),
    ],
)
def test_a_pooling_that_vllmc_does_not_do_is_refused_by_name(
    config: Any, named: str, tmp_path: Path
) -> None:
    with pytest.raises(VllmcError, match=named) as caught:
        stored_pooling(write(tmp_path, config))
    assert caught.value.code == "unsupported-pooling"
    assert "--pooling" in caught.value.hint


@pytest.mark.parametrize("config", ["{", "[]", {}, flags()], ids=str)
def test_a_file_that_says_no_pooling_is_refused(config: Any, tmp_path: Path) -> None:
    with pytest.raises(VllmcError) as caught:
        stored_pooling(write(tmp_path, config))
    assert caught.value.code == "bad-config"


def test_what_follows_the_pooling_is_named(tmp_path: Path) -> None:
    rows = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    path = tmp_path / "modules.json"
    assert steps_left_out(tmp_path) == ()
    path.write_text(json.dumps(rows))
    assert steps_left_out(tmp_path) == ()
    more = (
        "sentence_transformers.base.modules.dense.Dense",
        "sentence_transformers.models.Normalize",
    )
    path.write_text(json.dumps([*rows, *({"type": kind} for kind in more)]))
    assert steps_left_out(tmp_path) == ("Dense", "Normalize")
