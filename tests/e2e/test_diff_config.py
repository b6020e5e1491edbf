from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def snapshot(eager: Run, workplace: Path) -> Path:
    path = workplace / "before.json"
    path.write_text(eager("inspect-key", "--json").out)
    return path


def changes(done: Any) -> list[tuple[str, str, Any, Any]]:
    return [(c["group"], c["name"], c["before"], c["after"]) for c in done.json["changes"]]


def test_a_snapshot_of_now_is_equal_to_current(snapshot: Path, eager: Run) -> None:
    done = eager("diff-config", snapshot, "current", "--exit-code", "--json")
    assert (done.code, done.json["command"], done.json["equal"]) == (0, "diff-config", True)
    assert done.json["changes"] == []
    assert done.json["a"] == {"kind": "snapshot", "name": str(snapshot)}
    assert done.json["b"]["kind"] == "current"
    assert done.json["same"] > 600


def test_the_options_apply_to_current_and_the_field_is_named(snapshot: Path, eager: Run) -> None:
    words = ("diff-config", snapshot, "current", "-O", "max_autotune=true")
    done = eager(*words, "--json")
    assert (done.code, done.json["equal"]) == (0, False), "3 only with --exit-code"
    assert changes(done) == [("inductor", "max_autotune", False, True)]
    [change] = done.json["changes"]
    assert set(change) == {
        "group",
        "name",
        "before",
        "after",
        "kind",
        "class",
        "affects_key",
        "origin_before",
        "origin_after",
        "note",
        "restore",
    }
    assert (change["kind"], change["class"], change["affects_key"]) == ("changed", "codegen", True)
    assert (change["origin_before"], change["origin_after"]) == ("default", "flag")
    assert eager(*words, "--exit-code").code == 3
    back = eager("diff-config", "current", snapshot, "-O", "max_autotune=true", "--json")
    assert changes(back) == [("inductor", "max_autotune", True, False)]


def test_a_stored_key_is_compared_for_the_model_of_its_record(
    factory: Path, eager: Run, workplace: Path
) -> None:
    key = eager("warm", "factory:small", "--json").json["key"]
    done = eager("diff-config", key[:10], "current", "--json", "--exit-code")
    assert (done.code, done.json["equal"]) == (0, True)
    assert done.json["a"] == {"kind": "key", "name": key[:12]}
    other = eager(
        "diff-config", key[:10], "current", "--model", "factory:other_vocabulary", "--json"
    )
    assert not other.json["equal"]
    assert {change["group"] for change in other.json["changes"]} == {"model"}


def test_two_stored_keys_show_the_option_that_tells_them_apart(warmed: Any, eager: Run) -> None:
    other = eager("warm", "-O", "epilogue_fusion=false", "--json").json["key"]
    done = eager("diff-config", warmed.said["key"][:12], other[:12], "--json")
    assert changes(done) == [("inductor", "epilogue_fusion", True, False)]


def test_only_all_lists_what_does_not_affect_the_key(
    snapshot: Path, eager: Run, workplace: Path
) -> None:
    data = json.loads(snapshot.read_text())
    [compiler] = [f for f in data["factors"] if f["name"] == "cxx_compiler"]
    compiler["value"] = "g++: another one"
    snapshot.write_text(json.dumps(data))
    plain = eager("diff-config", snapshot, "current", "--exit-code", "--json")
    assert (plain.code, plain.json["equal"], plain.json["changes"]) == (0, True, [])
    full = eager("diff-config", snapshot, "current", "--exit-code", "--all", "--json")
    assert (full.code, full.json["equal"]) == (0, True)
    [change] = full.json["changes"]
    assert (change["name"], change["affects_key"]) == ("cxx_compiler", False)
    assert full.json["same"] == plain.json["same"]


def test_env_sets_variables_of_current(snapshot: Path, eager: Run, cache: Path) -> None:
    done = eager(
        "diff-config",
        snapshot,
        "current",
        "--env",
        "TORCHINDUCTOR_MAX_AUTOTUNE=1",
        "--exit-code",
        "--json",
    )
    assert done.code == 3
    assert changes(done) == [("inductor", "max_autotune", False, True)]
    assert done.json["changes"][0]["origin_after"] == "env:TORCHINDUCTOR_MAX_AUTOTUNE"


@pytest.mark.parametrize("given", [True, False])
def test_a_switch_applies_to_current_under_other_variables_too(
    given: bool, eager: Run, workplace: Path
) -> None:
    # The file says the opposite, so that either form of the switch is needed.
    (workplace / "vllmc.toml").write_text(f"split-kv-update = {str(not given).lower()}\n")
    flag = "--split-kv-update" if given else "--no-split-kv-update"
    row = eager(
        "diff-config", "current", "defaults", flag, "--env", "VLLMC_DTYPE=float32", "--json"
    ).json
    changed = {f"{c['group']}.{c['name']}": c["before"] for c in row["changes"]}
    assert changed.get("spec.split_kv_update", False) is given


def test_defaults_are_without_flags_variables_and_file(
    workplace: Path,
    vllmc: Run,
    monkeypatch: pytest.MonkeyPatch,
    cache: Path,
) -> None:
    (workplace / "vllmc.toml").write_text("layers = 3\n[inductor]\nepilogue_fusion = false\n")
    monkeypatch.setenv("VLLMC_DTYPE", "bfloat16")
    monkeypatch.setenv("TENSORIFY_PYTHON_SCALARS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "xdg"))
    done = vllmc("diff-config", "defaults", "current", "-O", "max_autotune=true", "--json")
    assert done.json["a"] == {"kind": "defaults", "name": ""}
    origins = {
        f"{change['group']}.{change['name']}": (change["origin_before"], change["origin_after"])
        for change in done.json["changes"]
    }
    assert origins == {
        "environment.TENSORIFY_PYTHON_SCALARS": ("default", "env:TENSORIFY_PYTHON_SCALARS"),
        "inductor.epilogue_fusion": ("default", "file:vllmc.toml:3"),
        "inductor.max_autotune": ("default", "flag"),
        "model.num_hidden_layers": ("vllmc", "file:vllmc.toml:1"),
        "spec.dtype": ("default", "env:VLLMC_DTYPE"),
    }
    assert not (workplace / "xdg").exists(), "the cache directory is the same for both"


def test_an_error_under_another_environment_is_that_error(snapshot: Path, eager: Run) -> None:
    done = eager("diff-config", "current", "defaults", "--model", "nonesuch", "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "unknown-model")
    done = eager("diff-config", snapshot, "current", "--env", "VLLMC_DTYPE=int3", "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "bad-value")


def test_a_model_of_a_record_that_is_not_here_asks_for_its_name(
    llama_dir: Path, eager: Run
) -> None:
    key = eager("warm", llama_dir, "--json").json["key"]
    done = eager("diff-config", key[:12], "current")
    assert (done.code, done.error) == (1, "unknown-model")
    assert "--model" in done.err
    found = eager("diff-config", key[:12], "current", "--model", llama_dir, "--exit-code")
    assert found.code == 0


def test_a_person_reads_the_verdict_and_the_rows(snapshot: Path, eager: Run) -> None:
    same = eager("diff-config", snapshot, "current").out
    assert "equal: no difference affects the key" in same
    words = ("diff-config", snapshot, "current", "-O", "max_autotune=true")
    assert "1 difference affects the key" in eager(*words).out
    text = eager(*words, "-O", "epilogue_fusion=false").out
    assert "2 differences affect the key" in text
    assert "inductor.max_autotune     false -> true  flag" in text
