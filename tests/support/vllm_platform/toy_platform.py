"""A platform of vLLM's that compiles by pieces on a CPU; to be put on PYTHONPATH."""

from __future__ import annotations

from typing import Any


def register() -> str:
    """Names the platform, as vLLM asks its plugins to."""
    return "toy_platform.ToyPlatform"


def __getattr__(name: str) -> Any:
    if name != "ToyPlatform":
        raise AttributeError(name)
    import dataclasses

    from vllm.platforms.cpu import CpuPlatform

    class ToyPlatform(CpuPlatform):  # type: ignore[misc]
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            compilation = vllm_config.compilation_config
            mode = compilation.mode
            super().check_and_update_config(vllm_config)
            compilation.mode, compilation.backend = mode, "inductor"
            compilation.compile_sizes = []
            for field in dataclasses.fields(compilation.pass_config):
                if getattr(compilation.pass_config, field.name) is True:
                    setattr(compilation.pass_config, field.name, False)

    return ToyPlatform
