"""A cache that another machine, user or directory made."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from caches import stored

Run = Callable[..., Any]

COMMAND = "import sys; del sys.argv[1]; from vllmc.cli.app import entry_point; entry_point()"


def _another_user() -> tuple[str, ...]:
    """What runs a command as another user: in a namespace, where those are allowed."""
    program = shutil.which("unshare")
    if program is None:
        return ()
    words = (program, "--user", "--map-user=4321", "--map-group=4321")
    allowed = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if allowed.returncode == 0 else ()


AS_ANOTHER_USER = _another_user()


def elsewhere(place: Path) -> dict[str, str]:
    """An environment without a compiler, with another home and an empty Inductor cache."""
    for name in ("bin", "home", "inductor"):
        (place / name).mkdir()
    return {
        "PATH": str(place / "bin"),
        "HOME": str(place / "home"),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TMPDIR": str(place),
    }


@pytest.mark.slow
def test_a_moved_cache_runs_without_compiler_or_inductor_s_cache(
    inductor_cache: Any, spawn: Run, tmp_path: Path, workplace: Path
) -> None:
    moved = inductor_cache.copy(tmp_path / "other" / "place")
    done = spawn(
        "run",
        "--prompt-ids",
        "1,2,3",
        "--batch-size",
        "1",
        "--batch-size",
        "3",
        "--fail-on-miss",
        "--json",
        "--cache-dir",
        moved,
        env=elsewhere(workplace),
    )
    assert done.code == 0, done.err
    assert done.json["key"] == inductor_cache.said["key"]
    assert done.json["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert done.json["recompiles"] == []
    assert [len(output["token_ids"]) for output in done.json["outputs"]] == [16] * 3
    compiled = [p for p in (workplace / "inductor").rglob("*") if p.is_file()]
    assert compiled == [], "nothing was compiled, and nothing written where Inductor compiles"


@pytest.mark.slow
def test_a_corrupt_artifact_of_inductor_is_compiled_again(
    inductor_cache: Any,
    tmp_path: Path,
    vllmc: Run,
    damage: Callable[[Path, str], None],
    workplace: Path,
) -> None:
    root = inductor_cache.copy(tmp_path / "broken")
    damage(root, inductor_cache.said["units"][2]["artifact"])
    words = ("run", "--max-new-tokens", "2", "--cache-dir", root, "--json")
    refused = vllmc(*words, "--fail-on-miss")
    assert (refused.code, refused.json["error"]["code"]) == (4, "corrupt-artifact")
    assert vllmc("cache", "verify", "--cache-dir", root).code == 4
    done = vllmc(*words)
    assert (done.code, done.json["counts"]) == (0, {"hit": 2, "dup": 0, "compiled": 1})
    assert "warning[corrupt-artifact]: " in done.err
    assert vllmc("cache", "verify", "--cache-dir", root).code == 0
    assert vllmc(*words, "--fail-on-miss").json["counts"]["hit"] == 3


@pytest.fixture
def other_python(tmp_path: Path) -> Path:
    """The `vllmc` of another virtual environment, with the packages of this one."""
    place = tmp_path / "another venv"
    venv.create(place, symlinks=True)
    [packages] = place.glob("lib/python*/site-packages")
    lent = [path for path in sys.path if path.endswith("site-packages")]
    # As a directory of packages, in which further ones are named, as editable installs are.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in lent]
    (packages / "lent.pth").write_text("".join(lines))
    return place / "bin" / "python"


@pytest.mark.slow
def test_a_bundle_serves_another_user_in_another_virtual_environment(
    inductor_cache: Any, spawn: Run, tmp_path: Path, workplace: Path, other_python: Path
) -> None:
    made = tmp_path / "made" / "tiny.vllmc"
    made.parent.mkdir()
    signing = ("--sign-key", made.parent / "key", "--cache-dir", inductor_cache.root)
    assert spawn("trust", "keygen", made.parent / "key").code == 0
    assert spawn("cache", "export", "tiny-llama", "-o", made, *signing).code == 0

    there = elsewhere(workplace) | {"VLLMC_CACHE_DIR": str(tmp_path / "theirs")}
    before = (*AS_ANOTHER_USER, str(other_python), "-c", COMMAND)

    def run(*words: str | Path) -> Any:
        return spawn(*words, "--json", env=there, before=before)

    check = ("cache", "check-bundle", made, "--for", "tiny-llama")
    refused = run(*check)
    assert (refused.code, refused.json["error"]["code"]) == (4, "untrusted")
    assert run("trust", "add", f"{made.parent / 'key'}.pub").code == 0
    foretold = run(*check)
    assert (foretold.code, foretold.json["outcome"]) == (0, "would-hit")
    assert stored(tmp_path / "theirs") == []
    other = run(*check, "--dtype", "bfloat16")
    assert (other.code, other.json["outcome"]) == (3, "would-miss")
    assert [change["name"] for change in other.json["miss"]["changes"]] == ["dtype"]
    assert run("cache", "import", made).json["vouched"] == "signed by key"
    done = run("run", "--prompt-ids", "1,2,3", "--max-new-tokens", "4", "--fail-on-miss")
    assert done.code == 0, done.err
    assert done.json["key"] == inductor_cache.said["key"]
    assert done.json["counts"] == {"hit": 3, "dup": 0, "compiled": 0}
    assert [p for p in (workplace / "inductor").rglob("*") if p.is_file()] == []


def test_a_directory_is_found_under_another_path(
    llama_dir: Path, eager: Run, workplace: Path
) -> None:
    key = eager("warm", llama_dir, "--json").json["key"]
    shutil.copytree(llama_dir, workplace / "copied")
    done = eager("warm", "copied", "--check", "--json")
    assert (done.code, done.json["key"]) == (0, key)


def test_no_record_names_a_place_or_a_person(
    llama_dir: Path, factory: Path, eager: Run, cache: Path, tmp_path: Path
) -> None:
    for model in (llama_dir, "factory:small"):
        assert eager("warm", model).code == 0
    records = [p for p in (cache / "v1").rglob("*.json") if p.is_file()]
    assert len(records) > 4
    repository = Path(__file__).parents[2]
    needles = (tmp_path, llama_dir, Path.home(), repository, repository.parent, "/site-packages")
    for record in records:
        text = record.read_text()
        assert [str(needle) for needle in needles if str(needle) in text] == [], record
