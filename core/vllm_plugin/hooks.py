"""The only module that wraps functions of vLLM's, to see what it hashes. Written for 0.32 and 0.33.

Each wrapper calls what it wraps once, with the arguments that it got, and returns what that
returned; whatever else it does cannot fail (`quietly`). Functions that a release lacks are left
out, and what is written then says so. The modules of vLLM's that compile are not imported: they
are wrapped once a model that they compile has been built.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

from vllmc.core.vllm_plugin.observation import ConfigHash, Forward, Hashed, Observation
from vllmc.core.vllm_plugin.quiet import quietly

Around: TypeAlias = Callable[..., Any]
"""Called with what it wraps, and with the arguments of the call."""


class _Thread(threading.local):
    """What a thread is in the middle of: keys, the parts of a config's hash, a whole model."""

    def __init__(self) -> None:
        self.open: list[Observation] = []
        self.parts: list[list[Hashed]] = []
        self.whole: Observation | None = None


_NOW: Final = _Thread()
_MARK: Final = "_vllmc_wraps"


def install() -> None:
    """Wraps what this process has imported of vLLM, and has the rest wrapped when it is needed."""
    import vllm.config  # noqa: F401 - in `sys.modules`, with the modules that it imports

    _wrap("vllm.envs", "compile_factors", _environment)
    _wrap("vllm.config.vllm", "VllmConfig.compute_hash", _config)
    _wrap("vllm.config.compilation", "CompilationConfig.init_backend", _backend_made)
    _install_compilation()


def missing(*, storing: bool) -> tuple[str, ...]:
    """The functions of vLLM's that could not be wrapped, of those that hash, and store."""
    return tuple(
        f"{module}.{name}"
        for module, name in (*_HASHING, *(_STORING if storing else ()))
        if not hasattr(_found(module, name), _MARK)
    )


@contextmanager
def observing(observation: Observation) -> Iterator[None]:
    """Has what this thread's calls of vLLM hash noted in `observation`, within the block."""
    _NOW.open.append(observation)
    try:
        yield
    finally:
        _NOW.open.pop()


def _install_compilation() -> None:
    # Each module of a config has these under its own name.
    for name in [name for name in sys.modules if name.startswith("vllm.config.")]:
        _wrap(name, "hash_factors", _hash_of_fields)
        _wrap(name, "safe_hash", _hash_of_text)
    _wrap("vllm.compilation.compiler_interface", "get_inductor_factors", _compiler)
    _wrap("vllm.compilation.caching", "get_inductor_factors", _compiler)
    _wrap("vllm.compilation.caching", "aot_compile_hash_factors", _whole_key)
    _wrap("vllm.compilation.decorators", "_model_hash_key", _forward)
    _wrap("vllm.compilation.decorators", "_try_load_aot_compiled_fn", _whole_path)
    _wrap("vllm.compilation.decorators", "monitor_profiling_run", _whole_ready)
    _wrap("vllm.compilation.backends", "VllmBackend.__call__", _compiled)


_HASHING: Final = (
    ("vllm.config.utils", "hash_factors"),
    ("vllm.config.vllm", "safe_hash"),
    ("vllm.envs", "compile_factors"),
    ("vllm.config.vllm", "VllmConfig.compute_hash"),
    ("vllm.compilation.compiler_interface", "get_inductor_factors"),
)
_STORING: Final = (
    ("vllm.compilation.caching", "aot_compile_hash_factors"),
    ("vllm.compilation.decorators", "_model_hash_key"),
    ("vllm.compilation.decorators", "_try_load_aot_compiled_fn"),
    ("vllm.compilation.decorators", "monitor_profiling_run"),
    ("vllm.compilation.backends", "VllmBackend.__call__"),
)


def _wrap(module: str, name: str, around: Around) -> None:
    original = _found(module, name)
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapper(*args: Any, **keywords: Any) -> Any:
        return around(original, *args, **keywords)

    setattr(wrapper, _MARK, original)
    *outer, attribute = name.split(".")
    setattr(functools.reduce(getattr, outer, sys.modules[module]), attribute, wrapper)


def _found(module: str, name: str) -> Any:
    """What an imported module has by a dotted name; None where there is no such thing."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _environment(original: Around, *args: Any, **keywords: Any) -> Any:
    result = original(*args, **keywords)
    # A key is made first; what is hashed while its pieces are compiled is no part of it.
    if _NOW.open and _NOW.open[-1].environment is None:
        _NOW.open[-1].environment = result
    return result


def _compiler(original: Around, *args: Any, **keywords: Any) -> Any:
    result = original(*args, **keywords)
    if _NOW.open and _NOW.open[-1].compiler is None:
        with quietly("the compiler's factors could not be read"):
            # The caller appends to the list that it gets.
            _NOW.open[-1].compiler = tuple(result)
    return result


def _config(original: Around, *args: Any, **keywords: Any) -> Any:
    if not _NOW.open or _NOW.open[-1].config is not None:
        return original(*args, **keywords)
    parts: list[Hashed] = []
    _NOW.parts.append(parts)
    try:
        digest = original(*args, **keywords)
    finally:
        _NOW.parts.pop()
    with quietly("the config's hash could not be read"):
        _NOW.open[-1].config = ConfigHash(config=args[0], digest=digest, parts=tuple(parts))
    return digest


def _hash_of_fields(original: Around, *args: Any, **keywords: Any) -> Any:
    digest = original(*args, **keywords)
    if _NOW.parts:
        with quietly("a hash of fields could not be read"):
            _note(args[0] if args else next(iter(keywords.values())), digest)
    return digest


def _hash_of_text(original: Around, *args: Any, **keywords: Any) -> Any:
    result = original(*args, **keywords)
    if _NOW.parts:
        with quietly("a hash could not be read"):
            _note(args[0], result.hexdigest())
    return result


def _note(content: Any, digest: str) -> None:
    # Which object asked is no argument: it is the `self` of the method that called.
    owner = sys._getframe(3).f_locals.get("self")
    _NOW.parts[-1].append(Hashed(owner=owner, content=content, digest=digest))


def _backend_made(original: Around, *args: Any, **keywords: Any) -> Any:
    backend = original(*args, **keywords)
    with quietly("vLLM's compilation could not be prepared"):
        if "vllm.compilation.backends" in sys.modules:
            # What compiles next imports it anyway; its functions are called as soon as it does.
            import vllm.compilation.caching  # noqa: F401
        _install_compilation()
    return backend


def _compiled(original: Around, *args: Any, **keywords: Any) -> Any:
    observation = Observation()
    with quietly("the traced files could not be read"):
        # vLLM empties the set once it has hashed the files.
        config = args[0].compilation_config
        observation.traced = frozenset(config.traced_files)
        observation.shared = bool(config.cache_dir)
    try:
        with observing(observation):
            return original(*args, **keywords)
    finally:
        with quietly("the factors of a compilation could not be written"):
            from vllmc.core.vllm_plugin.writing import write_compilation

            observation.missing = missing(storing=True)
            write_compilation(observation, args[0])


def _whole_key(original: Around, *args: Any, **keywords: Any) -> Any:
    observation = _NOW.whole = Observation()
    with observing(observation):
        return original(*args, **keywords)


def _forward(original: Around, *args: Any, **keywords: Any) -> Any:
    digest = original(*args, **keywords)
    if _NOW.whole is not None:
        with quietly("the function that is compiled could not be read"):
            line = args[0].__code__.co_firstlineno
            _NOW.whole.forward = Forward(name=args[0].__qualname__, line=line, digest=digest)
    return digest


def _whole_path(original: Around, *args: Any, **keywords: Any) -> Any:
    if _NOW.whole is not None:
        with quietly("where a whole model is stored could not be read"):
            _NOW.whole.model, _NOW.whole.path = args[:2]
    return original(*args, **keywords)


def _whole_ready(original: Around, *args: Any, **keywords: Any) -> Any:
    """A whole model is loaded, or compiled and stored, when its profiling begins."""
    observation, _NOW.whole = _NOW.whole, None
    if observation is not None and observation.path:
        with quietly("the factors of a whole model could not be written"):
            from vllmc.core.vllm_plugin.writing import write_whole_model

            observation.missing = missing(storing=True)
            write_whole_model(observation)
    return original(*args, **keywords)
