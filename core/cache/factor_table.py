"""What each factor of a key is, in words: for docs/cache-key.md. Imports no torch.

The options of torch's configs are described by torch; `config_scope` says which of them count.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from vllmc.core.passes import PASSES

GROUPS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "environment": "variables that torch's compiler or Triton reads itself, and torch's own "
        "switches: they change code and are options of no config",
        "versions": "Python, torch, Triton, Transformers: another version captures another graph "
        "or generates other code",
        "system": "the device and the instruction set that code is made for",
        "code": "vllmc's own modules that shape programs, by digest: what a corrected splitter "
        "makes never meets what the old one stored",
        "inductor": "torch._inductor.config, whole",
        "functorch": "torch._functorch.config, whole",
        "dynamo": "of the settings of capture, those that can change a graph",
        "spec": "what you asked for",
        "passes": "the passes over the graphs, each with its version and the digest of its source",
        "model": "the model's identity: its configuration, or the modules that its code makes",
        "graph": "the digest of the piece: ops, wiring, shapes and dtypes, without any name; "
        "of custom ops also the Python files that implement them",
        "range": "the token counts that the unit is compiled for; `any` where they play no part",
    }
)
"""What each group holds and why; `graph` and `range` are of units only."""

_DEBUG_CODE: Final = "builds the C++ code without optimisation, or with debug symbols"
_TRITON_CODE: Final = "changes what Triton makes of a kernel"
_TRITON_TOOL: Final = "another assembler or library than the one that comes with Triton"

ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "TORCHINDUCTOR_DEBUG_COMPILE": _DEBUG_CODE,
        "TORCHINDUCTOR_DEBUG_SYMBOL": _DEBUG_CODE,
        "TENSORIFY_PYTHON_SCALARS": "decides whether traced Python numbers become tensors",
        "FX_PATCH_GETITEM": "decides whether symbolic tracing follows indexing",
    }
)
"""The environment variables that are factors on every device, and the reason.

Most variables that torch reads set an option and are covered by the snapshots. These are read
within torch's compiler itself (or Triton's, below).
"""

CUDA_ENVIRONMENT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "DISABLE_LLVM_OPT": _TRITON_CODE,
        "DISABLE_MMA_V3": _TRITON_CODE,
        "DISABLE_MMA_V5": _TRITON_CODE,
        "DISABLE_PTXAS_OPT": _TRITON_CODE,
        "PTXAS_OPTIONS": _TRITON_CODE,
        "TRITON_DEFAULT_FP_FUSION": _TRITON_CODE,
        "TRITON_DISABLE_LINE_INFO": _TRITON_CODE,
        "TRITON_F32_DEFAULT": _TRITON_CODE,
        "TRITON_INTERPRET": "runs kernels in Python instead of compiling them",
        "TRITON_OVERRIDE_ARCH": "compiles for another GPU than the one there is",
        "TRITON_USE_META_WS": _TRITON_CODE,
        "TRITON_LIBDEVICE_PATH": _TRITON_TOOL,
        "TRITON_PTXAS_PATH": _TRITON_TOOL,
        "TRITON_PTXAS_BLACKWELL_PATH": _TRITON_TOOL,
    }
)
"""The environment variables that are factors on a GPU as well; of a file, its contents count."""

FACTORS: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("environment", "torch.default_dtype"): "the dtype of tensors that a forward makes",
        ("environment", "torch.float32_matmul_precision"): "whether products may be in TF32",
        ("environment", "torch.deterministic_algorithms"): "whether only such kernels are chosen",
        ("environment", "torch.deterministic_warn_only"): "whether others raise or warn",
        ("environment", "torch.fill_uninitialized_memory"): "whether empty tensors are filled",
        ("environment", "torch.autocast"): "the dtype of an ambient autocast",
        ("environment", "torch.mkldnn"): "whether oneDNN's kernels may be chosen",
        ("versions", "python"): "implementation and minor version: capture reads bytecode",
        ("versions", "python_abi"): "what a compiled extension must fit",
        ("versions", "torch"): "the version, with the build (`+cpu`)",
        ("versions", "torch_key"): "torch's own digest of its version and Python sources, for a "
        "torch that was built or edited by hand",
        ("versions", "triton"): "the version that is installed",
        ("versions", "transformers"): "the version that is installed",
        ("versions", "python_full"): "provenance: a patch release changes no bytecode",
        ("system", "device_type"): "`cpu` or `cuda`",
        ("system", "device_architecture"): "of the machine, such as `x86_64`",
        ("system", "device_platform"): "the operating system",
        ("system", "cpu_capability"): "the instruction set that torch's own kernels use, and "
        "after them Inductor's",
        ("system", "cpu_features"): "those features of the CPU that generated code may use: "
        "under a fixed `cpp.march` few, under `native` all",
        ("system", "cxx_compiler"): "provenance: compared only when something must be compiled, "
        "so that a machine without a compiler still hits",
        ("code", "core.declare"): "what of a call varies, and what it is captured with",
        ("code", "core.graph"): "splitting, passes, deduplication",
        ("code", "core.compiler"): "the backends",
        ("code", "core.models"): "how a model is built and its attention replaced",
        ("code", "core.torch_compat"): "the use of torch's private interfaces",
        ("code", "core.runtime"): "what a stored program and its artifacts are linked by",
        ("code", "core.pipeline"): "the order of it all",
        ("code", "kernels"): "vllmc's ops: what generated code calls",
        ("spec", "device"): "`cuda` counts as `cuda:0`",
        ("spec", "dtype"): "`auto` counts as what it stands for",
        ("spec", "ranges"): "their order plays no part",
        ("spec", "sizes"): "their order plays no part",
        ("spec", "dynamic_shapes"): "how the token count is traced",
        ("spec", "layer_names"): "inputs of the graph, or constants in it",
        (
            "spec",
            "experts",
        ): "what mixtures of experts run on: vllmc's op, or Transformers' grouped_mm",
        ("spec", "splitting_ops"): "where the graph is cut; their order plays no part",
        ("spec", "split_kv_update"): "whether pieces store keys and values, and not attention",
        ("spec", "quantize"): "how the linears are quantised; the values of scales play no part",
        ("spec", "backend"): "what compiles the pieces",
        **{("passes", name): info.does for name, info in PASSES.items()},
    }
)
"""(group, name) of each factor that there is on every machine, and what it is or is for."""

GPU_FACTORS: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("environment", "torch.cuda_matmul"): "which precision and reductions products may have",
        ("system", "device_name"): "its name",
        ("system", "device_capability"): "its compute capability",
        ("system", "device_multiprocessors"): "their number decides how kernels are tiled",
        ("system", "device_toolkit"): "the version of CUDA or ROCm that torch was built with",
    }
)
"""Those that a GPU brings besides."""

NO_FACTORS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "dynamo.*": "settings of guards, logs and recompiling: a linked program has no guards",
        "environment.*": "variables that set an option count there; no other changes the code",
        "system.cache_sizes": "of the CPU: they size blocks of autotuned products, for speed",
        "system.cxx_compiler": "provenance: compared only when something must be compiled",
        "system.driver": "of the GPU: code is made for the device and the CUDA toolkit",
        "system.threads": "generated code asks OpenMP for their number when it runs",
        "torch._inductor.config_comms": "orders collectives of several devices; vllmc uses one",
    }
)
"""What might seem to be a factor and is none, and why; options of configs are in `config_scope`."""

ORIGINS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "default": "nobody set it",
        "flag": "an option on the command line",
        "env:NAME": "the environment variable `NAME`: one of vllmc's (`VLLMC_DTYPE`), or one that "
        "torch reads for this option",
        "file:NAME:LINE": "a line of a config file, or of the model's `config.json`",
        "vllmc": "vllmc sets it, whatever torch's default is",
        "probe": "read from the machine, the installed packages or the model's code",
    }
)
"""Each form of a factor's origin, and what it means."""
