"""Owns the functions a program registered: name to function, its recovery, and the way of its arguments to JSON and back."""

from __future__ import annotations

import contextlib
import inspect
import json
import typing
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from .errors import DuplicateFunction, FunctionError, InvalidArguments, ResultNotSerializable, UnknownFunction, shown
from .fidelity import comes_back, is_json
from .lifecycle import MONITOR, Task
from .models import Recovery, check_id, check_seconds, check_word
from .policies import Backoff, Errors, RetryRule

__all__ = ["Function", "Registry", "from_json", "result_adapter", "to_json"]

Body = Callable[..., Awaitable[Any]]


def to_json(value: Any, what: str) -> str:
    """
    Write a value as the JSON text that is stored, through pydantic.

    Raises:
        ResultNotSerializable: not JSON (NaN and infinity are not), circular or nested deeper than pydantic goes (250 levels),
            with keys that are the same text, or with text that is not Unicode.
    """
    if _is_number(value):
        return str(value)
    if type(value) is bool or value is None:
        return json.dumps(value)
    try:
        text = pydantic_core.to_json(value, inf_nan_mode="constants").decode()
        # read back what will be read: NaN, and keys that only Python tells apart, pass the way out
        if type(value) is not str and not _is_simple(value):
            json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, TypeError, RecursionError, pydantic_core.PydanticSerializationError) as error:
        raise ResultNotSerializable(f"{what} is not JSON: {error}") from error
    return text


from_json: Callable[[str], Any] = json.JSONDecoder().decode
"""Read stored JSON text: as `json.loads` does, without looking each time how."""


def _is_simple(value: Any) -> bool:
    """Whether a value is an object of names and plain values, as arguments mostly are: it is read back as it is."""
    if type(value) is not dict:
        return False
    return all(type(name) is str and (type(one) in _PLAIN or _is_number(one)) for name, one in value.items())


def _is_number(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


_PLAIN = frozenset({str, bool, type(None)})
_EXACT: Mapping[str, type] = {"str": str, "int": int, "bool": bool}
_PLAIN_SCHEMAS: list[Any] = [{"type": name} for name in _EXACT]


_INNER: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("str", "int", "float", "bool", "none"), ()),
    "nullable": ("schema",),
    "list": ("items_schema",),
    "dict": ("keys_schema", "values_schema"),
}


def _is_plain(schema: Any) -> bool:
    """Whether a schema is of JSON's own types; without what is in a list or an object, it may be anything."""
    inner = _INNER.get(schema["type"])
    return inner is not None and all(name in schema and _is_plain(schema[name]) for name in inner)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("two keys of an object are the same text")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True)
class Function:
    """
    A registered function: ``async def name(task: TaskContext, …)``.

    Its annotated parameters, all but the first, are validated by pydantic on the way in and again before a body starts.
    """

    name: str
    body: Body
    recovery: Recovery
    retry: RetryRule
    version: str | None = None
    accepts: frozenset[str | None] = frozenset()
    timeout: float | None = None

    @property
    def max_attempts(self) -> int:
        """How many executions of one task may end by a crash or a retried failure."""
        return self.retry.max_attempts

    def takes(self, version: str | None) -> bool:
        """Say whether this code goes on with what code of a *version* began."""
        return version == self.version or version in self.accepts

    @cached_property
    def checkpoint_adapter(self) -> TypeAdapter[Any] | None:
        """What validates a checkpoint, if the function says what it is: its first parameter is a ``TaskContext[State]``."""
        first = next(iter(inspect.signature(self.body).parameters.values()))
        try:
            said = typing.get_args(_hints(self.body, {first.name: first.annotation})[first.name])
            return TypeAdapter(said[0]) if said else None
        except Exception as error:
            if isinstance(first.annotation, str) and "[" not in first.annotation:
                # its class may be imported for the type checker alone
                return None
            raise FunctionError(
                f"function {self.name!r}: pydantic cannot read the type of its checkpoint: {error}"
            ) from error

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
        try:
            hints = _hints(self.body, written)
            return {
                name: None if hints.get(name, Any) is Any else _adapter(parameter.kind, hints[name])
                for name, parameter in self._signature.parameters.items()
            }
        except Exception as error:
            # whatever an annotation may raise: it is said where the function is registered, not when a task of it starts
            raise FunctionError(f"function {self.name!r}: pydantic cannot read its annotations: {error}") from error

    def check(self) -> None:
        """
        Look at the function as far as can be done before it is called.

        Raises:
            FunctionError: not an ``async def``, without a parameter for its context, or with annotations nobody can resolve.
        """
        if not inspect.iscoroutinefunction(self.body):
            raise FunctionError(f"function {self.name!r} must be an 'async def'")
        _ = self._adapters, self.checkpoint_adapter

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """
        Validate arguments and write them as a JSON object by parameter name; the same call is the same text, but for the order of
        a mapping's keys.

        What is not of JSON's own types is read back, as it will be before each attempt.

        Raises:
            InvalidArguments: they do not fit the function, are not JSON, or do not come back from there as they were.
        """
        try:
            given = self._by_name(args, kwargs) or self._signature.bind(*args, **kwargs).arguments
            checked = {name: self._checked(name, value) for name, value in given.items()}
            plain = {name: self._ordered(name, value) for name, value in checked.items()}
            text = to_json(plain, f"an argument of {self.name!r}")
        except (TypeError, ValidationError, ResultNotSerializable) as error:
            raise InvalidArguments(f"the arguments do not fit function {self.name!r}: {error}") from error
        if doubtful := [name for name in checked if name not in self._plain and not is_json(checked[name])]:
            written = from_json(text)
            for name in doubtful:
                self._check_comes_back(name, checked[name], written[name])
        return text

    def _check_comes_back(self, name: str, value: Any, written: Any) -> None:
        try:
            is_same = comes_back(value, self._restored(name, written))
        except (TypeError, ValueError) as error:
            raise InvalidArguments(
                f"argument {name!r} of function {self.name!r} is not read back from the JSON that pydantic writes of it: {error}"
            ) from error
        if not is_same:
            raise InvalidArguments(
                f"argument {name!r} of function {self.name!r} does not come back from its JSON as it was given: something of it, "
                "a secret or a field that is left out, say, is not written"
            )

    @cached_property
    def _plain(self) -> frozenset[str]:
        """The parameters annotated with nothing but JSON's own types."""
        adapters = {name: adapter for name, adapter in self._adapters.items() if adapter is not None}
        return frozenset(name for name, adapter in adapters.items() if _is_plain(adapter.core_schema))

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Name the arguments of the commonest call, ten times quicker than `inspect`; None if it is not so simple."""
        names = self._names
        if names is None or len(args) + len(kwargs) != len(names):
            return None
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # in the order of the signature, however the caller wrote them
        return {name: given[name] for name in names} if given.keys() == set(names) else None

    @cached_property
    def _names(self) -> tuple[str, ...] | None:
        """The parameters' names if each may be given by position and by name."""
        parameters = self._signature.parameters
        plain = all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters.values())
        return tuple(parameters) if plain else None

    def _checked(self, name: str, value: Any) -> Any:
        adapter = self._adapters[name]
        if adapter is None or type(value) is self._exact.get(name):
            return value
        return adapter.validate_python(value)

    @cached_property
    def _exact(self) -> Mapping[str, type]:
        """The parameters annotated with a type whose own values pydantic leaves as they are, from Python and from JSON."""
        schemas = {name: adapter.core_schema for name, adapter in self._adapters.items() if adapter is not None}
        return {name: _EXACT[schema["type"]] for name, schema in schemas.items() if schema in _PLAIN_SCHEMAS}

    def _ordered(self, name: str, value: Any) -> Any:
        """Give sets an order, where the parameter may hold some: looking for them costs more than writing them down."""
        return _in_order(value) if name in self._with_sets or isinstance(value, set | frozenset) else value

    @cached_property
    def _with_sets(self) -> frozenset[str]:
        schemas = {name: repr(adapter.core_schema) for name, adapter in self._adapters.items() if adapter is not None}
        return frozenset(name for name, schema in schemas.items() if "'set'" in schema or "'frozenset'" in schema)

    def call(self, context: Any, arguments: str) -> Awaitable[Any]:
        """
        Call the function with stored arguments.

        Raises:
            InvalidArguments: the function has changed, and they do not fit any more.
        """
        try:
            values = self._values(arguments)
            if self._takes_names:
                return self.body(context, **values)
            bound = self._signature.bind_partial()
            bound.arguments.update({name: values[name] for name in self._signature.parameters if name in values})
            return self.body(context, *bound.args, **bound.kwargs)
        except (KeyError, TypeError, ValidationError) as error:
            raise InvalidArguments(
                f"the stored arguments do not fit function {self.name!r} any more: {error}"
            ) from error

    def _values(self, arguments: str) -> dict[str, Any]:
        try:
            given = from_json(arguments).items()
        except (AttributeError, ValueError, RecursionError) as error:
            # somebody's hand
            raise TypeError(f"they cannot be read ({error})") from error
        return {name: self._restored(name, value) for name, value in given}

    def _restored(self, name: str, value: Any) -> Any:
        adapter = self._adapters[name]
        if adapter is None or type(value) is self._exact.get(name):
            return value
        # by JSON's rules: a strict date may come as text from there, not from Python
        return adapter.validate_json(json.dumps(value))

    @cached_property
    def _takes_names(self) -> bool:
        by_name = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
        return all(parameter.kind in by_name for parameter in self._signature.parameters.values())


def _in_order(value: Any) -> Any:
    """Give a set, also one in a plain container, an order that is the same in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(_in_order, value), key=lambda item: to_json(item, "a set's item"))
    if type(value) is dict:
        return {key: _in_order(item) for key, item in value.items()}
    return type(value)(map(_in_order, value)) if type(value) in {list, tuple} else value


def _hints(body: Callable[..., Any], written: Mapping[str, Any]) -> dict[str, Any]:
    original = inspect.unwrap(body)
    return typing.get_type_hints(
        SimpleNamespace(__annotations__=dict(written)), original.__globals__, _closure(original), include_extras=True
    )


def result_adapter(fn: Callable[..., Any]) -> TypeAdapter[Any] | None:
    """Return what validates a function's result, if it is annotated with a type that pydantic can read from JSON."""
    try:
        if not hasattr(fn, "__globals__"):
            # a callable object
            fn = type(fn).__call__
        annotation = inspect.signature(fn).return_annotation
        if annotation is inspect.Signature.empty or annotation is Any:
            return None
        return TypeAdapter(_hints(fn, {"return": annotation})["return"])
    except Exception:
        return None


def _closure(body: Callable[..., Any]) -> dict[str, Any]:
    """Return what the function's closure holds by now: a name may be given its value later."""
    found = {}
    for name, cell in zip(body.__code__.co_freevars, body.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):
            found[name] = cell.cell_contents
    return found


def _version(given: str | None) -> str | None:
    return None if given is None else check_id("version", given)


def _accepted(given: Iterable[str | None]) -> frozenset[str | None]:
    if isinstance(given, str):
        raise ValueError(f"accepts is a set of versions, not one: write {{{shown(given)}}}")
    return frozenset(map(_version, given))


def _adapter(kind: inspect._ParameterKind, hint: Any) -> TypeAdapter[Any]:
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return TypeAdapter(list[hint])
    if kind is inspect.Parameter.VAR_KEYWORD:
        return TypeAdapter(dict[str, hint])
    return TypeAdapter(hint)


_OWN = "lash_store:"


class Registry:
    """The functions of one store, by name and by function object."""

    def __init__(self) -> None:
        self._by_name: dict[str, Function] = {}
        self._by_body: dict[Body, Function] = {}

    def add(
        self,
        body: Body,
        *,
        recovery: Recovery,
        name: str | None = None,
        max_attempts: int = 100,
        retry_on: Errors = (),
        no_retry_on: Errors = (),
        backoff: Backoff | None = None,
        timeout: float | None = None,
        version: str | None = None,
        accepts: Iterable[str | None] = (),
    ) -> Function:
        """
        Register a function.

        Raises:
            DuplicateFunction: another one has the name.
            FunctionError: it cannot be a task.
        """
        recovery = check_word("recovery", Recovery, recovery)
        if recovery is Recovery.EXTERNAL:
            raise FunctionError(
                "recovery 'external' is for work this store does not run: choose 'rerun' or 'owner_bound'"
            )
        name = check_id("function name", name if name is not None else getattr(body, "__name__", ""))
        if name.startswith(_OWN) and name != MONITOR:
            raise FunctionError(
                f"function name {name!r} begins with {_OWN!r}, as this package's own do: choose another"
            )
        if name in self._by_name:
            raise DuplicateFunction(f"function {name!r} is registered already: give one of them another name=")
        try:
            function = Function(
                name,
                body,
                recovery,
                RetryRule.of(max_attempts, retry_on, no_retry_on, backoff),
                _version(version),
                _accepted(accepts),
                None if timeout is None else check_seconds("timeout", timeout, at_least=0.001),
            )
        except ValueError as error:
            raise FunctionError(f"function {name!r}: {error}") from error
        function.check()
        self._by_name[name] = function
        self._by_body[body] = function
        return function

    def for_task(self, task: Task) -> Function | None:
        """Return the function that may run a task here; None if its name, or the version that began it, is not known."""
        function = None if task.function is None else self._by_name.get(task.function)
        # what no body has worked on yet is any version's
        return function if function is not None and (task.attempt == 0 or function.takes(task.version)) else None

    def by_body(self, body: Body) -> Function:
        """
        Return what a function object was registered as.

        Raises:
            UnknownFunction: it was not.
        """
        function = self._by_body.get(body) if callable(body) and isinstance(body, Hashable) else None
        if function is None:
            name = getattr(body, "__name__", body)
            raise UnknownFunction(
                f"function {shown(name)} is not registered with this store: decorate it with @store.task(recovery=…)"
            )
        return function

    def by_name(self, name: str) -> Function | None:
        """Return the function of a name, if this program has it."""
        return self._by_name.get(name)
