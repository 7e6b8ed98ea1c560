"""Owns the command that asks a file a question of the cook-book: query; never writes to the file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from .options import db_option, json_option, required_db, storable
from .output import Cell, console, print_blocks, print_table, safe, write_json_array

if TYPE_CHECKING:
    from .cookbook import Parameter, Query

__all__ = ["ask", "parameter_line", "query", "script"]

_MOST = 2**63 - 1
_LEAST_CELL = 12
"""Cells at least, of a column that folds."""


class Answer(NamedTuple):
    """What a query gave: the names of its columns, and its rows."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@click.command()
@click.argument("name", required=False)
@click.option(
    "--set", "given", multiple=True, metavar="PARAMETER=VALUE", help="Set a parameter of the query; may be given again."
)
@click.option("--sql", "as_sql", is_flag=True, help="Print the statement, ready for the sqlite3 shell; needs no file.")
@json_option("Print a JSON array, one object a row.")
@db_option
@click.pass_context
def query(ctx: click.Context, name: str | None, given: tuple[str, ...], as_sql: bool, as_json: bool) -> None:
    """Ask the file one of the questions of the cook-book. Without NAME, list them.

    Each is one SQL statement, which --sql prints with its parameters for `sqlite3 -readonly FILE`. Times are UTC.

    \b
    Examples:
      lash-store query
      lash-store query --db agent.db running
      lash-store query --db agent.db family --set task=helper --set session=desktop:s1
      lash-store query --db agent.db failures --set since=2026-01-31 --json
      lash-store query cancels --sql --set session=desktop:s1 | sqlite3 -readonly -box agent.db
    """
    if name is None:
        if given or as_sql:
            raise click.UsageError("--set and --sql belong to a query: name one, see lash-store query", ctx)
        _list(as_json)
        return
    asked = _named(ctx, name)
    values = _values(ctx, asked, given)
    if as_sql:
        click.echo(script(asked, values))
        return
    missing = [one.name for one in asked.parameters if one.is_required and values[one.name] in {None, ""}]
    if missing:
        raise click.UsageError(f"query {name} needs --set {' --set '.join(f'{one}=…' for one in missing)}", ctx)
    answer = ask(required_db(ctx), asked, values)
    if as_json:
        write_json_array(dict(zip(answer.columns, row, strict=True)) for row in answer.rows)
    elif answer.rows:
        _print(answer)
    else:
        click.echo("no such rows", err=True)


def ask(path: str, asked: Query, values: Mapping[str, object]) -> Answer:
    """
    Run a query on a file, as it is now.

    Raises:
        NotAStore, SchemaTooNew, SchemaTooOld, StorageError: the file cannot be read.
    """
    from .snapshot import looking

    with looking(path) as file:
        columns, rows = file.answer(asked.sql, values)
        return Answer(tuple(columns), rows)


# --- what was asked --------------------------------------------------------------------------------------------------


def _named(ctx: click.Context, name: str) -> Query:
    from .cookbook import COOKBOOK

    if name not in COOKBOOK:
        raise click.UsageError(f"no query {name!r}{_near(name, [*COOKBOOK])}; lash-store query lists them", ctx)
    return COOKBOOK[name]


def _near(name: str, known: Sequence[str]) -> str:
    near = [*get_close_matches(name, known), *(one for one in known if len(name) > 2 and name in one)]
    return f": did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""


def _values(ctx: click.Context, asked: Query, given: Sequence[str]) -> dict[str, object]:
    """Return the value of every parameter, None for one that is not set; of several, the last counts."""
    known = {parameter.name: parameter for parameter in asked.parameters}
    values: dict[str, object] = dict.fromkeys(known)
    for one in given:
        name, equals, value = one.partition("=")
        if not equals:
            raise click.UsageError(f"--set takes PARAMETER=VALUE, not {one!r}", ctx)
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise click.UsageError(f"query {asked.name} has no parameter {name!r}{_near(name, [*known])}; {has}", ctx)
        try:
            values[name] = _value(known[name], value)
        except ValueError as error:
            raise click.UsageError(f"--set {name}: {error}", ctx) from error
    return values


def _value(parameter: Parameter, value: str) -> object:
    if value == "":
        return None
    if parameter.type == "text":
        if not storable(value):
            raise ValueError("a text with NUL or bytes that are no UTF-8 is in no file")
        return value
    try:
        number = int(value) if parameter.type == "whole" else float(value)
    except ValueError:
        number = math.nan
    if not abs(number) <= _MOST:
        raise ValueError(f"{value!r} is not a {'whole ' if parameter.type == 'whole' else ''}number")
    return number


# --- what is printed -------------------------------------------------------------------------------------------------


def _list(as_json: bool) -> None:
    from .cookbook import COOKBOOK

    if as_json:
        write_json_array(
            {**query._asdict(), "parameters": [one._asdict() for one in query.parameters]}
            for query in COOKBOOK.values()
        )
        return
    rows: list[tuple[Cell, ...]] = []
    for query in COOKBOOK.values():
        names = ", ".join(one.name if one.is_required else f"[{one.name}]" for one in query.parameters)
        rows.append(((query.name, "bold"), query.question, (names, "dim")))
    print_table((("query", "fixed"), ("question", "fold"), ("parameters", "fold")), rows)


def script(asked: Query, values: Mapping[str, object]) -> str:
    """Write the input of the shell that asks the same: an older parameter of a session in it does not count."""
    lines = [f"-- {asked.question}", ".parameter clear"]
    for parameter in asked.parameters:
        value = values[parameter.name]
        if value is not None:
            lines.append(parameter_line(parameter, value))
        else:
            example = parameter_line(parameter, parameter.example)
            lines.append(f"-- {example}   ({parameter.meaning}; {parameter.default or 'needed'})")
    return "\n".join([*lines, f"{asked.sql};"])


def parameter_line(parameter: Parameter, value: object) -> str:
    r"""
    Write the command of the `sqlite3` shell that sets a parameter.

    The shell reads a double-quoted argument with C's escapes, and evaluates it as SQL: so a text is an SQL literal in it, and
    what is no printable ASCII in that is written as bytes in octal.
    """
    literal = "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)
    escaped = "".join(
        chr(byte) if 0x20 <= byte < 0x7F and byte not in b'"\\' else f"\\{byte:03o}" for byte in literal.encode()
    )
    return f".parameter set :{parameter.name} " + (f'"{escaped}"' if isinstance(value, str) else escaped)


def _print(answer: Answer) -> None:
    if _least_width(answer) <= console().width:
        behaviour = ["right" if _is_numeric(values) else "fold" for values in zip(*answer.rows, strict=True)]
        rows = [["" if value is None else str(value) for value in row] for row in answer.rows]
        print_table([*zip(answer.columns, behaviour, strict=True)], rows)
        return
    # too many columns for this terminal
    print_blocks(answer.columns, [[None if value is None else str(value) for value in row] for row in answer.rows])


def _least_width(answer: Answer) -> int:
    """Return how many cells a table needs in which short cells stay whole and long ones fold at a readable width."""
    from rich.cells import cell_len

    widths = []
    for column, values in zip(answer.columns, zip(*answer.rows, strict=True), strict=True):
        widest = max(cell_len(safe(value)) for value in (column, *values))
        widths.append(widest if _is_numeric(values) else min(widest, _LEAST_CELL))
    return sum(widths) + 2 * (len(widths) - 1)


def _is_numeric(values: Sequence[object]) -> bool:
    return all(value is None or isinstance(value, int | float) for value in values) and any(
        value is not None for value in values
    )
