from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Flip = Callable[[Path, str], None]
Files = Callable[[Path], dict[str, bytes]]

LONG = ",".join(str(3 * n + 1) for n in range(21))


def token_ids(done: Any) -> list[list[int]]:
    assert done.code == 0, done.err
    return [output["token_ids"] for output in done.json["outputs"]]


def test_run_generates_with_the_program_that_warm_stored(warmed: Any, eager: Run) -> None:
    words = ("--prompt-ids", "1,2,3", "--prompt-ids", "4", "--max-new-tokens", "5")
    row = eager("run", *words, "--json").json
    assert (row["command"], row["model"], row["key"]) == ("run", "tiny-llama", warmed.said["key"])
    assert [output["prompt"] for output in row["outputs"]] == ["1,2,3", "4"]
    for output in row["outputs"]:
        assert len(output["token_ids"]) == 5
        assert (output["finish_reason"], output["text"]) == ("length", None)
        assert "logprobs" not in output
    assert row["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert row["recompiles"] == []
    assert set(row["seconds"]) == {"load", "first_token", "total"}
    assert set(row["tokens_per_second"]) == {"prefill", "decode"}
    assert all(
        value > 0 for value in (*row["seconds"].values(), *row["tokens_per_second"].values())
    )


def test_run_compiles_what_is_missing_and_leaves_it_for_warm(eager: Run) -> None:
    row = eager("run", "--layers", "1", "--max-new-tokens", "2", "--json").json
    assert row["counts"] == {"hit": 0, "dup": 0, "compiled": 2}
    assert eager("warm", "--layers", "1", "--json").json["outcome"] == "hit"


@pytest.mark.slow
def test_inductor_s_code_gives_the_tokens_of_the_eager_graph(
    inductor_cache: Any, warmed: Any, eager: Run, vllmc: Run
) -> None:
    words = ("--prompt-ids", LONG, "--prompt-ids", "7", "--batch-size", "3", "--json")
    compiled = vllmc("run", *words, "--fail-on-miss", "--cache-dir", inductor_cache.root)
    assert compiled.json["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert token_ids(compiled) == token_ids(eager("run", *words))


def test_the_workload_runs_at_each_batch_size_in_turn_without_a_recompile(
    warmed: Any, eager: Run
) -> None:
    sizes = ("--batch-size", "1", "--batch-size", "2", "--batch-size", "7")
    words = ("--prompt-ids", "1,2,3", "--prompt-ids", LONG, "--max-new-tokens", "3", "--json")
    done = eager("run", *words, *sizes, "--fail-on-recompile")
    assert done.code == 0
    assert done.json["recompiles"] == []
    outputs = done.json["outputs"]
    assert [o["prompt"] for o in outputs] == ["1,2,3", LONG] * 3 + ["1,2,3"]
    alone = token_ids(eager("run", *words))
    assert token_ids(done) == alone * 3 + alone[:1], (
        "a batch does not change what each prompt gives"
    )


def test_token_ids_and_text_are_those_of_eager_transformers(llama_dir: Path, eager: Run) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_dir)
    prompts = ["w5 w6 w7 w8 w9", "w80"]
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    done = eager("run", llama_dir, *words, "--max-new-tokens", "12", "--ignore-eos", "--json")
    for prompt, output in zip(prompts, done.json["outputs"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, ids.shape[1] :].tolist()
        assert output["prompt"] == prompt
        assert output["token_ids"] == expected
        assert output["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert len({tuple(o["token_ids"]) for o in done.json["outputs"]}) == 2


def test_texts_come_before_token_ids(llama_dir: Path, eager: Run) -> None:
    words = ("--prompt-ids", "10,11", "--prompt", "w8 w9", "--max-new-tokens", "4", "--json")
    outputs = eager("run", llama_dir, *words).json["outputs"]
    assert [output["prompt"] for output in outputs] == ["w8 w9", "10,11"]
    assert outputs[0]["token_ids"] == outputs[1]["token_ids"], "w8 is token 10"


def test_a_prompt_longer_than_the_last_range_gives_the_same_tokens_in_parts(
    warmed: Any, eager: Run
) -> None:
    words = ("--prompt-ids", LONG, "--prompt-ids", "5", "--max-new-tokens", "6", "--json")
    whole = token_ids(eager("run", *words))
    assert token_ids(eager("run", *words, "--compile-range", "1:8")) == whole


def test_a_stop_token_ends_a_prompt_and_is_its_last_token(
    llama_dir: Path, eager: Run, workplace: Path
) -> None:
    words = ("--prompt", "w5 w6 w7", "--max-new-tokens", "8", "--json")
    [free] = token_ids(eager("run", llama_dir, *words, "--ignore-eos"))
    stop = free[3]
    stopping = workplace / "stopping"
    shutil.copytree(llama_dir, stopping)
    (stopping / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop]}))
    [output] = eager("run", "stopping", *words).json["outputs"]
    assert output["finish_reason"] == "stop"
    assert output["token_ids"] == free[: free.index(stop) + 1]
    assert token_ids(eager("run", "stopping", *words, "--ignore-eos")) == [free]


def test_sampling_is_repeatable_by_its_seed(warmed: Any, eager: Run) -> None:
    def sample(*words: str) -> list[list[int]]:
        return token_ids(eager("run", "--json", "--max-new-tokens", "8", *words))

    hot = ("--temperature", "5", "--seed", "3")
    first = sample(*hot)
    assert sample(*hot) == first
    assert sample("--temperature", "5", "--seed", "4") != first
    assert sample() != first, "without a temperature the most probable token is taken"
    assert sample(*hot, "--top-p", "0.000001") == sample(), "top-p leaves the most probable only"


def test_log_probabilities_are_those_of_each_token_and_the_best(warmed: Any, eager: Run) -> None:
    words = ("--max-new-tokens", "3", "--json")
    [output] = eager("run", *words, "--logprobs", "4").json["outputs"]
    assert [row["token_id"] for row in output["logprobs"]] == output["token_ids"]
    for row in output["logprobs"]:
        values = [top["logprob"] for top in row["top"]]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert values[0] < 0
        assert row["rank"] == 1, "greedy"
        assert row["top"][0] == {"token_id": row["token_id"], "logprob": row["logprob"]}
    [output] = eager("run", *words, "--logprobs", "0").json["outputs"]
    assert [row["top"] for row in output["logprobs"]] == [[], [], []]


def test_no_new_tokens_is_a_run_that_generates_none(warmed: Any, eager: Run) -> None:
    done = eager("run", "--max-new-tokens", "0", "--json")
    assert token_ids(done) == [[]]


def test_fail_on_miss_exits_3_and_compiles_and_stores_nothing(
    warmed: Any, eager: Run, files: Files
) -> None:
    before = files(warmed.root / "v1")
    done = eager("run", "--compile-size", "3", "--fail-on-miss", "--json")
    assert (done.code, done.json["error"]["code"]) == (3, "would-miss")
    assert "piece_0" in done.json["error"]["message"]
    assert files(warmed.root / "v1") == before


def test_fail_on_miss_needs_no_record_of_the_program_where_every_unit_is_stored(
    warmed: Any, eager: Run, files: Files
) -> None:
    before = files(warmed.root / "v1")
    done = eager("run", "--layers", "3", "--fail-on-miss", "--max-new-tokens", "2", "--json")
    assert (done.code, done.json["counts"]) == (0, {"hit": 3, "dup": 0, "compiled": 0})
    assert files(warmed.root / "v1") == before


def test_fail_on_miss_exits_4_for_a_corrupt_artifact_and_leaves_it(
    warmed: Any, eager: Run, damage: Flip, files: Files
) -> None:
    damage(warmed.root, warmed.said["units"][0]["artifact"])
    before = files(warmed.root / "v1")
    done = eager("run", "--fail-on-miss", "--json")
    assert (done.code, done.json["error"]["code"]) == (4, "corrupt-artifact")
    assert files(warmed.root / "v1") == before


def test_run_replaces_a_corrupt_artifact_with_a_warning(
    warmed: Any, eager: Run, damage: Flip
) -> None:
    damage(warmed.root, warmed.said["units"][0]["artifact"])
    words = ("--max-new-tokens", "2", "--json")
    done = eager("run", *words)
    assert (done.code, done.json["counts"]["compiled"]) == (0, 1)
    assert "warning[corrupt-artifact]: " in done.err
    assert eager("run", *words, "--fail-on-miss").code == 0


RECOMPILING = """
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from factory import config


@torch.compile(backend="eager", dynamic=False)
def halve(x):
    return x / 2


@torch.library.custom_op("e2e_recompile::halve", mutates_args=())
def halve_op(x: torch.Tensor) -> torch.Tensor:
    return halve(x)


@halve_op.register_fake
def _(x):
    return torch.empty_like(x)


class Halving(LlamaMLP):
    def forward(self, x):
        return torch.ops.e2e_recompile.halve(super().forward(x))


def make():
    model = LlamaForCausalLM(config(num_hidden_layers=1))
    model.model.layers[0].mlp = Halving(model.config)
    return model
"""


def test_a_recompile_inside_a_splitting_op_is_seen_and_explained(
    factory: Path, workplace: Path, eager: Run
) -> None:
    (workplace / "halving.py").write_text(RECOMPILING)
    ops = ("--splitting-op", "vllmc::unified_attention_with_output")
    ops += ("--splitting-op", "e2e_recompile::halve")
    words = ("run", "halving:make", *ops, "--max-new-tokens", "2")
    seen = eager(*words, "--batch-size", "1", "--batch-size", "2", "--json")
    assert seen.code == 0
    row, *_ = rows = seen.json["recompiles"]
    assert row["frame"].startswith("halving.py:")
    assert row["frame"].endswith(" in halve")
    assert row["class"] in ("shape", "shape-0-1")
    assert "size" in row["guard"]
    assert row["fix"]
    # Prefill 3, decode 1, then prefill 6, decode 2: all but the first compile again.
    assert sum(row["count"] for row in rows) == 3
    failed = eager(*words, "--batch-size", "3", "--batch-size", "4", "--fail-on-recompile")
    assert failed.code == 3
    assert "frame" in failed.out
    assert "fix" in failed.out


def test_a_splitting_op_of_the_model_s_own_cuts_the_graph(
    factory: Path, workplace: Path, eager: Run
) -> None:
    (workplace / "halving.py").write_text(RECOMPILING.replace("e2e_recompile", "e2e_split"))
    attention = ("--splitting-op", "vllmc::unified_attention_with_output")
    both = (*attention, "--splitting-op", "e2e_split::halve")
    words = ("warm", "halving:make", "--json")
    assert eager(*words).json["pieces"]["splitting"] == 1
    row = eager(*words, *both).json
    assert (row["pieces"]["splitting"], row["pieces"]["compilable"]) == (2, 3)
    [change] = row["miss"]["changes"]
    assert change["name"] == "splitting_ops"


def test_a_person_sees_the_prompts_the_tokens_and_the_speed(llama_dir: Path, eager: Run) -> None:
    done = eager("run", llama_dir, "--prompt", "w5 w6", "--max-new-tokens", "3", "--ignore-eos")
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0] == "> w5 w6"
    assert lines[1].startswith("w")
    names = [line.split("  ")[0] for line in lines[3:]]
    assert names == ["units", "load", "first token", "speed", "recompiles"]
    assert "3 compiled" in lines[3]
    assert lines[-1].endswith(" 0")
    ids = eager("run", llama_dir, "--prompt-ids", "7,8", "--max-new-tokens", "3")
    assert ids.err == "load\n"
