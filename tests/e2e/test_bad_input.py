from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caches import stored

Run = Callable[..., Any]


def refused(done: Any, code: int, error: str, *mentions: str) -> None:
    """Asserts that a command ended with this error: one line of what, and no traceback."""
    assert (done.code, done.error) == (code, error), done.err
    assert "Traceback" not in done.err + done.out
    for mention in mentions:
        assert mention in done.err
    assert "hint: " in done.err


@pytest.mark.parametrize("command", ["warm", "run", "inspect-key"])
def test_an_unknown_model_is_refused_by_every_command(eager: Run, command: str) -> None:
    refused(eager(command, "nonesuch"), 1, "unknown-model", "'nonesuch'", "vllmc models")
    refused(eager(command, "tiny-lama"), 1, "unknown-model", "did you mean 'tiny-llama'?")


def test_an_error_under_json_is_one_object_with_code_message_context_and_hint(eager: Run) -> None:
    done = eager("warm", "nonesuch", "--json")
    assert (done.code, set(done.json)) == (1, {"schema_version", "command", "error"})
    assert done.json["command"] == "warm"
    assert set(done.json["error"]) == {"code", "message", "context", "hint"}


def test_a_directory_without_a_config_is_no_model(eager: Run, workplace: Path) -> None:
    (workplace / "empty").mkdir()
    refused(eager("warm", "empty"), 1, "unknown-model", "config.json")


CONFIGS = [
    ('{"model_type": "llama",', "bad-config", "config.json"),
    ("[]", "bad-config", "JSON object"),
    ('{"hidden_size": 3}', "bad-config", "model_type"),
    ('{"model_type": "nonesuch"}', "bad-config", "nonesuch"),
    ('{"model_type": "llama", "hidden_size": "wide"}', "bad-config", "hidden_size"),
    ('{"model_type": "t5"}', "unsupported-model", "encoder-decoder"),
    ('{"model_type": "vit"}', "unsupported-model", "ViTConfig"),
]


@pytest.mark.parametrize(
    ("text", "code", "mention"),
    CONFIGS,
    ids=["malformed", "list", "no-type", "unknown-type", "wrong-value", "encoder-decoder", "image"],
)
def test_a_config_that_is_none_of_a_decoder_is_refused(
    eager: Run, workplace: Path, text: str, code: str, mention: str
) -> None:
    (workplace / "model").mkdir()
    (workplace / "model" / "config.json").write_text(text)
    refused(eager("warm", "model"), 1, code, mention)


def test_a_hub_id_that_is_not_cached_is_refused_offline(spawn: Run) -> None:
    done = spawn("warm", "some-org/some-model@v1")
    refused(done, 1, "unknown-model", "some-org/some-model@v1", "HF_HUB_OFFLINE")
    assert "Retrying" not in done.err


MODULES = {
    "number": "x = 5\n",
    "argument": "def x(size):\n    pass\n",
    "nothing": "def x():\n    return None\n",
    "syntax": "def x(:\n",
    "missing": "y = 1\n",
}


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("number", "bad-model"),
        ("argument", "bad-model"),
        ("nothing", "bad-model"),
        ("syntax", "bad-model"),
        ("missing", "unknown-model"),
    ],
)
def test_an_attribute_that_makes_no_module_is_refused(
    eager: Run, workplace: Path, name: str, code: str
) -> None:
    (workplace / f"bad_{name}.py").write_text(MODULES[name])
    refused(eager("warm", f"bad_{name}:x"), 1, code, f"bad_{name}")


def test_a_model_whose_own_code_fails_is_not_called_a_fault_of_vllmc_alone(
    eager: Run, workplace: Path
) -> None:
    (workplace / "failing.py").write_text("def x():\n    raise LookupError('my own')\n")
    done = eager("warm", "failing:x")
    assert done.code == 1
    assert "LookupError: my own" in done.err
    assert "failing.py:2 in x" in done.err


def test_a_module_that_does_not_exist_is_refused(eager: Run) -> None:
    refused(eager("warm", "no_such_module:make"), 1, "unknown-model", "no_such_module")


RANGES = [
    (("--compile-range", "9:2"), "bad-range", "did you mean 2:9?"),
    (("--compile-range", "0:5"), "bad-range", "start it at 1: 1:5"),
    (("--compile-range", "1:5:9"), "bad-range", "A:B"),
    (("--compile-range", ""), "bad-range", "A:B"),
    (("--compile-range", "1:5", "--compile-range", "5:9"), "overlapping-ranges", "1:4"),
    (("--pass", "no-ops@1:64"), "bad-range", "no compile range lies within 1:64"),
    (("--pass", "no-ops@1:64", "--pass", "no-ops@65:8192"), "bad-range", "and as no-ops@65:8192"),
    (("--pass", "no-ops@"), "bad-range", "for example 1:8192"),
    (("--compile-size", "0"), "bad-value", "at least 1"),
    (("--compile-size", "x"), "bad-value", "at least 1"),
    (("--layers", "0"), "bad-value", "at least 1"),
]


@pytest.mark.parametrize(("words", "code", "mention"), RANGES, ids=lambda v: str(v)[-24:])
def test_ranges_and_sizes_that_cannot_be_meant_are_wrong_usage(
    eager: Run, words: tuple[str, ...], code: str, mention: str
) -> None:
    for command in ("warm", "run"):
        refused(eager(command, *words), 2, code, mention)


def test_a_pass_that_a_file_limits_is_wrong_with_no_ranges_but_the_file_s(
    eager: Run, workplace: Path
) -> None:
    (workplace / "vllmc.toml").write_text('pass = ["no-ops@1:64"]\n')
    others = ("inspect-key", "--compile-range", "65:128")
    refused(eager("inspect-key"), 2, "bad-range", "no compile range lies within 1:64")
    refused(eager(*others, "--pass", "no-ops@1:64"), 2, "bad-range", "lies within 1:64")
    assert eager(*others).code == 0


def test_no_range_and_no_size_leave_nothing_to_compile(eager: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text("compile-range = []\n")
    refused(eager("warm"), 2, "bad-range", "--compile-range")


OPTIONS = [
    ("max_autotunee=1", "unknown-option", "did you mean max_autotune?"),
    ("functorch.donated_bufer=true", "unknown-option", "did you mean functorch.donated_buffer?"),
    ("threads=2", "unknown-option", "cpp.threads"),
    ("max_autotune=maybe", "bad-option", "true or false"),
    ("cpp.threads=many", "bad-option", "a whole number"),
    ("functorch.donated_buffer=3", "bad-option", "true or false"),
    ("max_autotune", "bad-value", "KEY=VALUE"),
    ("=true", "bad-value", "KEY=VALUE"),
]


@pytest.mark.parametrize(("option", "code", "mention"), OPTIONS, ids=lambda v: str(v)[:24])
def test_an_option_that_torch_does_not_have_or_take_is_wrong_usage(
    eager: Run, option: str, code: str, mention: str
) -> None:
    refused(eager("warm", "-O", option), 2, code, mention)


def test_an_unknown_option_of_the_file_is_refused_as_well(eager: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text("[inductor]\nmax_autotunee = true\n")
    refused(eager("warm"), 2, "unknown-option", "did you mean max_autotune?")


def test_a_device_that_is_not_there_is_refused(eager: Run) -> None:
    import torch

    device = f"cuda:{torch.cuda.device_count()}"
    refused(eager("warm", "--device", device), 1, "no-device", device, "--device cpu")


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_cuda_without_a_gpu_is_refused_by_every_command(eager: Run) -> None:
    for command in ("warm", "run", "inspect-key"):
        refused(eager(command, "--device", "cuda"), 1, "no-device", "--device cpu")


def test_a_variable_that_torch_does_not_take_is_named(start: Any) -> None:
    # Torch reads it where it is imported: in a process of its own.
    variable = "TORCHINDUCTOR_COMPILE_THREADS"
    process = start("inspect-key", "tiny-llama", env={variable: "many"})
    _, err = process.communicate()
    assert process.returncode == 2, err
    told, *rest = err.splitlines()
    assert told.startswith("error[bad-variable]: ")
    assert variable in told
    assert "'many'" in told
    assert rest[-1].startswith("  hint: ")


CHOICES = [
    ("--device", "tpu"),
    ("--dtype", "int8"),
    ("--dynamic-shapes", "static"),
    ("--layer-names", "none"),
    ("--experts", "eager"),
    ("--splitting-op", "attention"),
]


@pytest.mark.parametrize("words", CHOICES, ids=" ".join)
def test_a_value_that_an_option_does_not_take_is_wrong_usage(
    eager: Run, words: tuple[str, str]
) -> None:
    refused(eager("warm", *words), 2, "bad-value", words[1])


def test_a_backend_that_does_not_exist_is_wrong_usage(vllmc: Run) -> None:
    refused(vllmc("warm", "--backend", "onnx"), 2, "bad-value", "inductor, eager")


def test_a_splitting_op_that_the_graph_does_not_have_is_refused(eager: Run) -> None:
    done = eager("warm", "--splitting-op", "aten::nonesuch")
    refused(done, 1, "no-splitting-op", "aten::nonesuch")


def test_options_that_contradict_each_other_are_wrong_usage(eager: Run) -> None:
    refused(eager("warm", "--check", "--force"), 2, "bad-value", "--check")


PROMPTS = [
    (("--prompt-ids", "a,b"), 2, "bad-value", "--prompt-ids 1,2,3"),
    (("--prompt-ids", ""), 2, "bad-value", "--prompt-ids 1,2,3"),
    (("--prompt-ids", "1,99999"), 1, "bad-token-id", "99999"),
    (("--prompt-ids=-1",), 1, "bad-token-id", "-1"),
    (("--prompt", "hello"), 1, "no-tokenizer", "--prompt-ids"),
    (("--max-new-tokens", "8190"), 1, "prompt-too-long", "8192"),
    (("--max-new-tokens", "-1"), 2, "bad-sampling", "at least 0"),
    (("--batch-size", "0"), 2, "bad-value", "--batch-size 1"),
    (("--temperature", "-1"), 2, "bad-sampling", "at least 0"),
    (("--temperature", "nan"), 2, "bad-sampling", "at least 0"),
    (("--top-p", "0"), 2, "bad-sampling", "above 0"),
    (("--top-p", "1.5"), 2, "bad-sampling", "up to 1"),
    (("--logprobs", "-1"), 2, "bad-sampling", "at least 0"),
    (("--max-new-tokens", "x"), 2, "usage", "--max-new-tokens"),
]


@pytest.mark.parametrize(("words", "code", "error", "mention"), PROMPTS, ids=lambda v: str(v)[:28])
def test_a_workload_that_cannot_run_is_refused_before_anything_is_compiled(
    eager: Run, cache: Path, words: tuple[str, ...], code: int, error: str, mention: str
) -> None:
    refused(eager("run", *words), code, error, mention)
    assert stored(cache) == []


def test_a_text_without_tokens_is_refused(llama_dir: Path, eager: Run) -> None:
    refused(eager("run", llama_dir, "--prompt", ""), 1, "empty-prompt")


def test_a_prompt_longer_than_the_model_s_maximum_is_refused(llama_dir: Path, eager: Run) -> None:
    prompt = ",".join(["5"] * 65)
    refused(eager("run", llama_dir, "--prompt-ids", prompt), 1, "prompt-too-long", "65", "64")


def test_token_counts_that_nothing_was_compiled_for_are_named(eager: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text("compile-range = []\ncompile-size = [4]\n")
    done = eager("run", "--prompt-ids", "1,2,3", "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "size-out-of-range")
    assert done.json["error"]["context"]["ranges"] == ["4"]
    done = eager("run", "--prompt-ids", "1,2,3,4", "--max-new-tokens", "1", "--json")
    assert done.code == 0, "the size itself runs"


def test_a_tokenizer_that_cannot_be_read_is_refused(
    llama_dir: Path, eager: Run, workplace: Path
) -> None:
    broken = workplace / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    (broken / "tokenizer.json").write_text("{")
    (broken / "tokenizer_config.json").write_bytes(
        (llama_dir / "tokenizer_config.json").read_bytes()
    )
    refused(eager("run", "broken", "--prompt", "w5"), 1, "bad-tokenizer", "--prompt-ids")


def test_weights_that_cannot_be_read_are_refused(
    llama_dir: Path, eager: Run, workplace: Path
) -> None:
    broken = workplace / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes(b"\0" * 64)
    assert eager("warm", "broken").code == 0, "warming reads no weight"
    refused(eager("run", "broken"), 1, "bad-weights")


SIDES = [
    (("a", "current"), 2, "unknown-side", "snapshot"),
    (("current",), 2, "usage", "B"),
    (("0123456789ab", "current"), 1, "unknown-key", "cache ls"),
    (("current", "defaults", "--env", "FOO"), 2, "bad-value", "NAME=VALUE"),
    (("current", "defaults", "--env", "=x"), 2, "bad-value", "NAME=VALUE"),
]


@pytest.mark.parametrize(("words", "code", "error", "mention"), SIDES, ids=lambda v: str(v)[:28])
def test_sides_that_are_nothing_to_compare_are_refused(
    eager: Run, words: tuple[str, ...], code: int, error: str, mention: str
) -> None:
    refused(eager("diff-config", *words), code, error, mention)


@pytest.mark.parametrize("text", ["", "hello", "[]", '{"model": "x"}', '{"factors": [{}]}'])
def test_a_file_that_is_no_snapshot_is_refused(eager: Run, workplace: Path, text: str) -> None:
    (workplace / "file.json").write_text(text)
    refused(eager("diff-config", "file.json", "current"), 1, "bad-snapshot", "inspect-key --json")


def test_a_key_that_is_not_stored_is_refused(eager: Run) -> None:
    refused(eager("inspect-key", "0123456789ab"), 1, "unknown-key", "cache ls")


@pytest.mark.parametrize("command", ["warm", "run", "inspect-key", "diff-config"])
def test_an_option_that_no_command_has_is_wrong_usage(eager: Run, command: str) -> None:
    done = eager(command, "--nope", "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "usage")
    assert "--nope" in json.dumps(done.json)


@pytest.mark.parametrize("flag", ["--config", "--from", "--summary", "--cache-dir"])
def test_a_home_that_nobody_has_is_refused_by_name(eager: Run, flag: str) -> None:
    done = eager("warm", "--check", flag, "~nonesuch/file")
    refused(done, 1, "no-home-directory", "~nonesuch/file")


def test_a_model_below_a_home_that_nobody_has_is_unknown(eager: Run, workplace: Path) -> None:
    (workplace / "warm.toml").write_text('[[warm]]\nmodel = "~nonesuch/model"\n')
    refused(eager("warm", "--check", "--from", "warm.toml"), 1, "unknown-model", "~nonesuch/model")


def test_a_config_file_that_is_not_there_is_refused(eager: Run) -> None:
    refused(eager("warm", "--config", "none.toml"), 2, "no-config-file", "none.toml")
