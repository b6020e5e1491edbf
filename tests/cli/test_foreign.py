"""vLLM's caches and logs on the command line: the situations that its users meet."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vllmc.cli import report
from vllmc.cli.vllm_inspect import vllm_report


def first(done: Any) -> str:
    return str(done.out.splitlines()[0])


def pods(start: Any) -> tuple[Any, Any]:
    """Two pods whose only difference is their address, as in ai-dynamo/dynamo#10695."""
    return start, start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.9.4"})


def test_a_pod_s_address_among_200_variables_is_the_first_line(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    for number, pod in enumerate(pods(vllm_start), 1):
        pod.store(workplace / f"pod{number}")
        (workplace / f"{number}.log").write_text(pod.log())
    for a, b in (("pod1", "pod2"), ("1.log", "2.log"), ("1.log", "pod2"), ("pod1", "2.log")):
        done = vllmc("diff-config", a, b, "--exit-code")
        assert done.code == 3
        assert first(done) == ("1 difference affects the key: vllm.env.VLLM_NIXL_SIDE_CHANNEL_HOST")
        assert "10.0.3.17 -> 10.0.9.4" in done.out
        assert "everything that differs is spurious" in done.out
        assert "use vLLM 0.24 or later" in done.out


def test_the_json_of_a_comparison_has_the_contract_s_fields(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    one, two = pods(vllm_start)
    one.store(workplace / "pod1")
    (workplace / "2.log").write_text(two.log())
    row = vllmc("diff-config", "pod1", "2.log", "--json").json
    assert row["a"] == {"kind": "vllm-cache", "name": "pod1"}
    assert row["b"] == {"kind": "vllm-log", "name": "2.log"}
    assert (row["equal"], row["same"]) == (False, len(one.env) + 2)
    [change] = row["changes"]
    assert change.pop("note")
    assert change == {
        "group": "vllm.env",
        "name": "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "before": "10.0.3.17",
        "after": "10.0.9.4",
        "kind": "changed",
        "class": "surroundings",
        "affects_key": True,
        "origin_before": "env:VLLM_NIXL_SIDE_CHANNEL_HOST",
        "origin_after": "env:VLLM_NIXL_SIDE_CHANNEL_HOST",
        "restore": "",
    }
    assert "everything that differs is spurious" in row["notes"]


def test_another_home_and_virtual_environment_are_named(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    # vllm-project/vllm#47573 and #52154: the cache was baked into an image under another HOME.
    root = "/home/u/v/lib/python3.12/site-packages"
    there = vllm_start.change(
        root=root,
        graph=vllm_start.graph.replace(vllm_start.root, root),
        env={
            "VLLM_CONFIG_ROOT": "/root/.config/vllm",
            "VLLM_XLA_CACHE_PATH": "/root/.cache/vllm/xla_cache",
        },
    )
    vllm_start.store(workplace / "here")
    there.store(workplace / "there", written_in="/root/.cache/vllm")
    done = vllmc("diff-config", "here", "there")
    assert first(done) == (
        "3 differences affect the key: vllm.env.VLLM_CONFIG_ROOT, vllm.env.VLLM_XLA_CACHE_PATH, "
        "vllm.code.hash"
    )
    assert f"the sources lie in {vllm_start.root} and in {root}" in done.out
    inspected = vllmc("inspect-key", "there")
    assert first(inspected) == (
        "it was moved, and vLLM before 0.32 looks for its artifacts in "
        f"/root/.cache/vllm/torch_compile_cache/{there.key}/rank_0_0/backbone"
    )
    assert "not where the artifacts are now" in inspected.out
    roles = {
        (row["role"], row["path"])
        for row in vllmc("inspect-key", "there", "--json").json["caches"][0]["paths"]
    }
    handle = f"/root/.cache/vllm/torch_compile_cache/{there.key}/rank_0_0/backbone"
    assert roles == {
        ("moved", handle),
        ("factor", "/root/.config/vllm"),
        ("factor", "/root/.cache/vllm/xla_cache"),
        ("source", root),
    }


def test_where_only_hashes_are_known_it_says_which_differs_and_what_follows(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    # pytorch/pytorch#152065: nothing else explains such a miss.
    vllm_start.store(workplace / "a")
    vllm_start.change(config="f" * 10).store(workplace / "same_graph")
    other = vllm_start.graph.replace("s72, 64]", "s72, 128]")
    vllm_start.change(config="f" * 10, graph=other).store(workplace / "other_graph")
    done = vllmc("diff-config", "a", "same_graph")
    assert first(done) == "1 difference affects the key: vllm.config.hash"
    assert "which field changed cannot be told" in done.out
    assert "graphs: identical, so what differs did not change the graph" in done.out
    done = vllmc("diff-config", "a", "other_graph")
    assert first(done) == "1 difference affects the key: vllm.config.hash"
    assert '"bf16[s72, 64]"' in done.out
    assert '"bf16[s72, 128]"' in done.out


def test_one_start_s_cache_and_log_are_equal(vllmc: Any, workplace: Path, vllm_start: Any) -> None:
    vllm_start.store(workplace / "cache")
    (workplace / "log").write_text(vllm_start.log())
    done = vllmc("diff-config", "cache", "log", "--exit-code")
    assert (done.code, first(done)) == (0, "equal: no difference affects the key")


def test_of_a_log_with_several_starts_the_last_is_taken(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    one, two = pods(vllm_start)
    (workplace / "both.log").write_text(one.log() + two.log())
    (workplace / "2.log").write_text(two.log())
    row = vllmc("diff-config", "both.log", "2.log", "--json").json
    assert row["equal"]
    assert row["notes"] == ["both.log: 2 dumps; of each rank the last is taken"]


def test_a_snapshot_of_a_cache_is_compared_with_another(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    one, two = pods(vllm_start)
    one.store(workplace / "one")
    two.store(workplace / "two")
    (workplace / "one.json").write_text(vllmc("inspect-key", "one", "--json").out)
    row = vllmc("diff-config", "one.json", "two", "--json").json
    assert row["a"] == {"kind": "snapshot", "name": "one.json"}
    assert [change["name"] for change in row["changes"]] == ["VLLM_NIXL_SIDE_CHANNEL_HOST"]
    assert vllmc("diff-config", "one.json", "one", "--json").json["equal"]


def test_inspecting_a_cache_names_what_ties_it_to_its_place(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    artifacts = (b"a" * 1000, b"b" * 900, *[b"c" * 5000] * 14, b"d" * 100)
    start = vllm_start.change(artifacts=artifacts, env={"VLLM_API_KEY": "hunter2"})
    start.store(workplace / "vllm")
    done = vllmc("inspect-key", "vllm")
    assert done.code == 0
    assert first(done) == (
        "4 spurious factors tie it to one place: VLLM_API_KEY, VLLM_CONFIG_ROOT, "
        "VLLM_NIXL_SIDE_CHANNEL_HOST and 1 more"
    )
    assert "17, 4 unique; storing each once saves 65.0 kB" in done.out
    assert "recorded in plain text: VLLM_API_KEY" in done.out
    assert "VLLM_OPTION_001" not in done.out
    assert "VLLM_OPTION_001" in vllmc("inspect-key", "vllm", "-v").out


def test_the_json_of_a_cache_has_the_contract_s_fields_and_more(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    directory = vllm_start.store(workplace / "vllm")
    row = vllmc("inspect-key", "vllm", "--json").json
    assert (row["model"], row["key"], row["excluded"]) == ("", vllm_start.key, [])
    assert "prediction" not in row
    assert len(row["factors"]) == len(vllm_start.env) + 3
    [cache] = row["caches"]
    assert cache["path"] == str(directory)
    assert (cache["kind"], cache["release"]) == ("compile", "after 0.15, before 0.24")
    assert (cache["artifacts"], cache["unique_artifacts"], cache["duplicate_bytes"]) == (4, 3, 600)
    [compilation] = cache["compilations"]
    assert (compilation["pieces"], compilation["ranges"]) == (7, ["1:8192"])
    assert [row["name"] for row in cache["spurious"]] == [
        "VLLM_CONFIG_ROOT",
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "VLLM_XLA_CACHE_PATH",
    ]
    assert (cache["secrets"], cache["notes"], cache["differs"]) == ([], [], None)


def test_several_keys_are_listed_each_with_what_sets_it_apart(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    starts = (
        *pods(vllm_start),
        vllm_start.change(env={"VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.9.4"}, compiler="0" * 10),
    )
    for number, start in enumerate(starts):
        os.utime(start.store(workplace / "vllm"), (number, number))
    done = vllmc("inspect-key", "vllm")
    assert first(done).startswith("3 keys, ")
    lines = [line.split() for line in done.out.splitlines()[3:]]
    assert [line[0] for line in lines] == [start.key for start in starts]
    assert [line[-1] for line in lines[1:]] == [
        "VLLM_NIXL_SIDE_CHANNEL_HOST",
        "vllm.compiler.hash",
    ]
    row = vllmc("inspect-key", "vllm", "--json").json
    assert (row["key"], row["factors"], len(row["caches"])) == ("", [], 3)
    assert row["caches"][0]["unique_artifacts"] is None
    one = vllmc("diff-config", "vllm", "vllm")
    assert one.code == 2
    assert "error[several-keys]" in one.err
    assert all(start.key in one.err for start in starts)


def test_names_that_are_no_text_are_shown_all_the_same(
    vllmc: Any, workplace: Path, vllm_start: Any
) -> None:
    for name in (b"caf\xe9", b"\x1b[2J"):
        vllm_start.store(workplace / "vllm", key=os.fsdecode(name))
    (workplace / "vllm/torch_compile_cache" / os.fsdecode(b"caf\xe9") / "rank_1_0/x").mkdir(
        parents=True
    )
    done = vllmc("inspect-key", "vllm")
    assert done.code == 0
    assert r"caf\udce9" in done.out
    assert r"\x1b[2J" in done.out
    done.out.encode()
    assert "error[several-keys]" in vllmc("diff-config", "vllm", "vllm").err


def test_a_secret_is_printed_nowhere(vllmc: Any, workplace: Path, vllm_start: Any) -> None:
    for number, secret in enumerate(("hunter2", "hunter3")):
        start = vllm_start.change(
            env={"VLLM_API_KEY": secret, "VLLM_DEBUG_URL": f"https://u:{secret}@h/"},
            graph=vllm_start.graph + f"    x = 'hf_abcdefghijklmnopqrst{secret}'\n",
        )
        start.store(workplace / f"{number}")
        (workplace / f"{number}.log").write_text(start.log())
    for words in (
        ("inspect-key", "0"),
        ("inspect-key", "0", "-v"),
        ("inspect-key", "0", "--json"),
        ("diff-config", "0", "1"),
        ("diff-config", "0", "1", "--json"),
        ("diff-config", "0.log", "1.log", "--json", "--all"),
    ):
        done = vllmc(*words)
        assert done.code == 0
        assert "hunter" not in done.out + done.err
        assert "<redacted>" in done.out or words[-1] == "0"
    row = vllmc("diff-config", "0", "1", "--json").json
    assert {(c["name"], c["class"]) for c in row["changes"]} == {
        ("VLLM_API_KEY", "secret"),
        ("VLLM_DEBUG_URL", "secret"),
    }


@pytest.mark.parametrize("other", ["current", "defaults", "aot"])
def test_keys_made_of_different_things_are_not_compared(
    vllmc: Any, workplace: Path, vllm_start: Any, other: str
) -> None:
    vllm_start.store(workplace / "vllm")
    model = workplace / "aot/torch_aot_compile" / ("ab" * 32) / "rank_0_0/model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"pickle")
    for words in (("vllm", other), (other, "vllm")):
        done = vllmc("diff-config", *words)
        assert done.code == 2
        assert "error[unlike-sides]" in done.err


def test_a_whole_model_s_tree_says_what_is_not_known(vllmc: Any, workplace: Path) -> None:
    model = workplace / "torch_aot_compile" / ("ab" * 32) / "rank_0_0/model"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"pickle")
    done = vllmc("inspect-key", "torch_aot_compile")
    assert (done.code, first(done)) == (0, "what it is keyed by is not recorded")
    assert "no factors" in done.out


def test_a_log_without_a_dump_says_how_to_get_one(vllmc: Any, workplace: Path) -> None:
    path = "/c/torch_compile_cache/torch_aot_compile/ab/rank_0_0/model"
    (workplace / "log").write_text(f"Directly load AOT compilation from path {path}\n")
    done = vllmc("diff-config", "log", "log")
    assert done.code == 1
    assert "error[no-factors]" in done.err
    assert path in done.err
    assert "VLLM_LOGGING_LEVEL=DEBUG and VLLM_USE_AOT_COMPILE=0" in done.err


def test_what_was_not_understood_is_said(vllmc: Any, workplace: Path, vllm_start: Any) -> None:
    place = vllm_start.store(workplace / "vllm") / "rank_0_0/backbone"
    (place / "cache_key_factors.json").write_bytes(b"\x00\xff")
    done = vllmc("inspect-key", "vllm")
    assert (done.code, first(done)) == (0, "what it is keyed by is not recorded")
    assert "cache_key_factors.json: no UTF-8 text" in done.out
    empty = workplace / "torch_compile_cache"
    empty.mkdir()
    done = vllmc("inspect-key", "torch_compile_cache")
    assert done.code == 1
    assert "error[no-vllm-cache]" in done.err


@pytest.mark.parametrize("words", [("inspect-key", "one"), ("diff-config", "one", "two")])
def test_it_fits_80_columns(
    vllmc: Any, workplace: Path, vllm_start: Any, words: tuple[str, ...]
) -> None:
    one, two = pods(vllm_start)
    one.store(workplace / "one")
    two.change(compiler="0" * 64).store(workplace / "two")
    row = json.loads(vllmc(*words, "--json").out)
    rendered = vllm_report(row, whole=True) if words[0] == "inspect-key" else report.diff(row)
    file = io.StringIO()
    Console(file=file, width=80).print(rendered)
    lines = file.getvalue().splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= 80


def test_of_a_start_that_stored_a_whole_model_its_factors_are_compared(vllmc: Any) -> None:
    # A root of vLLM 0.33 has one key of each kind.
    root = Path(__file__).parents[1] / "core/diagnose/vllm/0.33"
    done = vllmc("diff-config", str(root), str(root / "start.log"))
    assert first(done) == "equal: no difference affects the key"
    assert "its torch_aot_compile tree is not compared; name that of both sides" in done.out


def test_the_log_of_a_start_says_why_a_stored_model_was_not_used(vllmc: Any) -> None:
    logs = Path(__file__).parents[1] / "core/diagnose/vllm/0.33"
    done = vllmc("diff-config", str(logs / "start.log"), str(logs / "changed.log"))
    assert first(done) == "1 difference affects the key: vllm.code.hash"
    assert "could not be used: Source code has changed since the last compilation." in done.out


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


WATCHED = """
import sys
from vllmc.cli.app import main
for words in (["inspect-key", "vllm"], ["inspect-key", "aot"], ["inspect-key", TRACE],
              ["diff-config", "vllm", "log"], ["diff-config", "aot", "aot"],
              ["diff-config", TRACE, TRACE]):
    assert main([*words, "-q"]) == 0, words
    assert main([*words, "--json", "-v"]) == 0, words
print(*sys.modules)
"""


def test_nothing_is_unpickled_and_torch_is_not_imported(workplace: Path, vllm_start: Any) -> None:
    sprung = workplace / "sprung"
    trap = pickle.dumps(Trap(sprung))
    vllm_start.change(artifacts=(trap, trap)).store(workplace / "vllm")
    (workplace / "log").write_text(vllm_start.log())
    model = workplace / "aot/torch_aot_compile" / ("ab" * 32) / "rank_0_0/model"
    model.parent.mkdir(parents=True)
    model.write_bytes(trap)
    trace = Path(__file__).parents[1] / "core/diagnose/traces/cold"
    done = subprocess.run(
        [sys.executable, "-c", f"TRACE = {str(trace)!r}\n{WATCHED}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "vllmc.core.diagnose.torch_caches" in loaded
    assert not {"torch", "transformers"} & loaded
    assert not sprung.exists()
    pickle.loads(trap)
    assert sprung.exists(), "the trap works"
