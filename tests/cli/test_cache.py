from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from vllmc.cli.render import moment
from vllmc.core.cache.usage import Counts

Run = Callable[..., Any]


def flip_a_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def test_an_empty_cache_is_listed_as_empty_and_is_not_created(vllmc: Run, workplace: Path) -> None:
    plain, machine = vllmc("cache", "ls"), vllmc("cache", "ls", "--json")
    assert (plain.code, plain.out) == (0, "the cache is empty\n")
    assert machine.json == {"schema_version": 1, "command": "cache ls", "entries": []}
    assert not (workplace.parent / "cache").exists()


def test_ls_lists_each_program_alike_for_people_and_machines(vllmc: Run, stored: Any) -> None:
    stored.store.note_use(stored.program.key, Counts())
    used = stored.program.created + 86400
    os.utime(stored.store.layout.used(stored.program.key), (used, used))
    machine = vllmc("cache", "ls", "--json").json
    assert machine["command"] == "cache ls"
    assert machine["entries"] == [
        {
            "key": stored.program.key,
            "model": "tiny-llama",
            "created": stored.program.created,
            "last_used": used,
            "bytes": len(stored.data),
            "units": 1,
        }
    ]
    heading, row = vllmc("cache", "ls").out.splitlines()
    assert heading.split() == ["KEY", "MODEL", "UNITS", "SIZE", "CREATED", "LAST", "USED"]
    when = [moment(stored.program.created), moment(used)]
    assert row.split() == [stored.program.key[:12], "tiny-llama", "1", "2.4", "kB"] + [
        word for text in when for word in text.split()
    ]


def test_show_prints_a_program_alike_for_people_and_machines(vllmc: Run, stored: Any) -> None:
    prefix = stored.program.key[:8]
    machine = vllmc("cache", "show", prefix, "--json").json
    assert machine["command"] == "cache show"
    assert (machine["key"], machine["kind"]) == (stored.program.key, "program")
    [record] = machine["records"]
    assert (record["id"], record["model"]) == (stored.program.id, "tiny-llama")
    assert record["pieces"] == {"total": 13, "splitting": 6, "compilable": 7, "unique": 1}
    [unit] = record["units"]
    assert (unit["key"], unit["artifact"]) == (stored.unit.key, stored.unit.artifact)
    assert unit["pieces"] == [f"piece_{i}" for i in range(6)]
    assert record["sources"][0]["path"] == "models/llama/modeling_llama.py"
    assert record["factor_groups"] == [
        {"group": "inductor", "factors": 2, "not_default": ["max_autotune"]},
        {"group": "system", "factors": 1, "not_default": []},
    ]
    plain = vllmc("cache", "show", prefix).out
    for text in (
        stored.program.key[:12],
        stored.program.id[:12],
        "tiny-llama",
        "13 total, 6 splitting, 7 compilable, 1 unique",
        f"{stored.unit.key[:12]}  1:8192",
        "piece_0, piece_1, piece_2, piece_3 and 2 more",
        "transformers/models/llama/modeling_llama.py",
        "LlamaModel.forward, LlamaMLP.forward",
        "max_autotune",
    ):
        assert text in plain
    assert stored.unit.key not in plain


def test_show_prints_every_record_of_a_program(vllmc: Run, stored: Any) -> None:
    source = dataclasses.replace(stored.program.sources[0], digest="f" * 32)
    newer = dataclasses.replace(
        stored.program, sources=(source,), created=stored.program.created + 60
    )
    stored.store.put_program(newer)
    machine = vllmc("cache", "show", stored.program.key, "--json").json
    assert [row["id"] for row in machine["records"]] == [newer.id, stored.program.id]
    plain = vllmc("cache", "show", stored.program.key).out
    assert plain.index(newer.id[:12]) < plain.index(stored.program.id[:12])
    # An empty line is between them, and none is last.
    assert plain.splitlines()[-1].strip()


def test_show_prints_a_unit_alike_for_people_and_machines(vllmc: Run, stored: Any) -> None:
    machine = vllmc("cache", "show", stored.unit.key, "--json").json
    assert machine["kind"] == "unit"
    record = machine["record"]
    assert (record["artifact"], record["bytes"]) == (stored.unit.artifact, len(stored.data))
    assert (record["format"], record["seconds"]) == ("native", 1.25)
    plain = vllmc("cache", "show", stored.unit.key).out
    for text in (stored.unit.artifact[:12], "native", "2.4 kB", "1.2 s", "max_autotune"):
        assert text in plain


@pytest.mark.parametrize(
    ("key", "exit_code", "code"), [("0123456789ab", 1, "unknown-key"), ("xyz", 2, "bad-key")]
)
def test_show_refuses_a_key_that_is_not_there(
    vllmc: Run, stored: Any, key: str, exit_code: int, code: str
) -> None:
    done = vllmc("cache", "show", key, "--json")
    assert (done.code, done.json["error"]["code"]) == (exit_code, code)
    assert done.json["command"] == "cache show"


def test_stats_sums_up_alike_for_people_and_machines(vllmc: Run, stored: Any) -> None:
    orphan = stored.store.put_artifact(b"x" * 5000)
    assert orphan
    stored.store.note_use(stored.program.key, Counts(misses=7, dups=2))
    stored.store.note_use(stored.program.key, Counts(hits=7, seconds_saved=61.5))
    uses = {"hits": 7, "misses": 7, "dups": 2, "seconds_saved": 61.5}
    machine = vllmc("cache", "stats", "--json").json
    assert machine["command"] == "cache stats"
    assert machine["stats"] == {
        "programs": 1,
        "units": 1,
        "artifacts": 2,
        "bytes": 7400,
        "unreferenced_bytes": 5000,
        "inodes": 1 + len(list(stored.store.root.rglob("*"))),
        **uses,
        "by_model": [{"model": "tiny-llama", "programs": 1, "bytes": 2400, **uses}],
    }
    plain = [line.split() for line in vllmc("cache", "stats").out.splitlines()]
    assert plain == [
        ["programs", "1"],
        ["units", "1"],
        ["artifacts", "2,", "7.4", "kB"],
        ["unreferenced", "5.0", "kB"],
        ["inodes", str(machine["stats"]["inodes"])],
        ["hits", "7,", "which", "saved", "1", "min", "2", "s"],
        ["misses", "7,", "2", "of", "them", "dups"],
        [],
        ["MODEL", "PROGRAMS", "SIZE", "HITS", "MISSES", "DUPS", "SAVED"],
        ["tiny-llama", "1", "2.4", "kB", "7", "7", "2", "1", "min", "2", "s"],
    ]


def test_an_intact_cache_is_verified(vllmc: Run, stored: Any) -> None:
    plain, machine = vllmc("cache", "verify"), vllmc("cache", "verify", "--json")
    assert (plain.code, plain.out) == (0, "the cache is intact\n")
    assert machine.code == 0
    assert (machine.json["problems"], machine.json["removed"]) == ([], [])


def test_a_corrupt_artifact_is_named_and_exits_4(vllmc: Run, stored: Any) -> None:
    blob = stored.store.layout.blob(stored.unit.artifact)
    flip_a_byte(blob)
    name = stored.store.layout.relative(blob)
    machine = vllmc("cache", "verify", "--json")
    assert machine.code == 4
    [problem] = machine.json["problems"]
    assert (problem["path"], problem["kind"]) == (name, "corrupt-artifact")
    plain = vllmc("cache", "verify")
    assert plain.code == 4
    assert name in plain.out
    assert "corrupt-artifact" in plain.out
    assert "--repair" in plain.err
    assert blob.exists()


def test_repair_removes_what_is_corrupt_and_nothing_else(vllmc: Run, stored: Any) -> None:
    other = stored.store.layout.blob(stored.store.put_artifact(b"unharmed"))
    blob = stored.store.layout.blob(stored.unit.artifact)
    flip_a_byte(blob)
    machine = vllmc("cache", "verify", "--repair", "--json")
    assert machine.code == 0
    assert [problem["kind"] for problem in machine.json["problems"]] == ["corrupt-artifact"]
    removed = {row["path"] for row in machine.json["removed"]}
    layout = stored.store.layout
    assert removed == {
        layout.relative(blob),
        layout.relative(layout.unit(stored.unit.key)),
        layout.relative(layout.program(stored.program.key, stored.program.id)),
    }
    assert not blob.exists()
    assert other.exists()
    assert vllmc("cache", "verify").out == "the cache is intact\n"


def test_people_are_told_what_repair_removed(vllmc: Run, stored: Any) -> None:
    record = stored.store.layout.unit(stored.unit.key)
    flip_a_byte(record)
    plain = vllmc("cache", "verify", "--repair")
    assert plain.code == 0
    found, removed = plain.out.split("REMOVED")
    for part in (found, removed):
        assert stored.store.layout.relative(record) in part
    assert plain.err == ""


def test_a_foreign_file_is_told_but_is_not_corrupt(vllmc: Run, stored: Any) -> None:
    foreign = stored.store.layout.top / "notes.txt"
    foreign.write_text("mine")
    done = vllmc("cache", "verify", "--repair", "--json")
    assert done.code == 0
    assert [problem["kind"] for problem in done.json["problems"]] == ["foreign-file"]
    assert done.json["removed"] == []
    assert foreign.exists()


def test_path_tells_where_the_cache_lies_and_why(
    vllmc: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*flags: str) -> tuple[str, str]:
        machine = vllmc("cache", "path", "--json", *flags).json
        assert machine["command"] == "cache path"
        assert vllmc("cache", "path", *flags).out == machine["path"] + "\n"
        return machine["path"], machine["origin"]

    assert told("--cache-dir", "here") == (str(workplace / "here"), "flag")
    assert told() == (str(workplace.parent / "cache"), "env:VLLMC_CACHE_DIR")
    monkeypatch.delenv("VLLMC_CACHE_DIR")
    assert told() == (str(platformdirs.user_cache_path("vllmc")), "default")
    (workplace / "vllmc.toml").write_text('# a comment\ncache-dir = "/kept"\n')
    assert told() == ("/kept", "file:vllmc.toml:2")
    (workplace / "other.toml").write_text('cache-dir = "/other"\n')
    assert told("--config", "other.toml") == ("/other", "file:other.toml:1")


def test_a_bad_config_file_is_an_error_of_the_command(vllmc: Run, workplace: Path) -> None:
    (workplace / "vllmc.toml").write_text("compile-rnage = []\n")
    done = vllmc("cache", "ls", "--json")
    assert done.code == 2
    assert done.json["error"]["code"] == "unknown-setting"
    assert "compile-range" in done.json["error"]["hint"]


def test_a_cache_directory_that_is_a_file_is_an_error(vllmc: Run, workplace: Path) -> None:
    (workplace / "file").write_text("")
    done = vllmc("cache", "ls", "--cache-dir", "file", "--json")
    assert (done.code, done.json["error"]["code"]) == (1, "bad-cache-dir")
