"""What is remembered of models. Each answer comes from a process of its own, as of a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from vllmc.core.cache import facts
from vllmc.core.cache.key import sha256_hex

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "eos_token_id": 5,
}

ASK = """
import json, os, sys
from pathlib import Path
from vllmc.core.cache.key import key_of
from vllmc.core.errors import VllmcError
from vllmc.core.models.resolve import resolve
from vllmc.core.spec import CompileSpec

name, layers, cache, build = sys.argv[1:]
model = resolve(name, layers=int(layers) or None, cache=Path(cache))
answer = {
    "key": key_of(model.factors()),
    "rows": [factor.to_json() for factor in model.factors()],
    "info": repr(model.info),
    "remembered": "transformers" not in sys.modules,
}
if build == "build":
    try:
        answer["built"] = type(model.build("fake", CompileSpec()).model).__name__
    except VllmcError as error:
        answer["built"] = error.code
print(json.dumps(answer))
"""

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """What a fresh process says of a model: `ask(name, layers=0, cache=..., path=(), build=False)`.

    `path` is searched for modules first; further arguments are environment variables.
    """

    def run(
        name: object,
        *,
        layers: int = 0,
        cache: Path = tmp_path / "cache",
        path: tuple[Path, ...] = (),
        build: bool = False,
        script: str = ASK,
        **variables: str,
    ) -> dict[str, Any]:
        places = os.pathsep.join([*map(str, path), *filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", script, str(name), str(layers), str(cache), "build" * build],
            env=os.environ | {"PYTHONPATH": places, "PYTHONDONTWRITEBYTECODE": "1"} | variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer

    return run


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(LLAMA, indent=2))
    return path


@pytest.fixture
def editable(tmp_path: Path) -> Path:
    """A directory with a Transformers whose `__init__` and configuration of Llama can be edited."""
    package = Path(transformers.__file__).parent
    copied = {Path("__init__.py"), Path("models/llama/configuration_llama.py")}

    def link(place: Path) -> None:
        (tmp_path / "editable" / "transformers" / place).mkdir(parents=True)
        for entry in sorted((package / place).iterdir()):
            name = place / entry.name
            target = tmp_path / "editable" / "transformers" / name
            if name in copied:
                target.write_bytes(entry.read_bytes())
            elif any(name in file.parents for file in copied):
                link(name)
            else:
                target.symlink_to(entry)

    link(Path())
    return tmp_path / "editable"


def fact_of(cache: Path) -> Path:
    [file] = (cache / "v1" / "facts").glob("model-*")
    return file


def test_what_was_resolved_once_needs_no_transformers_again(
    ask: Ask, directory: Path, tmp_path: Path
) -> None:
    for name in ("tiny-llama", directory):
        first, second = ask(name), ask(name, build=True)
        plain = ask(name, cache=tmp_path / "other")
        assert not first["remembered"]
        assert second.pop("remembered")
        assert second.pop("built") == "LlamaForCausalLM"
        assert second == {k: v for k, v in first.items() if k != "remembered"}
        assert first == plain


def test_what_is_remembered_names_no_place(ask: Ask, directory: Path, tmp_path: Path) -> None:
    ask(directory)
    assert str(tmp_path) not in fact_of(tmp_path / "cache").read_text()
    moved = directory.rename(tmp_path / "moved")
    answer = ask(moved)
    assert answer["remembered"]
    assert repr(moved) in answer["info"]


def test_another_configuration_or_number_of_layers_is_another_model(
    ask: Ask, directory: Path
) -> None:
    first = ask(directory)
    three = ask(directory, layers=3)
    config = directory / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    edited = ask(directory)
    assert not three["remembered"]
    assert not edited["remembered"]
    assert len({first["key"], three["key"], edited["key"]}) == 3
    again = ask(directory, layers=3)
    assert not again["remembered"]
    assert "'hidden_size', 'value': 64" in str(again["rows"])
    assert ask(directory, layers=3) == again | {"remembered": True}


def test_stop_tokens_are_those_of_the_generation_config_that_is_there_now(
    ask: Ask, directory: Path
) -> None:
    assert "stop_token_ids=(5,)" in ask(directory)["info"]
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    answer = ask(directory)
    assert not answer["remembered"]
    assert "stop_token_ids=(7, 8)" in answer["info"]
    assert ask(directory) == answer | {"remembered": True}


def test_an_edited_configuration_class_is_asked_again(ask: Ask, editable: Path) -> None:
    first = ask("tiny-llama", path=(editable,))
    assert ask("tiny-llama", path=(editable,)) == first | {"remembered": True}
    source = editable / "transformers" / "models" / "llama" / "configuration_llama.py"
    status = source.stat()
    text = source.read_text()
    assert text.count('hidden_act: str = "silu"') == 1
    source.write_text(text.replace('hidden_act: str = "silu"', 'hidden_act: str = "gelu"'))
    # Neither its size nor its time of change tells.
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.stat().st_size == status.st_size
    edited = ask("tiny-llama", path=(editable,))
    assert not edited["remembered"]
    assert edited["key"] != first["key"]
    assert "'hidden_act', 'value': 'gelu'" in str(edited["rows"])


@pytest.mark.thorough
def test_another_version_of_transformers_is_asked_again(ask: Ask, editable: Path) -> None:
    ask("tiny-llama", path=(editable,))
    source = editable / "transformers" / "__init__.py"
    text = source.read_text()
    version = f'__version__ = "{transformers.__version__}"'
    assert text.count(version) == 1
    source.write_text(text.replace(version, '__version__ = "5.99.0"'))
    assert not ask("tiny-llama", path=(editable,))["remembered"]
    assert ask("tiny-llama", path=(editable,))["remembered"]


@pytest.mark.thorough
def test_a_damaged_memory_is_as_none_and_mended(ask: Ask, directory: Path, tmp_path: Path) -> None:
    first = ask(directory)
    file = fact_of(tmp_path / "cache")
    intact = file.read_bytes()
    for damaged in (b"", intact[:-9], intact.replace(b'"float32"', b'"float16"'), b"\xff" * 99):
        file.write_bytes(damaged)
        assert ask(directory) == first
        assert file.read_bytes() == intact


def test_a_cache_that_cannot_be_written_only_costs_time(
    ask: Ask, directory: Path, tmp_path: Path
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert ask(directory, cache=in_the_way) == ask(directory, cache=in_the_way)


@pytest.mark.thorough
def test_a_memory_in_a_read_only_cache_is_used(ask: Ask, directory: Path, tmp_path: Path) -> None:
    first, cache = ask(directory), tmp_path / "cache"
    for place in (cache / "v1" / "facts", cache):
        place.chmod(0o555)
    try:
        assert ask(directory) == first | {"remembered": True}
        assert not ask(directory, layers=5)["remembered"]
    finally:
        for place in (cache, cache / "v1" / "facts"):
            place.chmod(0o755)


def test_a_model_that_is_not_what_was_remembered_of_it_is_not_built(
    ask: Ask, directory: Path, tmp_path: Path
) -> None:
    ask(directory)
    cache = tmp_path / "cache"
    file = fact_of(cache)
    text = facts.recall(cache, file.name)
    assert text is not None
    assert '"value": 64' in text
    facts.remember(cache, file.name, text.replace('"value": 64', '"value": 65'))
    answer = ask(directory, build=True)
    assert answer["remembered"]
    assert answer["built"] == "model-changed"
    # It has been asked by then.
    assert ask(directory, build=True)["built"] == "LlamaForCausalLM"


@pytest.mark.parametrize("field", ["auto_map", "configuration_files"])
def test_a_configuration_that_names_other_files_is_not_remembered(
    ask: Ask, directory: Path, tmp_path: Path, field: str
) -> None:
    value: object = {} if field == "auto_map" else ["config.4.0.0.json"]
    (directory / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    (directory / "config.4.0.0.json").write_text(json.dumps(LLAMA))
    assert not ask(directory)["remembered"]
    assert not (tmp_path / "cache").exists()


def test_a_file_that_changes_while_it_is_asked_is_not_remembered(
    ask: Ask, editable: Path, tmp_path: Path
) -> None:
    touch = """
import os
from pathlib import Path
import vllmc.core.models.resolve as resolving
known = resolving.remembered_model
def touching(name, ask, load, cache):
    def loaded():
        model = load()
        import transformers.models.llama.configuration_llama as edited
        os.utime(edited.__file__)
        return model
    return known(name, ask, loaded, cache)
resolving.remembered_model = touching
"""
    assert not ask("tiny-llama", path=(editable,), script=touch + ASK)["remembered"]
    assert not (tmp_path / "cache").exists()
    assert not ask("tiny-llama", path=(editable,))["remembered"]
    assert ask("tiny-llama", path=(editable,))["remembered"]


def test_a_model_in_the_transformers_cache_is_that_of_its_commit(ask: Ask, tmp_path: Path) -> None:
    model = tmp_path / "hub" / "models--some--llama"
    for commit, changes in (("a" * 40, {}), ("b" * 40, {"vocab_size": 128})):
        snapshot = model / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps(LLAMA | changes))
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("a" * 40)

    def told(name: str) -> tuple[bool, bool]:
        answer = ask(name, HF_HUB_CACHE=str(tmp_path / "hub"))
        return answer["remembered"], "vocab_size=128" in answer["info"]

    assert told("some/llama") == (False, False)
    assert told("some/llama") == (True, False)
    assert told("some/llama@" + "a" * 40) == (True, False)
    (model / "refs" / "main").write_text("b" * 40)
    assert told("some/llama") == (False, True)
    assert told("some/llama@" + "b" * 40) == (True, True)
    # What the hub says of it now is not known, where it may be asked.
    (model / "refs" / "main").write_text("a" * 40)
    question = """
from vllmc.core.models.remembered import hub_question
import json
names = (None, "main", "a" * 40)
print(json.dumps({str(name): bool(hub_question("some/llama", name, 0)) for name in names}))
"""
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    assert ask("", script=question, **hub) == {"None": False, "main": False, "a" * 40: True}


def test_a_configuration_that_changes_while_it_is_loaded_is_not_remembered(
    ask: Ask, directory: Path, tmp_path: Path
) -> None:
    replace = """
from pathlib import Path
import sys
import vllmc.core.models.resolve as resolving
known = resolving.remembered_model
def replacing(name, ask, load, cache):
    def loaded():
        file = Path(name) / "config.json"
        file.write_text(file.read_text().replace('"vocab_size": 96', '"vocab_size": 97'))
        return load()
    return known(name, ask, loaded, cache)
resolving.remembered_model = replacing
"""
    before = (directory / "config.json").read_text()
    assert "vocab_size=97" in ask(directory, script=replace + ASK)["info"]
    (directory / "config.json").write_text(before)
    assert "vocab_size=96" in ask(directory)["info"]


def test_a_fact_begins_with_its_digest(tmp_path: Path) -> None:
    assert facts.recall(tmp_path, "a") is None
    facts.remember(tmp_path, "a", "b\nc")
    path = tmp_path / "v1" / "facts" / "a"
    assert path.read_text() == f"{sha256_hex('a b' + chr(10) + 'c')}\nb\nc"
    assert facts.recall(tmp_path, "a") == "b\nc"
    assert facts.recall(None, "a") is None
    assert [file.name for file in (tmp_path / "v1" / "facts").iterdir()] == ["a"]
