"""The compiled forward of one decorated module: which program a call runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

import torch

from vllmc.core.declare.containers import containers, leaves
from vllmc.core.declare.declaration import Declaration, declaration_of
from vllmc.core.declare.dims import Declared, DynamicDim, forward_parameters
from vllmc.core.declare.held import Held
from vllmc.core.declare.session import Session, current_session
from vllmc.core.errors import VllmcError
from vllmc.core.models.guarded import HOOKS
from vllmc.core.runtime.program import Program

_LOGGER: Final = logging.getLogger("vllmc")


class CompiledForward:
    """Runs calls of one module by compiled programs, one for each kind of call.

    Calls are of one kind if they bring tensors of the same dtypes, ranks and fixed sizes under the
    same names, and the same constants.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._programs: dict[Hashable, Program] = {}
        self._held: Held | None = None
        self._bind: Callable[..., tuple[object, ...]] | None = None
        self._names: tuple[str, ...] = ()
        self._enabled: bool | None = None
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: object) -> CompiledForward:
        """A fresh one: programs are bound to the tensors of one module."""
        return CompiledForward(self._session)

    def __reduce__(self) -> tuple[object, ...]:
        """Pickled as a fresh one that takes the session in force where it is loaded."""
        return (_unpickled, ())

    def forget(self) -> None:
        """Drops all programs: the module's tensors are others from now on."""
        self._programs, self._held = {}, None

    def __call__(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What the module's forward returns. Raises what `Program.__call__` and compiling raise."""
        if self._enabled is None:
            self._enabled = self._is_enabled(module)
        if not self._enabled:
            return torch.nn.Module.__call__(module, *args, **kwargs)
        if self._bind is None:
            self._bind = _binder(module)
            self._names = tuple(p.name for p in forward_parameters(module))
        values = self._bind(*args, **kwargs)
        tensors, kind = _kind(_declaration(module).declared, self._names, values)
        kind = (module.training, kind)
        if any(getattr(module, name) for name in HOOKS):
            raise _hooked(module)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise _autocast(module)
        if self._held is not None and not self._held.is_there():
            self.forget()
        program = self._programs.get(kind)
        if program is None:
            with self._lock:
                program = self._programs.get(kind) or self._open(module, values)
                self._programs[kind] = program
                self._held = self._held or Held(module)
        # Compiled for inference, in whatever mode the caller is.
        with torch.no_grad():
            return program(*tensors)

    def _is_enabled(self, module: torch.nn.Module) -> bool:
        from vllmc.core.job import resolve_spec
        from vllmc.core.models.live_model import LiveModel

        declaration = _declaration(module)
        if declaration.enable_if is None:
            return True
        return declaration.enable_if(resolve_spec(self._session.spec, LiveModel(module, {})))

    def _open(self, module: torch.nn.Module, values: tuple[object, ...]) -> Program:
        """The program for calls like this one, from the cache or compiled now."""
        # Importing the pipeline takes a second, which a module that is only made does without.
        from vllmc.core.job import make_job, resolve_spec
        from vllmc.core.models.live_model import LiveModel
        from vllmc.core.obtain import Policy
        from vllmc.core.pipeline import obtain_program, open_program

        session = self._session
        model = LiveModel(module, dict(zip(self._names, values, strict=True)))
        job = make_job(
            model,
            resolve_spec(session.spec, model),
            environment=session.environment,
            cache_dir=session.store.root,
            origins={},
            since=session.since,
        )
        ready = obtain_program(
            job,
            session.store,
            session.observer,
            policy=Policy(may_compile=session.may_compile),
        )
        _LOGGER.info("%s: %s, %.1f s", job.label, ready.outcome, ready.seconds.total)
        # What another model has otherwise says nothing of this one.
        if ready.miss is not None and ready.miss.nearest_model is None:
            for c in ready.miss.changes:
                told = (job.label, c.kind, c.group, c.name, c.before, c.after)
                _LOGGER.info("%s: not stored so far, %s: %s %s, %s before and %s now", *told)
        began = time.perf_counter()
        program = open_program(ready, module)
        _LOGGER.info("%s: loaded and linked, %.2f s", job.label, time.perf_counter() - began)
        return program


def _unpickled() -> CompiledForward:
    return CompiledForward(current_session())


def _declaration(module: torch.nn.Module) -> Declaration:
    declaration = declaration_of(module)
    assert declaration is not None
    return declaration


def _binder(module: torch.nn.Module) -> Callable[..., tuple[object, ...]]:
    """A function with the parameters of the module's forward that returns their values.

    Generated, because `inspect.Signature.bind` takes longer than a small piece.
    """
    defaults: dict[str, Any] = {}
    parts: list[str] = []
    parameters = forward_parameters(module)
    for index, parameter in enumerate(parameters):
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        if parameter.default is parameter.empty:
            parts.append(parameter.name)
        else:
            defaults[f"_default_{index}"] = parameter.default
            parts.append(f"{parameter.name}=_default_{index}")
    if by_place := sum(p.kind is p.POSITIONAL_ONLY for p in parameters):
        parts.insert(by_place, "/")
    returned = "".join(f"{parameter.name}, " for parameter in parameters)
    exec(f"def forward({', '.join(parts)}): return ({returned})", defaults)
    bind: Callable[..., tuple[object, ...]] = defaults["forward"]
    return bind


def _kind(
    declared: Declared, names: Sequence[str], values: Sequence[object]
) -> tuple[list[torch.Tensor], Hashable]:
    """The tensors among `values`, and what is the same in all calls of this kind."""
    tensors: list[torch.Tensor] = []
    kind: list[Hashable] = []
    for name, value in zip(names, values, strict=True):
        if value is None:
            kind.append(None)
            continue
        varying = declared.dims.get(name, ())
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            kind.append((name, *_same_of_tensor(value, varying)))
            continue
        kind.extend(containers(name, value))
        for path, leaf in leaves(name, value):
            if isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
                kind.append((path, *_same_of_tensor(leaf, varying)))
            elif isinstance(leaf, float):
                # Not all that are equal are the same, and a nan does not equal itself.
                kind.append((path, float, leaf.hex()))
            else:
                # `1` and `True` are equal, and not the same constant.
                kind.append((path, type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf)))
    return tensors, tuple(kind)


def _same_of_tensor(tensor: torch.Tensor, varying: Sequence[DynamicDim]) -> tuple[Hashable, ...]:
    shape = [*tensor.shape]
    for dynamic in varying:
        if -len(shape) <= dynamic.dim < len(shape):
            shape[dynamic.dim] = -1
    return (type(tensor), tensor.dtype, tensor.device, *shape)


def _hooked(module: torch.nn.Module) -> VllmcError:
    return VllmcError(
        "has-hooks",
        f"{type(module).__qualname__} has hooks of its own, which a compiled call would leave out",
        hint="register them on a module inside it, before its first call; or call it within "
        "vllmc.core.plainly()",
    )


def _autocast(module: torch.nn.Module) -> VllmcError:
    return VllmcError(
        "autocast",
        f"{type(module).__qualname__} is called under autocast, which no compiled call looks at",
        hint="convert the module, as by .to(torch.bfloat16), and call it outside of autocast; or "
        "call it within vllmc.core.plainly()",
    )
