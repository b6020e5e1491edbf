"""`inspect-key` and `diff-config` of what torch wrote under TORCH_TRACE."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TRACES = Path(__file__).parents[1] / "core" / "diagnose" / "traces"
LOG = "dedicated_log_torch_trace_0.log"


def trace(name: str) -> str:
    return str(TRACES / name)


def test_a_person_reads_the_verdict_and_a_row_per_compilation(vllmc: Run) -> None:
    done = vllmc("inspect-key", trace("warm"))
    assert (done.code, done.err) == (0, "")
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0].startswith("4 compilations: 3 hit, 1 bypass: Unsupported call_function target")
    assert lines[1:] == [
        "torch  2.13.0+cpu",
        "",
        "COMPILATION                    AOTAUTOGRAD  FX GRAPH",
        "[0/0] program.py:20 in scale   hit          hit",
        "[0/1] program.py:20 in scale   hit          hit",
        "[1/0] program.py:25 in custom  bypass       hit",
        "[2/0] program.py:30 in train   hit          2 hit",
    ]


def test_several_reasons_stand_below_the_table_each_with_its_compilations(vllmc: Run) -> None:
    lines = vllmc("inspect-key", trace("frozen")).out.splitlines()
    assert lines[0] == (
        "1 compilation: 1 bypass: Cannot cache a graph with freezing enabled (and 1 more, below)"
    )
    assert [" ".join(line.split()) for line in lines[-2:]] == [
        "bypass [0/0] external_utils.py:67 in inner: Cannot cache a graph with freezing enabled",
        "bypass [0/0] external_utils.py:67 in inner: mkldnn tensors unpickleable",
    ]


def test_a_cache_that_was_off_is_said(vllmc: Run) -> None:
    lines = vllmc("inspect-key", trace("disabled")).out.splitlines()
    assert lines[0] == "1 compilation: 1 with the cache off"
    assert lines[-1].split()[-3:] == ["not", "asked", "disabled"]


def test_one_log_of_a_trace_is_a_trace(vllmc: Run) -> None:
    assert (
        vllmc("inspect-key", f"{trace('warm')}/{LOG}").out
        == vllmc("inspect-key", trace("warm")).out
    )


def test_v_shows_the_keys_and_what_they_share(vllmc: Run) -> None:
    text = vllmc("inspect-key", trace("cold"), "-v").out
    assert re.search(r"program.py:20 in scale +fx_graph +miss +fwpt4fpn", text)
    assert re.search(r"inductor_config\[epilogue_fusion\] +true", text)
    assert "example_inputs" not in text


@pytest.mark.parametrize("words", [("inspect-key", "cold"), ("diff-config", "cold", "option")])
def test_what_is_shown_fits_80_columns(
    vllmc: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    command, *names = words
    text = re.sub(r"\x1b\[[0-9;]*m", "", vllmc(command, *map(trace, names)).out)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "FX" in text or "fx_graph" in text


def test_json_has_the_fields_of_the_contract_and_the_compilations(vllmc: Run) -> None:
    row = vllmc("inspect-key", trace("cold"), "--json").json
    assert set(row) == {
        "schema_version",
        "command",
        "model",
        "key",
        "factors",
        "excluded",
        "torch",
        "compilations",
        "notes",
    }
    assert (row["model"], row["key"], row["excluded"], row["notes"]) == ("", "", [], [])
    shared = {factor["name"]: factor for factor in row["factors"]}
    assert shared["inductor_config[fx_passes_numeric_check]"]["value"]["pre_grad"] is False
    assert set(shared["torch_version"]) == {
        "group",
        "name",
        "value",
        "digest",
        "origin",
        "is_default",
        "affects_key",
    }
    assert shared["torch_version"]["value"] == f"hash {shared['torch_version']['digest']}"
    assert row["torch"] == "2.13.0+cpu"
    custom = row["compilations"][2]
    assert (custom["id"], custom["rank"], custom["outcome"]) == ("1/0", None, "bypass")
    bypass, miss = custom["lookups"]
    assert (bypass["cache"], bypass["answer"], bypass["key"]) == ("aot_autograd", "bypass", "")
    assert (miss["cache"], miss["answer"], miss["backward"]) == ("fx_graph", "miss", False)
    own = {component["name"] for component in miss["components"]}
    assert {"gm", "example_inputs[0]"} <= own
    assert not own & set(shared)


def test_what_was_not_understood_is_noted(vllmc: Run, tmp_path: Path) -> None:
    data = (TRACES / "cold" / LOG).read_bytes()
    (tmp_path / LOG).write_bytes(data[: data.rindex(b'{"artifact"') + 40])
    done = vllmc("inspect-key", str(tmp_path))
    assert done.code == 0
    assert done.out.splitlines()[-1] == f"note  {LOG} ends in the middle of an entry"
    row = vllmc("diff-config", str(tmp_path), trace("cold"), "--json").json
    assert row["notes"][0] == f"{tmp_path}: {LOG} ends in the middle of an entry"


def test_a_shipped_cache_that_one_flag_makes_inert_is_explained_in_the_first_line(
    vllmc: Run,
) -> None:
    # Situation 4 of the field: the cache arrived, and everything was compiled again.
    done = vllmc("diff-config", trace("cold"), trace("option"), "--exit-code")
    assert done.code == 3
    lines = done.out.splitlines()
    assert lines[0] == (
        "1 difference affects the key: torch.fx_graph.inductor_config[epilogue_fusion]"
    )
    assert "true -> false" in lines[5]


def test_a_miss_names_each_component_that_moved(vllmc: Run) -> None:
    # Situation 5 of the field: nothing explains a miss.
    done = vllmc("diff-config", trace("detailed"), trace("changed"), "--json")
    assert done.code == 0
    row = done.json
    assert row["a"] == {"kind": "torch-trace", "name": trace("detailed")}
    assert (row["equal"], row["same"]) == (False, 74)
    assert [(c["name"], c["class"], c["affects_key"]) for c in row["changes"]] == [
        ("autograd_config[donated_buffer]", "codegen", True),
        ("example_inputs[0].shape", "identity", True),
    ]


def test_a_cold_and_a_warm_trace_are_equal(vllmc: Run) -> None:
    done = vllmc("diff-config", trace("cold"), trace("warm"), "--exit-code")
    assert (done.code, done.out.splitlines()[0]) == (0, "equal: no difference affects the key")
    assert "the same key was a miss in a and a hit in b" in done.out


@pytest.mark.parametrize("name", ["disabled", "frozen"])
def test_traces_without_a_key_are_not_called_equal(vllmc: Run, name: str) -> None:
    done = vllmc("diff-config", trace(name), trace(name), "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "no-keys")
    [note, *_] = done.json["error"]["context"]["notes"]
    assert "in both, so there is no key to compare" in note


@pytest.mark.parametrize("other", ["current", "defaults"])
def test_a_trace_is_compared_with_another_trace_alone(vllmc: Run, other: str) -> None:
    done = vllmc("diff-config", trace("cold"), other, "--json")
    assert (done.code, done.json["error"]["code"]) == (2, "unlike-sides")
    assert "a torch trace with another" in done.json["error"]["hint"]


def test_what_inspect_key_says_of_a_trace_is_no_snapshot(vllmc: Run, workplace: Path) -> None:
    snapshot = workplace / "trace.json"
    snapshot.write_text(vllmc("inspect-key", trace("cold"), "--json").out)
    done = vllmc("diff-config", str(snapshot), str(snapshot), "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "bad-snapshot")
    assert "compare the traces" in done.json["error"]["context"]["cause"]


def test_a_directory_without_a_trace_is_what_it_was_before(vllmc: Run, tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text(json.dumps({"a": 1}))
    done = vllmc("inspect-key", str(tmp_path), "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "unknown-model")
