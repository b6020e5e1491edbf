"""Secrets put wherever vllmc reads something, and looked for in all that it writes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

MARK = "Canary77"
"""Part of each secret, so that one search finds them all."""
TOKEN = f"hf_{MARK}abcdefghijklmnop"
KEY = f"sk-{MARK}-abcdefghijklmnop"
URL = f"https://me:{MARK}@proxy.example/x"
RANDOM = f"q7Xv2LmP9sTz4RbKd8WnHc3YfGj6Ue1AoQi5B0{MARK}"

ENVIRONMENT = {
    "HF_TOKEN": TOKEN,
    "OPENAI_API_KEY": KEY,
    "AWS_SECRET_ACCESS_KEY": RANDOM,
    "DB_PASSWORD": MARK,
    "HTTPS_PROXY": URL,
    # What vllmc takes as factors.
    "TENSORIFY_PYTHON_SCALARS": KEY,
    "TORCHINDUCTOR_DISABLED_PASSES": RANDOM,
}

MODULE = f"""
import os
from factory import LlamaForCausalLM, config

API_KEY = "{MARK}-global"
SETTINGS = {{"scale": 2.0, "password": "{MARK}-setting"}}
HEADER = "Bearer {MARK}abcdefghijklmnop"


class Quiet(LlamaForCausalLM):
    def __init__(self):
        super().__init__(config(hf_token="{TOKEN}"))
        self.api_key = "{MARK}-attribute"
        self.endpoint = "{URL}"
        self.keys = ["{KEY}"]


class Reader(Quiet):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if API_KEY != "" and self.api_key != HEADER:
            out.logits = out.logits * SETTINGS["scale"]
        return out


def broken():
    raise RuntimeError("cannot reach {URL} with api_key={MARK}")
"""


@pytest.fixture
def clean(cache: Path, workplace: Path) -> Callable[..., None]:
    """Asserts that no secret is in what commands printed, nor in any file of the cache."""

    def check(*done: Any) -> None:
        for each in done:
            for text in (each.out, each.err):
                assert MARK not in text, text[max(0, text.index(MARK) - 300) :][:600]
        written = [p for p in cache.rglob("*") if p.is_file()]
        found = [p for p in written if MARK.encode() in p.read_bytes() or MARK in str(p)]
        assert found == []

    return check


@pytest.fixture
def model(llama_dir: Path, workplace: Path) -> Path:
    """A model's directory whose configuration holds secrets, by name and by shape."""
    copy = workplace / "model"
    shutil.copytree(llama_dir, copy)
    fields = json.loads((copy / "config.json").read_text()) | {
        "hf_token": f"{MARK}-field",
        "credentials": {"value": f"{MARK}-nested"},
        "notes": [f"trained with {TOKEN}"],
        "image_token": "<image>",
    }
    (copy / "config.json").write_text(json.dumps(fields, indent=1))
    return copy


def factors(done: Any) -> dict[str, Any]:
    return {f"{f['group']}.{f['name']}": f["value"] for f in done.json["factors"]}


def test_neither_a_record_nor_any_output_holds_a_secret(
    model: Path, workplace: Path, spawn: Run, vllmc: Run, clean: Callable[..., None]
) -> None:
    (workplace / "vllmc.toml").write_text(
        f'[inductor]\nprofile_bandwidth_regex = "{KEY}"\n[functorch]\ncse = true\n'
    )
    words = (model, "--backend", "eager")
    summary = workplace / "summary.md"
    env = {**ENVIRONMENT, "GITHUB_STEP_SUMMARY": str(summary)}
    warmed = spawn("warm", *words, "-vv", env=env)
    assert warmed.code == 0, warmed.err
    row = spawn("inspect-key", *words, "--json", env=env)
    assert row.json["prediction"]["outcome"] == "hit"
    values = factors(row)
    for name in (
        "model.hf_token",
        "model.credentials.value",
        "environment.TENSORIFY_PYTHON_SCALARS",
        "inductor.disabled_passes",
        "inductor.profile_bandwidth_regex",
    ):
        assert values[name] == "<redacted>", name
    assert values["model.notes"] == ["<redacted>"]
    assert values["model.image_token"] == "<image>"
    # Another secret where the compiler reads it, and an option on the command line.
    other = {**env, "TORCHINDUCTOR_DISABLED_PASSES": RANDOM[::-1] + MARK}
    missed = spawn("warm", "--check", *words, "-O", f"profile_bandwidth_output={URL}", env=other)
    assert "inductor.disabled_passes" in missed.out
    assert missed.code == 3
    key = row.json["key"]
    clean(
        warmed,
        row,
        missed,
        spawn("inspect-key", *words, "-v", env=env),
        vllmc("inspect-key", key, "-v"),
        vllmc("cache", "show", key, "--json"),
        vllmc("diff-config", key, "current", "--model", model, "--all"),
        spawn(
            "diff-config",
            *(key, "current", "--model", model, "--backend", "eager", "--json"),
            *("--env", f"TORCHINDUCTOR_DISABLED_PASSES={KEY}", "--env", f"FX_PATCH_GETITEM={KEY}"),
            env=env,
        ),
    )
    assert MARK not in summary.read_text()


def test_a_rotated_token_of_the_model_s_configuration_still_hits(model: Path, eager: Run) -> None:
    first = eager("warm", model, "--json")
    config = model / "config.json"
    config.write_text(config.read_text().replace(f"{MARK}-field", "rotated"))
    again = eager("warm", model, "--json")
    assert (again.json["outcome"], again.json["key"]) == ("hit", first.json["key"])


def test_python_values_that_are_secret_are_not_told(
    factory: Path, spawn: Run, clean: Callable[..., None]
) -> None:
    (factory.parent / "mine.py").write_text(MODULE)
    for name, outcome in (("Quiet", "hit"), ("Reader", "unknown")):
        words = (f"mine:{name}", "--backend", "eager")
        warmed = spawn("warm", *words, "-v")
        assert warmed.code == 0, warmed.err
        row = spawn("inspect-key", *words, "--json")
        # What depends on a secret is captured each time, as nothing of it is stored to compare.
        assert row.json["prediction"]["outcome"] == outcome
        again = spawn("warm", *words, "--json")
        assert again.json["outcome"] == "hit"
        root = factors(row)["model.."]["attributes"]
        assert (root["api_key"], root["endpoint"]) == ("<redacted>", "<redacted>")
        clean(warmed, row, again)


@pytest.mark.parametrize(
    "words",
    [
        ("warm", f"no-such-model-{TOKEN}"),
        ("warm", URL),
        ("inspect-key", f"some.module:{TOKEN}"),
        ("inspect-key", "-O", f"max_autotune={TOKEN}"),
        ("inspect-key", "-O", KEY),
        ("inspect-key", "--dtype", TOKEN),
        ("inspect-key", "--splitting-op", URL),
        ("diff-config", TOKEN, "current"),
        ("diff-config", "current", "current", "--env", KEY),
        ("diff-config", "current", "current", "--env", f"={MARK}"),
        ("warm", "--no-such-option", TOKEN),
        ("warm", "mine:broken"),
        ("warm", "--config", f"{KEY}.toml"),
    ],
    ids=lambda words: " ".join(words[:2]).replace(MARK, ""),
)
def test_an_error_shows_no_secret(
    words: tuple[str, ...], factory: Path, vllmc: Run, clean: Callable[..., None]
) -> None:
    (factory.parent / "mine.py").write_text(MODULE)
    plain, rows = vllmc(*words, "-vv"), vllmc(*words, "--json")
    assert plain.code == rows.code != 0
    assert plain.error == rows.json["error"]["code"]
    clean(plain, rows)


@pytest.mark.slow
def test_inductor_s_artifacts_hold_no_secret(
    factory: Path, spawn: Run, tmp_path: Path, clean: Callable[..., None]
) -> None:
    (factory.parent / "mine.py").write_text(MODULE)
    env = {**ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = spawn("warm", "mine:Reader", "--compile-range", "1:64", "-v", env=env)
    assert done.code == 0, done.err
    clean(done)
