from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caches import stored

Run = Callable[..., Any]
Files = Callable[[Path], dict[str, bytes]]


def factor(row: dict[str, Any], group: str, name: str) -> dict[str, Any]:
    [found] = [f for f in row["factors"] if (f["group"], f["name"]) == (group, name)]
    return found


def test_it_shows_every_factor_of_the_key_that_warm_uses(warmed: Any, eager: Run) -> None:
    row = eager("inspect-key", "--json").json
    assert (row["command"], row["model"], row["key"]) == (
        "inspect-key",
        "tiny-llama",
        warmed.said["key"],
    )
    groups: dict[str, int] = {}
    for item in row["factors"]:
        groups[item["group"]] = groups.get(item["group"], 0) + 1
        assert set(item) == {
            "group",
            "name",
            "value",
            "digest",
            "origin",
            "is_default",
            "affects_key",
        }
        assert re.fullmatch(r"[0-9a-f]{64}", item["digest"])
        assert re.fullmatch(r"default|flag|vllmc|probe|(env|file):.+", item["origin"])
    assert set(groups) >= {
        "environment",
        "versions",
        "system",
        "code",
        "inductor",
        "functorch",
        "dynamo",
        "spec",
        "model",
    }
    assert groups["inductor"] > 100
    assert groups["functorch"] > 30
    assert factor(row, "versions", "torch")["origin"] == "probe"
    compiler = factor(row, "system", "cxx_compiler")
    assert compiler["affects_key"] is False, "the C++ compiler is provenance"
    assert all(set(item) == {"name", "reason"} and item["reason"] for item in row["excluded"])
    assert "system.cxx_compiler" in {item["name"] for item in row["excluded"]}


def test_it_predicts_and_exits_0_whatever_it_predicts(
    warmed: Any, eager: Run, damage: Callable[[Path, str], None]
) -> None:
    hit = eager("inspect-key", "--json")
    assert (hit.code, hit.json["prediction"]["outcome"]) == (0, "hit")
    assert hit.json["prediction"]["changes"] == []
    miss = eager("inspect-key", "-O", "max_autotune=true", "--json")
    assert (miss.code, miss.json["prediction"]["outcome"]) == (0, "miss")
    assert miss.json["prediction"]["nearest_key"] == warmed.said["key"]
    [change] = miss.json["prediction"]["changes"]
    assert change["name"] == "max_autotune"
    assert miss.json["prediction"]["reason"].endswith("differs in inductor.max_autotune")
    unknown = eager("inspect-key", "--layers", "3", "--json")
    assert (unknown.code, unknown.json["prediction"]["outcome"]) == (0, "unknown")
    damage(warmed.root, warmed.said["units"][0]["artifact"])
    unsafe = eager("inspect-key", "--json")
    assert (unsafe.code, unsafe.json["prediction"]["outcome"]) == (0, "unsafe")
    assert "corrupt" in unsafe.json["prediction"]["reason"]


def test_it_writes_nothing_that_a_program_needs(eager: Run, cache: Path) -> None:
    row = eager("inspect-key", "--json").json
    assert row["prediction"]["outcome"] == "miss"
    assert row["prediction"]["nearest_key"] is None
    assert stored(cache) == []


def test_each_value_says_where_it_was_set(
    workplace: Path, vllmc: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workplace / "vllmc.toml").write_text(
        '# ours\ncompile-range = ["1:64"]\nlayers = 3\n\n[inductor]\n\nepilogue_fusion = false\n'
        "[functorch]\ndonated_buffer = false\n"
    )
    monkeypatch.setenv("VLLMC_DTYPE", "bfloat16")
    row = vllmc("inspect-key", "-O", "cpp.threads=3", "--backend", "eager", "--json").json
    for group, name, value, origin in (
        ("spec", "ranges", ["1:64"], "file:vllmc.toml:2"),
        ("spec", "dtype", "bfloat16", "env:VLLMC_DTYPE"),
        ("spec", "backend", "eager", "flag"),
        ("spec", "sizes", [], "default"),
        ("inductor", "epilogue_fusion", False, "file:vllmc.toml:7"),
        ("inductor", "cpp.threads", 3, "flag"),
        ("functorch", "donated_buffer", False, "file:vllmc.toml:9"),
        ("inductor", "max_autotune", False, "default"),
    ):
        found = factor(row, group, name)
        assert (found["value"], found["origin"]) == (value, origin), name
        assert found["is_default"] == (origin == "default")


def test_a_flag_beats_the_file_for_an_option_of_inductor(workplace: Path, eager: Run) -> None:
    (workplace / "vllmc.toml").write_text("[inductor]\nepilogue_fusion = false\n")
    row = eager("inspect-key", "-O", "epilogue_fusion=true", "--json").json
    found = factor(row, "inductor", "epilogue_fusion")
    assert (found["value"], found["origin"]) == (True, "flag")


def test_a_functorch_option_changes_the_key_and_saying_the_default_does_not(
    workplace: Path, eager: Run
) -> None:
    plain = eager("inspect-key", "--json").json
    default = factor(plain, "functorch", "donated_buffer")["value"]

    def key(value: bool) -> str:
        option = f"functorch.donated_buffer={str(value).lower()}"
        return eager("inspect-key", "-O", option, "--json").json["key"]

    assert key(default) == plain["key"]
    assert key(not default) != plain["key"]


def test_a_variable_of_torch_is_the_origin_of_its_option(workplace: Path, spawn: Run) -> None:
    done = spawn("inspect-key", "--json", env={"TORCHINDUCTOR_MAX_AUTOTUNE": "1"})
    found = factor(done.json, "inductor", "max_autotune")
    assert (found["value"], found["origin"]) == (True, "env:TORCHINDUCTOR_MAX_AUTOTUNE")


def test_a_stored_key_gives_the_factors_that_were_recorded(warmed: Any, eager: Run) -> None:
    key = warmed.said["key"]
    for prefix in (key, key[:8], key[:12].upper()):
        done = eager("inspect-key", prefix, "--json")
        assert (done.code, done.json["key"], done.json["model"]) == (0, key, "tiny-llama")
        assert "prediction" not in done.json
    now = eager("inspect-key", "--json").json
    assert done.json["factors"] == sorted(now["factors"], key=lambda f: (f["group"], f["name"]))


def test_a_stored_unit_s_key_gives_its_factors(warmed: Any, eager: Run) -> None:
    record = eager_units(warmed.root)[0]
    done = eager("inspect-key", record[:12], "--json")
    assert done.json["key"] == record
    assert {f["group"] for f in done.json["factors"]} >= {"graph", "range", "inductor"}
    assert "model" not in eager("inspect-key", record[:12]).out.split("\n")[0]


def eager_units(root: Path) -> list[str]:
    names = [p.stem for p in (root / "v1" / "units").rglob("*") if p.is_file()]
    assert len(names) == 3
    return names


def test_a_directory_named_like_a_key_is_a_directory(
    warmed: Any, eager: Run, workplace: Path
) -> None:
    (workplace / warmed.said["key"][:12]).mkdir()
    done = eager("inspect-key", warmed.said["key"][:12])
    assert (done.code, done.error) == (1, "unknown-model")
    assert "config.json" in done.err


def test_a_person_sees_what_was_set_and_with_v_everything(warmed: Any, eager: Run) -> None:
    plain = eager("inspect-key", "-O", "max_autotune=true").out
    assert "prediction  miss  the nearest stored program differs in inductor.max_auto" in plain
    assert "inductor.max_autotune  leave out -O max_autotune" in plain
    assert "inductor.max_autotune  false -> true  flag" in plain
    assert "epilogue_fusion" not in plain
    assert re.search(r"^\d+ more that nobody set; -v shows them", plain, re.MULTILINE)
    whole = eager("inspect-key", "-v").out
    assert "epilogue_fusion" in whole
    assert "system.cxx_compiler" in whole
    assert len(whole.splitlines()) > 500


IMPORTS = """
import sys
import torch

before = set(sys.modules)
from vllmc.cli.app import main

code = main(sys.argv[1:])
outside = ("vllmc", "typer", "rich", "platformdirs", "xxhash", "annotated_doc", "shellingham")
stdlib = sys.stdlib_module_names
new = {name for name in set(sys.modules) - before if name.partition(".")[0] not in stdlib}
new = {name for name in new if not name.startswith((*outside, "_sysconfigdata", "__"))}
print(code, *sorted(new), file=sys.stderr)
"""


def imported_by(*words: str) -> list[str]:
    """The exit code of a command, and what it imports beyond torch and the command line's own."""
    command = [sys.executable, "-c", IMPORTS, *words, "--backend", "eager"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "hit" in done.stdout
    return done.stderr.splitlines()[-1].split()


def test_a_first_prediction_imports_no_compiler_and_no_modeling_code(
    warmed: Any, workplace: Path
) -> None:
    for fact in (warmed.root / "v1" / "facts").glob("model-*"):
        fact.unlink()
    code, *modules = imported_by("warm", "--check", "tiny-llama")
    assert code == "0"
    heavy = {"sympy", "triton", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    heavy |= {"transformers.activations", "transformers.modeling_utils"}
    assert "transformers" in modules
    assert heavy.isdisjoint(modules)


@pytest.mark.parametrize("words", ["inspect-key", "warm --check", "warm"])
def test_a_hit_imports_nothing_of_torch_but_a_config(
    warmed: Any, workplace: Path, words: str
) -> None:
    # What is remembered comes from a process without Transformers, as this one may not be.
    imported_by("warm", "--check", "tiny-llama")
    assert imported_by(*words.split(), "tiny-llama") == ["0", "torch._functorch.config"]
