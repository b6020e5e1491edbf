"""Makes the caches and logs beside this file: `make.py SOURCES PACKAGES [NAME...]`.

Each is what vLLM's own code wrote on a CPU with torch 2.13, cut down to what is read. SOURCES has
a directory for each release with the Python files of its wheel, and PACKAGES the packages that
importing it needs (cbor2, msgspec, pydantic and some forty more, by `pip install --no-deps`):

    pip download --no-deps vllm==0.33.0 && unzip -d SOURCES/0.33.0 vllm-*.whl '*.py'

Artifacts and models, which are pickles, are replaced by a line that has their digest and the
directories they mention. Paths of the machine are replaced; the keys are still those of it. 0.11
is older than this torch: its `patched_inline_call` must take and pass on `**keywords`.

Where vllmc is installed its plugin runs in vLLM: those called `-fields` are what it wrote, of
starts that differ in one setting each. Of them only the factors are kept.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from vllmc.core.diagnose.foreign_files import content_of

HERE = Path(__file__).parent
PIECES = {
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_USE_MEGA_AOT_ARTIFACT": "0",
    "VLLM_USE_STANDALONE_COMPILE": "1",
}
WHOLE = {"VLLM_USE_AOT_COMPILE": "1", "VLLM_USE_MEGA_AOT_ARTIFACT": "1"}
# The name, the release, the variables, and whether the source changes before a second start.
CASES = (
    ("0.33", "0.33.0", WHOLE, True),
    ("0.33-pieces", "0.33.0", PIECES, False),
    ("0.28-pieces", "0.28.0", PIECES, False),
    ("0.11", "0.11.0", PIECES, False),
)
OFF = {"VLLMC_PLUGIN": "0"}
# Of each start with the plugin the directory, the variables, and whether the source changes.
FIELDS = (
    ("base", PIECES, False),
    ("variable", {**PIECES, "VLLM_USE_LAYERNAME": "0"}, False),
    ("config", {**PIECES, "TOY_TOKENS": "1024"}, False),
    ("option", {**PIECES, "TORCHINDUCTOR_MAX_AUTOTUNE": "1"}, False),
    ("source", PIECES, True),
    ("whole", WHOLE, False),
    ("whole-source", WHOLE, True),
)
KEPT = ("vllmc_factors.json", "cache_key_factors.json")
TOLD = re.compile(r"\[compilation/|Using cache directory|Vllm config hash")
TEXTS = (".json", ".py", ".log")


def main() -> None:
    """Runs every case, or those that are named, and writes what they left."""
    sources, packages = (Path(word).resolve() for word in sys.argv[1:3])
    wanted = sys.argv[3:]
    for name, release, variables, changes in CASES:
        if wanted and name not in wanted:
            continue
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            environment = prepare(root, sources / release, packages) | variables | OFF
            start(root, environment, "start.log")
            shutil.copytree(root / "cache", root / "kept")
            start(root, environment, "again.log")
            if changes:
                change_source(root)
                start(root, environment, "changed.log")
            target = HERE / name
            shutil.rmtree(target, ignore_errors=True)
            reduce(root, target, {str(root): "/app", str(sources / release): "/site"})
    for release in ("0.32.0", "0.33.0"):
        if wanted and f"{release[:4]}-fields" not in wanted:
            continue
        target = HERE / f"{release[:4]}-fields"
        shutil.rmtree(target, ignore_errors=True)
        # All in one place, as the paths of sources are hashed.
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            for name, variables, changes in FIELDS if release == "0.33.0" else FIELDS[:1]:
                environment = prepare(root, sources / release, packages) | variables
                if changes:
                    change_source(root)
                start(root, environment, "start.log")
                (root / "start.log").unlink()
                (root / "cache").rename(root / "kept")
                for path in (root / "kept").rglob("*"):
                    if path.is_file() and path.name not in KEPT:
                        path.unlink()
                reduce(root, target / name, {str(root): "/app", str(sources / release): "/site"})
                shutil.rmtree(root / "kept")


def prepare(root: Path, source: Path, packages: Path) -> dict[str, str]:
    """Copies the program, and makes the environment that it runs in."""
    shutil.copy(HERE / "program.py", root / "model.py")
    identity = source / f"vllm-{source.name}+cpu.dist-info"
    identity.mkdir(exist_ok=True)
    (identity / "METADATA").write_text(f"Name: vllm\nVersion: {source.name}+cpu\n")
    return {
        **os.environ,
        "PYTHONPATH": f"{source}:{packages}",
        "VLLM_CACHE_ROOT": str(root / "cache"),
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "TORCHINDUCTOR_CACHE_DIR": str(root / "torchinductor_root"),
    }


def change_source(root: Path) -> None:
    """Changes the program so that its graph is another."""
    model = root / "model.py"
    model.write_text(model.read_text().replace("+ x\n", "+ x * 1\n"))


def start(root: Path, environment: dict[str, str], log: str) -> None:
    """Starts the program, and keeps what it logs."""
    command = [sys.executable, str(root / "model.py")]
    with (root / log).open("wb") as file:
        subprocess.run(command, env=environment, stdout=file, stderr=subprocess.DEVNULL)


def reduce(root: Path, target: Path, places: dict[str, str]) -> None:
    """Copies the cache and the logs, with less in them, and no path of this machine."""
    places = {**places, sysconfig.get_path("purelib"): "/site"}
    for path in sorted((*(root / "kept").rglob("*"), *root.glob("*.log"))):
        inside = path.relative_to(root / "kept" if path.suffix != ".log" else root)
        if not path.is_file() or {"inductor_cache", "triton_cache"} & set(inside.parts):
            continue
        copy = target / inside
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in TEXTS or "artifact" in str(inside):
            content = content_of(path)
            text = f"{content.digest} {content.bytes} {' '.join(sorted(content.places))}\n"
        else:
            text = path.read_text(encoding="utf-8")
        if path.suffix == ".log":
            text = "".join(line for line in text.splitlines(True) if TOLD.search(line))
        for place, name in places.items():
            text = text.replace(place, name)
        copy.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
