"""Owns the functions a program registered: name to function, its recovery, and the way of its arguments to JSON and back."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_jsonable_python

from .errors import DuplicateFunction, FunctionError, InvalidArguments, ResultNotSerializable, UnknownFunction
from .models import Recovery, check_id

__all__ = ["Function", "Registry", "to_json"]

Body = Callable[..., Awaitable[Any]]

_DEEPEST = 200
"""Levels of nesting a stored value may have; SQLite's own limit for JSON is 1,000, Python's recursion not far off."""


def to_json(value: Any, what: str) -> str:
    """
    Write a value as the JSON text that is stored, through pydantic.

    Raises:
        ResultNotSerializable: not JSON (NaN and infinity are not), circular, nested deeper than 200, with keys that collide, or
            with text that is not Unicode.
    """
    try:
        if isinstance(value, dict | list | tuple):
            _check_shape(value)
        plain = to_jsonable_python(value, inf_nan_mode="constants")
        text = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()
    except (ValueError, TypeError, RecursionError, PydanticSerializationError) as error:
        raise ResultNotSerializable(f"{what} is not JSON: {error}") from error
    return text


def _check_shape(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if len({_key(key) for key in item}) != len(item):
                    raise ValueError("two keys of an object are the same text")
                below += item.values()
            elif isinstance(item, list | tuple):
                below += item
        level = [item for item in below if isinstance(item, dict | list | tuple)]
        if not level:
            return
    raise ValueError(f"nested deeper than {_DEEPEST} levels, or within itself")


def _key(key: Any) -> Any:
    return key if type(key) is str else next(iter(to_jsonable_python({key: None})))


@dataclass(frozen=True)
class Function:
    """
    A registered function: ``async def name(task: TaskContext, …)``.

    Its annotated parameters, all but the first, are validated by pydantic on the way in and again before a body starts.
    """

    name: str
    body: Body
    recovery: Recovery
    max_attempts: int

    @cached_property
    def _signature(self) -> inspect.Signature:
        signature = inspect.signature(self.body)
        parameters = list(signature.parameters.values())
        positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
        if not parameters or parameters[0].kind not in positional:
            raise FunctionError(f"function {self.name!r} has no first parameter for its TaskContext: add one")
        return signature.replace(parameters=parameters[1:])

    @cached_property
    def _adapters(self) -> Mapping[str, TypeAdapter[Any] | None]:
        written = {
            name: parameter.annotation
            for name, parameter in self._signature.parameters.items()
            if parameter.annotation is not inspect.Parameter.empty
        }
        closure = inspect.getclosurevars(inspect.unwrap(self.body)).nonlocals
        try:
            hints = typing.get_type_hints(
                SimpleNamespace(__annotations__=written), self.body.__globals__, dict(closure), include_extras=True
            )
        except NameError as error:
            raise FunctionError(f"function {self.name!r}: an annotation cannot be resolved: {error}") from error
        return {
            name: _adapter(parameter.kind, hints[name]) if name in hints else None
            for name, parameter in self._signature.parameters.items()
        }

    def check(self) -> None:
        """
        Look at the function as far as can be done before it is called.

        Raises:
            FunctionError: not an ``async def``, without a parameter for its context, or with annotations nobody can resolve.
        """
        if not inspect.iscoroutinefunction(self.body):
            raise FunctionError(f"function {self.name!r} must be an 'async def'")
        _ = self._adapters

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """
        Validate arguments and write them as a JSON object by parameter name.

        Raises:
            InvalidArguments: they do not fit the function, or are not JSON.
        """
        try:
            given = self._by_name(args, kwargs) or self._signature.bind(*args, **kwargs).arguments
            plain = {name: self._checked(name, value) for name, value in given.items()}
            return to_json(plain, f"an argument of {self.name!r}")
        except (TypeError, ValidationError, PydanticSerializationError, ValueError, ResultNotSerializable) as error:
            raise InvalidArguments(f"the arguments do not fit function {self.name!r}: {error}") from error

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Name the arguments of the commonest call, ten times quicker than `inspect`; None if it is not so simple."""
        names = self._names
        if names is None or len(args) + len(kwargs) != len(names):
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return given if given.keys() == set(names) else None

    @cached_property
    def _names(self) -> tuple[str, ...] | None:
        """The parameters' names if each may be given by position and by name."""
        parameters = self._signature.parameters
        plain = all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        return tuple(parameters) if plain else None

    def _checked(self, name: str, value: Any) -> Any:
        adapter = self._adapters[name]
        return value if adapter is None else adapter.dump_python(adapter.validate_python(value), mode="json")

    def call(self, context: Any, arguments: str) -> Awaitable[Any]:
        """
        Call the function with stored arguments.

        Raises:
            InvalidArguments: the function has changed, and they do not fit any more.
        """
        try:
            values = {name: self._restored(name, value) for name, value in json.loads(arguments).items()}
            if self._takes_names:
                return self.body(context, **values)
            bound = self._signature.bind_partial()
            bound.arguments.update({name: values[name] for name in self._signature.parameters if name in values})
            return self.body(context, *bound.args, **bound.kwargs)
        except (KeyError, TypeError, ValidationError) as error:
            raise InvalidArguments(
                f"the stored arguments do not fit function {self.name!r} any more: {error}"
            ) from error

    def _restored(self, name: str, value: Any) -> Any:
        adapter = self._adapters[name]
        if adapter is None:
            return value
        # JSON's own rules for what is not JSON's own: a strict date may come as text here, not from Python
        return adapter.validate_python(value) if type(value) in _SCALARS else adapter.validate_json(json.dumps(value))

    @cached_property
    def _takes_names(self) -> bool:
        by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        return all(parameter.kind in by_name for parameter in self._signature.parameters.values())


_SCALARS = frozenset({int, float, bool, type(None)})


def _adapter(kind: inspect._ParameterKind, hint: Any) -> TypeAdapter[Any]:
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return TypeAdapter(list[hint])
    if kind is inspect.Parameter.VAR_KEYWORD:
        return TypeAdapter(dict[str, hint])
    return TypeAdapter(hint)


class Registry:
    """The functions of one store, by name and by function object."""

    def __init__(self) -> None:
        self._by_name: dict[str, Function] = {}
        self._by_body: dict[Body, Function] = {}

    def add(self, body: Body, *, recovery: Recovery, name: str | None, max_attempts: int) -> Function:
        """
        Register a function.

        Raises:
            DuplicateFunction: another one has the name.
            FunctionError: it cannot be a task.
        """
        recovery = Recovery(recovery)
        if recovery is Recovery.EXTERNAL:
            raise FunctionError(
                "recovery 'external' is for work this store does not run: choose 'rerun' or 'owner_bound'"
            )
        if max_attempts < 1:
            raise FunctionError(f"max_attempts must be at least 1, not {max_attempts}")
        name = check_id("function name", name if name is not None else body.__name__)
        if name in self._by_name:
            raise DuplicateFunction(f"function {name!r} is registered already: give one of them another name=")
        function = Function(name, body, recovery, max_attempts)
        function.check()
        self._by_name[name] = function
        self._by_body[body] = function
        return function

    def by_body(self, body: Body) -> Function:
        """
        Return what a function object was registered as.

        Raises:
            UnknownFunction: it was not.
        """
        function = self._by_body.get(body)
        if function is None:
            name = getattr(body, "__name__", body)
            raise UnknownFunction(
                f"function {name!r} is not registered with this store: decorate it with @store.task(recovery=…)"
            )
        return function

    def by_name(self, name: str) -> Function | None:
        """Return the function of a name, if this program has it."""
        return self._by_name.get(name)

    @property
    def names(self) -> frozenset[str]:
        """The names this program knows."""
        return frozenset(self._by_name)
