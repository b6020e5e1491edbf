"""The parts of what the plugin writes: secrets, sources, passes, and what it could not read."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllmc.core.cache.key import REDACTED, JsonValue
from vllmc.core.vllm_plugin import record
from vllmc.core.vllm_plugin.observation import Observation
from vllmc.core.vllm_plugin.sources import code_hash, sources


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the plugin take this process for one of that release of vLLM's."""

    def pretend(version: str) -> None:
        module = ModuleType("vllm")
        module.__version__ = version  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", module)

    return pretend


def test_an_unknown_release_says_what_it_lacks(release: Any) -> None:
    release("0.34.1")
    seen = Observation(missing=("vllm.envs.compile_factors",))
    unread = record.key_record(seen)["not_read"]
    assert isinstance(unread, list)
    assert unread[0] == "vLLM 0.34 is not known to this vllmc, which knows 0.32, 0.33"
    assert "this vLLM has no vllm.envs.compile_factors" in unread
    assert any(str(text).startswith("the config: ") for text in unread)


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cpu"])
def test_a_known_release_is_no_remark(release: Any, version: str) -> None:
    release(version)
    unread = record.key_record(Observation(environment={}))["not_read"]
    assert isinstance(unread, list)
    assert [text for text in unread if "not known to this vllmc" in str(text)] == []


def test_no_secret_is_written_and_two_can_be_told_apart(release: Any) -> None:
    release("0.33.0")
    rows = []
    for secret in ("hunter2hunter2", "swordfish1234"):
        seen = Observation(environment={"VLLM_S3_SECRET": secret, "VLLM_PORT": 8000})
        row = record.key_record(seen)
        assert secret not in str(row)
        assert row["env"] == {"VLLM_S3_SECRET": REDACTED, "VLLM_PORT": 8000}
        rows.append(row["hidden"])
    assert rows[0] != rows[1]


def test_the_variables_that_torch_s_options_read_are_recorded_without_secrets(
    release: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    release("0.33.0")
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")
    monkeypatch.setenv("TORCHINDUCTOR_WORKER_LOGPATH", "https://me:hunter2@host/")
    monkeypatch.setenv("NOT_OF_TORCH", "1")
    row = record.key_record(Observation(environment={}))
    variables, hidden = row["variables"], row["hidden"]
    assert isinstance(variables, dict)
    assert isinstance(hidden, dict)
    assert variables["TORCHINDUCTOR_MAX_AUTOTUNE"] == "1"
    assert variables["TORCHINDUCTOR_WORKER_LOGPATH"] == REDACTED
    assert "variables.TORCHINDUCTOR_WORKER_LOGPATH" in hidden
    assert "NOT_OF_TORCH" not in variables


def test_a_key_that_is_not_made_of_what_is_recorded_is_said() -> None:
    row: dict[str, JsonValue] = {"rebuilds": True, "not_read": []}
    record._check(row, "0123456789", "0123456789")
    assert row == {"rebuilds": True, "not_read": []}
    record._check(row, "chosen", "0123456789")
    assert row["rebuilds"] is False
    [remark] = row["not_read"]  # type: ignore[misc]
    assert "the directory is called chosen" in str(remark)


class Pass:
    def __init__(self, name: str) -> None:
        self.name = name

    def uuid(self) -> str:
        return self.name


class Manager(Pass):
    def __init__(self) -> None:
        super().__init__("all")
        self.passes = [Pass("first"), Pass("second")]
        self.cleanup = Pass("last")


def test_the_passes_are_listed_in_their_order() -> None:
    options = {"dce": True, "pre_grad": Pass("alone"), "post_grad": Manager()}
    found = record._passes(SimpleNamespace(inductor_config=options))
    named = [(row["slot"], row["uuid"]) for row in found if isinstance(row, dict)]
    assert named == [
        ("pre_grad", "alone"),
        ("post_grad", "first"),
        ("post_grad", "second"),
        ("post_grad", "last"),
    ]


def test_sources_are_named_below_the_directory_of_their_package(tmp_path: Path) -> None:
    package = tmp_path / "site" / "model" / "layers"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").touch()
    (package / "norm.py").write_text("x = 1\n")
    (tmp_path / "loose.py").write_text("y = 2\n")
    paths = [str(package / "norm.py"), str(tmp_path / "loose.py"), "<string>"]
    digest = hashlib.sha256(b"x = 1\n").hexdigest()
    assert sources(paths)[1] == {
        "name": "model/layers/norm.py",
        "root": str(tmp_path / "site"),
        "digest": digest,
    }
    assert [row["name"] for row in sources(paths) if isinstance(row, dict)] == [
        "loose.py",
        "model/layers/norm.py",
        "<string>",
    ]


def test_the_hash_of_the_code_is_of_paths_and_contents(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("x\n")
    expected = hashlib.sha256(f"{file}\nx\n".encode()).hexdigest()
    assert code_hash([str(file)]) == expected
    assert code_hash([str(file), "<string>"]) == expected
    assert code_hash([str(file), str(tmp_path / "gone.py")]) != expected
