"""The plugin that vLLM loads: it writes `vllmc_factors.json` beside each compile-cache entry.

vLLM calls `register` in each of its processes, through the entry point `vllmc` of the group
`vllm.general_plugins`. `VLLMC_PLUGIN=0` switches it off. Importing this imports nothing else.
"""

from __future__ import annotations

import os


def register() -> None:
    """Has vLLM's keys recorded in this process; called again it does nothing. Never raises."""
    if os.environ.get("VLLMC_PLUGIN", "").strip() == "0":
        return
    from vllmc.core.vllm_plugin.quiet import quietly

    with quietly("vLLM could not be prepared"):
        from vllmc.core.vllm_plugin.hooks import install

        install()
