"""What the source of torch's config modules says: the variables an option reads, and its default.

Torch's registry forgets both. It keeps the value that an environment variable gave an option, not
the variable's name; and most Inductor options read the environment inline
(`max_autotune = os.environ.get("TORCHINDUCTOR_MAX_AUTOTUNE") == "1"`), so that what the registry
calls their default is already the value after the environment. Importing this imports no torch.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, SimpleNamespace
from typing import Any, TypeAlias

from vllmc.core.syntax import parse_module
from vllmc.core.torch_compat.config_modules import config_file, present_config
from vllmc.core.torch_compat.options import MODULES

_Functions: TypeAlias = "dict[str, ast.FunctionDef]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """How a config module defines an option.

    `variables` are the environment variables that can set it, the decisive one first.
    `expression` gives its default once no variable is set; `scope` is the prefix of the class
    that it stands in (`cpp.`, empty at the top).
    """

    variables: tuple[str, ...]
    expression: ast.expr
    scope: str


@functools.cache
def definitions(module: str) -> dict[str, Definition]:
    """The definitions in a config module of torch, by dotted option name."""
    tree = parse_module(config_file(module).read_bytes())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    found: dict[str, Definition] = {}
    _collect(tree.body, "", functions, found)
    return found


def variables_of(module: str, name: str, environment: Collection[str]) -> list[str]:
    """The variables among `environment` that can set an option, the decisive one first."""
    # Reading the source as Python takes long. Mostly no variable that is set is named in it.
    if _quoted(module).isdisjoint(environment):
        return []
    return [v for v in variables_that_set(module, name) if v in environment]


def variables_that_set(module: str, name: str) -> tuple[str, ...]:
    """The variables that can set an option, the decisive one first; none of one it lacks."""
    defined = definitions(module).get(name)
    return defined.variables if defined else ()


def variables_read(environment: Mapping[str, str]) -> dict[str, str]:
    """What `environment` has of the variables that options of Inductor and functorch read.

    Quick, so there may be others among them: those that the source has in quotes.
    """
    quoted = frozenset[str]().union(*map(_quoted, MODULES.values()))
    return {name: environment[name] for name in sorted(quoted & environment.keys())}


@functools.cache
def _quoted(module: str) -> frozenset[str]:
    """The words in quotes in a config module's source, among them all variables that it reads."""
    return frozenset(re.findall(r"""["'](\w+)["']""", config_file(module).read_text("utf-8")))


def default_without_environment(module: str, name: str) -> Any:
    """The option's default with no environment variable set. Raises `KeyError` if undefined."""
    defined = definitions(module)[name]
    namespace = vars(present_config(module))
    bare = dict(namespace)
    unset = {"environ": {}, "getenv": lambda _, default=None: default}
    bare["os"] = SimpleNamespace(**(vars(os) | unset))
    bare["get_tristate_env"] = lambda _, default=None: default
    for key, value in list(bare.items()):
        if isinstance(value, FunctionType) and value.__globals__ is namespace:
            bare[key] = FunctionType(
                value.__code__, bare, value.__name__, value.__defaults__, value.__closure__
            )
    code = compile(ast.Expression(defined.expression), f"<default of {name}>", "eval")
    return eval(code, bare, _Siblings(module, defined.scope))


class _Siblings(dict[str, Any]):
    """The other options, as names within a definition: those of its class, then the module's."""

    def __init__(self, module: str, scope: str) -> None:
        super().__init__()
        self._module = module
        self._scope = scope

    def __missing__(self, key: str) -> Any:
        for name in (self._scope + key, key):
            if name in definitions(self._module):
                return default_without_environment(self._module, name)
        raise KeyError(key)


def _collect(
    body: list[ast.stmt], scope: str, functions: _Functions, found: dict[str, Definition]
) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            _collect_class(node, scope, functions, found)
        elif isinstance(node, ast.If):
            _collect(node.body + node.orelse, scope, functions, found)
        elif isinstance(node, ast.Try):
            _collect(node.body, scope, functions, found)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            variables = dict.fromkeys(_variables(node.value, scope, functions, found))
            definition = Definition(
                variables=tuple(variables), expression=_default(node.value), scope=scope
            )
            for target in targets:
                if isinstance(target, ast.Name):
                    found[scope + target.id] = definition


def _collect_class(
    node: ast.ClassDef, scope: str, functions: _Functions, found: dict[str, Definition]
) -> None:
    prefix = f"{scope}{node.name}."
    # `class cuda(cutlass)` with @inherit_fields_from: the parent's options under the child's name.
    for base in node.bases:
        if isinstance(base, ast.Name):
            parent = f"{scope}{base.id}."
            inherited = {k: v for k, v in found.items() if k.startswith(parent)}
            found |= {prefix + k.removeprefix(parent): v for k, v in inherited.items()}
    _collect(node.body, prefix, functions, found)


def _default(value: ast.expr) -> ast.expr:
    """The default within a definition: that of `Config(default=...)`, else all of it."""
    if isinstance(value, ast.Call) and _name(value.func) == "Config":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return keyword.value
    return value


def _variables(
    node: ast.AST, scope: str, functions: _Functions, found: dict[str, Definition]
) -> Iterator[str]:
    """The environment variables that `node` reads, outermost first."""
    yield from _read_here(node)
    if isinstance(node, ast.Call) and (called := functions.get(_name(node.func))) is not None:
        yield from _passed_on(node, called)
        for statement in called.body:
            yield from _variables(statement, "", functions, found)
    if isinstance(node, ast.Name):
        known = found.get(scope + node.id) or found.get(node.id)
        yield from known.variables if known else ()
    for child in ast.iter_child_nodes(node):
        yield from _variables(child, scope, functions, found)


def _read_here(node: ast.AST) -> Iterator[str]:
    """The names that `node` itself looks up: an `os.environ` access, or `Config(env_name_*=)`."""
    if isinstance(node, ast.Call):
        if _is_reader(node.func) and node.args:
            yield from _texts(node.args[0])
        elif _name(node.func) == "Config":
            # A forced variable beats everything, a default one only the default.
            arguments = {keyword.arg: keyword.value for keyword in node.keywords}
            for key in ("env_name_force", "env_name_default"):
                yield from _texts(arguments[key]) if key in arguments else ()
    elif isinstance(node, ast.Subscript) and _is_environ(node.value):
        yield from _texts(node.slice)
    elif isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
        yield from _texts(node.left)


def _passed_on(call: ast.Call, called: ast.FunctionDef) -> Iterator[str]:
    """The names handed to a helper that looks up the variable which its parameter names."""
    looked_up = {
        name.id
        for node in ast.walk(called)
        for argument in _looked_up(node)
        for name in ast.walk(argument)
        if isinstance(name, ast.Name)
    }
    for parameter, argument in zip(called.args.args, call.args, strict=False):
        if parameter.arg in looked_up:
            yield from _texts(argument)


def _looked_up(node: ast.AST) -> Iterator[ast.expr]:
    if isinstance(node, ast.Call) and _is_reader(node.func):
        yield from node.args[:1]
    elif isinstance(node, ast.Subscript) and _is_environ(node.value):
        yield node.slice
    elif isinstance(node, ast.Compare) and any(map(_is_environ, node.comparators)):
        yield node.left


def _is_reader(function: ast.expr) -> bool:
    text = ast.unparse(function)
    return text in ("os.environ.get", "os.getenv") or text.endswith("get_tristate_env")


def _is_environ(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "os.environ"


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _texts(node: ast.expr) -> Iterator[str]:
    elements = node.elts if isinstance(node, ast.List) else [node]
    for element in elements:
        if isinstance(element, ast.Constant) and isinstance(element.value, str):
            yield element.value
