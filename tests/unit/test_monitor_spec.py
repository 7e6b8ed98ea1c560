"""Rules of what a monitor may be asked to be, and of the limits of all of them."""

from __future__ import annotations

import json
import math
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pydantic import ValidationError

from lash_store.monitor_models import LONGEST_TIMEOUT, ArmOn, MonitorSpec, Stream, WakePolicy
from lash_store.policies import Limits

NUL, SURROGATE = "a\0b", "a\ud800b"


def spec(**given: Any) -> MonitorSpec:
    return MonitorSpec(**{"id": "tests", "command": ["pytest", "-x"], **given})


FULL: dict[str, Any] = {
    "id": "build",
    "command": ["make", "-j2", "", "a b", "ä", "x\ny"],
    "label": "the build\nof everything",
    "cwd": "/src",
    "env": {"CC": "clang", "EMPTY": "", "LINES": "a\nb", "ä": "日本", "WITH": "a=b"},
    "inherit_env": ["TOKEN", "SSH_AUTH_SOCK"],
    "timeout": 12.5,
    "persistent": True,
    "arm_on": "session_start",
    "wake_policy": "notify",
    "restart_on_restore": True,
    "keep_lines": 7,
}


# --- what a spec says -----------------------------------------------------------------------------------------------


def test_a_spec_that_names_an_id_and_a_command_says_the_rest_by_itself() -> None:
    plain = spec()

    assert (plain.shell, plain.label, plain.cwd, plain.env, plain.inherit_env) == (False, None, None, {}, ())
    assert (plain.timeout, plain.persistent, plain.restart_on_restore, plain.keep_lines) == (300.0, False, False, 1000)
    assert (plain.arm_on, plain.wake_policy) == (ArmOn.MANUAL, WakePolicy.QUEUE_TURN)


def test_the_process_gets_the_arguments_of_the_list_as_they_are() -> None:
    assert spec(command=FULL["command"]).arguments == ("make", "-j2", "", "a b", "ä", "x\ny")


def test_a_line_for_the_shell_is_one_argument_of_it() -> None:
    line = "make | tee 'a b'\necho $?"

    assert spec(command=line, shell=True).arguments == ("/bin/sh", "-c", line)


def test_the_task_of_a_monitor_has_its_id_and_says_that_it_is_one() -> None:
    assert spec(id="tests").task_id == "monitor:tests"


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({}, 300.0),
        ({"timeout": 5}, 5.0),
        ({"timeout": None}, None),
        ({"persistent": True}, None),
        ({"persistent": True, "timeout": 5.0}, None),
        ({"persistent": True, "timeout": None}, None),
        ({"persistent": False, "timeout": 5.0}, 5.0),
    ],
    ids=repr,
)
def test_a_persistent_monitor_or_one_without_a_timeout_runs_as_long_as_its_session(
    given: dict[str, Any], seconds: float | None
) -> None:
    assert spec(**given).seconds == seconds


@pytest.mark.parametrize(
    "given", [FULL, {"id": "sh", "command": "exit 3", "shell": True}, {"id": "a", "command": ["b"]}]
)
def test_a_spec_is_the_same_after_it_was_written_and_read(given: dict[str, Any]) -> None:
    one = MonitorSpec(**given)

    assert MonitorSpec.model_validate_json(one.model_dump_json()) == one
    assert MonitorSpec.model_validate(json.loads(one.model_dump_json())) == one
    assert MonitorSpec.model_validate(one.model_dump()) == one


def test_written_as_json_a_spec_has_the_words_it_was_made_of() -> None:
    assert json.loads(MonitorSpec(**FULL).model_dump_json()) == {"shell": False, **FULL}


def test_paths_may_stand_for_texts() -> None:
    one = spec(command=[Path("/bin/ls"), PurePosixPath("a b"), "-l"], cwd=Path("/src"))

    assert (one.command, one.cwd) == (("/bin/ls", "a b", "-l"), "/src")


@pytest.mark.parametrize("name", list(MonitorSpec.model_fields))
def test_a_spec_is_not_changed_once_it_was_made(name: str) -> None:
    one = spec()

    with pytest.raises(ValidationError, match="frozen"):
        setattr(one, name, getattr(one, name))


def test_what_a_spec_was_made_of_may_be_changed_without_changing_it() -> None:
    command, env, inherit = ["ls"], {"A": "1"}, ["B"]
    one = spec(command=command, env=env, inherit_env=inherit)

    command.append("-l")
    env["C"] = "2"
    inherit.append("D")

    assert (one.command, one.env, one.inherit_env) == (("ls",), {"A": "1"}, ("B",))


def test_the_words_of_a_monitor_are_those_of_the_file() -> None:
    assert [*ArmOn, *WakePolicy, *Stream] == [
        "manual",
        "session_start",
        "notify",
        "queue_turn",
        "stdout",
        "stderr",
    ]


# --- what is refused ------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, Any], str]] = {
    # the command
    "no command": ({"command": None}, "command"),
    "an empty command": ({"command": []}, "command is empty"),
    "a command without a program": ({"command": ["", "-l"]}, "names a program"),
    "a line without a shell": ({"command": "make -j2"}, r"\['make', '-j2'\].*shell=True"),
    "an empty line without a shell": ({"command": ""}, "list of arguments"),
    "a list for the shell": ({"command": ["ls"], "shell": True}, "one line for the shell"),
    "an empty line for the shell": ({"command": "", "shell": True}, "one line for the shell"),
    "a blank line for the shell": ({"command": " \n\t", "shell": True}, "one line for the shell"),
    "NUL in a line for the shell": ({"command": NUL, "shell": True}, "the command has NUL"),
    "a surrogate in a line for the shell": ({"command": SURROGATE, "shell": True}, "the command has NUL or lone surr"),
    "NUL in the program": ({"command": [NUL]}, "an argument of the command has NUL"),
    "NUL in an argument": ({"command": ["ls", NUL]}, "an argument of the command has NUL"),
    "a surrogate in an argument": ({"command": ["ls", SURROGATE]}, "an argument of the command has NUL or lone surr"),
    "a number in a command": ({"command": ["sleep", 5]}, "valid string"),
    "a list in a command": ({"command": ["ls", ["-l"]]}, "valid string"),
    "nothing in a command": ({"command": ["ls", None]}, "valid string"),
    "a path as a command": ({"command": Path("/bin/ls")}, "command"),
    "a mapping as a command": ({"command": {"ls": "-l"}}, "command"),
    "a set as a command": ({"command": {"ls", "-l"}}, "command"),
    # where and as what
    "an empty folder": ({"cwd": ""}, "cwd\n.*empty"),
    "NUL in the folder": ({"cwd": NUL}, "cwd\n.*NUL"),
    "a surrogate in the folder": ({"cwd": SURROGATE}, "cwd\n.*surrogate"),
    "a number as a folder": ({"cwd": 3}, "cwd\n.*valid string"),
    "an empty label": ({"label": ""}, "label\n.*empty"),
    "NUL in the label": ({"label": NUL}, "label\n.*NUL"),
    "a surrogate in the label": ({"label": SURROGATE}, "label\n.*surrogate"),
    "a number as a label": ({"label": 3}, "label\n.*valid string"),
    # the environment
    "a variable without a name": ({"env": {"": "x"}}, "env\n.*name of a variable"),
    "'=' in the name of a variable": ({"env": {"A=B": "x"}}, "env\n.*'A=B'.*'='"),
    "a name that is '='": ({"env": {"=": "x"}}, "env\n.*'='"),
    "NUL in the name of a variable": ({"env": {NUL: "x"}}, "env\n.*name of a variable has NUL"),
    "a surrogate in the name of a variable": ({"env": {SURROGATE: "x"}}, "env\n.*name of a variable has NUL or lone"),
    "NUL in a variable": ({"env": {"A": NUL}}, "env\n.*variable 'A' has NUL"),
    "a surrogate in a variable": ({"env": {"A": SURROGATE}}, "env\n.*variable 'A' has NUL or lone"),
    "a number in a variable": ({"env": {"A": 1}}, "env.A\n.*valid string"),
    "nothing in a variable": ({"env": {"A": None}}, "env.A\n.*valid string"),
    "a number as a variable's name": ({"env": {1: "x"}}, "env"),
    "no environment": ({"env": None}, "env\n"),
    "an environment of text": ({"env": "A=B"}, "env\n"),
    "an inherited variable without a name": ({"inherit_env": [""]}, "inherit_env\n.*name of a variable"),
    "'=' in the name of an inherited one": ({"inherit_env": ["A", "B=C"]}, "inherit_env\n.*'B=C'.*'='"),
    "NUL in the name of an inherited one": ({"inherit_env": [NUL]}, "inherit_env\n.*NUL"),
    "a surrogate in the name of an inherited one": ({"inherit_env": [SURROGATE]}, "inherit_env\n.*surrogate"),
    "one text for what is inherited": ({"inherit_env": "PATH"}, "inherit_env\n"),
    "a number among what is inherited": ({"inherit_env": [1]}, "inherit_env"),
    # the time
    "no time": ({"timeout": 0}, "timeout\n.*greater than or equal to 0.001"),
    "a negative time": ({"timeout": -1.0}, "timeout\n.*greater than or equal to 0.001"),
    "a hardly negative time": ({"timeout": -5e-324}, "timeout\n.*greater than or equal to 0.001"),
    "a time that is no number": ({"timeout": math.nan}, "timeout\n.*finite"),
    "an endless time": ({"timeout": math.inf}, "timeout\n.*finite"),
    "an endless time before": ({"timeout": -math.inf}, "timeout\n"),
    "a truth as a time": ({"timeout": True}, "timeout\n.*number"),
    "a text as a time": ({"timeout": "5"}, "timeout\n.*number"),
    "a second more than a day": ({"timeout": LONGEST_TIMEOUT + 1}, "timeout\n.*86400"),
    "hardly more than a day": ({"timeout": math.nextafter(LONGEST_TIMEOUT, math.inf)}, "timeout\n.*86400"),
    "a number too long for a float": ({"timeout": 10**400}, "timeout\n"),
    # how many lines
    "no lines": ({"keep_lines": 0}, "keep_lines\n.*at least 1|keep_lines\n.*equal to 1"),
    "fewer than no lines": ({"keep_lines": -1}, "keep_lines\n"),
    "too many lines": ({"keep_lines": 100_001}, "keep_lines\n.*100000"),
    "a truth as a number of lines": ({"keep_lines": True}, "keep_lines\n.*integer"),
    "a fraction of lines": ({"keep_lines": 1.5}, "keep_lines\n.*integer"),
    "a text as a number of lines": ({"keep_lines": "7"}, "keep_lines\n.*integer"),
    "no number of lines": ({"keep_lines": None}, "keep_lines\n.*integer"),
    # the words
    "an unknown arming": ({"arm_on": "always"}, "arm_on\n.*'manual' or 'session_start'"),
    "a word in capitals": ({"arm_on": "MANUAL"}, "arm_on\n"),
    "no arming": ({"arm_on": None}, "arm_on\n"),
    "an unknown wake policy": ({"wake_policy": "shout"}, "wake_policy\n.*'notify' or 'queue_turn'"),
    "an empty wake policy": ({"wake_policy": ""}, "wake_policy\n"),
    "no truth": ({"persistent": "perhaps"}, "persistent\n"),
    "no truth about the restart": ({"restart_on_restore": None}, "restart_on_restore\n"),
    "no truth about the shell": ({"shell": 2}, "shell\n"),
    # the id
    "no id": ({"id": None}, "id\n"),
    "an empty id": ({"id": ""}, "id\n.*1 to 256 characters"),
    "an id that is the task's": ({"id": "monitor:tests"}, "id\n.*'monitor:'.*leave that out"),
    "an id that is the prefix": ({"id": "monitor:"}, "id\n.*leave that out"),
    "NUL in an id": ({"id": NUL}, "id\n.*control characters"),
    "a newline in an id": ({"id": "a\n"}, "id\n.*control characters"),
    "an escape in an id": ({"id": "a\x1b[31m"}, "id\n.*control characters"),
    "a surrogate in an id": ({"id": SURROGATE}, "id\n.*surrogates"),
    "an id of 256 characters": ({"id": "x" * 256}, "id\n.*characters"),
    "an id one too long with its prefix": ({"id": "x" * 249}, "id\n.*characters"),
    "a number as an id": ({"id": 3}, "id\n.*string"),
    # what there is not
    "a field that is none": ({"retries": 3}, "retries\n.*not permitted"),
    "a field of another name": ({"commands": ["ls"]}, "commands\n.*not permitted"),
}


@pytest.mark.parametrize(("given", "said"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_a_monitor_is_refused_by_what_is_wrong_with_it(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        spec(**given)


@pytest.mark.parametrize("missing", ["id", "command"])
def test_a_spec_without_an_id_or_a_command_is_refused(missing: str) -> None:
    given = {"id": "tests", "command": ["pytest"]}
    del given[missing]

    with pytest.raises(ValueError, match=f"{missing}\n.*required"):
        MonitorSpec(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {"id": "x" * 248},
        {"id": "été 日本 \U0001f600"},
        {"id": "a/b:c"},
        {"id": "my monitor:1"},
        {"id": "Monitor:1"},
        {"command": [" "]},
        {"command": ["ls", "", " ", "\n", "--", "-"]},
        {"command": ("ls",)},
        {"command": ["x" * 1_000_000]},
        {"command": "a\nb", "shell": True},
        {"env": {"A": "", "B": "\n", "C": "a=b", "D E": "x", "f": "日"}},
        {"inherit_env": ("A", "A")},
        {"inherit_env": []},
        {"timeout": 1e-3},
        {"timeout": 1},
        {"timeout": LONGEST_TIMEOUT},
        {"timeout": 86_400},
        {"keep_lines": 1},
        {"keep_lines": 100_000},
        {"label": "two\nlines"},
        {"cwd": "../relative"},
        {"arm_on": ArmOn.SESSION_START, "wake_policy": WakePolicy.NOTIFY},
    ],
    ids=lambda given: repr(given)[:40],
)
def test_what_is_unusual_is_taken_as_it_is(given: dict[str, Any]) -> None:
    one = spec(**given)

    said = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    assert {name: json.loads(one.model_dump_json())[name] for name in given} == said


# --- the limits of monitors -----------------------------------------------------------------------------------------


def test_a_store_that_says_nothing_bounds_what_monitors_do() -> None:
    limits = Limits()

    assert (limits.monitors, limits.line_bytes, limits.lines_per_second) == (32, 4096, 200.0)
    assert limits.update_bytes == 16 * 1024 * 1024


@pytest.mark.parametrize(
    "given",
    [
        {"monitors": 1},
        {"monitors": None},
        {"line_bytes": 16},
        {"line_bytes": 1024 * 1024},
        {"lines_per_second": 0.1},
        {"lines_per_second": 1e6},
        {"lines_per_second": 5},
        {"update_bytes": 1},
        {"update_bytes": None},
    ],
    ids=repr,
)
def test_a_limit_may_be_as_small_or_as_large_as_it_makes_sense(given: dict[str, Any]) -> None:
    assert {name: getattr(Limits(**given), name) for name in given} == given


@pytest.mark.parametrize(
    "given",
    [
        {"monitors": 0},
        {"monitors": -1},
        {"monitors": True},
        {"monitors": 1.5},
        {"monitors": "3"},
        {"monitors": 2**63},
        {"line_bytes": 15},
        {"line_bytes": 1024 * 1024 + 1},
        {"line_bytes": None},
        {"line_bytes": True},
        {"line_bytes": 64.0},
        {"lines_per_second": 0},
        {"lines_per_second": 0.09},
        {"lines_per_second": -1},
        {"lines_per_second": math.nan},
        {"lines_per_second": math.inf},
        {"lines_per_second": 1e6 + 1},
        {"lines_per_second": None},
        {"lines_per_second": True},
        {"lines_per_second": "5"},
        {"update_bytes": 0},
        {"update_bytes": True},
        {"update_bytes": 1e6},
        {"update_bytes": 2**63},
    ],
    ids=repr,
)
def test_a_limit_of_monitors_without_sense_is_refused_by_its_name(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(given))):
        Limits(**given)
