"""What users reported, and that the answer to it is in the first lines of what they read.

The threads are those of `docs/explain-a-miss.md` and more; situations of vLLM's own caches and logs
that need no model are in tests/cli/test_foreign.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]

TRACES = Path(__file__).parents[1] / "core/diagnose/traces"


def lines(done: Any, count: int = 1) -> str:
    """The first lines of what a person reads."""
    return "\n".join(done.out.splitlines()[:count])


def test_two_engines_of_one_host_differ_in_the_variable_that_counts_them(
    vllmc: Run, workplace: Path, vllm_start: Any
) -> None:
    # NovaSky-AI/SkyRL#2167: a variable of each engine splits the cache.
    for rank in range(2):
        engine = vllm_start.change(env={"VLLM_DP_RANK": rank})
        (workplace / f"{rank}.log").write_text(engine.log(label=f"rank_0_{rank}/backbone"))
    done = vllmc("diff-config", "0.log", "1.log")
    assert lines(done) == "1 difference affects the key: vllm.env.VLLM_DP_RANK"
    assert "everything that differs is spurious" in done.out


def test_a_moved_cache_of_vllmc_s_own_still_hits_under_another_home(
    warmed: Any, eager: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # marin-community/marin#7615 and vllm-project/vllm#47573, as they go here.
    moved = warmed.copy(workplace / "elsewhere/deep/cache")
    monkeypatch.setenv("HOME", str(workplace / "another"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "another/cache"))
    done = eager("warm", "--check", "--cache-dir", moved)
    assert done.code == 0
    assert lines(done).startswith("would-hit")


def test_a_shipped_cache_that_one_flag_makes_inert_is_found_out_before_the_start(
    warmed: Any, eager: Run, workplace: Path
) -> None:
    # ai-dynamo/modelexpress#560: moved, installed, and compiled all the same.
    shipped = warmed.copy(workplace / "shipped")
    done = eager("warm", "--check", "--cache-dir", shipped, "-O", "epilogue_fusion=false")
    assert done.code == 3
    assert lines(done) == (
        "would-miss  the nearest stored program differs in inductor.epilogue_fusion"
    )
    assert "true -> false" in done.out
    assert "to have it as it was:" in done.out


def test_a_shipped_cache_of_vllm_is_compared_with_the_log_of_the_start_that_missed_it(
    vllmc: Run, workplace: Path, vllm_start: Any
) -> None:
    # The same, of a cache of vLLM's.
    vllm_start.store(workplace / "shipped")
    here = vllm_start.change(env={"VLLM_USE_DEEP_GEMM": False})
    (workplace / "start.log").write_text(here.log())
    done = vllmc("diff-config", "shipped", "start.log", "--exit-code")
    assert done.code == 3
    assert lines(done) == "1 difference affects the key: vllm.env.VLLM_USE_DEEP_GEMM"
    assert "spurious" not in done.out


def test_a_miss_of_torch_names_the_option_that_moved(vllmc: Run) -> None:
    # pytorch/pytorch#152065 and #155332: torch says that it missed, and no more.
    done = vllmc("diff-config", TRACES / "cold", TRACES / "option")
    assert "inductor_config[epilogue_fusion]" in lines(done)


def test_a_bypass_of_torch_is_told_with_its_reason(vllmc: Run) -> None:
    # pytorch/pytorch#144859: stored, and never used.
    done = vllmc("inspect-key", TRACES / "frozen")
    assert lines(done).startswith(
        "1 compilation: 1 bypass: Cannot cache a graph with freezing enabled"
    )


MODEL = """
from factory import config
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

SCALE = 2.0


class Scaled(LlamaMLP):
    def forward(self, x):
        return super().forward(x) * SCALE


def make():
    model = LlamaForCausalLM(config())
    for layer in model.model.layers:
        layer.mlp = Scaled(model.config)
    return model
"""


def test_a_value_that_shapes_the_code_but_no_key_is_no_wrong_hit(
    workplace: Path, factory: Path, eager: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vllm-project/vllm#53366, #14953, #16491, #28759: what changes the code was not in the key.
    (workplace / "scaled.py").write_text(MODEL)
    assert eager("warm", "scaled:make").code == 0
    monkeypatch.setattr(sys.modules["scaled"], "SCALE", 3.0)
    done = eager("warm", "scaled:make", "--check")
    assert done.code == 3
    assert "changed since it was stored: scaled.SCALE" in lines(done)
    assert "2.0 -> 3.0" in done.out


def test_an_artifact_that_is_not_what_was_stored_is_unsafe_before_the_start(
    warmed: Any, eager: Run, damage: Callable[[Path, str], None]
) -> None:
    # A wrong hit by a damaged file: vllm-project/vllm#21858.
    damage(warmed.root, warmed.said["units"][0]["artifact"])
    done = eager("warm", "--check")
    assert done.code == 4
    assert lines(done).startswith("unsafe")
