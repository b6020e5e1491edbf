"""`support_torch_compile`: a module's author declares what varies from call to call.

After vLLM's decorator of that name (vllm/compilation/decorators.py), for plain PyTorch modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, TypeVar, overload

import torch

from vllmc.core.declare.compiled import CompiledForward
from vllmc.core.declare.declaration import DECLARATION, Declaration, ExampleInputs, declaration_of
from vllmc.core.declare.dims import Dims, declare
from vllmc.core.declare.session import current_session, runs_plainly
from vllmc.core.errors import UsageError
from vllmc.core.spec import CompileSpec

ModuleClass = TypeVar("ModuleClass", bound=type[torch.nn.Module])

_STATE: Final = "_vllmc_compiled"


@overload
def support_torch_compile(cls: ModuleClass, /) -> ModuleClass: ...


@overload
def support_torch_compile(
    *,
    dynamic_arg_dims: Mapping[str, Dims] | None = None,
    mark_unbacked_dims: Mapping[str, Dims] | None = None,
    at_most_tokens: Iterable[str] = (),
    enable_if: Callable[[CompileSpec], bool] | None = None,
    is_encoder: bool = False,
    example_inputs: ExampleInputs | None = None,
) -> Callable[[ModuleClass], ModuleClass]: ...


def support_torch_compile(
    cls: ModuleClass | None = None,
    /,
    *,
    dynamic_arg_dims: Mapping[str, Dims] | None = None,
    mark_unbacked_dims: Mapping[str, Dims] | None = None,
    at_most_tokens: Iterable[str] = (),
    enable_if: Callable[[CompileSpec], bool] | None = None,
    is_encoder: bool = False,
    example_inputs: ExampleInputs | None = None,
) -> Any:
    """Has the forward of a `torch.nn.Module` class compiled, and its code kept in vllmc's cache.

        @support_torch_compile(dynamic_arg_dims={
            "input_ids": {0: "tokens"}, "positions": {0: "tokens"},
        })
        class Decoder(torch.nn.Module): ...

    A call of an instance then runs the compiled program; the first call of its kind finds it in
    the cache or compiles it (see `compiling` for how and where). Nothing is compiled again for
    another size: programs have no guards. Results carry no gradient.

    - `dynamic_arg_dims`: the dimensions of tensor arguments that vary from call to call, counted
      from the first or the last (negative): one, several, or each with a *shape id*. Dimensions
      with one id are one size in every call; a call in which they differ is refused. Without it,
      the first dimension of each argument annotated as a tensor (or as something that holds
      tensors) varies. The first size that varies is the token count: it chooses the compile range.
    - `mark_unbacked_dims`: dimensions that vary and are unbacked whatever the spec's kind is.
    - `at_most_tokens`: shape ids of sizes that never exceed the token count, such as the number of
      rows whose logits are wanted; a call in which one does is refused.
    - `enable_if`: asked with the `CompileSpec` whether to compile at all; where not, calls run the
      forward as it is.
    - `is_encoder`: a batch cannot be cut into chunks, so the last compile range has no end.
    - `example_inputs`: gives `vllmc warm module:Class` the arguments of a call, by name. Without
      it they are guessed from names, annotations and the sizes of the weights.

    A subclass is compiled as its base is; it can be decorated itself, or `ignore_torch_compile`d.
    While something else compiles or captures a module that holds this one, the forward is part of
    that. Raises `UsageError` (`unknown-argument`, `bad-dims`, `no-dynamic-dims`,
    `not-a-module`, `own-call`, `no-self`), and `VllmcError` (`torch-too-old`) for shape ids on a
    torch without them.
    """
    if cls is None:
        return partial(
            _decorated,
            dynamic_arg_dims=dynamic_arg_dims,
            mark_unbacked_dims=mark_unbacked_dims,
            at_most_tokens=at_most_tokens,
            enable_if=enable_if,
            is_encoder=is_encoder,
            example_inputs=example_inputs,
        )
    return _decorated(cls)


def ignore_torch_compile(cls: ModuleClass) -> ModuleClass:
    """Has calls of a subclass run its forward as it is, though its base class is compiled."""
    _check_class(cls, "ignore_torch_compile")
    setattr(cls, DECLARATION, None)
    return cls


def _decorated(
    cls: ModuleClass,
    *,
    dynamic_arg_dims: Mapping[str, Dims] | None = None,
    mark_unbacked_dims: Mapping[str, Dims] | None = None,
    at_most_tokens: Iterable[str] = (),
    **options: Any,
) -> ModuleClass:
    _check_class(cls, "support_torch_compile")
    _check_methods(cls)
    declared = declare(cls.forward, dynamic_arg_dims, mark_unbacked_dims, at_most_tokens)
    if cls.__call__ is not _call:
        cls.__new__ = _making(cls.__new__)
        cls.__call__ = _call
        cls._apply = _moving(cls._apply)
    setattr(cls, DECLARATION, Declaration(declared=declared, **options))
    return cls


def _making(new: Callable[..., Any]) -> Callable[..., Any]:
    """`__new__` of a class that has been declared, after `new`."""

    def made(cls: type[torch.nn.Module], *args: object, **kwargs: object) -> torch.nn.Module:
        given = (args, kwargs) if new is not object.__new__ else ((), {})
        module: torch.nn.Module = new(cls, *given[0], **given[1])
        vars(module)[_STATE] = CompiledForward(current_session())
        return module

    return made


def _call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or runs_plainly() or declaration_of(self) is None:
        return torch.nn.Module.__call__(self, *args, **kwargs)
    state: CompiledForward = vars(self)[_STATE]
    return state(self, args, kwargs)


def _moving(apply: Callable[..., Any]) -> Callable[..., Any]:
    """`_apply` of a class that has been declared: moves or converts what programs are bound to."""

    def _apply(self: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
        vars(self)[_STATE].forget()
        moved: torch.nn.Module = apply(self, fn, recurse)
        return moved

    return _apply


def _check_methods(cls: type[torch.nn.Module]) -> None:
    """Refuses what a compiled call would pass by, or capture could not name."""
    if cls.__call__ not in (torch.nn.Module.__call__, _call):
        raise UsageError(
            "own-call",
            f"{cls.__qualname__} has a __call__ of its own, which a compiled call would leave out",
            hint="do in its forward what it does",
        )
    first = next(iter(inspect.signature(cls.forward).parameters), None)
    if first != "self":
        raise UsageError(
            "no-self",
            f"the first parameter of {cls.__qualname__}.forward is {first}",
            hint="call the module self: def forward(self, ...)",
        )


def _check_class(cls: object, name: str) -> None:
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise UsageError(
            "not-a-module",
            f"{name} is given {cls!r}, which is no class of torch.nn.Module",
            hint=f"decorate the class: @{name} above class Model(torch.nn.Module)",
        )
