"""Every op of vllmc: to import this defines them all.

An artifact calls ops by their names, and passes put some there that no model's code knows.
"""

from __future__ import annotations

from vllmc.kernels import activation as _activation  # noqa: F401
from vllmc.kernels import attention as _attention  # noqa: F401
from vllmc.kernels import logprobs as _logprobs  # noqa: F401
from vllmc.kernels import matmul as _matmul  # noqa: F401
from vllmc.kernels import moe as _moe  # noqa: F401
from vllmc.kernels import norm as _norm  # noqa: F401
from vllmc.kernels import quant as _quant  # noqa: F401
from vllmc.kernels import rotary as _rotary  # noqa: F401
