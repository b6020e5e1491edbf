"""What `vllmc_factors.json` is called, and how one is told from other files. Imports nothing.

A start that is only asked about prints the same, in a line that begins with `PRINTED`.
"""

from __future__ import annotations

from typing import Final

RECORDED: Final = "vllmc_factors.json"
FACTORS: Final = "cache_key_factors.json"
"""What vLLM itself records beside a compilation."""
FORMAT: Final = "vllmc-vllm-factors"
VERSION: Final = 1
PRINTED: Final = "vllmc-start: "
