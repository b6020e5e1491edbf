from __future__ import annotations

import os
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmc.core.diagnose.doctor_table import KINDS

Run = Callable[..., Any]
LEVELS = ("problem", "warning", "note")
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(autouse=True)
def _plain_surroundings(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of what the machine of the tests brings: its CI, its variables of torch."""
    for name in os.environ:
        if name.startswith(("TORCH", "TRITON", "CI", "GITLAB", "SUDO_", "KUBERNETES_", "HF_")):
            monkeypatch.delenv(name)


def ids(done: Any) -> set[str]:
    return {finding["id"] for finding in done.json["findings"]}


def test_people_and_machines_are_told_the_same_findings(vllmc: Run) -> None:
    machine, plain = vllmc("doctor", "--json"), vllmc("doctor")
    assert machine.json["command"] == "doctor"
    assert set(machine.json) == {"schema_version", "command", "findings", "facts"}
    assert machine.code == plain.code
    assert machine.err == plain.err == ""
    heads = [line.split() for line in plain.out.splitlines() if line.startswith(tuple(LEVELS))]
    findings = machine.json["findings"]
    assert heads == [[finding["level"], finding["id"]] for finding in findings]
    for finding in findings:
        assert set(finding) == {"id", "level", "what", "why", "fix"}
        assert finding["level"] == KINDS[finding["id"]].level
        for text in (f"{finding['what']}.", finding["why"], finding["fix"]):
            assert text in plain.out


def test_the_facts_are_those_of_this_process(vllmc: Run, workplace: Path) -> None:
    facts = vllmc("doctor", "--json").json["facts"]
    [layer] = facts["layers"]
    cache = workplace.parent / "cache"
    assert (layer["place"]["path"], layer["place"]["state"]) == (str(cache), "missing")
    assert (layer["given"], layer["origin"]) == (str(cache), "env:VLLMC_CACHE_DIR")
    assert facts["user"]["uid"] == os.geteuid()
    assert "torch" in [package["name"] for package in facts["packages"]]
    assert facts["config_file"] is None
    assert not cache.exists()


def test_a_cache_that_others_can_write_is_a_problem_and_exits_3(
    vllmc: Run, workplace: Path
) -> None:
    cache = workplace.parent / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    done = vllmc("doctor", "--json")
    assert done.code == 3
    assert "cache-writable-by-others" in ids(done)
    assert done.json["facts"]["layers"][0]["place"]["mode"] == "0777"
    assert vllmc("doctor").out.splitlines()[-1].endswith("the next start cannot count on the cache")
    cache.chmod(0o700)
    assert "cache-writable-by-others" not in ids(vllmc("doctor", "--json"))


def test_each_layer_is_looked_at_with_what_was_typed_for_it(vllmc: Run, workplace: Path) -> None:
    first, below = workplace / "first", workplace / "below"
    below.mkdir(mode=0o777)
    below.chmod(0o777)
    words = ("doctor", "--cache-dir", "first", "--cache-dir", str(below))
    done = vllmc(*words, "--json")
    layers = done.json["facts"]["layers"]
    assert [(layer["place"]["path"], layer["given"], layer["role"]) for layer in layers] == [
        (str(first), "first", "written"),
        (str(below), str(below), "read"),
    ]
    assert {"cache-path-relative", "cache-writable-by-others"} <= ids(done)
    used = vllmc(*words, "--json", "--trust-unsigned")
    assert "unsigned-is-used" in ids(used)
    assert "cache-writable-by-others" not in ids(used)


def test_no_directory_at_all_is_the_default_one(
    vllmc: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLMC_CACHE_DIR", os.pathsep)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    [layer] = vllmc("doctor", "--json").json["facts"]["layers"]
    assert layer["given"] == ""
    assert Path(layer["place"]["path"]).name == "vllmc"


def test_a_file_in_place_of_the_cache_is_a_problem(vllmc: Run, workplace: Path) -> None:
    (workplace.parent / "cache").write_text("")
    done = vllmc("doctor", "--json")
    assert done.code == 3
    assert "cache-not-a-directory" in ids(done)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs /dev/shm")
def test_a_cache_in_memory_is_a_problem(vllmc: Run) -> None:
    done = vllmc("doctor", "--json", "--cache-dir", "/dev/shm/vllmc-of-no-test")
    assert done.code == 3
    [finding] = [row for row in done.json["findings"] if row["id"] == "cache-in-memory"]
    assert finding["fix"].startswith("--cache-dir DIR")


def test_warnings_and_notes_exit_0(
    vllmc: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLMC_CACHEDIR", "/x")
    monkeypatch.setenv("VLLMC_CACHE_DIR", "cache")
    monkeypatch.setenv("PATH", "")
    (workplace / "cache").mkdir(mode=0o700)
    done = vllmc("doctor", "--json")
    assert ids(done) >= {"unknown-variable", "cache-path-relative", "cache-empty", "no-compiler"}
    problems = {row["id"] for row in done.json["findings"] if row["level"] == "problem"}
    assert problems <= {"cache-in-container-layer", "cache-in-memory"}, "of where tests run"
    assert done.code == (3 if problems else 0)


def test_what_is_stored_is_counted(vllmc: Run, stored: Any) -> None:
    done = vllmc("doctor", "--json")
    assert done.json["facts"]["layers"][0]["programs"] == 1
    assert "cache-empty" not in ids(done)
    assert ", 1 program, from env:VLLMC_CACHE_DIR" in vllmc("doctor").out


def test_a_config_file_counts_as_found_or_as_named(vllmc: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text('dtype = "float32"\n')
    found = vllmc("doctor", "--json")
    assert "config-by-directory" in ids(found)
    assert found.json["facts"]["config_file"] == str(workplace / "vllmc.toml")
    assert "config-by-directory" not in ids(vllmc("doctor", "--json", "--config", "vllmc.toml"))


def test_a_broken_config_file_is_an_error_as_for_every_command(vllmc: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text("dtype = \n")
    done = vllmc("doctor")
    assert done.code == 2
    assert "error[bad-config-file]" in done.err


def test_the_page_of_findings_is_up_to_date_and_has_them_all() -> None:
    script = runpy.run_path(str(SCRIPTS / "gen_doctor_doc.py"))
    text = script["PAGE"].read_text(encoding="utf-8")
    assert text == script["page"](), "run scripts/gen_doctor_doc.py"
    for name in KINDS:
        assert text.count(f"\n### `{name}`\n") == 1
