"""Which of torch's settings are cache key factors, and why the others are not.

Inductor's and functorch's configs count whole, minus `EXCLUDED`: an option that a later torch adds
is covered without anyone listing it. Of Dynamo's settings, most of which concern guards, logging
and recompiling, only `CAPTURE` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_WORKERS: Final = "how many workers compile, and how they start and stop, not what they compile"
_LOGS: Final = "what is logged or shown while compiling, and where to"
_DEBUG: Final = "what a debugging session writes down about a compilation"
_PATH: Final = "where a tool or its scratch files lie on this machine"
_CACHES: Final = "torch's own caches: whether code is looked up, not what code is"
_BOOKKEEPING: Final = "names of options, for torch's own cache key"
_CHECKS: Final = "a check while running, which the generated code knows nothing of"
_TYPING: Final = "a constant of Python's that torch's registry takes for an option"

EXCLUDED: Final[Mapping[tuple[str, str], str]] = MappingProxyType(
    {
        ("inductor", "compile_threads"): _WORKERS,
        ("inductor", "worker_start_method"): _WORKERS,
        ("inductor", "worker_suppress_logging"): _WORKERS,
        ("inductor", "quiesce_async_compile_pool"): _WORKERS,
        ("inductor", "quiesce_async_compile_time"): _WORKERS,
        ("inductor", "compile_worker_wait_timeout"): _WORKERS,
        ("inductor", "file_lock_timeout"): _WORKERS,
        ("inductor", "worker_log_path"): _LOGS,
        ("inductor", "torchinductor_worker_logpath"): _LOGS,
        ("inductor", "autoheuristic_log_path"): _LOGS,
        ("inductor", "disable_progress"): _LOGS,
        ("inductor", "verbose_progress"): _LOGS,
        ("inductor", "log_tlparse"): _LOGS,
        # trace.provenance_tracking_level is not here: it writes comments into the generated code.
        ("inductor", "trace.enabled"): _DEBUG,
        ("inductor", "trace.save_real_tensors"): _DEBUG,
        ("inductor", "trace.debug_dir"): _DEBUG,
        ("inductor", "trace.debug_log"): _DEBUG,
        ("inductor", "trace.info_log"): _DEBUG,
        ("inductor", "trace.fx_graph"): _DEBUG,
        ("inductor", "trace.fx_graph_transformed"): _DEBUG,
        ("inductor", "trace.ir_pre_fusion"): _DEBUG,
        ("inductor", "trace.ir_post_fusion"): _DEBUG,
        ("inductor", "trace.output_code"): _DEBUG,
        ("inductor", "trace.graph_diagram"): _DEBUG,
        ("inductor", "trace.graph_diagram_format"): _DEBUG,
        ("inductor", "trace.draw_orig_fx_graph"): _DEBUG,
        ("inductor", "trace.orig_fx_graph_diagram_format"): _DEBUG,
        ("inductor", "trace.dot_graph_shape"): _DEBUG,
        ("inductor", "trace.log_url_for_graph_xform"): _DEBUG,
        ("inductor", "trace.compile_profile"): _DEBUG,
        ("inductor", "trace.upload_tar"): _DEBUG,
        ("inductor", "trace.log_autotuning_results"): _DEBUG,
        ("functorch", "visualize_memory_budget_pareto"): _DEBUG,
        ("functorch", "memory_budget_pareto_dir"): _DEBUG,
        ("functorch", "torch_compile_graph_format"): _DEBUG,
        # Their defaults are paths of this installation (or of the working directory).
        ("inductor", "cutlass.cutlass_dir"): _PATH,
        ("inductor", "cuda.cutlass_dir"): _PATH,
        ("inductor", "xpu.cutlass_dir"): _PATH,
        ("inductor", "global_cache_dir"): _PATH,
        ("inductor", "cpp.cxx"): (
            "the C++ compiler is provenance: a machine without one must still hit"
        ),
        ("inductor", "fx_graph_cache"): _CACHES,
        ("inductor", "fx_graph_remote_cache"): _CACHES,
        ("inductor", "force_disable_caches"): _CACHES,
        ("functorch", "enable_autograd_cache"): _CACHES,
        ("functorch", "enable_remote_autograd_cache"): _CACHES,
        ("functorch", "strict_autograd_cache"): _CACHES,
        # The default of the second is whether CI is set, which would part CI from production.
        ("functorch", "check_custom_op_aliasing"): _CHECKS,
        ("functorch", "error_on_custom_op_aliasing"): _CHECKS,
        ("inductor", "_save_config_ignore"): _BOOKKEEPING,
        ("inductor", "_cache_config_ignore_prefix"): _BOOKKEEPING,
        ("inductor", "_cache_config_factory_keys"): _BOOKKEEPING,
        ("functorch", "_save_config_ignore"): _BOOKKEEPING,
        ("inductor", "TYPE_CHECKING"): _TYPING,
        ("functorch", "TYPE_CHECKING"): _TYPING,
    }
)
"""(group, name) of each option that is no factor, and the reason. A torch may lack some."""

_SPECIALISES: Final = "decides which sizes and numbers become symbols and which constants"
_TRACES: Final = "decides which Python constructs capture follows into the graph"
_NUMPY: Final = "the types of traced NumPy code"
_ASSERTS: Final = "decides which assertions capture puts into the graph"
_REGIONS: Final = "decides which subgraphs the captured graph has"
_SYMBOLS: Final = "decides how symbolic sizes compare, and so how branches go"
_SWITCH: Final = "can turn capture off, or another backend or config on"

CAPTURE: Final[Mapping[str, str]] = MappingProxyType(
    {
        "assume_static_by_default": _SPECIALISES,
        "automatic_dynamic_shapes": _SPECIALISES,
        "automatic_dynamic_shapes_mark_as": _SPECIALISES,
        "force_parameter_static_shapes": _SPECIALISES,
        "force_nn_module_property_static_shapes": _SPECIALISES,
        "allow_ignore_mark_dynamic": _SPECIALISES,
        "allow_unspec_int_on_nn_module": _SPECIALISES,
        "specialize_int": _SPECIALISES,
        "specialize_float": _SPECIALISES,
        "capture_scalar_outputs": _TRACES,
        "capture_dynamic_output_shape_ops": _TRACES,
        "capture_autograd_function": _TRACES,
        "capture_func_transforms": _TRACES,
        "capture_sparse_compute": _TRACES,
        "capture_profiler_record_function": _TRACES,
        "allow_rnn": _TRACES,
        "inline_inbuilt_nn_modules": _TRACES,
        "install_free_tensors": _TRACES,
        "trace_autograd_ops": _TRACES,
        "enable_dynamo_decompositions": _TRACES,
        "enable_trace_contextlib": _TRACES,
        "enable_faithful_generator_behavior": _TRACES,
        "constant_fold_autograd_profiler_enabled": _TRACES,
        "replay_side_effects": _TRACES,
        "wrap_top_frame": _TRACES,
        "prepare_freezing": _TRACES,
        "reorderable_logging_functions": _TRACES,
        "ignore_logging_functions": _TRACES,
        "allowed_functions_module_string_ignorelist": _TRACES,
        "trace_numpy": _NUMPY,
        "numpy_default_float": _NUMPY,
        "numpy_default_complex": _NUMPY,
        "numpy_default_int": _NUMPY,
        "use_numpy_random_stream": _NUMPY,
        "rewrite_assert_with_torch_assert": _ASSERTS,
        "do_not_emit_runtime_asserts": _ASSERTS,
        "prefer_deferred_runtime_asserts_over_guards": _ASSERTS,
        "use_graph_deduplication": _REGIONS,
        "enable_invoke_subgraph_regional_compile": _REGIONS,
        "inline_invoke_subgraph": _REGIONS,
        "inline_single_use_invoke_subgraph": _REGIONS,
        "disable": _SWITCH,
        "suppress_errors": _SWITCH,
        "debug_backend_override": _SWITCH,
        "debug_inductor_config_override": _SWITCH,
        "debug_dynamo_config_override": _SWITCH,
        "compiler.dynamic_sources": _SPECIALISES,
        "compiler.dynamic_values": _SPECIALISES,
        "compiler.unbacked_sources": _SPECIALISES,
        "compiler.compile_on_one_rank": "decides whether devices are constants of the graph",
        "compiler.cache_key_tag": "torch's own switch to part caches: it is there to change keys",
        "symbolic_shapes.use_duck_shape": _SYMBOLS,
        "symbolic_shapes.backed_size_oblivious": _SYMBOLS,
        "symbolic_shapes.unify_view_symbols_bso_meta": _SYMBOLS,
        "symbolic_shapes.aggressive_guard_free_semantics": _SYMBOLS,
        "symbolic_shapes.meta_nonzero_assume_all_nonzero": _SYMBOLS,
        "symbolic_shapes.skip_dtype_check_in_meta_registrations": _SYMBOLS,
        "symbolic_shapes.symbol_guard_limit_before_specialize": _SYMBOLS,
    }
)
"""Name of each setting of capture that is a factor (group `dynamo`), and the reason.

Names are torch._dynamo.config's; `compiler.` stands before torch.compiler.config's and
`symbolic_shapes.` before torch.fx.experimental._config's. Where this torch lacks one (`absent` in
`vllmc.core.torch_compat.minors`), so does the key.
"""
