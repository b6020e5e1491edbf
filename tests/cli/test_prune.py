from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.prune import parse_age, parse_size
from vllmc.core.cache.key import Factor, key_of
from vllmc.core.cache.record import encode
from vllmc.core.cache.usage import Counts
from vllmc.core.errors import UsageError, VllmcError
from vllmc.core.torch_compat.version import installed_torch

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5GB", 5_000_000_000),
        ("500MB", 500_000_000),
        ("1GiB", 2**30),
        ("1.5 kB", 1500),
        ("2tib", 2**41),
        ("17B", 17),
        ("17", 17),
        ("0", 0),
    ],
)
def test_a_size_is_a_number_and_a_unit(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "5X", "5G", "-5GB", "5 GB left", "1e3", "5..0MB", "٣GB"]
)
def test_another_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert caught.value.code == "bad-size"
    assert "5GB, 500MB, 1GiB" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2_592_000), ("12h", 43_200), ("2w", 1_209_600), ("1.5h", 5400), ("90 min", 5400)],
)
def test_an_age_is_a_number_and_a_unit(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "1y", "5m", "-1d"])
def test_another_age_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_age(text)
    assert caught.value.code == "bad-age"
    assert "30d, 12h, 2w" in caught.value.hint


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--max-size", "5X"), "bad-size"), (("--older-than", "soon"), "bad-age")],
)
def test_a_bad_option_is_wrong_usage_and_removes_nothing(
    vllmc: Run, stored: Any, words: tuple[str, ...], code: str
) -> None:
    done = vllmc("cache", "prune", *words, "--json")
    assert (done.code, done.json["error"]["code"]) == (2, code)
    assert done.json["command"] == "cache prune"
    assert len(stored.store.entries()) == 1


def test_an_empty_cache_is_pruned_and_is_not_created(vllmc: Run, workplace: Path) -> None:
    done = vllmc("cache", "prune", "--max-size", "0", "--json")
    assert done.code == 0
    assert done.json == {
        "schema_version": 1,
        "command": "cache prune",
        "dry_run": False,
        "plan": [],
        "removed": [],
        "kept": [],
        "bytes_before": 0,
        "bytes_after": 0,
    }
    assert vllmc("cache", "prune").out == "freed 0 B; 0 B are left\n"
    assert not (workplace.parent / "cache").exists()


def test_a_dry_run_tells_the_plan_alike_for_people_and_machines(vllmc: Run, stored: Any) -> None:
    used = time.time() - 40 * 86400
    stored.store.note_use(stored.program.key, Counts(hits=1))
    os.utime(stored.store.layout.used(stored.program.key), (used, used))
    before = sorted(stored.store.root.rglob("*"))
    done = vllmc("cache", "prune", "--older-than", "30d", "--dry-run", "--json")
    assert (done.code, done.json["command"], done.json["dry_run"]) == (0, "cache prune", True)
    assert done.json["removed"] == done.json["kept"] == []
    rows = done.json["plan"]
    assert [row["kind"] for row in rows] == ["program", "use", "unit", "code", "artifact"]
    assert rows[0] == {
        "kind": "program",
        "key": stored.program.key,
        "path": f"v1/programs/{stored.program.key[:2]}/{stored.program.key}/"
        f"{stored.program.id}.json",
        "model": "tiny-llama",
        "program": stored.program.key,
        "bytes": len(encode(stored.program)),
        "reason": "last used 40 days ago",
    }
    assert {row["program"] for row in rows} == {stored.program.key}
    assert done.json["bytes_before"] == sum(row["bytes"] for row in rows)
    assert done.json["bytes_after"] == 0
    plain = vllmc("cache", "prune", "--older-than", "30d", "--dry-run").out.splitlines()
    assert plain[0].split() == ["WOULD", "GO", "MODEL", "FILES", "SIZE", "WHY"]
    assert plain[1].split()[:3] == [stored.program.key[:12], "tiny-llama", "5"]
    assert "last used 40 days ago" in plain[1]
    assert plain[-1].startswith("would free ")
    assert sorted(stored.store.root.rglob("*")) == before


def test_prune_removes_what_the_dry_run_named(vllmc: Run, stored: Any) -> None:
    planned = vllmc("cache", "prune", "--max-count", "0", "--dry-run", "--json").json
    done = vllmc("cache", "prune", "--max-count", "0", "--json")
    assert done.code == 0
    assert done.json["plan"] == done.json["removed"] == planned["plan"]
    assert done.json["bytes_after"] == planned["bytes_after"] == 0
    assert vllmc("cache", "ls").out == "the cache is empty\n"


def test_people_are_told_what_went_and_what_stayed(vllmc: Run, stored: Any) -> None:
    stored.store.put_artifact(b"x" * 5000)
    hold = stored.store.note_use(stored.program.key, Counts(hits=1))
    done = vllmc("cache", "prune", "--max-size", "1kB")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["KEPT", "MODEL", "FILES", "SIZE", "WHY"]
    assert lines[1][:2] == [stored.program.key[:12], "tiny-llama"]
    assert done.out.count("a process holds it") == 1
    assert "it may be of a model that is being compiled now" in done.out
    assert done.out.splitlines()[-1].startswith("freed 0 B; ")
    assert "still larger than 1kB" in done.err
    hold.release()
    gone = vllmc("cache", "prune", "--max-size", "6kB")
    assert gone.out.splitlines()[0].split()[0] == "REMOVED"
    assert gone.err == ""
    assert stored.store.stats().bytes == 5000


def test_programs_of_another_torch_go_when_asked(vllmc: Run, stored: Any) -> None:
    def put(version: str) -> None:
        factors = (Factor(group="versions", name="torch", value=version, origin="probe"),)
        made = {"model": f"torch {version}", "factors": factors, "key": key_of(factors)}
        stored.store.put_program(dataclasses.replace(stored.program, **made))

    put(installed_torch())
    put("1.0.0")
    done = vllmc("cache", "prune", "--other-torch", "--json")
    assert [row["reason"] for row in done.json["removed"]] == ["it takes torch 1.0.0"]
    models = {entry.model for entry in stored.store.entries()}
    assert models == {"tiny-llama", f"torch {installed_torch()}"}


def test_the_installed_torch_is_found_without_importing_it() -> None:
    script = (
        "import sys; from vllmc.core.torch_compat.version import installed_torch;"
        "found = installed_torch(); early = 'torch' in sys.modules;"
        "import torch; sys.exit(early or found != torch.__version__)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_without_a_torch_none_can_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(VllmcError) as caught:
        installed_torch()
    assert caught.value.code == "no-torch"
