"""What to change so that a guard does not fail again. Imports no torch.

A fix that begins with code can be pasted: what it says to a person is a comment. Each was tried on
a program that compiled again: see tests/core/diagnose/recompiles.
"""

from __future__ import annotations

import re
from typing import Final

from vllmc.core.diagnose.guards import Guard

_SUBJECT_DIM = re.compile(r"^(?P<tensor>.+)\.(?:size|stride)\(\)\[(?P<dim>\d+)\]$")
_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<name>.+)_at_(?P<line>\d+)")
_ATTRIBUTE = re.compile(r".+\.(?P<name>[^\W\d]\w*)")
_NUMBER_TYPES: Final = ("int", "float", "bool")
_DTYPES: Final = {
    "Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16",
    "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
    "Bool": "bool", "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
_STATES: Final = {
    "grad_mode": "torch.set_grad_enabled(False)  # once, before the first call of {frame}; with "
    "gradients: True, but the same at every call",
    "num_threads": "torch.set_num_threads(torch.get_num_threads())  # set the number once, before "
    "the first call of {frame}, and never after",
    "default_dtype": "torch.set_default_dtype(torch.float32)  # once, before the first call of "
    "{frame}; name the dtype where a tensor is made",
    "deterministic_algorithms": "torch.use_deterministic_algorithms(False)  # or True, once, "
    "before the first call of {frame}",
}


def fix_for(guard: Guard, frame: str) -> str:
    """What to paste or do so that `frame` (`file.py:12 in f`) does not compile again for it."""
    subject, where = guard.subject, f"# before each call of {_called(frame)}"
    dimension = _SUBJECT_DIM.match(subject)
    tensor, dim = (dimension["tensor"], dimension["dim"]) if dimension else (subject, "0")
    match guard.klass:
        case "shape-0-1":
            declared = _declaration(tensor, dim, frame)
            return f"torch._dynamo.decorators.mark_unbacked({tensor}, {dim})  {where}{declared}"
        case "shape":
            return _shape(guard, tensor, dim, frame)
        case "dtype":
            dtype = _DTYPES.get(guard.expected, "float32")
            return f"{subject} = {subject}.to(torch.{dtype})  {where}, or any one dtype"
        case "layout":
            return f"{tensor} = {tensor}.contiguous()  {where}"
        case "int":
            return _int(guard, where)
        case "string":
            return (
                f"compile the function that calls {_called(frame)} for every layer instead: each "
                f"{subject} is then a constant of one graph. A vllmc.kernels.layer_name.LayerName "
                "keeps the code of its layers the same there; given to a function of its own it "
                "compiles again as a string does"
            )
        case "object-id":
            return _object(guard, frame)
        case "global-state":
            return _state(guard, frame)
        case "index-width":
            return (
                f"use torch.int64 for indices at every size, where {_called(frame)} chooses; where "
                f"generated code chose, call it with the largest {tensor} first"
            )
        case "type":
            return _type(guard, where)
        case _:
            return _other(guard, frame, where)


def fix_for_dropped(guard: Guard, frame: str) -> str:
    """What to paste or do so that what was captured of `frame` holds for every call."""
    subject = guard.subject
    if ".size()" in subject:
        return (
            f"--dynamic-shapes unbacked  # it assumes nothing of {subject}: compiling then names "
            f"the line below {_called(frame)} that branches on it, which is to be taken out"
        )
    attribute = _ATTRIBUTE.fullmatch(subject)
    if attribute and guard.klass in ("int", "other") and _is_number(guard.expected):
        name = attribute["name"]
        if subject.startswith("self."):
            return (
                f"self.{name} = torch.tensor(self.{name})  # once, where {subject} is first set; "
                "after that change it in place, as += does"
            )
        return (
            f'self.register_buffer("{name}", torch.tensor({subject}), persistent=False)  # in the '
            f"module that reads {subject}: read self.{name} there, and change it in place"
        )
    return (
        f"hold {subject} at {guard.expected} while the program runs: it is a constant of the "
        "program, and every other value needs a program of its own"
    )


def _shape(guard: Guard, tensor: str, dim: str, frame: str) -> str:
    called = _called(frame)
    if guard.subject.endswith(".ndim"):
        tensor = guard.subject.removesuffix(".ndim")
        return f"give {called} {tensor} with one number of dimensions: {tensor}.unsqueeze(0)"
    if not guard.subject:
        return f"mark the same dimensions of the same arguments at every call of {called}"
    if guard.text.startswith("tensor "):
        declared = _declaration(tensor, dim, frame)
        return (
            f"torch._dynamo.mark_dynamic({tensor}, {dim})  # before each call of {called}{declared}"
        )
    if guard.text.count(".size()") > 1:
        return (
            f"keep {guard.text} true at every call of {called}; where the sizes may differ, "
            "let both differ at the first call too"
        )
    return (
        f"take the branch on {guard.subject} out of {called}: its condition became the guard "
        f"{guard.text}; choose in the caller, and compile one function for each side"
    )


def _declaration(tensor: str, dim: str, frame: str) -> str:
    """How a module declares a dimension of an argument of its `forward`; empty for others."""
    if not (frame.endswith(" in forward") and tensor.isidentifier()):
        return ""
    dims = f'{{"{tensor}": {{{dim}: "{tensor}_{dim}"}}}}'
    return f"; or once, on its class: @vllmc.core.support_torch_compile(dynamic_arg_dims={dims})"


def _int(guard: Guard, where: str) -> str:
    subject = guard.subject
    if subject.startswith("len("):
        inner = subject.removeprefix("len(").removesuffix(")")
        return (
            f"pass {inner} with one length, padded; or as one tensor, torch.stack({inner}), with "
            "dimension 0 marked"
        )
    if "." in subject and subject.isascii() and "[" not in subject:
        return f"{subject} = torch.tensor({subject})  # once, where {subject} is first set"
    return f"{subject} = torch.tensor({subject})  {where}"


def _object(guard: Guard, frame: str) -> str:
    called = _called(frame)
    if guard.subject == "backend":
        return f"make the backend once, and give torch.compile that same object for {called}"
    return (
        f"make {guard.subject} once, outside of the code that calls {called}, and pass that same "
        "object at every call"
    )


def _state(guard: Guard, frame: str) -> str:
    for word in guard.subject.split():
        if word in _STATES:
            return _STATES[word].format(frame=_called(frame))
        if word.startswith("autocast"):
            return (
                f"enter torch.autocast at every call of {_called(frame)} or at none; or inside it"
            )
    return f"set it once, before the first call of {_called(frame)}: {guard.subject}"


def _type(guard: Guard, where: str) -> str:
    subject = guard.subject
    if guard.expected in _NUMBER_TYPES:
        return f"{subject} = torch.tensor(float({subject}))  {where}"
    if "None" in (guard.expected.removesuffix("Type"), guard.observed.removesuffix("Type")):
        return (
            f"pass a tensor as {subject} at every call, an empty one in the place of None, with "
            "its dimensions marked: torch._dynamo.decorators.mark_unbacked"
        )
    found = f", not {guard.observed}" if guard.observed else ""
    return f"pass {subject} as one type at every call: {guard.expected or 'the first'}{found}"


def _other(guard: Guard, frame: str, where: str) -> str:
    subject, called = guard.subject, _called(frame)
    if subject.endswith(".requires_grad"):
        tensor = subject.removesuffix(".requires_grad")
        return f"{tensor} = {tensor}.detach()  {where}, where no gradient is needed"
    if subject.endswith(".device"):
        tensor = subject.removesuffix(".device")
        return f"keep {tensor} on one device, and inference mode the same, for {called}"
    if guard.text.startswith("Duplicate tensor"):
        return f"give {called} no tensor twice: pass a clone() of the second"
    if guard.expected in ("True", "False"):
        return f"hold {subject} constant, or compile one function for each of its two values"
    if ".__closure__" in subject:
        function = subject.partition(".__closure__")[0]
        return (
            f"torch.tensor({guard.expected})  # what {function} closes over, where {function} is "
            "made: as a tensor it is an input"
        )
    if guard.expected:
        return f"{subject} = torch.tensor({subject})  {where}"
    return f"hold what this guard of {called} asks for the same at every call"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _called(frame: str) -> str:
    """`f (file.py:12)` of `file.py:12 in f`."""
    place, _, function = frame.rpartition(" in ")
    if resumed := _RESUMED.fullmatch(function):
        function = f"{resumed['name']}, behind its graph break in line {resumed['line']}"
    return f"{function} ({place})" if place else frame
