"""Tests reach no hub: said before anything imports huggingface_hub, which reads it once.

Then the profiles of hypothesis: no example has a deadline, and those of the default run are always
the same ones. `pytest --hypothesis-profile=thorough` tries others, and twenty times as many.

Below them, layouts as vLLM writes them, for tests of what reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
import pprint
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"

_PHASES = (
    hypothesis.Phase.explicit,
    hypothesis.Phase.reuse,
    hypothesis.Phase.generate,
    hypothesis.Phase.shrink,
)
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, database=None, phases=_PHASES
)
hypothesis.settings.register_profile(
    "thorough", deadline=None, max_examples=2000, print_blob=True, phases=_PHASES
)
hypothesis.settings.load_profile("default")

VENV = "/opt/venv/lib/python3.12/site-packages"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def environment() -> dict[str, Any]:
    """The environment's factors of a start of vLLM 0.20: about 200, most of no interest."""
    return {
        "CMAKE_BUILD_TYPE": None,
        "CUDA_HOME": None,
        "VLLM_API_KEY": None,
        "VLLM_CONFIG_ROOT": "/home/dynamo/.config/vllm",
        "VLLM_DISABLED_KERNELS": [],
        "VLLM_DP_RANK": 0,
        "VLLM_FLOAT32_MATMUL_PRECISION": "highest",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.3.17",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": 5600,
        "VLLM_PP_LAYER_PARTITION": None,
        "VLLM_PROCESS_NAME_PREFIX": "VLLM",
        "VLLM_RAY_BUNDLE_INDICES": "",
        "VLLM_USE_DEEP_GEMM": True,
        "VLLM_USE_LAYERNAME": True,
        "VLLM_USE_MEGA_AOT_ARTIFACT": False,
        "VLLM_XGRAMMAR_CACHE_MB": 512,
        "VLLM_XLA_CACHE_PATH": "/home/dynamo/.cache/vllm/xla_cache",
        **{f"VLLM_OPTION_{index:03}": index % 7 == 0 for index in range(180)},
    }


def graph_text(*, root: str = VENV, hidden: int = 64, layers: int = 3, shift: int = 0) -> str:
    """A computation_graph.py: `layers` attention ops between `layers + 1` other pieces."""
    source = f"{root}/vllm/model_executor/models/llama.py"
    calls, classes = [], []
    for index in range(2 * layers + 1):
        calls.append(f"        submod_{index} = self.submod_{index}(x, s72);  x = None")
        if index % 2:
            body = (
                f"torch.ops.vllm.unified_attention(x, 'model.layers.{index // 2}.self_attn.attn')"
            )
            line, code = 201, "attn_output = self.attn(q, k, v)"
        else:
            body = "torch._C._nn.linear(x, l_self_modules_mlp_weight_)"
            line, code = 118, "x = self.down_proj(x)"
        classes += [
            f"    class submod_{index}(torch.nn.Module):",
            f'        def forward(self, x: "bf16[s72, {hidden}]", s72: "Sym(s72)"):',
            f"            # File: {source}:{line + shift} in forward, code: {code}",
            f'            y: "bf16[s72, {hidden}]" = {body};  x = None',
            "            return y",
            "",
        ]
    return "\n".join(
        [
            "from __future__ import annotations",
            "import torch",
            "class GraphModule(torch.nn.Module):",
            f'    def forward(self, x: "bf16[s72, {hidden}]", s72: "Sym(s72)"):',
            *calls,
            f"        return (submod_{2 * layers},)",
            "",
            *classes,
        ]
    )


@dataclass(frozen=True, kw_only=True)
class VllmStart:
    """One start of vLLM, and what it leaves behind; `change` gives another one."""

    env: dict[str, Any] = field(default_factory=environment)
    config: str = "84b7dc96bd"
    compiler: str = "a92dbc9a80"
    root: str = VENV
    sources: str = "def forward(): ..."
    graph: str = field(default_factory=graph_text)
    ranges: tuple[tuple[int, int], ...] = ((1, 8192),)
    artifacts: tuple[bytes, ...] = (b"first" * 100, b"middle" * 100, b"middle" * 100, b"last" * 100)

    def change(self, *, env: dict[str, Any] | None = None, **fields: Any) -> VllmStart:
        return replace(self, env=self.env | (env or {}), **fields)

    @property
    def traced(self) -> tuple[str, ...]:
        return tuple(f"{self.root}/vllm/model_executor/{n}.py" for n in ("layers/linear", "llama"))

    @property
    def hashes(self) -> dict[str, str]:
        """The four hashes, as vLLM 0.12 to 0.33 compute them."""
        code = "\n".join(part for path in self.traced for part in (path, self.sources))
        return {
            "env": sha256(json.dumps(self.env, sort_keys=True)),
            "cfg": self.config,
            "code": sha256(code),
            "comp": self.compiler,
        }

    @property
    def key(self) -> str:
        return sha256(str(list(self.hashes.values())))[:10]

    def store(
        self,
        cache_root: Path,
        *,
        key: str = "",
        label: str = "rank_0_0/backbone",
        written_in: str = "",
    ) -> Path:
        """Writes the cache below `cache_root`, and returns the key's directory.

        `written_in` is the cache root at that time, where the cache was moved since.
        """
        directory = cache_root / "torch_compile_cache" / (key or self.key)
        place = directory / label
        place.mkdir(parents=True)
        hashes = self.hashes
        factors = {
            "env": self.env,
            "config_hash": hashes["cfg"],
            "code_hash": hashes["code"],
            "compiler_hash": hashes["comp"],
        }
        (place / "cache_key_factors.json").write_text(json.dumps(factors, indent=2, sort_keys=True))
        (place / "computation_graph.py").write_text(self.graph)
        origin = Path(written_in or cache_root) / place.relative_to(cache_root)
        index = {}
        for start, end in self.ranges:
            for piece, data in enumerate(self.artifacts):
                name = f"artifact_compile_range_{start}_{end}_subgraph_{piece}"
                (place / name).write_bytes(data)
                index[((start, end), piece, "inductor_standalone")] = {
                    "graph_handle": (name, str(origin / name)),
                    "cache_key": sha256(repr(data)),
                }
        (place / "vllm_compile_cache.py").write_text(pprint.pformat(index, indent=4))
        return directory

    def log(
        self,
        *,
        process: str = "EngineCore pid=42",
        time: str = "06-20 14:45:37",
        label: str = "rank_0_0/backbone",
    ) -> str:
        """What the start logs with VLLM_LOGGING_LEVEL=DEBUG, with its prefix on each line."""
        hashes = self.hashes
        directory = f"/home/dynamo/.cache/vllm/torch_compile_cache/{self.key}/{label}"
        raw = {k: tuple(v) if isinstance(v, list) else v for k, v in self.env.items()}
        messages = [
            ("DEBUG", 1067, "Traced files (to be considered for compilation cache):"),
            *(("DEBUG", 1067, path) for path in self.traced),
            ("INFO", 1095, f"Using cache directory: {directory} for vLLM's torch.compile"),
            (
                "DEBUG",
                1106,
                "torch.compile cache factors: "
                + " ".join(f"{name}={hashes[name]}" for name in ("env", "cfg", "comp", "code"))
                + f" dir={directory}",
            ),
            ("DEBUG", 1117, "Compile env factors (raw):"),
            *(("DEBUG", 1117, line) for line in pprint.pformat(raw, width=120).splitlines()),
            ("DEBUG", 1117, f"Vllm config hash: {self.config}"),
            ("INFO", 1150, "Dynamo bytecode transform time: 4.12 s"),
        ]
        return "".join(
            f"({process}) {level} {time} [compilation/backends.py:{number}] {text}\n"
            for level, number, text in messages
        )


@pytest.fixture
def vllm_start() -> VllmStart:
    """A start of vLLM 0.20 that compiled a tiny model, whose layouts tests may write."""
    return VllmStart()


@pytest.fixture(scope="session")
def vllm_start_class() -> type[VllmStart]:
    """For tests that make starts of their own, of which one fixture would serve many examples."""
    return VllmStart
