"""Commands run whole: in this process, or in one of their own where the process matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vllmc.cli.app import main

SURROUNDINGS = (
    "VLLMC_",
    "TORCHINDUCTOR_",
    "TORCH_",
    "TRITON_",
    "GITHUB_",
    "COLUMNS",
    "FORCE_COLOR",
    "NO_COLOR",
    "TTY_",
)
EXECUTABLE = Path(sys.executable).parent / "vllmc"


@dataclass(frozen=True)
class Done:
    """What a command line did: its exit code, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        assert value["schema_version"] == 1
        return value

    @property
    def error(self) -> str:
        """The code of the error that it ended with."""
        first = next(line for line in self.err.splitlines() if line.startswith("error["))
        return first.removeprefix("error[").partition("]")[0]


def invoke(*words: str | Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Done(code=code, out=out.getvalue(), err=err.getvalue())


def plain_environment() -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(SURROUNDINGS)}
    return environment | {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", autouse=True)
def _deprecated_import() -> None:
    """torch.utils.mkldnn, which Dynamo imports, uses what torch itself deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch.utils.mkldnn  # noqa: F401


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory, an environment that says nothing, a cache beside it.

    Modules imported from it are forgotten at the end.
    """
    for name in os.environ:
        if name.startswith(SURROUNDINGS):
            monkeypatch.delenv(name)
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("VLLMC_CACHE_DIR", str(tmp_path / "cache"))
    yield directory
    forget_modules(tmp_path)


@pytest.fixture
def forget() -> Callable[[Path], None]:
    """Lets the modules below a directory be imported anew, as in another process."""
    return forget_modules


def forget_modules(below: Path) -> None:
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).is_relative_to(below):
            del sys.modules[name]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache directory, which need not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def vllmc(workplace: Path) -> Callable[..., Done]:
    """Runs a command line in this process."""
    return invoke


@pytest.fixture
def eager(workplace: Path) -> Callable[..., Done]:
    """Runs a command line in this process, with the eager backend."""

    def run(*words: str | Path) -> Done:
        return invoke(*words, "--backend", "eager")

    return run


Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(workplace: Path, cache: Path) -> Iterator[Spawn]:
    """Starts the console script in a process of its own, which is killed when the test ends.

    `env` adds to a plain environment; `before` is a command to run it with.
    """
    started: list[subprocess.Popen[str]] = []

    def run(
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        before: tuple[str, ...] = (),
    ) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*before, str(EXECUTABLE), *map(str, words)],
            env=plain_environment() | {"VLLMC_CACHE_DIR": str(cache)} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell's background job ignores interrupts, and hands that on to what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def spawn(start: Spawn) -> Callable[..., Done]:
    """Runs the console script in a process of its own, to the end."""

    def run(*words: str | Path, **how: Any) -> Done:
        process = start(*words, **how)
        out, err = process.communicate(timeout=300)
        return Done(code=process.returncode, out=out, err=err)

    return run


@dataclass(frozen=True)
class Warmed:
    """A cache that a process of its own warmed with tiny-llama, and what it said."""

    root: Path
    said: dict[str, Any]

    def copy(self, to: Path) -> Path:
        """A copy, for a test that changes it."""
        shutil.copytree(self.root, to)
        return to


@pytest.fixture(scope="session")
def inductor_cache(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    """tiny-llama compiled by Inductor with no cache of its own; not to be written to."""
    place = tmp_path_factory.mktemp("inductor")
    done = subprocess.run(
        [str(EXECUTABLE), "warm", "--json", "--cache-dir", str(place / "cache")],
        env=plain_environment() | {"TORCHINDUCTOR_CACHE_DIR": str(place / "inductor")},
        cwd=place,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Warmed(root=place / "cache", said=json.loads(done.stdout))


@pytest.fixture(scope="session")
def eager_cache(tmp_path_factory: pytest.TempPathFactory) -> Warmed:
    """tiny-llama under the eager backend; not to be written to."""
    root = tmp_path_factory.mktemp("eager") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith(SURROUNDINGS):
                patch.delenv(name)
        done = invoke("warm", "--json", "--backend", "eager", "--cache-dir", root)
    assert done.code == 0, done.err
    return Warmed(root=root, said=done.json)


@pytest.fixture
def warmed(eager_cache: Warmed, cache: Path, workplace: Path) -> Warmed:
    """The cache directory of this test, filled as `eager_cache` is."""
    return Warmed(root=eager_cache.copy(cache), said=eager_cache.said)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as `save_pretrained` writes it: random weights, and a tokenizer of words."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("models") / "tiny"
    words = ["<unk>", "</s>", *(f"w{index}" for index in range(94))]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(directory)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=1,
                initializer_range=0.2,
            )
        )
    llama.save_pretrained(directory)
    return directory


FACTORY = """
from transformers import LlamaConfig, LlamaForCausalLM


def config(**changes):
    shape = dict(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )
    return LlamaConfig(**(shape | changes))


def small():
    return LlamaForCausalLM(config())


def other_vocabulary():
    return LlamaForCausalLM(config(vocab_size=128))
"""


@pytest.fixture
def factory(workplace: Path) -> Path:
    """A module `factory` in the working directory, with factories of tiny models."""
    path = workplace / "factory.py"
    path.write_text(FACTORY)
    return path


@pytest.fixture
def files() -> Callable[[Path], dict[str, bytes]]:
    """The contents of every plain file below a directory, by relative path."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture
def damage() -> Callable[[Path, str], None]:
    """Flips a byte in the middle of the artifact with this digest."""

    def flip(root: Path, digest: str) -> None:
        [blob] = [p for p in root.rglob("*") if p.is_file() and digest in p.as_posix()]
        data = bytearray(blob.read_bytes())
        data[len(data) // 2] ^= 0xFF
        blob.write_bytes(data)

    return flip
