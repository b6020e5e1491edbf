"""Keys and values stored by an op of their own, inside the pieces: `--split-kv-update`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from repeating import plans, told
from tiny_models import continued, save_decoder
from transformers import BertConfig, BertModel, PreTrainedModel

from vllmc.core.cache.store import Store
from vllmc.core.compiler.container import unpack

Run = Callable[..., Any]

UPDATE = "unified_kv_cache_update"
ATTENTION = "unified_attention_with_output"
VOCAB = 96
NEW_TOKENS = 6
PROMPTS = ([5, 9, 31, 7, 7, 60, 12, 80, 3], [44], [10, 20, 30, 40])
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA = {
    "sliding_window": 5,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "query_pre_attn_scalar": 8,
}


def save(directory: Path, family: str, layers: int) -> PreTrainedModel:
    """Saves a tiny model of the family, which varies in what it says."""
    fields = {**SHAPE, "num_hidden_layers": layers, **(GEMMA if family == "gemma2" else {})}
    return save_decoder(directory, family, fields, spread=0.2)


def generated(run: Run, *words: str | Path) -> list[list[int]]:
    prompts = [w for p in PROMPTS for w in ("--prompt-ids", ",".join(map(str, p)))]
    more = ("--max-new-tokens", str(NEW_TOKENS), "--ignore-eos", "--batch-size", "3", "--json")
    row = run("run", *words, *prompts, *more).json
    assert row["recompiles"] == []
    return [output["token_ids"] for output in row["outputs"]]


@pytest.mark.parametrize("names", ["hoisted", "baked"])
@pytest.mark.parametrize("layers", [2, 12])
@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(n, marks=pytest.mark.thorough) for n in ("qwen3", "gemma2"))],
)
def test_tokens_are_those_of_transformers_and_hoisted_names_cost_nothing(
    family: str, layers: int, names: str, eager: Run, tmp_path: Path
) -> None:
    model = save(tmp_path / "model", family, layers)
    words = (tmp_path / "model", "--layer-names", names, "--split-kv-update")
    first, second = (eager("warm", *words, "--json").json for _ in range(2))
    assert (first["outcome"], second["outcome"]) == ("compiled", "hit")
    assert first["pieces"]["splitting"] == layers
    assert first["pieces"]["unique"] == (3 if names == "hoisted" else layers + 1)
    found = first["layer_names"]
    if names == "hoisted" or layers == 2:
        assert found is None
    else:
        assert (found["unique"], found["would_be"], found["compiled"]) == (13, 3, 10)
        [op] = found["ops"]
        assert (op["op"], op["argument"]) == (f"vllmc::{UPDATE}", "layer_name")
        assert op["fix"] == "--layer-names hoisted"
    tokens = generated(eager, *words)
    assert tokens == [[*continued(model, prompt, NEW_TOKENS)] for prompt in PROMPTS]
    assert len({token for row in tokens for token in row}) > 3


def test_updates_are_in_what_is_copied_of_a_layer_that_was_traced(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", 4)
    repeating, whole, stood_in = plans(str(tmp_path), split_kv_update=True)
    assert told(repeating) == told(whole)
    assert stood_in == 3


def test_an_encoder_stores_nothing_and_has_the_same_pieces(eager: Run, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    ways = ((), ("--split-kv-update",))
    plain, split = (eager("warm", tmp_path / "bert", *way, "--json").json for way in ways)
    assert {unit["outcome"] for unit in split["units"]} == {"hit"}
    assert [u["artifact"] for u in split["units"]] == [u["artifact"] for u in plain["units"]]


def test_a_miss_says_how_to_get_back(eager: Run) -> None:
    eager("warm", "--split-kv-update")
    assert "--split-kv-update" in eager("warm", "--check").out
    eager("warm", "--force")
    row = eager("inspect-key", "--split-kv-update", "--json").json
    [factor] = [f for f in row["factors"] if f["name"] == "split_kv_update"]
    assert (factor["group"], factor["value"], factor["origin"]) == ("spec", True, "flag")


def code_of(cache: Path, row: dict[str, Any]) -> list[str]:
    """The wrapper of each of the program's units, without what holds no call."""
    store = Store(cache)
    found = []
    for unit in row["units"]:
        data = store.read_artifact(unit["artifact"])
        files = unpack(data).files
        found += [text.decode() for name, text in files.items() if name.endswith(".py")]
    return found


def calls_of(code: str) -> list[str]:
    """The ops of vllmc that the code calls, in their order."""
    return re.findall(rf"torch\.ops\.vllmc\.({UPDATE}|{ATTENTION})\.\w+\(", code)


@pytest.mark.slow
@pytest.mark.parametrize("names", ["hoisted", "baked"])
def test_generated_code_updates_once_in_each_piece_before_attention(
    names: str, vllmc: Run, cache: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "model", "llama", 3)
    words = (tmp_path / "model", "--layer-names", names, "--split-kv-update")
    row = vllmc("warm", *words, "--json").json
    calls = [calls_of(code) for code in code_of(cache, row)]
    assert calls == [[UPDATE]] * (len(calls) - 1) + [[]]
    assert generated(vllmc, *words) == [
        [*continued(model, prompt, NEW_TOKENS)] for prompt in PROMPTS
    ]


@pytest.mark.slow
@pytest.mark.parametrize("names", ["hoisted", pytest.param("baked", marks=pytest.mark.thorough)])
def test_within_one_piece_each_update_comes_before_its_attention(
    names: str, vllmc: Run, cache: Path, tmp_path: Path
) -> None:
    """All between two splitting ops: nothing but the token says in which order."""
    model = save(tmp_path / "model", "gemma2", 3)
    words = (tmp_path / "model", "--layer-names", names, "--split-kv-update")
    words += ("--splitting-op", "torch.nn.functional.embedding")
    row = vllmc("warm", *words, "--json").json
    assert generated(vllmc, *words) == [
        [*continued(model, prompt, NEW_TOKENS)] for prompt in PROMPTS
    ]
    [calls] = [calls_of(code) for code in code_of(cache, row)]
    assert calls == [UPDATE, ATTENTION] * 3
