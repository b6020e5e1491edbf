from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
MODEL = ("--prove", "tiny-llama", "--layers", "1")


@pytest.fixture
def snapshot(eager: Run, workplace: Path) -> Path:
    path = workplace / "before.json"
    path.write_text(eager("inspect-key", "--json", "--layers", "1").out)
    return path


def edit(snapshot: Path, **values: Any) -> None:
    """Gives factors other values, as another machine would have written them."""
    data = json.loads(snapshot.read_text())
    for factor in data["factors"]:
        factor["value"] = values.get(factor["name"], factor["value"])
    snapshot.write_text(json.dumps(data))


def test_a_change_that_changes_no_code_is_proved(snapshot: Path, eager: Run) -> None:
    words = ("diff-config", snapshot, "current", "-O", "max_autotune=true", *MODEL)
    done = eager(*words, "--json", "--exit-code")
    assert (done.code, done.json["equal"]) == (3, False), "a proof does not make keys equal"
    found = {
        "code": "same",
        "units": 0,
        "of": 2,
        "differing": [],
        "bitwise": True,
        "max_abs_diff": 0.0,
        "reason": "",
    }
    named = {"group": "inductor", "name": "max_autotune", "before": False, "after": True}
    assert done.json["proof"] == {
        "model": "tiny-llama",
        "pieces": 2,
        "changes": [named | found],
        "together": found | {"changes": 1},
        "elsewhere": [],
    }
    [change] = done.json["changes"]
    assert change["note"].endswith("; proved: no piece's code differs")
    assert "side a" in done.err
    assert "compiled" in done.err
    again = eager(*words)
    assert again.code == 0
    assert "compiled" not in again.err
    first, *others = again.out.splitlines()
    assert first == "tiny-llama: inductor.max_autotune changed: no piece's code differs"
    assert "1 difference affects the key: inductor.max_autotune" in others
    assert eager(*words, "-q").err == ""


def test_what_cannot_be_proved_here_is_said_and_what_can_is_proved_beside_it(
    snapshot: Path, eager: Run
) -> None:
    edit(snapshot, torch="9.9.0", cpu_features=["neon"], post_grad_custom_pre_pass=f"f#{'0' * 64}")
    done = eager("diff-config", snapshot, "current", "--dtype", "bfloat16", *MODEL, "--json")
    proof = done.json["proof"]
    rows = {f"{row['group']}.{row['name']}": row for row in proof["changes"]}
    assert {name: row["code"] for name, row in rows.items()} == {
        "spec.dtype": "differs",
        "versions.torch": "unproved",
        "system.cpu_features": "unproved",
        "inductor.post_grad_custom_pre_pass": "unproved",
    }
    assert rows["spec.dtype"]["bitwise"] is False
    assert 0 < rows["spec.dtype"]["max_abs_diff"] < 1
    assert proof["together"]["changes"] == 1
    notes = {f"{c['group']}.{c['name']}": c["note"] for c in done.json["changes"]}
    assert notes.keys() == rows.keys()
    assert notes["versions.torch"] == (
        "cannot be proved here: another version would have to be installed"
    )


def test_sources_that_differ_are_not_proved(factory: Path, eager: Run) -> None:
    first = eager("warm", "factory:small", "--json").json["key"]
    code = factory.read_text().replace("vocab_size=128", "vocab_size=64 + 64")
    factory.write_text(code + "\n# another version\n")
    second = eager("warm", "factory:small", "--dtype", "bfloat16", "--json").json["key"]
    done = eager("diff-config", first[:12], second[:12], "--prove", "factory:small", "--json")
    codes = {row["group"]: row["code"] for row in done.json["proof"]["changes"]}
    assert codes["spec"] == "differs"
    assert {row["group"] for row in done.json["changes"]} == codes.keys()
    assert all(code == "unproved" for group, code in codes.items() if group != "spec")


def test_live_sides_are_of_the_model_of_the_proof(
    llama_dir: Path, workplace: Path, eager: Run
) -> None:
    config = json.loads((llama_dir / "config.json").read_text())
    narrow = workplace / "narrow"
    narrow.mkdir()
    (narrow / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    # Freezing ends the proof of the first side before anything is compiled.
    words = ("current", "defaults", "--dtype", "float32", "-O", "freezing=true")
    done = eager("diff-config", *words, "--prove", narrow, "--json")
    assert {c["name"]: c["after"] for c in done.json["changes"]} == {
        "backend": "inductor",
        "dtype": "bfloat16",
        "freezing": False,
    }
    proof = done.json["proof"]
    assert (proof["pieces"], proof["together"]["changes"]) == (None, 0)
    for row in (*proof["changes"], proof["together"]):
        assert row["code"] == "unproved"
        assert row["reason"].startswith("side a cannot be compiled: freezing puts the weights")


def test_equal_sides_compile_nothing(snapshot: Path, eager: Run, cache: Path) -> None:
    done = eager("diff-config", snapshot, "current", *MODEL, "--json")
    assert done.json["equal"]
    assert done.json["proof"]["changes"] == []
    assert not (cache / "v1" / "units").exists()
    assert done.err == ""


def test_a_model_that_is_not_there_is_an_error(snapshot: Path, eager: Run) -> None:
    done = eager("diff-config", snapshot, "current", "--prove", "nonesuch")
    assert (done.code, done.error) == (1, "unknown-model")


@pytest.mark.slow
def test_inductor_tells_code_from_results(workplace: Path, vllmc: Run) -> None:
    path = workplace / "before.json"
    shape = ("--compile-range", "1:64", "--layers", "1")
    path.write_text(vllmc("inspect-key", "--json", *shape).out)
    done = vllmc(
        "diff-config",
        path,
        "current",
        *shape,
        *("-O", "size_asserts=false", "-O", "triton.unique_kernel_names=false"),
        *("--prove", "tiny-llama"),
    )
    assert [line.rstrip() for line in done.out.splitlines()[:6]] == [
        "tiny-llama: both changes together: the code of 2 of 2 units differs, the results on "
        "random inputs are equal bit for bit",
        "",
        "OPTION                               BEFORE  AFTER  CODE           RESULTS",
        "inductor.size_asserts                true    false  2 of 2 differ  equal",
        "inductor.triton.unique_kernel_names  true    false  same           equal",
        "all together                                        2 of 2 differ  equal",
    ]
