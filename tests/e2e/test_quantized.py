"""--quantize through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_families import ENCODERS, save_encoder
from quantized_reference import input_scales, make_model, save_quantized

Run = Callable[..., Any]

MODES = ("fp8-static", "fp8-dynamic", "int8-dynamic")
IDS = ("--prompt-ids", "5,6,7,8", "--ignore-eos")


@pytest.fixture(scope="session")
def llama() -> Any:
    return make_model("llama")


@pytest.fixture(scope="session")
def plain(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(directory)
    return directory


def tokens(done: Any) -> list[int]:
    assert done.code == 0, done.err
    return done.json["outputs"][0]["token_ids"]


def test_a_second_start_finds_what_the_first_compiled(vllmc: Run, plain: Path) -> None:
    words = ("run", plain, "--quantize", "fp8-static", *IDS, "--calibrate-ids", "1,2,3", "--json")
    first = vllmc(*words)
    again = vllmc(*words, "--fail-on-miss")
    assert first.json["counts"]["compiled"] == 3
    assert again.json["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert tokens(first) == tokens(again)
    assert first.json["recompiles"] == []


def test_warming_needs_neither_weights_nor_prompts(eager: Run, plain: Path, cache: Path) -> None:
    (bare := cache.parent / "bare").mkdir()
    (bare / "config.json").write_text((plain / "config.json").read_text())
    for mode in MODES:
        words = ("--quantize", mode, "--json")
        assert eager("warm", bare, *words, "--check").json["outcome"] != "would-hit"
        assert eager("warm", bare, *words).json["outcome"] != "hit"
        assert eager("warm", bare, *words, "--check").json["outcome"] == "would-hit"
        found = eager("inspect-key", bare, *words).json
        assert found["prediction"]["outcome"] == "hit"
        # The weights make no difference either.
        assert eager("warm", plain, *words, "--weights", "real").json["outcome"] == "hit"
        assert eager("run", plain, *words, *IDS, "--fail-on-miss").json["key"] == found["key"]


def test_no_mode_takes_the_program_of_another(eager: Run, plain: Path) -> None:
    keys = set()
    for mode in (None, *MODES):
        words = () if mode is None else ("--quantize", mode)
        done = eager("warm", plain, *words, "--json").json
        assert done["program"] == "miss"
        assert done["outcome"] == "compiled"
        keys.add(done["key"])
    assert len(keys) == 4


def test_prompts_to_calibrate_on_change_scales_and_no_key(eager: Run, plain: Path) -> None:
    words = ("run", plain, "--quantize", "fp8-static", *IDS, "--logprobs", "1", "--json")
    runs = [
        eager(*words, "--calibrate-ids", "1,2,3"),
        eager(*words, "--calibrate-ids", "9,8,70,6", "--calibrate-ids", "11,90,100"),
        eager(*words),
    ]
    assert len({run.json["key"] for run in runs}) == 1
    assert [run.json["counts"]["compiled"] for run in runs] == [3, 0, 0]
    logprobs = {json.dumps(run.json["outputs"][0]["logprobs"]) for run in runs}
    assert len(logprobs) == 3
    warned = ["calibrated-on-random-tokens" in run.err for run in runs]
    assert warned == [False, False, True]


def test_the_lines_of_a_file_are_prompts_to_calibrate_on(
    eager: Run, workplace: Path, plain: Path
) -> None:
    (workplace / "prompts.txt").write_text("one\n\ntwo\n")
    words = ("run", plain, "--quantize", "fp8-static", *IDS)
    done = eager(*words, "--calibrate-file", "prompts.txt")
    assert done.error == "no-tokenizer"
    assert "--calibrate-ids" in done.err
    assert eager(*words, "--calibrate-file", "none.txt").error == "not-readable"
    (workplace / "blank.txt").write_text("\n \n")
    assert eager(*words, "--calibrate-file", "blank.txt").error == "empty-prompt"


@pytest.mark.parametrize(
    "words", [("--calibrate", "a"), ("--calibrate-ids", "1", "--quantize", "fp8-dynamic")]
)
def test_prompts_that_no_scale_is_taken_from_are_refused(
    words: Sequence[str], eager: Run, plain: Path
) -> None:
    done = eager("run", plain, *words)
    assert (done.code, done.error) == (2, "bad-value")


def test_a_prompt_to_calibrate_on_is_looked_at_before_anything_is_compiled(
    eager: Run, plain: Path, cache: Path
) -> None:
    words = ("run", plain, "--quantize", "fp8-static")
    done = eager(*words, "--calibrate-ids", "100000")
    assert done.error == "bad-token-id"
    assert "prompt 0 to calibrate on" in done.err
    assert eager(*words, "--calibrate-ids", "one").error == "bad-value"
    assert not (cache / "blobs").exists()


def test_the_difference_is_named(eager: Run, plain: Path) -> None:
    words = ("diff-config", "defaults", "current", "--model", plain, "--quantize", "int8-dynamic")
    [change] = [
        change for change in eager(*words, "--json").json["changes"] if change["name"] != "backend"
    ]
    assert (change["group"], change["name"]) == ("spec", "quantize")
    assert (change["before"], change["after"]) == (None, "int8-dynamic")
    assert change["origin_after"] == "flag"


def test_environment_and_config_file_say_it_too(
    eager: Run, plain: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def factor() -> tuple[str, str]:
        rows = eager("inspect-key", plain, "--json").json["factors"]
        [row] = [r for r in rows if (r["group"], r["name"]) == ("spec", "quantize")]
        return row["value"], row["origin"]

    (workplace / "vllmc.toml").write_text('quantize = "fp8-dynamic"\n')
    assert factor() == ("fp8-dynamic", "file:vllmc.toml:1")
    monkeypatch.setenv("VLLMC_QUANTIZE", "int8-dynamic")
    assert factor() == ("int8-dynamic", "env:VLLMC_QUANTIZE")
    assert eager("warm", plain, "--quantize", "int4").error == "bad-value"


def test_a_quantised_checkpoint_is_run_as_it_says_and_not_otherwise(
    eager: Run, llama: Any, cache: Path
) -> None:
    directory = cache.parent / "quantised"
    save_quantized(llama, directory, "fp8 static", scales=input_scales(llama, [[1, 2, 3]]))
    done = eager("warm", directory)
    assert (done.code, done.error) == (1, "quantized-weights")
    assert "--quantize fp8-static" in done.err
    done = eager("run", directory, "--quantize", "fp8-static", *IDS, "--json")
    # Its scales are known.
    assert "calibrated" not in done.err
    assert len(tokens(done)) == 16


def test_a_checkpoint_without_scales_of_activations_is_calibrated(
    eager: Run, llama: Any, cache: Path
) -> None:
    directory = cache.parent / "quantised"
    save_quantized(llama, directory, "fp8 dynamic")
    done = eager("run", directory, "--quantize", "fp8-static", *IDS, "--json")
    assert "calibrated-on-random-tokens" in done.err
    assert len(tokens(done)) == 16


@pytest.mark.parametrize("mode", ["fp8-static", "int8-dynamic"])
def test_an_encoder_embeds(mode: str, eager: Run, cache: Path) -> None:
    [family] = [family for family in ENCODERS if family.name == "bert"]
    save_encoder(family, cache.parent / "bert")
    words = ("run", cache.parent / "bert", "--embed", "--prompt-ids", "5,6,7", "--json")
    exact, near = (eager(*words, *more) for more in ((), ("--quantize", mode)))
    rows = [torch.tensor(done.json["embeddings"][0]["embedding"]) for done in (exact, near)]
    assert not torch.equal(*rows)
    assert torch.cosine_similarity(*rows, dim=0) > 0.98


MODULE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllmc.core import support_torch_compile

def llama():
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, vocab_size=96,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2))

def casting():
    model = llama()
    mlp = model.model.layers[0].mlp
    class Mlp(type(mlp)):
        def forward(self, x):
            return super().forward(x.to(self.up_proj.weight.dtype))
    mlp.__class__ = Mlp
    return model

made = llama()

@support_torch_compile(dynamic_arg_dims={"x": 0})
class Declared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor):
        return self.linear(x)
"""


def test_a_model_that_code_makes_is_quantised(eager: Run, workplace: Path) -> None:
    (workplace / "own.py").write_text(MODULE)
    words = ("--quantize", "fp8-static", "--json")
    first = eager("run", "own:llama", *words, *IDS)
    again = eager("run", "own:llama", *words, *IDS, "--guards", "check", "--fail-on-miss")
    assert tokens(first) == tokens(again)
    assert again.json["recompiles"] == []


@pytest.mark.parametrize("name", ["made", "Declared", "casting"])
def test_a_model_that_cannot_be_exchanged_is_refused(
    name: str, eager: Run, workplace: Path
) -> None:
    (workplace / "own.py").write_text(MODULE)
    done = eager("warm", f"own:{name}", "--quantize", "fp8-dynamic")
    assert (done.code, done.error) == (1, "cannot-quantize")
