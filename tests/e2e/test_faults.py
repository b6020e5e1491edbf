"""Disks that are full, processes that die, compilers that are not there."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
Start = Callable[..., "subprocess.Popen[str]"]
Files = Callable[[Path], dict[str, bytes]]


def read_until(process: subprocess.Popen[str], start: str) -> str:
    """The lines on stderr up to the one that begins so."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(start):
            return "".join(lines)
    pytest.fail(f"no line {start!r} in {''.join(lines)!r}")


def leftovers(cache: Path) -> list[Path]:
    """Files of an unfinished write."""
    return [p for p in (cache / "v1").rglob("*") if p.is_file() and "tmp" in p.parent.name]


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_and_leaves_the_cache_intact(
    eager: Run, vllmc: Run, cache: Path
) -> None:
    with files_of_at_most(700):
        done = eager("warm", "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "disk-full")
    assert "--cache-dir" in done.json["error"]["hint"]
    assert leftovers(cache) == []
    assert vllmc("cache", "verify").code == 0
    assert eager("warm", "--json").json["outcome"] == "compiled"
    assert vllmc("cache", "verify").code == 0


def test_a_disk_that_fills_up_at_the_end_keeps_the_units_that_were_stored(
    eager_cache: Any, eager: Run, vllmc: Run
) -> None:
    def largest(section: str) -> int:
        return max(p.stat().st_size for p in (eager_cache.root / "v1" / section).rglob("*.json"))

    assert largest("units") < largest("programs")
    with files_of_at_most((largest("units") + largest("programs")) // 2):
        done = eager("warm")
    assert (done.code, done.error) == (1, "disk-full")
    assert vllmc("cache", "verify").code == 0
    row = eager("warm", "--json").json
    assert (row["program"], row["outcome"]) == ("miss", "hit")


@pytest.mark.parametrize("command", ["warm", "run", "inspect-key"])
def test_a_cache_directory_below_a_file_is_an_error(
    eager: Run, workplace: Path, command: str
) -> None:
    (workplace / "file").write_text("")
    for place in ("file", "file/below"):
        done = eager(command, "--cache-dir", place)
        assert (done.code, done.error) == (1, "bad-cache-dir")
        assert "--cache-dir" in done.err


def bound_by_modes() -> tuple[str, ...]:
    """What to run a command with, so that file modes bind it even when it is root's."""
    if os.geteuid() != 0:
        return ()
    bounded = ("setpriv", "--bounding-set", "-dac_override,-dac_read_search")
    try:
        subprocess.run([*bounded, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("root's rights cannot be given up here")
    return bounded


def test_a_warmed_cache_can_be_used_read_only_and_a_miss_says_so(
    warmed: Any, start: Start, files: Files
) -> None:
    for path in (warmed.root, *warmed.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = files(warmed.root)

    def command(*words: str) -> tuple[int, dict[str, Any]]:
        process = start(*words, "--backend", "eager", "--json", before=bound_by_modes())
        out, _ = process.communicate(timeout=120)
        return process.returncode, json.loads(out)

    code, row = command("run", "--max-new-tokens", "2")
    assert (code, row["counts"]) == (0, {"hit": 3, "dup": 0, "compiled": 0})
    code, row = command("warm", "--dtype", "bfloat16")
    assert (code, row["error"]["code"]) == (1, "not-writable")
    assert files(warmed.root) == before


def test_a_vllm_cache_without_permissions_is_read_as_far_as_it_goes(
    start: Start, workplace: Path, vllm_start: Any
) -> None:
    directory = vllm_start.store(workplace / "vllm")
    vllm_start.store(workplace / "vllm", label="rank_1_0/backbone")
    hidden = ("rank_0_0/backbone/cache_key_factors.json", "rank_1_0/backbone")
    for path in (*hidden, "rank_0_0/backbone/artifact_compile_range_1_8192_subgraph_0"):
        (directory / path).chmod(0)
    process = start("inspect-key", "vllm", "--json", before=bound_by_modes())
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    [cache] = json.loads(out)["caches"]
    assert [len(part["artifacts"]) for part in cache["compilations"]] == [3, 0]
    for path in hidden:
        assert any(note.startswith(path) and "denied" in note for note in cache["notes"])
    directory.parent.chmod(0)
    process = start("inspect-key", directory.parent, "--json", before=bound_by_modes())
    out, _ = process.communicate(timeout=120)
    assert (process.returncode, json.loads(out)["error"]["code"]) == (1, "not-readable")
    for path in (directory.parent, directory / hidden[1]):
        path.chmod(0o755)


def without_compiler(workplace: Path) -> dict[str, str]:
    """An environment with nothing on its PATH and no Inductor cache to find kernels in."""
    for name in ("bin", "inductor"):
        (workplace / name).mkdir()
    return {"PATH": str(workplace / "bin"), "TORCHINDUCTOR_CACHE_DIR": str(workplace / "inductor")}


def test_a_miss_without_a_compiler_is_an_error(
    spawn: Run, workplace: Path, vllmc: Run, cache: Path
) -> None:
    done = spawn("warm", "--layers", "1", "--json", env=without_compiler(workplace))
    assert (done.code, done.json["error"]["code"]) == (1, "no-compiler")
    assert "g++" in done.json["error"]["hint"]
    assert "Traceback" not in done.err
    assert vllmc("cache", "verify").code == 0


@pytest.mark.slow
def test_an_interrupt_while_compiling_ends_with_one_clear_line(
    start: Start, workplace: Path, cache: Path, vllmc: Run
) -> None:
    process = start(
        "warm", "--layers", "1", "-v", env={"TORCHINDUCTOR_CACHE_DIR": str(workplace / "inductor")}
    )
    read_until(process, "[1/2]")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (130, "")
    assert "\nerror[interrupted]: " in f"\n{err}"
    assert "run it again" in err
    assert leftovers(cache) == []
    assert vllmc("cache", "verify").code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.thorough)]
)
def test_nothing_outlives_a_command_that_is_killed_while_its_workers_compile(
    start: Start, cache: Path, vllmc: Run, number: int
) -> None:
    process = start("warm", "--layers", "1", "-v", "--jobs", "2")
    read_until(process, "[1/2]")
    begun = descendants(process.pid)
    assert len(begun) >= 2, "the process that makes workers, and a worker"
    process.send_signal(number)
    # All of them hold stderr open.
    process.communicate(timeout=120)
    assert process.returncode == -number
    assert vllmc("cache", "verify").code == 0
    done = vllmc("warm", "--layers", "1", "--json", "--jobs", "1", "--backend", "eager")
    assert done.code == 0, "the lock is free"


def descendants(process: int) -> list[int]:
    """The processes below one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    found = [process]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def test_an_interrupt_that_meets_a_finalizer_is_not_lost(spawn: Run, workplace: Path) -> None:
    """Python prints what a finalizer raises and goes on: the program was compiled to its end."""
    (workplace / "interrupted.py").write_text(
        "import os, signal\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        [None for _ in range(100)]\n"
        "built = 0\n"
        "def make():\n"
        "    global built\n"
        "    built += 1\n"
        "    if built == 2:\n"  # once to know the model, once to capture it
        "        Last()\n"
        "    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1)\n"
        "    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=4, **sizes))\n"
    )
    done = spawn("warm", "interrupted:make", "--backend", "eager")
    assert (done.code, done.out) == (130, ""), done.err
    assert "Exception ignored in" in done.err
    assert "error[interrupted]: " in done.err


@pytest.mark.slow
def test_after_a_kill_while_compiling_the_next_run_carries_on(
    start: Start, spawn: Run, workplace: Path, cache: Path, vllmc: Run
) -> None:
    inductor = {"TORCHINDUCTOR_CACHE_DIR": str(workplace / "inductor")}
    words = ("warm", "--layers", "1", "--jobs", "1")
    process = start(*words, "-v", env=inductor)
    read_until(process, "[2/2]")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert vllmc("cache", "verify").code == 0
    done = spawn(*words, "--json", env=inductor)
    assert (done.code, done.json["program"], done.json["outcome"]) == (0, "miss", "partial")
    assert [unit["outcome"] for unit in done.json["units"]] == ["hit", "compiled"]
    assert vllmc("cache", "verify").code == 0
    assert vllmc("warm", "--layers", "1", "--json").json["outcome"] == "hit"


def test_the_second_of_two_processes_waits_and_then_hits(start: Start, eager: Run) -> None:
    words = ("warm", "--backend", "eager", "--json")
    first = start(*words)
    read_until(first, "capture")
    first.send_signal(signal.SIGSTOP)  # it holds the lock for as long as the test needs
    second = start(*words)
    said = read_until(second, "waiting: ")
    who = f"process {first.pid} on {socket.gethostname()}"
    assert said.endswith(f"waiting: {who} compiles this model\n")
    assert "capture" not in said
    first.send_signal(signal.SIGCONT)
    rows = []
    for process in (first, second):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        rows.append(out)
    assert '"outcome": "compiled"' in rows[0]
    assert '"outcome": "hit"' in rows[1]
    assert '"program": "hit"' in rows[1]
