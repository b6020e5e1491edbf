"""Which modules are Transformers' own, told without importing it.

A module of a running program is mostly not one, and importing Transformers takes seconds: more than
all else that finds a stored program.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_pretrained(module: torch.nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether `module` is a `PreTrainedModel`: there is none before that class is imported."""
    imported = sys.modules.get("transformers.modeling_utils")
    return imported is not None and isinstance(module, imported.PreTrainedModel)
