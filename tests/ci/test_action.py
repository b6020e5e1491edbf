"""action.yml: its steps are run one after the other, as GitHub's runner would."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
EXPRESSION = re.compile(r"\$\{\{ (\S+) \}\}")

Bash = Callable[..., Any]


@pytest.fixture
def step(bash: Bash, workplace: Path) -> Callable[..., Any]:
    """Runs the step of that name with these inputs; gives what it did and its outputs."""

    def run(name: str, **inputs: str) -> tuple[Any, dict[str, str]]:
        given = {
            key: EXPRESSION.sub(str(workplace), declared.get("default", ""))
            for key, declared in ACTION["inputs"].items()
        } | {key.replace("_", "-"): value for key, value in inputs.items()}
        env = {
            variable: EXPRESSION.sub(lambda m: given[m[1].removeprefix("inputs.")], text)
            for variable, text in STEPS[name]["env"].items()
        }
        outputs = workplace / "outputs"
        outputs.write_text("")
        done = bash(
            STEPS[name]["run"],
            env
            | {
                "GITHUB_ACTIONS": "true",
                "GITHUB_ACTION_PATH": str(ROOT),
                "GITHUB_WORKSPACE": str(workplace),
                "GITHUB_OUTPUT": str(outputs),
                "GITHUB_STEP_SUMMARY": str(workplace / "summary.md"),
            },
        )
        lines = outputs.read_text().splitlines()
        return done, dict(line.split("=", 1) for line in lines)

    return run


def test_warm_then_check_and_nothing_to_save_the_second_time(
    step: Callable[..., Any], workplace: Path
) -> None:
    (workplace / "warm.toml").write_text('[[warm]]\nmodel = "tiny-llama"\nlayers = 1\n')
    inputs = {"from": "warm.toml", "options": "--dtype 'bfloat16' --retries 1"}
    named, first = step("Name the programs", **inputs)
    assert named.code == 0, named.err
    assert re.fullmatch(r"[0-9a-f]{16}", first["digest"])
    assert "::" not in named.err
    warm, outputs = step("Warm", **inputs)
    assert warm.code == 0, warm.err
    assert outputs == {"compiled": "2"}
    check, _ = step("Check", **inputs)
    assert check.code == 0, check.err
    again, outputs = step("Warm", **inputs)
    assert (again.code, outputs) == (0, {"compiled": "0"})
    assert (workplace / "summary.md").read_text().count("### vllmc warm") == 2
    [case] = ElementTree.parse(workplace / ".vllmc-reports" / "check.xml").iter("testcase")
    assert list(case) == []
    programs = workplace / ".vllmc-cache" / "v1" / "programs"
    for size, left in (("2GB", True), ("1B", False)):
        pruned, _ = step("Prune", max_size=size)
        assert pruned.code == 0, pruned.err
        assert any(path.is_file() for path in programs.rglob("*")) == left


@pytest.mark.thorough
def test_a_model_that_fails_fails_the_step_and_what_was_compiled_is_saved(
    step: Callable[..., Any], workplace: Path
) -> None:
    (workplace / "warm.toml").write_text(
        '[[warm]]\nmodel = "nonesuch"\n[[warm]]\nmodel = "tiny-llama"\nlayers = 1\n'
    )
    done, outputs = step("Warm", **{"from": "warm.toml"})
    assert (done.code, outputs) == (1, {"compiled": "2"})
    assert "::error file=warm.toml,line=1,title=nonesuch could not be compiled::" in done.err
    assert "!cancelled()" in STEPS["Save"]["if"]


@pytest.mark.thorough
def test_models_are_given_by_name_too(step: Callable[..., Any]) -> None:
    words = {"model": "tiny-llama\n  nonesuch"}
    done, outputs = step("Warm", **words)
    assert (done.code, outputs) == (1, {"compiled": "0"})
    assert "error[unknown-model]: there is no model 'nonesuch'" in done.err
    check, _ = step("Check", model="tiny-llama", options="--layers 1")
    assert check.code == 3


def test_a_warm_that_is_killed_fails_the_step_without_a_traceback(
    step: Callable[..., Any], workplace: Path
) -> None:
    (workplace / "killed.py").write_text("import os\n\nos.kill(os.getpid(), 9)\n")
    done, outputs = step("Warm", model="killed:Model")
    assert (done.code, outputs) == (137, {"compiled": "0"})
    assert "Traceback" not in done.err


def test_a_mistake_is_found_before_anything_is_restored(step: Callable[..., Any]) -> None:
    done, outputs = step("Name the programs", options="--dtype float7")
    assert (done.code, outputs) == (2, {})
    done, outputs = step("Name the programs", options="--dtype 'float32")
    assert (done.code, outputs) == (1, {})
    assert "No closing quotation" in done.err


@pytest.mark.thorough
def test_the_digest_tells_programs_apart_and_not_their_order(step: Callable[..., Any]) -> None:
    def digest(model: str, options: str = "") -> str:
        _, outputs = step("Name the programs", model=model, options=options)
        return outputs["digest"]

    both = digest("tiny-llama qwen3-0.6b")
    assert both == digest("qwen3-0.6b tiny-llama")
    assert len({both, digest("tiny-llama"), digest("tiny-llama", "--layers 1")}) == 3


def test_each_expression_names_an_input_or_an_earlier_step() -> None:
    known = {f"inputs.{name}" for name in ACTION["inputs"]} | {
        "github.workspace",
        "github.run_id",
        "github.run_attempt",
        "runner.os",
        "runner.arch",
    }
    for step in ACTION["runs"]["steps"]:
        for text in (*step.get("with", {}).values(), *step.get("env", {}).values()):
            for name in EXPRESSION.findall(text):
                assert name in known, name
        if "id" in step:
            results = {"key": ["digest"], "warm": ["compiled"], "restore": ["cache-primary-key"]}
            known |= {f"steps.{step['id']}.outputs.{name}" for name in results[step["id"]]}
    # What pruning took is checked for, and what is saved was pruned.
    assert list(STEPS) == [
        "Install vllmc", "Name the programs", "Restore", "Warm", "Prune", "Check", "Save"
    ]  # fmt: skip


def test_what_is_saved_is_found_by_the_restore_keys() -> None:
    restore, save = STEPS["Restore"]["with"], STEPS["Save"]["with"]
    assert save["path"] == restore["path"]
    assert save["key"] == "${{ steps.restore.outputs.cache-primary-key }}"
    for prefix in restore["restore-keys"].split("\n"):
        assert restore["key"].startswith(prefix)


def test_composite_steps_say_which_shell_runs_them() -> None:
    assert ACTION["runs"]["using"] == "composite"
    for step in ACTION["runs"]["steps"]:
        assert ("run" in step) != ("uses" in step)
        assert ("run" in step) == (step.get("shell") == "bash")


def test_the_script_is_clean_shell(bash: Bash) -> None:
    assert bash(f"bash -n {ROOT}/ci/prewarm").code == 0
    assert (ROOT / "ci" / "prewarm").stat().st_mode & 0o111
    if shutil.which("shellcheck"):
        assert bash(f"shellcheck {ROOT}/ci/prewarm").out == ""
