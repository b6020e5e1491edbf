from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def traces() -> Path:
    """Where the traces lie that `traces/make.py` made."""
    return Path(__file__).parent / "traces"
