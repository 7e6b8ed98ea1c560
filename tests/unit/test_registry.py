"""Rules of registering a function, and of the way of its arguments and results to JSON and back."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import re
import subprocess
import sys
import textwrap
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import Enum, IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar
from zoneinfo import ZoneInfo

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, SecretBytes, SecretStr, computed_field

from lash_store import registry
from lash_store.errors import (
    DuplicateFunction,
    FunctionError,
    InvalidArguments,
    InvalidId,
    ResultNotSerializable,
    UnknownFunction,
)
from lash_store.models import Recovery
from lash_store.policies import NO_RETRY, Backoff, RetryRule
from lash_store.registry import Function, Registry, result_adapter, to_json
from tests.unit.task_rows import managed

if TYPE_CHECKING:
    from fractions import Fraction

    from lash_store import TaskContext

CONTEXT = object()
T = TypeVar("T")


def add(body: Callable[..., Awaitable[Any]], name: str | None = None) -> Function:
    return Registry().add(body, recovery=Recovery.RERUN, name=name, max_attempts=3)


def there_and_back(body: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Bind the arguments, store them as text, and call the body with what was stored."""
    function = add(body)
    stored = function.bind(args, kwargs)
    assert isinstance(json.loads(stored), dict)
    return asyncio.run(_awaited(function.call(CONTEXT, stored)))


async def _awaited(body: Awaitable[Any]) -> Any:
    return await body


# --- binding --------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


class Point(BaseModel):
    x: int
    y: int = 0


@dataclass
class Job:
    name: str
    at: datetime


async def of_model(task: TaskContext, value: Point) -> Any:
    return value


async def of_models(task: TaskContext, value: list[Point]) -> Any:
    return value


async def of_dataclass(task: TaskContext, value: Job) -> Any:
    return value


async def of_datetime(task: TaskContext, value: datetime) -> Any:
    return value


async def of_bytes(task: TaskContext, value: bytes) -> Any:
    return value


async def of_set(task: TaskContext, value: set[int]) -> Any:
    return value


async def of_int_keys(task: TaskContext, value: dict[int, str]) -> Any:
    return value


async def of_tuple(task: TaskContext, value: tuple[int, str]) -> Any:
    return value


async def of_enum(task: TaskContext, value: Colour) -> Any:
    return value


async def of_optional(task: TaskContext, value: int | None) -> Any:
    return value


async def of_float(task: TaskContext, value: float) -> Any:
    return value


async def of_text(task: TaskContext, value: str) -> Any:
    return value


async def of_limited(task: TaskContext, value: Annotated[int, Field(gt=0)]) -> Any:
    return value


class Level(IntEnum):
    HIGH = 3


async def of_strict_number(task: TaskContext, value: Annotated[Level, Field(strict=True)]) -> Any:
    return value


async def of_strict_date(task: TaskContext, value: Annotated[datetime, Field(strict=True)]) -> Any:
    return value


async def of_anything(task: TaskContext, value: Any) -> Any:
    return value


async def of_unannotated(task, value):  # type: ignore[no-untyped-def]
    return value


NOON = datetime(2024, 5, 1, 12, 0, 0, 123456, tzinfo=UTC)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (of_model, Point(x=1, y=2)),
        (of_models, [Point(x=1), Point(x=2)]),
        (of_dataclass, Job("a", NOON)),
        (of_datetime, NOON),
        (of_bytes, b"abc"),
        (of_set, {3, 1, 2}),
        (of_int_keys, {1: "a", -2: "b"}),
        (of_tuple, (1, "a")),
        (of_enum, Colour.RED),
        (of_strict_number, Level.HIGH),
        (of_strict_date, NOON),
        (of_optional, None),
        (of_float, 0.1),
        (of_limited, 1),
        (of_text, "a\0b\U0001f600 \u2028"),
        (of_anything, {"a": [1, None, True, 2.5, {"b": "c"}]}),
        (of_anything, 10**30),
        (of_unannotated, [1, "a"]),
        (of_unannotated, None),
    ],
    ids=lambda value: value.__name__ if callable(value) else repr(value),
)
def test_an_argument_comes_back_as_it_went_in(body: Callable[..., Awaitable[Any]], value: Any) -> None:
    assert there_and_back(body, value) == value
    assert type(there_and_back(body, value)) is type(value)


def test_an_argument_is_converted_to_its_annotation_on_the_way_in() -> None:
    assert json.loads(add(of_limited).bind(("5",), {})) == {"value": 5}


def test_a_plain_object_is_enough_for_a_model() -> None:
    assert there_and_back(of_model, {"x": 3}) == Point(x=3)


async def positional_only(task: TaskContext, a: int, b: int = 2, /) -> Any:
    return a, b


async def keyword_only(task: TaskContext, *, a: int, b: int = 2) -> Any:
    return a, b


async def both(task: TaskContext, a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> Any:
    return a, b, rest, c, more


async def plain_rest(task, *rest, **more):  # type: ignore[no-untyped-def]
    return rest, more


async def defaults(task: TaskContext, a: int = 1, b: int = 2) -> Any:
    return a, b


@pytest.mark.parametrize(
    ("body", "args", "kwargs", "expected"),
    [
        (positional_only, (1,), {}, (1, 2)),
        (positional_only, (1, 5), {}, (1, 5)),
        (keyword_only, (), {"a": 1}, (1, 2)),
        (keyword_only, (), {"b": 5, "a": 1}, (1, 5)),
        (both, (1,), {}, (1, 2, (), 3, {})),
        (both, (1, 4, 5, 6), {"c": 7, "d": 8}, (1, 4, (5, 6), 7, {"d": 8})),
        (both, (), {"b": 4, "a": 1}, (1, 4, (), 3, {})),
        (plain_rest, (1, "a"), {"d": [8]}, ((1, "a"), {"d": [8]})),
        (plain_rest, (), {}, ((), {})),
        (defaults, (), {}, (1, 2)),
        (defaults, (), {"b": 5}, (1, 5)),
    ],
)
def test_every_kind_of_parameter_is_bound(
    body: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any
) -> None:
    assert there_and_back(body, *args, **kwargs) == expected


def test_a_keyword_may_have_the_context_parameters_name_only_if_the_body_can_take_it() -> None:
    with pytest.raises(InvalidArguments):
        there_and_back(plain_rest, task=1)


async def renamed(context: TaskContext, /, **more: int) -> Any:
    return more


def test_a_positional_only_context_leaves_its_name_to_the_arguments() -> None:
    assert there_and_back(renamed, context=1) == {"context": 1}


@pytest.mark.parametrize(
    ("body", "args", "kwargs"),
    [
        (of_model, (), {}),
        (of_model, ({"x": "many"},), {}),
        (of_model, ({"x": 1}, 2), {}),
        (of_model, (), {"valeu": {"x": 1}}),
        (of_model, ({"x": 1},), {"value": {"x": 1}}),
        (of_limited, (0,), {}),
        (of_datetime, ("yesterday",), {}),
        (of_bytes, (b"\xff",), {}),
        (of_optional, ("one",), {}),
        (positional_only, (), {"a": 1}),
        (keyword_only, (1,), {}),
        (both, (1, 2, "x"), {}),
        (both, (1,), {"d": "x"}),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_the_functions_name(
    body: Callable[..., Awaitable[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    function = add(body)

    with pytest.raises(InvalidArguments, match=body.__name__):
        function.bind(args, kwargs)


@pytest.mark.parametrize(
    "stored",
    ['{"value":"many"}', "{}", '{"value":1,"gone":2}', '{"gone":2}'],
    ids=["does not validate", "missing", "one too many", "renamed"],
)
def test_stored_arguments_are_validated_again_before_a_body_starts(stored: str) -> None:
    with pytest.raises(InvalidArguments, match="of_limited"):
        add(of_limited).call(CONTEXT, stored)


# --- what does not come back ----------------------------------------------------------------------------------------


class Aliased(BaseModel):
    x: int = Field(validation_alias="number")


class Hiding(BaseModel):
    x: int = 0
    kept: int = Field(default=0, exclude=True)
    token: SecretStr = SecretStr("")


class Cat(BaseModel):
    name: str


class Dog(BaseModel):
    name: str


@dataclass
class Holder:
    token: SecretStr


async def of_secret(task: TaskContext, value: SecretStr) -> Any:
    return value


async def of_secrets(task: TaskContext, *value: SecretStr) -> Any:
    return value


async def of_named_secrets(task: TaskContext, **value: SecretStr) -> Any:
    return value


async def of_aliased(task: TaskContext, value: Aliased) -> Any:
    return value


async def of_hiding(task: TaskContext, value: Hiding) -> Any:
    return value


async def of_either(task: TaskContext, value: Cat | Dog) -> Any:
    return value


async def of_holder(task: TaskContext, value: list[Holder]) -> Any:
    return value


async def of_growing(task: TaskContext, value: Annotated[Decimal, AfterValidator(lambda value: value + 1)]) -> Any:
    return value


async def of_objects(task: TaskContext, value: dict[str, Any]) -> Any:
    return value


LOST: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {
    "a secret": (of_secret, (SecretStr("sesame"),), {}),
    "a secret as text": (of_secret, ("sesame",), {}),
    "one of several secrets": (of_secrets, ("", "sesame"), {}),
    "a secret by name": (of_named_secrets, (), {"one": "sesame"}),
    "a secret without annotation": (of_unannotated, (SecretStr("sesame"),), {}),
    "a secret of any type": (of_objects, ({"a": [SecretBytes(b"sesame")]},), {}),
    "a secret in a model": (of_hiding, (Hiding(token=SecretStr("sesame")),), {}),
    "a secret in a dataclass": (of_holder, ([Holder(SecretStr("sesame"))],), {}),
    "a field that is left out": (of_hiding, (Hiding(kept=5),), {}),
    "a field that is read under another name": (of_aliased, (Aliased(number=1),), {}),
    "a type that is read as another": (of_either, (Dog(name="Rex"),), {}),
    "a type that grows each time": (of_growing, (Decimal(1),), {}),
}


@pytest.mark.parametrize(("body", "args", "kwargs"), LOST.values(), ids=LOST.keys())
def test_an_argument_that_does_not_come_back_is_refused_by_its_name(
    body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    with pytest.raises(InvalidArguments, match=r"argument 'value'.*JSON") as refused:
        add(body).bind(args, kwargs)

    assert "sesame" not in str(refused.value)


@dataclass(eq=False)
class Silent:
    """Does not say what is equal to it."""

    x: int


class Counting(BaseModel):
    x: int
    _asked: int = PrivateAttr(default=0)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def moment(self) -> float:
        return time.perf_counter()


class Cached(BaseModel):
    at: datetime

    @functools.cached_property
    def text(self) -> str:
        return self.at.isoformat()


class Puppy(Dog):
    age: int = 0


class Odd(BaseModel):
    model_config = ConfigDict(extra="allow")
    items: Sequence[int] = ()


def counted() -> Counting:
    value = Counting(x=1)
    value._asked = 5
    return value


def cached() -> Cached:
    value = Cached(at=datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1))
    assert value.text
    return value


async def of_many(
    task: TaskContext,
    *,
    row: Sequence[int] = (),
    moment: datetime = NOON,
    span: timedelta = timedelta.max,
    price: Decimal = Decimal(0),
    counting: Counting | None = None,
    cached: Cached | None = None,
    dog: Dog | None = None,
    odd: Odd | None = None,
    objects: dict[str, Any] | None = None,
    names: frozenset[tuple[int, str]] = frozenset(),
    path: Path | None = None,
    silent: Silent | None = None,
    secret: SecretStr | None = None,
) -> Any:
    return {name: value for name, value in locals().items() if name != "task"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("row", (1, 2)),
        ("row", deque([1, 2])),
        ("moment", datetime(2024, 10, 27, 2, 30, tzinfo=ZoneInfo("Europe/Berlin"), fold=1)),
        ("moment", datetime.max.replace(tzinfo=UTC)),
        ("span", timedelta(days=-400, microseconds=7)),
        ("price", Decimal("0.10")),
        ("counting", counted()),
        ("cached", cached()),
        ("dog", Puppy(name="Rex")),
        ("odd", Odd.model_validate({"items": (1,), "more": (2, 3), "most": {4}})),
        ("objects", {"at": NOON, "pair": (1, NOON), "model": Point(x=1), "set": {1}, "by number": {1: (2,)}}),
        ("names", {(1, "a"), (2, "b")}),
        ("path", Path("a/b")),
        ("silent", Silent(1)),
        ("secret", ""),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_means_the_same_when_it_comes_back_is_taken(name: str, value: Any) -> None:
    assert there_and_back(of_many, **{name: value})[name] is not None


def test_an_argument_of_json_alone_is_not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "comes_back", None)

    assert there_and_back(of_objects, {"a": [1, 0.5, None, {"b": "c"}]}) == {"a": [1, 0.5, None, {"b": "c"}]}
    assert there_and_back(of_optional, 5) == 5
    assert there_and_back(of_anything, [True, "a"]) == [True, "a"]


# --- what is not JSON -----------------------------------------------------------------------------------------------


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def _circular() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


class Loose(BaseModel):
    value: Any = None


NOT_JSON: dict[str, Any] = {
    "NaN": math.nan,
    "infinity": math.inf,
    "NaN within": {"a": [1.0, -math.inf]},
    "a lone surrogate": "\ud800",
    "a lone surrogate as a key": {"\ud800": 1},
    "within itself": _circular(),
    "nested 100,000 deep": _deep(100_000),
    "nested deeper than SQLite reads": _deep(1_500),
    "keys that are the same text": {1: "a", "1": "b"},
    "keys that are the same text, None": {None: 1, "None": 2},
    "keys that are the same text, true": {True: 1, "true": 2},
    "keys that are the same text, bytes": {b"a": 1, "a": 2},
    "keys that are the same text, an enum": {Colour.RED: 1, "red": 2},
    "keys that are the same text, within": [{"a": {2: 1, "2": 1}}],
    "keys that are the same text, within a model": Loose(value={1: "a", "1": "b"}),
    "an object": object(),
    "a function": test_every_kind_of_parameter_is_bound,
    "bytes that are no text": b"\xff",
    "an integer too long for text": 10**5_000,
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_a_result_that_is_not_json_is_refused(value: Any) -> None:
    with pytest.raises(ResultNotSerializable, match="the result"):
        to_json(value, "the result")


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON.keys())
@pytest.mark.parametrize("body", [of_unannotated, of_anything])
def test_an_argument_that_is_not_json_is_refused(body: Callable[..., Awaitable[Any]], value: Any) -> None:
    function = add(body)

    with pytest.raises(InvalidArguments, match=body.__name__):
        function.bind((value,), {})


async def of_mixed_keys(task: TaskContext, value: dict[int | str, int]) -> Any:
    return value


def test_an_annotation_does_not_hide_that_two_keys_are_the_same_text() -> None:
    with pytest.raises(InvalidArguments):
        add(of_mixed_keys).bind(({1: 1, "1": 2},), {})


def test_an_annotated_float_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(InvalidArguments):
        add(of_float).bind((math.nan,), {})


@pytest.mark.long
@pytest.mark.parametrize("shape", ["value += [value, value]", "value.append({'up': value, 'root': value})"])
def test_a_value_that_holds_itself_twice_is_refused_at_once(shape: str) -> None:
    # in a process of its own with bounds: a look at every path through the value would never end
    script = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
        from lash_store.errors import ResultNotSerializable
        from lash_store.registry import to_json
        value = []
        {shape}
        try:
            to_json(value, "the result")
        except ResultNotSerializable:
            print("refused")
    """

    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=30, check=False
    )

    assert ended.stdout == "refused\n", ended.stderr[-300:]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (Point(x=1), '{"x":1,"y":0}'),
        (Job("a", NOON), '{"name":"a","at":"2024-05-01T12:00:00.123456Z"}'),
        ({1: "a"}, '{"1":"a"}'),
        ((1, 2), "[1,2]"),
        (b"abc", '"abc"'),
        (Colour.RED, '"red"'),
        (2**64, "18446744073709551616"),
        ("é\u2028\0", '"é\u2028\\u0000"'),
    ],
)
def test_a_result_is_written_as_pydantic_would_dump_it(value: Any, text: str) -> None:
    assert to_json(value, "the result") == text


def test_a_shared_value_is_not_taken_for_one_within_itself() -> None:
    shared = {"a": [1]}

    assert json.loads(to_json([shared, shared], "the result")) == [shared, shared]


# --- registering ----------------------------------------------------------------------------------------------------


def test_a_function_is_found_by_its_name_and_by_itself() -> None:
    registry = Registry()

    function = registry.add(of_model, recovery=Recovery.OWNER_BOUND, name=None, max_attempts=7)

    assert registry.by_name("of_model") is function
    assert registry.by_body(of_model) is function
    assert (function.recovery, function.max_attempts) == (Recovery.OWNER_BOUND, 7)


def test_a_name_is_given_once() -> None:
    registry = Registry()
    registry.add(of_model, recovery=Recovery.RERUN, name="work", max_attempts=1)

    with pytest.raises(DuplicateFunction, match="'work'"):
        registry.add(of_bytes, recovery=Recovery.RERUN, name="work", max_attempts=1)
    assert registry.by_name("work").body is of_model  # type: ignore[union-attr]
    with pytest.raises(UnknownFunction):
        registry.by_body(of_bytes)


def test_a_function_nobody_registered_is_unknown_by_its_name() -> None:
    with pytest.raises(UnknownFunction, match="of_model"):
        Registry().by_body(of_model)
    assert Registry().by_name("of_model") is None


def not_async(task: TaskContext) -> None: ...


async def no_context() -> None: ...


async def context_by_keyword(*, task: TaskContext) -> None: ...


async def unresolvable(task: TaskContext, value: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821


async def no_such_attribute(task: TaskContext, value: json.Missing) -> None: ...  # type: ignore[name-defined]


async def not_an_expression(task: TaskContext, value: "a list of") -> None: ...  # type: ignore  # noqa: F722


class Opaque: ...


async def not_for_pydantic(task: TaskContext, value: Opaque) -> None: ...


class Callme:
    async def __call__(self, task: TaskContext, value: int) -> None: ...


@pytest.mark.parametrize(
    "body",
    [
        not_async,
        no_context,
        context_by_keyword,
        unresolvable,
        no_such_attribute,
        not_an_expression,
        not_for_pydantic,
        functools.partial(of_model, value=1),
        Callme(),
    ],
    ids=lambda body: getattr(body, "__name__", type(body).__name__),
)
def test_a_function_that_cannot_be_a_task_is_refused_when_it_is_registered(body: Any) -> None:
    registry = Registry()

    with pytest.raises(FunctionError, match="'work'"):
        registry.add(body, recovery=Recovery.RERUN, name="work", max_attempts=1)
    assert registry.by_name("work") is None


def test_work_of_others_is_not_registered_as_a_function() -> None:
    with pytest.raises(FunctionError, match="external"):
        Registry().add(of_model, recovery=Recovery.EXTERNAL, name=None, max_attempts=1)


def test_a_recovery_is_one_of_the_known_words() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        Registry().add(of_model, recovery="sometimes", name=None, max_attempts=1)  # type: ignore[arg-type]


def test_a_task_has_at_least_one_attempt() -> None:
    with pytest.raises(FunctionError, match="max_attempts"):
        Registry().add(of_model, recovery=Recovery.RERUN, name=None, max_attempts=0)


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 257, "\ud800"])
def test_a_functions_name_can_be_stored(name: str) -> None:
    with pytest.raises(InvalidId):
        add(of_model, name)


def test_a_context_annotated_for_the_type_checker_alone_is_fine() -> None:
    assert "TaskContext" not in globals()

    assert there_and_back(of_datetime, NOON) == NOON


def test_annotations_of_a_closure_are_resolved() -> None:
    class Local(BaseModel):
        x: int

    async def body(task: TaskContext, value: Local) -> Any:
        return value, Local

    assert there_and_back(body, {"x": 1})[0] == Local(x=1)


def test_a_bound_method_can_be_a_task() -> None:
    class Agent:
        async def work(self, task: TaskContext, value: Point) -> Any:
            return self, value

    agent = Agent()

    assert there_and_back(agent.work, {"x": 1}) == (agent, Point(x=1))


def test_a_decorated_function_is_validated_by_its_own_annotations() -> None:
    def logged(body: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        @functools.wraps(body)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await body(*args, **kwargs)

        return wrapper

    assert there_and_back(logged(of_model), {"x": 1}) == Point(x=1)


def test_a_function_decorated_in_another_module_finds_its_own_annotations() -> None:
    elsewhere: dict[str, Any] = {"functools": functools}
    source = """
        def logged(body):
            @functools.wraps(body)
            async def wrapper(*args, **kwargs):
                return await body(*args, **kwargs)
            return wrapper
    """
    exec(textwrap.dedent(source), elsewhere)

    assert there_and_back(elsewhere["logged"](of_model), {"x": 1}) == Point(x=1)


def test_sets_are_written_in_one_order_whatever_pythons_hashes_are() -> None:
    async def work(task: Any, words: set[str], nested: dict[str, list[frozenset[int]]], plain: Any) -> None: ...

    function = Function("work", work, Recovery.RERUN, NO_RETRY)

    written = json.loads(function.bind(({"b", "c", "a"}, {"x": [frozenset({3, 1, 2})]}, {"z", "y"}), {}))

    assert written == {"words": ["a", "b", "c"], "nested": {"x": [[1, 2, 3]]}, "plain": ["y", "z"]}


def test_arguments_are_written_in_the_order_of_the_signature() -> None:
    async def work(task: Any, a: int, b: int) -> None: ...

    function = Function("work", work, Recovery.RERUN, NO_RETRY)

    assert function.bind((), {"b": 2, "a": 1}) == function.bind((1, 2), {}) == function.bind((1,), {"b": 2})


# --- tried again ----------------------------------------------------------------------------------------------------


def test_a_function_that_says_nothing_is_tried_again_after_no_failure() -> None:
    function = Registry().add(of_model, recovery=Recovery.RERUN)

    assert function.retry == RetryRule(max_attempts=100, on=(), never_on=(), backoff=Backoff())
    assert not function.retry.wants(ValueError())
    assert (function.timeout, function.version, function.accepts) == (None, None, frozenset())


def test_a_function_says_which_failures_are_worth_another_try_and_when() -> None:
    function = Registry().add(
        of_model,
        recovery=Recovery.RERUN,
        max_attempts=5,
        retry_on=(OSError, ValueError),
        no_retry_on=[FileNotFoundError],
        backoff=Backoff(initial=3),
        timeout=2.5,
    )

    assert function.retry == RetryRule(5, (OSError, ValueError), (FileNotFoundError,), Backoff(initial=3))
    assert function.timeout == 2.5


@pytest.mark.parametrize(
    "words",
    [
        {"retry_on": "OSError"},
        {"retry_on": [OSError, "ValueError"]},
        {"retry_on": OSError()},
        {"retry_on": int},
        {"retry_on": BaseException},
        {"no_retry_on": KeyboardInterrupt},
        {"no_retry_on": asyncio.CancelledError},
        {"backoff": 3},
        {"backoff": {"initial": 3}},
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"max_attempts": 2**31},
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": math.nan},
        {"timeout": math.inf},
        {"timeout": "1"},
        {"version": ""},
        {"version": "a\0b"},
        {"version": "x" * 257},
        {"accepts": "1"},
        {"accepts": {""}},
        {"accepts": [1]},
        {"version": 2},
    ],
    ids=repr,
)
def test_a_word_about_a_function_that_makes_no_sense_is_refused_when_it_is_registered(words: dict[str, Any]) -> None:
    registry = Registry()

    with pytest.raises((FunctionError, InvalidId), match=re.compile("of_model|version")):
        registry.add(of_model, recovery=Recovery.RERUN, **words)
    assert registry.by_name("of_model") is None


# --- the version of the code ----------------------------------------------------------------------------------------


def versioned(version: str | None, *accepts: str | None) -> Registry:
    registry = Registry()
    registry.add(of_model, recovery=Recovery.RERUN, name="index_repo", version=version, accepts=accepts)
    return registry


@pytest.mark.parametrize(
    ("version", "accepts", "began", "goes_on"),
    [
        (None, (), None, True),
        (None, (), "1", False),
        ("2", (), "2", True),
        ("2", (), "1", False),
        ("2", (), None, False),
        ("2", ("1",), "1", True),
        ("2", ("1",), None, False),
        ("2", ("1", None), None, True),
        (None, ("1",), "1", True),
        ("2", ("1",), "2", True),
    ],
)
def test_code_goes_on_with_what_its_version_or_one_it_accepts_began(
    version: str | None, accepts: tuple[str | None, ...], began: str | None, goes_on: bool
) -> None:
    registry = versioned(version, *accepts)

    assert (registry.for_task(managed("running", version=began)) is not None) is goes_on
    assert registry.by_name("index_repo").takes(began) is goes_on  # type: ignore[union-attr]


def test_what_no_body_has_worked_on_is_any_versions() -> None:
    registry = versioned("2")

    assert registry.for_task(managed("pending", version="1", attempt=0)) is registry.by_name("index_repo")


def test_what_a_body_of_another_version_has_worked_on_is_not_run_also_when_it_is_pending_again() -> None:
    assert versioned("2").for_task(managed("pending", version="1", attempt=1)) is None


def test_no_function_runs_a_task_that_has_none_or_one_nobody_registered() -> None:
    registry = versioned(None)

    assert registry.for_task(managed("pending", function=None)) is None
    assert registry.for_task(managed("pending", function="another")) is None


# --- what a checkpoint is -------------------------------------------------------------------------------------------


class Context(Generic[T]):
    """Stands for `TaskContext`, which this module imports for the type checker alone."""


async def with_state(task: Context[Point]) -> None: ...


async def with_plain_context(task: Context) -> None: ...  # type: ignore[type-arg]


async def without_annotation(task) -> None: ...  # type: ignore[no-untyped-def]


async def with_a_list(task: Context[list[Point]], value: int) -> None: ...


def test_a_checkpoint_is_validated_as_the_functions_context_says() -> None:
    adapter = add(with_state).checkpoint_adapter

    assert adapter is not None
    assert adapter.validate_json('{"x":1}') == Point(x=1)


def test_a_checkpoint_may_be_of_any_type_pydantic_reads() -> None:
    adapter = add(with_a_list).checkpoint_adapter

    assert adapter is not None
    assert adapter.validate_json('[{"x":1}]') == [Point(x=1)]


@pytest.mark.parametrize("body", [with_plain_context, without_annotation, of_model])
def test_a_function_that_does_not_say_what_its_checkpoint_is_has_none_validated(body: Any) -> None:
    assert add(body).checkpoint_adapter is None


def test_the_state_of_a_checkpoint_may_be_local_to_a_closure() -> None:
    class Local(BaseModel):
        x: int

    async def body(task: Context[Local]) -> Any:
        return Local

    adapter = add(body).checkpoint_adapter

    assert adapter is not None
    assert adapter.validate_json('{"x":1}') == Local(x=1)


async def with_unresolvable_state(task: Context[Missing]) -> None: ...  # type: ignore[name-defined]  # noqa: F821


async def with_opaque_state(task: Context[Opaque]) -> None: ...


async def with_state_for_the_type_checker(task: Context[Fraction]) -> None: ...


async def with_a_context_for_the_type_checker(task: TaskContext[Point]) -> None: ...


@pytest.mark.parametrize(
    "body",
    [
        with_unresolvable_state,
        with_opaque_state,
        with_state_for_the_type_checker,
        with_a_context_for_the_type_checker,
    ],
)
def test_a_state_that_cannot_be_read_is_refused_when_the_function_is_registered(body: Any) -> None:
    with pytest.raises(FunctionError, match=f"{body.__name__}.*checkpoint"):
        add(body)


# --- what a result is -----------------------------------------------------------------------------------------------


def a_point(x: int) -> Point:
    return Point(x=x)


async def a_point_later(x: int) -> Point:
    return Point(x=x)


@functools.wraps(a_point)
def wrapped_point(*args: Any) -> Any:
    return a_point(*args)


@pytest.mark.parametrize("fn", [a_point, a_point_later, wrapped_point])
def test_a_result_is_read_as_the_functions_annotation_says(fn: Callable[..., Any]) -> None:
    adapter = result_adapter(fn)

    assert adapter is not None
    assert adapter.validate_json('{"x":1}') == Point(x=1)


def test_a_result_of_a_method_is_read_by_its_annotation() -> None:
    class Maker:
        def point(self) -> Point:
            return Point(x=1)

    adapter = result_adapter(Maker().point)

    assert adapter is not None
    assert adapter.validate_json('{"x":1}') == Point(x=1)


def test_a_function_that_returns_none_says_so() -> None:
    def nothing() -> None: ...

    adapter = result_adapter(nothing)

    assert adapter is not None
    assert adapter.validate_json("null") is None


def unannotated(x):  # type: ignore[no-untyped-def]
    return x


def opaque() -> Opaque: ...  # type: ignore[empty-body]


def missing() -> Missing: ...  # type: ignore  # noqa: F821


def for_the_type_checker() -> Fraction: ...  # type: ignore[empty-body]


@pytest.mark.parametrize("fn", [unannotated, opaque, missing, for_the_type_checker, len, dict, object()])
def test_a_result_nobody_can_tell_the_type_of_is_read_as_plain_json(fn: Any) -> None:
    assert result_adapter(fn) is None
