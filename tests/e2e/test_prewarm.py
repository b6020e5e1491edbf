"""Several models in one call: matrix files, retries, reports, and the schema of what is printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from caches import stored

Run = Callable[..., Any]
SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "warm.schema.json"

# Fails as long as there is no file `network`, as a model does whose files cannot be fetched.
FLAKY = """
from pathlib import Path
from transformers import LlamaForCausalLM
from factory import config


def fetched():
    found = Path("network")
    if not found.exists():
        found.touch()
        raise OSError("the network is down")
    return LlamaForCausalLM(config())


def lost():
    raise OSError("the network is gone")
"""


BROKEN = """
import torch


class Model(torch.nn.Module):
    def forward(self, input_ids, position_ids):
        return input_ids if input_ids.sum() else position_ids
"""


# Interrupted when it is built to be captured, not when its name is looked up.
STOPPED = """
from transformers import LlamaForCausalLM
from factory import config

built = []


def make():
    built.append(1)
    if len(built) == 2:
        raise KeyboardInterrupt
    return LlamaForCausalLM(config())
"""

# Puts a file where the directory of a report was.
TAKEN = """
import shutil
from pathlib import Path
from transformers import LlamaForCausalLM
from factory import config

built = []


def make():
    built.append(1)
    if len(built) == 2:
        shutil.rmtree("reports")
        Path("reports").touch()
    return LlamaForCausalLM(config())
"""


@pytest.fixture(scope="session")
def schema() -> Any:
    contents = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(contents)
    return jsonschema.Draft202012Validator(contents)


@pytest.fixture
def matrix(workplace: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = workplace / "warm.toml"
        path.write_text(text)
        return path

    return write


TWO = """
[[warm]]
model = "tiny-llama"

[[warm]]
name = "half"
model = "tiny-llama"
dtype = "bfloat16"
[warm.inductor]
epilogue_fusion = false
"""


def test_each_entry_is_warmed_with_options_of_its_own(
    warmed: Any, matrix: Any, eager: Run, schema: Any
) -> None:
    first = eager("warm", "--from", matrix(TWO), "--json")
    assert first.code == 0, first.err
    plain, half = first.json["results"]
    assert (plain["name"], plain["outcome"], plain["key"]) == (
        "tiny-llama",
        "hit",
        warmed.said["key"],
    )
    assert (half["name"], half["model"], half["outcome"]) == ("half", "tiny-llama", "compiled")
    changes = {c["name"]: c["origin_after"] for c in half["miss"]["changes"]}
    assert changes == {"dtype": "file:warm.toml:8", "epilogue_fusion": "file:warm.toml:10"}
    assert "[2/2] half" in first.err.splitlines()
    schema.validate(first.json)
    alone = ("--dtype", "bfloat16", "-O", "epilogue_fusion=false")
    assert eager("warm", *alone, "--check", "--json").json["key"] == half["key"]


def test_flags_beat_an_entry_which_beats_environment_and_config_file(
    matrix: Any, workplace: Path, vllmc: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLMC_DTYPE", "float16")
    (workplace / "vllmc.toml").write_text("layers = 1\n[inductor]\nmax_autotune = true\n")
    path = matrix(
        '[[warm]]\nmodel = "tiny-llama"\n'
        '[[warm]]\nname = "own"\nmodel = "tiny-llama"\ndtype = "bfloat16"\nlayers = 3\n'
        "[warm.inductor]\nmax_autotune = false\n"
    )

    def keys(*words: str | Path) -> list[str]:
        found = vllmc("warm", *words, "--check", "--json").json
        return [row["key"] for row in found.get("results", [found])]

    settled = ("-O", "max_autotune=false", "--layers", "3", "--dtype")
    assert keys("--from", path) == [*keys(), *keys(*settled, "bfloat16")]
    assert keys("--from", path, "--dtype", "float32")[1:] == keys(*settled, "float32")


def test_one_entry_that_fails_does_not_stop_the_others(
    warmed: Any, factory: Path, matrix: Any, eager: Run, workplace: Path, schema: Any
) -> None:
    (workplace / "flaky.py").write_text(FLAKY)
    path = matrix(
        '[[warm]]\nmodel = "nonesuch"\n[[warm]]\nmodel = "flaky:lost"\n'
        '[[warm]]\nmodel = "tiny-llama"\n'
    )
    done = eager("warm", "--from", path, "--json", "--junit", "warm.xml", "--summary", "warm.md")
    assert done.code == 1
    unknown, lost, found = done.json["results"]
    assert (unknown["outcome"], unknown["key"], unknown["error"]["code"]) == (
        "failed",
        None,
        "unknown-model",
    )
    assert (lost["outcome"], lost["error"]["code"], found["outcome"]) == (
        "failed",
        "os-error",
        "hit",
    )
    schema.validate(done.json)
    cases = ElementTree.parse(workplace / "warm.xml").getroot().iter("testcase")
    assert [(case.get("name"), len(case)) for case in cases] == [
        ("nonesuch", 1),
        ("flaky:lost", 1),
        ("tiny-llama", 0),
    ]
    page = (workplace / "warm.md").read_text()
    assert "| nonesuch | **failed** |" in page
    assert "flaky:lost: the network is gone (hint: " in page


def test_what_failed_is_tried_again_after_all_the_others(
    warmed: Any, factory: Path, matrix: Any, eager: Run, workplace: Path, schema: Any
) -> None:
    (workplace / "flaky.py").write_text(FLAKY)
    path = matrix(
        '[[warm]]\nmodel = "flaky:fetched"\n[[warm]]\nmodel = "flaky:lost"\n'
        '[[warm]]\nmodel = "tiny-llama"\n'
    )
    done = eager("warm", "--from", path, "--retries", "2", "--json")
    assert [(r["outcome"], r["attempts"]) for r in done.json["results"]] == [
        ("compiled", 2),
        ("failed", 3),
        ("hit", 1),
    ]
    assert done.code == 1
    stages = [line for line in done.err.splitlines() if line.startswith("[") and "/3] " in line]
    assert [line for line in stages if "piece" not in line] == [
        "[1/3] flaky:fetched",
        "[2/3] flaky:lost",
        "[3/3] tiny-llama",
        "[1/3] flaky:fetched, attempt 2",
        "[2/3] flaky:lost, attempt 2",
        "[2/3] flaky:lost, attempt 3",
    ]
    schema.validate(done.json)


def test_a_mistake_in_one_entry_stops_all_before_anything_is_compiled(
    matrix: Any, eager: Run, cache: Path
) -> None:
    path = matrix(TWO + "\n[[warm]]\nname = 'bad'\nmodel = 'tiny-llama'\ndevice = 'tpu'\n")
    done = eager("warm", "--from", path, "--retries", "3")
    assert (done.code, done.error) == (2, "bad-value")
    assert "file:warm.toml:15" in done.err
    option = TWO + "\n[[warm]]\nname = 'bad'\nmodel = 'tiny-llama'\ninductor.max_autotoon = true\n"
    done = eager("warm", "--from", matrix(option))
    assert (done.code, done.error) == (2, "unknown-option")
    for text in ("[[warm]]\nmodel = \n", "[[warm]]\nmodel = 'a'\ndtpye = 'b'\n", TWO + TWO, ""):
        assert eager("warm", "--from", matrix(text)).code == 2
    assert eager("warm", "--from", "nonesuch.toml").code == 2
    assert stored(cache) == []


def test_check_exits_with_the_worst_of_the_entries(
    warmed: Any, matrix: Any, eager: Run, damage: Any, cache: Path, schema: Any
) -> None:
    path = matrix(TWO)
    some = eager("warm", "--from", path, "--check", "--json")
    assert [row["outcome"] for row in some.json["results"]] == ["would-hit", "would-miss"]
    assert some.code == 3
    schema.validate(some.json)
    damage(cache, warmed.said["units"][0]["artifact"])
    unsafe = eager("warm", "--from", path, "--check", "--json")
    assert (unsafe.code, unsafe.json["results"][0]["outcome"]) == (4, "unsafe")
    schema.validate(unsafe.json)


def test_one_entry_is_a_list_of_one(warmed: Any, matrix: Any, eager: Run, schema: Any) -> None:
    done = eager("warm", "--from", matrix('[[warm]]\nmodel = "tiny-llama"\n'), "--json")
    [row] = done.json["results"]
    assert row["outcome"] == "hit"
    schema.validate(done.json)


def test_what_a_hit_saved_is_what_its_units_took(warmed: Any, eager: Run) -> None:
    took = sum(unit["seconds"] for unit in warmed.said["units"])
    found = eager("warm", "--json").json
    assert found["saved_seconds"] == pytest.approx(took, abs=0.001)
    assert took > 0
    assert warmed.said["saved_seconds"] == 0


def test_the_schema_describes_single_models_and_errors_too(
    warmed: Any, factory: Path, eager: Run, schema: Any
) -> None:
    for words in (
        ("tiny-llama",),
        ("tiny-llama", "factory:small"),
        ("--layers", "3", "--check"),
        ("--dtype", "float16", "--check"),
        ("--layer-names", "baked", "--split-kv-update", "--quantize", "int8-dynamic"),
        ("nonesuch",),
        ("--check", "--force"),
    ):
        said = eager("warm", *words, "--json").json
        schema.validate(said)


def test_the_schema_refuses_what_it_does_not_describe(warmed: Any, schema: Any) -> None:
    said = warmed.said
    schema.validate(said)
    for wrong in (
        said | {"more": 1},
        said | {"outcome": "failed"},
        said | {"key": None},
        said | {"units": [said["units"][0] | {"more": 1}]},
        {name: value for name, value in said.items() if name != "counts"},
        {"schema_version": 1, "command": "warm", "results": [said]},
        {"schema_version": 1, "command": "warm", "results": []},
    ):
        assert not schema.is_valid(wrong)


def test_on_github_findings_are_commands_on_stderr_and_stdout_stays_one_object(
    warmed: Any, matrix: Any, eager: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix(TWO)
    (workplace / "step.md").touch()
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_WORKSPACE", str(workplace.parent))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workplace / "step.md"))
    done = eager("warm", "--from", "warm.toml", "--check", "--json", "-q")
    assert len(done.json["results"]) == 2
    [line] = [line for line in done.err.splitlines() if line.startswith("::")]
    assert line.startswith(
        "::error file=work/warm.toml,line=5,title=half would have to compile::the nearest stored "
        "program differs in spec.dtype, inductor.epilogue_fusion ("
    )
    assert "| half | **would-miss** |" in (workplace / "step.md").read_text()
    monkeypatch.delenv("GITHUB_ACTIONS")
    assert "::" not in eager("warm", "--from", "warm.toml", "--check", "-q").err


def test_a_single_model_that_fails_is_reported_too(eager: Run, workplace: Path) -> None:
    (workplace / "broken.py").write_text(BROKEN)
    done = eager("warm", "broken:Model", "--junit", "warm.xml", "--summary", "warm.md")
    assert (done.code, done.error) == (1, "unsupported-model")
    assert done.err.count("error[") == 1
    [case] = ElementTree.parse(workplace / "warm.xml").getroot().iter("testcase")
    assert len(case) == 1
    assert "**failed**" in (workplace / "warm.md").read_text()


def test_an_interrupt_leaves_reports_of_what_was_done(
    warmed: Any, factory: Path, matrix: Any, eager: Run, workplace: Path
) -> None:
    (workplace / "stopped.py").write_text(STOPPED)
    path = matrix(
        '[[warm]]\nmodel = "tiny-llama"\n[[warm]]\nmodel = "stopped:make"\n'
        '[[warm]]\nname = "last"\nmodel = "tiny-llama"\nlayers = 1\n'
    )
    done = eager("warm", "--from", path, "--junit", "warm.xml", "--summary", "warm.md")
    assert (done.code, done.error, done.out) == (130, "interrupted", "")
    cases = ElementTree.parse(workplace / "warm.xml").getroot().iter("testcase")
    found = [(case.get("name"), [failure.get("type") for failure in case]) for case in cases]
    assert found == [
        ("tiny-llama", []),
        ("stopped:make", ["interrupted"]),
        ("last", ["interrupted"]),
    ]
    page = (workplace / "warm.md").read_text()
    assert "| tiny-llama | **hit** |" in page
    assert "last: stopped before the end" in page


def test_a_report_that_cannot_be_written_is_found_before_anything_is_compiled(
    matrix: Any, eager: Run, workplace: Path, cache: Path
) -> None:
    path = matrix(TWO)
    for flag in ("--summary", "--junit", "--code-quality"):
        done = eager("warm", "--from", path, flag, path / "report")
        assert (done.code, done.error) == (1, "not-writable")
        assert f"{flag} cannot be written to {path}/report" in done.err
    assert stored(cache) == []
    assert sorted(workplace.iterdir()) == [path], "nothing is left behind"


def test_a_report_that_cannot_be_written_at_the_end_costs_no_other(
    factory: Path, matrix: Any, eager: Run, workplace: Path
) -> None:
    (workplace / "taken.py").write_text(TAKEN)
    path = matrix('[[warm]]\nmodel = "taken:make"\n')
    words = ("--summary", "reports/warm.md", "--junit", "warm.xml", "--json")
    done = eager("warm", "--from", path, *words)
    assert (done.code, done.error) == (1, "not-writable")
    assert done.json["results"][0]["outcome"] == "compiled"
    assert (workplace / "warm.xml").is_file()


def test_what_differs_from_another_entry_was_asked_for_and_is_not_told(
    warmed: Any, matrix: Any, eager: Run, workplace: Path
) -> None:
    path = matrix('[[warm]]\nmodel = "tiny-llama"\n[[warm]]\nname = "own"\n'
                  'model = "tiny-llama"\nlayers = 3\n')  # fmt: skip
    done = eager("warm", "--from", path, "--summary", "warm.md")
    assert done.code == 0
    told = done.out + (workplace / "warm.md").read_text()
    assert "differs" not in told
    assert "to have it as it was" not in told


def test_gitlab_s_report_is_of_a_matrix_file(warmed: Any, matrix: Any, eager: Run) -> None:
    page = matrix(TWO).parent / "quality.json"
    done = eager("warm", "--from", "warm.toml", "--check", "--code-quality", page)
    assert done.code == 3
    [found] = json.loads(page.read_text())
    assert found["location"] == {"path": "warm.toml", "lines": {"begin": 5}}


REFUSED = [
    ("--from", "warm.toml", "tiny-llama"),
    ("--from", "warm.toml", "--dump", "dump"),
    ("--code-quality", "quality.json"),
    ("--retries", "-1"),
    ("--retries", "many"),
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_be_meant_together_is_refused(
    matrix: Any, eager: Run, words: tuple[str, ...]
) -> None:
    matrix(TWO)
    assert eager("warm", *words).code == 2


# Of each the generated code is another.
STATES = {
    "plain": "",
    "unasserted": "size_asserts = false",
    "named": 'cpp.descriptive_names = "inductor_node"',
}


@pytest.mark.slow
@pytest.mark.thorough
def test_what_is_compiled_depends_on_no_entry_before_it(
    matrix: Any, spawn: Run, tmp_path: Path
) -> None:
    """The first of a process is what a fresh one compiles, and each end is first once."""

    def artifacts(*names: str) -> dict[str, list[str]]:
        path = matrix(
            "".join(
                f'[[warm]]\nname = "{name}"\nmodel = "tiny-llama"\nlayers = 1\n'
                f"[warm.inductor]\n{STATES[name]}\n"
                for name in names
            )
        )
        place = tmp_path / "-".join(names)
        done = spawn("warm", "--from", path, "--json", "--jobs", "1", "--cache-dir", place)
        assert done.code == 0, done.err
        return {
            row["name"]: [unit["artifact"] for unit in row["units"]] for row in done.json["results"]
        }

    forwards = artifacts(*STATES)
    assert len({str(found) for found in forwards.values()}) == len(STATES)
    assert artifacts(*reversed(STATES)) == forwards
