"""The plugin in vLLM itself, which compiles a toy decoder on a CPU with its own backend.

Needs vLLM 0.32 or 0.33 and what importing it needs; docs/vllm.md says how to have them without a
GPU. Each start is a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROOT = Path(__file__).parents[3]
PROGRAM = ROOT / "tests" / "core" / "diagnose" / "vllm" / "program.py"
PIECES = {"VLLM_USE_AOT_COMPILE": "0", "VLLM_USE_MEGA_AOT_ARTIFACT": "0"}
WHOLE = {"VLLM_USE_AOT_COMPILE": "1", "VLLM_USE_MEGA_AOT_ARTIFACT": "1"}
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
COMPILATION = {
    "mode": 3,
    "splitting_ops": ["toy::attention"],
    "cudagraph_mode": "NONE",
    # vLLM sets the option of Inductor's while it compiles, and hashes it there.
    "dynamic_shapes_config": {"assume_32_bit_indexing": True},
}
ASK = """
import json, sys
from vllmc.core.vllm_plugin.start import start_record
print(json.dumps([start_record(words) for words in json.loads(sys.argv[1])]))
"""


@dataclass(frozen=True)
class Toy:
    """A copy of the program, and starts of it."""

    root: Path

    def start(self, cache: str, *arguments: str, **variables: str) -> str:
        """What a start logs; it must end well."""
        done = subprocess.run(
            [sys.executable, str(self.root / "model.py"), *arguments],
            env=self.environment(cache, **variables),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr + done.stdout

    def environment(self, cache: str, **variables: str) -> dict[str, str]:
        return {
            **os.environ,
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_CACHE_ROOT": str(self.root / cache),
            "VLLM_USE_STANDALONE_COMPILE": "1",
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.root / "inductor"),
            **PIECES,
            **variables,
        }

    def files(self, cache: str) -> dict[str, Path]:
        """The files of the plugin's, by tree."""
        found = (self.root / cache).rglob("vllmc_factors.json")
        return {json.loads(path.read_text())["tree"]: path for path in found}

    def vllmc(self, *words: str, **variables: str) -> tuple[int, Any]:
        done = subprocess.run(
            [sys.executable, "-c", "from vllmc.cli.app import entry_point as run; run()", *words],
            cwd=self.root,
            env=self.environment("cache", **variables),
            capture_output=True,
            text=True,
        )
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    root = tmp_path_factory.mktemp("toy")
    shutil.copy(PROGRAM, root / "model.py")
    made = Toy(root)
    made.start("base")
    return made


def changes(toy: Toy, before: str, after: str) -> list[tuple[str, str, Any, Any]]:
    _, row = toy.vllmc("diff-config", before, after, "--json")
    return [(c["group"], c["name"], c["before"], c["after"]) for c in row["changes"]]


def changing_source(toy: Toy, start: Callable[[], object]) -> None:
    model = toy.root / "model.py"
    text = model.read_text()
    model.write_text(re.sub(r"\+ x$", "+ x * 1", text, flags=re.MULTILINE))
    try:
        start()
    finally:
        model.write_text(text)


def test_what_is_written_makes_vllm_s_key(toy: Toy) -> None:
    [path] = toy.files("base").values()
    recorded = json.loads(path.read_text())
    assert recorded["rebuilds"] is True
    assert recorded["not_read"] == []
    assert recorded["key"] == path.parents[2].name
    assert recorded["compilation"]["splitting_ops"] == ["toy::attention"]
    assert recorded["compilation"]["ranges"] == ["1:2048"]
    assert "model.py" in [source["name"] for source in recorded["sources"]]
    assert recorded["private"]["inductor._micro_pipeline_tp"] is False


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"VLLM_USE_LAYERNAME": "0"}, ("vllm.env", "VLLM_USE_LAYERNAME", True, False)),
        (
            {"TOY_TOKENS": "1024"},
            ("vllm.config", "scheduler_config.max_num_batched_tokens", 2048, 1024),
        ),
        (
            {"TORCHINDUCTOR_MAX_AUTOTUNE": "1"},
            ("vllm.compiler", "inductor.max_autotune", False, True),
        ),
    ],
    ids=["a variable", "a field of the config", "an option of Inductor"],
)
def test_a_changed_setting_is_named(
    toy: Toy, variables: dict[str, str], expected: tuple[str, str, Any, Any]
) -> None:
    cache = "-".join(variables)
    toy.start(cache, **variables)
    assert changes(toy, "base", cache) == [expected]


def test_a_changed_source_file_is_named(toy: Toy) -> None:
    changing_source(toy, lambda: toy.start("source"))
    [(group, name, before, after)] = changes(toy, "base", "source")
    assert (group, name) == ("vllm.code", "model.py")
    assert before != after


def test_switched_off_it_writes_nothing_and_the_key_is_the_same(toy: Toy) -> None:
    toy.start("off", VLLMC_PLUGIN="0")
    assert toy.files("off") == {}
    names = [
        {p.name for p in (toy.root / c / "torch_compile_cache").iterdir()} for c in ("base", "off")
    ]
    assert names[0] == names[1]
    # The next start with the plugin records what the entry, which it hits, is keyed by.
    log = toy.start("off", VLLM_LOGGING_LEVEL="DEBUG")
    assert "Directly load the 0-th graph" in log
    assert json.loads(toy.files("off")["compile"].read_text())["rebuilds"] is True


@pytest.mark.thorough
def test_a_warm_start_leaves_the_files_alone_in_both_trees(toy: Toy) -> None:
    toy.start("whole", **WHOLE)
    files = toy.files("whole")
    assert set(files) == {"compile", "aot"}
    before = {tree: (path.stat().st_mtime_ns, path.read_bytes()) for tree, path in files.items()}
    log = toy.start("whole", **WHOLE, VLLM_LOGGING_LEVEL="DEBUG")
    assert "Directly load AOT compilation" in log
    for tree, path in files.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == before[tree]
    aot = json.loads(files["aot"].read_text())
    assert (aot["rebuilds"], aot["not_read"]) == (True, [])
    files["aot"].unlink()
    toy.start("whole", **WHOLE)
    assert files["aot"].read_bytes() == before["aot"][1]
    changing_source(toy, lambda: toy.start("whole", **WHOLE))
    after = json.loads(files["aot"].read_text())
    assert after["key"] == aot["key"]
    assert after["sources"] != aot["sources"]


@pytest.mark.thorough
def test_a_whole_model_without_its_artifacts_is_keyed_by_less(toy: Toy) -> None:
    # Its key has no options of the compiler; those are in the key of its pieces.
    toy.start("graph", VLLM_USE_AOT_COMPILE="1")
    for path in toy.files("graph").values():
        recorded = json.loads(path.read_text())
        assert (recorded["rebuilds"], recorded["not_read"]) == (True, [])
    assert json.loads(toy.files("graph")["aot"].read_text())["compiler"] == {}


@pytest.mark.thorough
def test_a_directory_that_is_not_named_by_its_key_is_checked_by_vllm_s_hashes(toy: Toy) -> None:
    toy.start("chosen", TOY_CACHE_DIR=str(toy.root / "chosen" / "here"))
    recorded = json.loads(toy.files("chosen")["compile"].read_text())
    assert (recorded["key"], recorded["rebuilds"], recorded["not_read"]) == ("here", True, [])


def test_a_file_that_cannot_be_written_is_one_warning(toy: Toy) -> None:
    shutil.copytree(toy.root / "base", toy.root / "blocked")
    [path] = toy.files("blocked").values()
    path.unlink()
    path.mkdir()
    log = toy.start("blocked")
    assert log.count("VLLMC_PLUGIN=0 switches this off") == 1
    assert list(path.parent.glob("*.tmp")) == []


@pytest.fixture(scope="module")
def served(toy: Toy) -> tuple[list[str], dict[str, str]]:
    """The arguments of a start of vLLM's that has filled the cache, and its variables."""
    (toy.root / "tiny").mkdir()
    (toy.root / "tiny" / "config.json").write_text(json.dumps(MODEL))
    arguments = ["--model", str(toy.root / "tiny"), "--skip-tokenizer-init"]
    arguments += ["--max-model-len", "128", "--compilation-config", json.dumps(COMPILATION)]
    platform = ROOT / "tests" / "support" / "vllm_platform"
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(platform)])
    variables = {"PYTHONPATH": path.strip(os.pathsep), "VLLM_TARGET_DEVICE": "empty"}
    toy.start("cache", *arguments, **variables)
    return arguments, variables


def test_a_start_that_would_hit_is_predicted(
    toy: Toy, served: tuple[list[str], dict[str, str]]
) -> None:
    arguments, variables = served
    words = ("warm", "--check", "--json", "--vllm", "cache", "--", *arguments)
    code, row = toy.vllmc(*words, **variables)
    assert (code, row["outcome"], row["miss"]) == (0, "would-hit", None)
    assert row["vllm"]["not_known"]
    recorded = json.loads(toy.files("cache")["compile"].read_text())
    assert (recorded["rebuilds"], recorded["not_read"]) == (True, [])
    assert recorded["config"]["model_config.hf_config"]["hidden_size"] == 64
    # And it does.
    log = toy.start("cache", *arguments, **variables, VLLM_LOGGING_LEVEL="DEBUG")
    assert "Directly load the 0-th graph" in log


def test_starts_that_would_miss_are_predicted_with_the_cause(
    toy: Toy, served: tuple[list[str], dict[str, str]]
) -> None:
    arguments, variables = served
    words = ("warm", "--check", "--json", "--vllm", "cache", "--", *arguments)
    code, row = toy.vllmc(*words, "--max-num-seqs", "17", **variables)
    assert (code, row["outcome"]) == (3, "would-miss")
    [change] = row["miss"]["changes"]
    assert (change["name"], change["after"]) == ("scheduler_config.max_num_seqs", 17)
    code, row = toy.vllmc(*words, **variables, VLLM_USE_LAYERNAME="0")
    assert [c["name"] for c in row["miss"]["changes"]] == ["VLLM_USE_LAYERNAME"]
    rows: list[Any] = []
    changing_source(toy, lambda: rows.append(toy.vllmc(*words, **variables)))
    [(code, row)] = rows
    assert (code, row["outcome"]) == (3, "would-miss")
    assert [c["name"] for c in row["miss"]["changes"]] == ["model.py"]


def test_what_a_start_will_do_beside_its_key_is_asked_of_vllm(
    toy: Toy, served: tuple[list[str], dict[str, str]]
) -> None:
    arguments, variables = served
    tiny = arguments[arguments.index("--model") + 1]
    draft = {"method": "draft_model", "model": tiny, "num_speculative_tokens": 2}
    lookup = {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    off = COMPILATION | {"inductor_compile_config": {"force_disable_caches": True}}
    encoder = COMPILATION | {"compile_mm_encoder": True}
    asked = [
        ["--enable-lora"],
        ["--speculative-config", json.dumps(draft)],
        ["--speculative-config", json.dumps(lookup)],
        ["--compilation-config", json.dumps(off)],
        ["--compilation-config", json.dumps(encoder)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps([[*arguments, *words] for words in asked])],
        env=toy.environment("cache", **variables),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lora, drafting, looking_up, without_cache, encoding = json.loads(done.stdout.splitlines()[-1])
    assert lora["config"]["lora_config.max_loras"] == 1
    assert lora["config"]["lora_config.lora_dtype"] == lora["config"]["model_config.dtype"]
    assert drafting["beside"] == ["the draft model (draft_model)"]
    assert drafting["config"]["speculative_config.draft_model_config.model"] == tiny
    # It refers to the config of the model, which keeps its name.
    assert drafting["config"]["model_config.model"] == tiny
    assert looking_up["beside"] == []
    assert looking_up["disabled"] == "speculation by ngram_gpu"
    assert without_cache["disabled"].startswith("force_disable_caches")
    assert encoding["beside"] == ["the multimodal encoder"]
    assert [row["not_read"] for row in (lora, drafting, encoding)] == [[]] * 3


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flag", "variable", "other"),
    [
        ("--tensor-parallel-size", "TOY_RANK", "rank_1_0"),
        ("--data-parallel-size", "TOY_REPLICA", "rank_0_1"),
    ],
    ids=["ranks", "replicas"],
)
def test_each_process_has_a_directory_of_its_own_under_one_key(
    toy: Toy,
    served: tuple[list[str], dict[str, str]],
    flag: str,
    variable: str,
    other: str,
) -> None:
    arguments, variables = served
    arguments = [*arguments, flag, "2", "--distributed-executor-backend", "mp"]
    words = ("warm", "--check", "--json", "--vllm", variable, "--", *arguments)
    toy.start(variable, *arguments, **variables)
    code, row = toy.vllmc(*words, **variables)
    assert (code, row["reason"]) == (3, f"there is nothing of {other} in the entry")
    toy.start(variable, *arguments, **variables, **{variable: "1"})
    [key] = (toy.root / variable / "torch_compile_cache").iterdir()
    for place in key.glob("rank_*/backbone/vllmc_factors.json"):
        recorded = json.loads(place.read_text())
        assert (recorded["rebuilds"], recorded["not_read"]) == (True, [])
    _, row = toy.vllmc("inspect-key", variable, "--json")
    labels = [part["label"] for part in row["caches"][0]["compilations"]]
    assert labels == ["rank_0_0/backbone", f"{other}/backbone"]
    assert changes(toy, str(key / "rank_0_0"), str(key / other)) == []
    code, row = toy.vllmc(*words, **variables)
    assert (code, row["outcome"]) == (0, "would-hit")


def test_arguments_that_vllm_refuses_are_an_error(toy: Toy) -> None:
    code, row = toy.vllmc("warm", "--check", "--json", "--vllm", "base", "--", "--no-such-flag")
    assert (code, row["error"]["code"]) == (1, "vllm-refused")
    assert "--no-such-flag" in row["error"]["context"]["cause"]
