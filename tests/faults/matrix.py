"""
Owns the fault matrix as data: what goes wrong, where, what must come of it, by hand and in words, and the tests that show it.

Nothing here is computed by what is tested. ``docs/faults.md`` is written from it.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MATRIX", "Row", "page"]


@dataclass(frozen=True)
class Row:
    """
    One line: *shown* are the tests that show it, without parameters; *sweep* names what ``python -m tests.faults`` runs beside.

    *name* is what ``--only`` takes.
    """

    name: str
    fault: str
    where: str
    expected: str
    shown: tuple[str, ...]
    sweep: str | None = None


_WRITER, _DATABASE = "tests/storage/test_writer.py", "tests/storage/test_database.py"
_UPGRADE, _SCHEMA = "tests/storage/test_upgrade.py", "tests/storage/test_schema.py"
_STATEMENTS, _AROUND = "tests/faults/test_statements.py", "tests/faults/test_surroundings.py"
_POINTS = "tests/runtime/test_cancellation_points.py"

MATRIX: tuple[Row, ...] = (
    # --- statements and commits
    Row(
        "statement",
        "a statement fails, before it runs, after it ran, with its transaction, or with all after it for a while: "
        "SQLITE_IOERR, FULL, BUSY, INTERRUPT, NOMEM",
        "each statement of each public operation, readers' too",
        "The caller has a StorageError, or success if opening the file again met it. Success: the effect is there, whole. An "
        "error that is not CommitInDoubt: nothing is changed by it. The write lock is free, no connection is in a transaction, "
        "no thread is left, the same store goes on, the file is whole.",
        (
            f"{_STATEMENTS}::test_a_sample_of_all_points_is_whole_or_absent_and_leaves_nothing",
            f"{_STATEMENTS}::test_every_public_method_is_an_operation_or_says_why_not",
            f"{_WRITER}::test_a_units_error_undoes_its_own_work_and_no_others",
            f"{_WRITER}::test_an_interrupt_fails_the_guilty_unit_alone_and_the_others_land",
            f"{_WRITER}::test_a_passing_disk_error_is_met_by_opening_again",
            f"{_WRITER}::test_a_lasting_disk_error_fails_its_unit_alone",
            f"{_DATABASE}::test_a_passing_read_error_is_met_by_opening_again",
        ),
        "statements",
    ),
    Row(
        "commit",
        "COMMIT fails, or takes and its reply is lost",
        "the commit of each operation",
        "The file is asked. There: success. Not there: a StorageError, and the next commit works. It cannot be asked, or what "
        "was written has no event to ask for: CommitInDoubt, there or not there, and the store has stopped, without the lock.",
        (
            f"{_STATEMENTS}::test_a_commit_that_fails_is_told_as_it_is",
            f"{_WRITER}::test_a_commit_that_raised_but_took_is_a_commit",
            f"{_WRITER}::test_a_commit_that_raised_and_did_not_take_fails_its_batch_and_the_writer_lives_on",
            f"{_WRITER}::test_a_commit_that_raised_is_not_asked_of_another_processes_event",
            f"{_WRITER}::test_a_commit_nobody_can_ask_for_is_in_doubt_and_stops_the_writer",
            f"{_WRITER}::test_a_batch_without_events_is_in_doubt_unless_there_was_no_room_for_it",
            f"{_WRITER}::test_what_waits_behind_a_commit_in_doubt_is_refused_and_not_run",
            f"{_WRITER}::test_a_commit_in_doubt_keeps_no_lock",
        ),
    ),
    Row(
        "rollback",
        "ROLLBACK fails, or a read cannot begin or end",
        "writer and readers",
        "The connection is opened again, which ends the transaction: no lock is held, no later read sees an old state.",
        (
            f"{_WRITER}::test_a_rollback_that_fails_keeps_no_lock_and_the_writer_lives_on",
            f"{_WRITER}::test_a_rollback_that_fails_while_nothing_can_be_opened_keeps_no_lock_either",
            f"{_DATABASE}::test_a_read_that_could_not_end_does_not_have_later_ones_see_what_was_true_then",
        ),
    ),
    Row(
        "memory",
        "SQLite has no memory (MemoryError of the driver)",
        "BEGIN, a statement, COMMIT, a read",
        "A StorageError that passes; the outcome of a body that ended is stored later; no lock is held.",
        (
            f"{_WRITER}::test_want_of_memory_is_an_error_of_the_storage_and_the_writer_lives_on",
            f"{_DATABASE}::test_want_of_memory_in_a_read_is_an_error_of_the_storage",
        ),
    ),
    Row(
        "program's own",
        "a program's function fails in our transaction, or ends it",
        "transact, at_completion",
        "Nothing of the function is stored, others' units land; the storage's own trouble is not taken for the function's.",
        (
            "tests/runtime/test_transact.py::test_a_full_disk_is_not_its_failure",
            "tests/storage/test_guest.py::"
            "test_what_the_storage_says_while_its_tables_are_looked_at_is_no_failure_of_the_function",
            "tests/storage/test_guest.py::test_a_function_that_ends_the_transaction_is_refused_alone_whether_it_tells_or_not",
            f"{_WRITER}::test_a_unit_that_ends_the_transaction_is_refused",
        ),
    ),
    Row(
        "controls",
        "a store that acknowledges what a commit lost, denies what took, or keeps the write lock; a part of an effect; something "
        "acknowledged and lost",
        "planted in the writer, or in what is asked",
        "The harness is red.",
        (
            f"{_STATEMENTS}::test_a_store_that_acknowledged_what_a_commit_lost_is_found_out",
            f"{_STATEMENTS}::test_an_error_that_tells_of_no_effect_which_took_is_found_out",
            f"{_STATEMENTS}::test_a_store_that_keeps_the_write_lock_is_found_out",
            "tests/faults/test_cancels.py::test_a_part_of_an_effect_is_found_out",
            "tests/faults/test_calls.py::test_an_acknowledged_operation_that_is_not_there_is_found_out",
        ),
    ),
    # --- cancelled callers
    Row(
        "cancel",
        "the caller is cancelled, while it waits or when what it waits for has come",
        "each suspension of each public operation, in bodies too",
        "CancelledError, and the effect is there or not, never a part; answered all the same: it is there. Row and body agree, "
        "no coroutine, connection, thread or lock is left, the store goes on.",
        (
            "tests/faults/test_cancels.py::test_a_caller_cancelled_anywhere_leaves_the_whole_or_nothing",
            f"{_POINTS}::test_spawn_of_a_registered_function",
            f"{_POINTS}::test_spawn_of_a_coroutine_object",
            f"{_POINTS}::test_cancel_of_a_running_task",
            f"{_POINTS}::test_waiting_for_a_task",
            f"{_POINTS}::test_a_write_of_a_body",
            f"{_POINTS}::test_recover",
            f"{_POINTS}::test_open_leaves_nothing_behind_wherever_it_is_cancelled",
            f"{_POINTS}::test_close_is_whole_wherever_its_caller_is_cancelled",
        ),
        "cancels",
    ),
    # --- I/O
    Row(
        "call",
        "a call of SQLite's on a file fails, once, although it was done, or for a while: write, sync, truncate, read, open, "
        "delete, size, lock, sync of the folder",
        "each call of each operation, from a layer under SQLite",
        "As for a statement. Then a new store on the file recovers, works, and finds nothing wrong.",
        ("tests/faults/test_calls.py::test_a_sample_of_failing_calls_is_answered_as_it_is_and_recovered_from",),
        "calls",
    ),
    Row(
        "kill",
        "SIGKILL at a call of SQLite's on a file",
        "each call of each operation that changes the file",
        "What was answered is there, whole; what was not is whole or absent. A new store recovers.",
        (
            "tests/faults/test_calls.py::test_a_process_killed_at_a_call_leaves_what_it_acknowledged",
            "tests/acceptance/test_kill.py::test_no_acknowledged_operation_is_lost_over_many_kills",
            "tests/acceptance/test_step_kill.py::"
            "test_killed_anywhere_in_ten_steps_the_next_process_takes_again_only_the_step_in_flight",
            "tests/acceptance/test_handoff_kill.py::test_killed_before_any_statement_of_it_a_handoff_is_done_whole_or_not_at_all"
            "_and_a_replay_completes_it",
            "tests/acceptance/test_transact_kill.py::"
            "test_killed_anywhere_in_a_step_or_an_ending_the_file_has_all_of_it_or_nothing",
            "tests/acceptance/test_prune_kill.py::test_a_prune_that_is_killed_leaves_each_task_whole_or_its_tombstone",
            "tests/acceptance/test_keeping.py::"
            "test_a_restore_that_is_killed_at_any_time_leaves_the_one_file_or_the_other",
        ),
        "kills",
    ),
    Row(
        "system call",
        "pwrite64, fdatasync, fsync, ftruncate or openat on a store's files fails (EIO, ENOSPC, EINTR, EMFILE), or is where the "
        "process is killed",
        "each call in the life of a process that runs one of eleven operations, by strace",
        "As for a call of SQLite's; EINTR is not noticed at all.",
        (),
        "syscalls",
    ),
    Row(
        "upgrade",
        "an upgrade is killed, meets a full disk, or fails in the middle",
        "each revision",
        "The old file, row by row, or the new one; the next opening upgrades it.",
        (
            f"{_UPGRADE}::test_a_process_killed_in_the_middle_of_an_upgrade_leaves_the_old_file_row_by_row",
            f"{_UPGRADE}::test_a_disk_that_is_full_in_an_upgrade_leaves_the_old_file_row_by_row",
            f"{_SCHEMA}::test_a_revision_that_fails_in_the_middle_leaves_the_file_as_it_was",
        ),
    ),
    # --- room, descriptors, permissions
    Row(
        "full file",
        "the file may not grow (max_page_count), then it may again",
        "spawn, the end of a body, steps, notes, backup, prune",
        "StorageFull, nothing of it is stored, reads go on. The same store goes on, and ends that found no room are stored then.",
        (
            f"{_AROUND}::test_a_full_file_refuses_what_is_new_and_the_same_store_goes_on_once_there_is_room",
            f"{_WRITER}::test_a_full_disk_fails_the_guilty_unit_alone_and_the_others_land",
            "tests/runtime/test_steps.py::test_a_result_that_a_full_disk_refused_is_stored_later_without_a_second_call",
            "tests/runtime/test_inbox.py::test_a_reader_whose_leave_a_full_disk_refused_gives_its_notes_back",
            "tests/runtime/test_copies.py::test_a_full_disk_leaves_nothing_of_a_backup",
            "tests/runtime/test_retention_beside.py::"
            "test_a_full_disk_does_not_stop_the_store_that_prunes_or_hands_out_a_result",
        ),
    ),
    Row(
        "small disk",
        "a tmpfs or an ext4 of small or large blocks is full",
        "a store that spawns until it is refused, in a process of its own",
        "A StorageError, and the same process goes on once there is room. Or SIGBUS, on small blocks: then what was acknowledged "
        "is there, and a new store recovers.",
        (),
        "disks",
    ),
    Row(
        "file size",
        "RLIMIT_FSIZE",
        "a store at work",
        "A StorageError, nothing of it is stored; what was acknowledged is there; the same store goes on once files may grow.",
        (f"{_AROUND}::test_a_file_that_may_not_grow_refuses_what_is_new_and_the_same_store_goes_on_once_it_may",),
    ),
    Row(
        "descriptors",
        "RLIMIT_NOFILE: none, one, two … are left",
        "opening a store, new or there; then a store at work",
        "StorageError, nothing left open; it opens once there are enough. At work, what needs none succeeds (spawn, result, "
        "list, prune), what does is refused (inbox, backup, check), and the store goes on.",
        (
            f"{_AROUND}::test_without_descriptors_a_store_does_not_open_in_our_words_and_leaves_nothing",
            f"{_AROUND}::test_a_store_at_work_without_descriptors_answers_in_our_words_and_goes_on",
        ),
    ),
    Row(
        "read-only",
        "the folder or the file may not be written",
        "open",
        "A StorageError that says so, nothing is made; a stopped file can still be read.",
        (
            "tests/runtime/test_bad_input.py::test_a_folder_that_may_not_be_written_is_refused",
            f"{_DATABASE}::test_a_stopped_file_in_a_folder_that_may_not_be_written_is_read_without_making_anything",
        ),
    ),
    # --- others
    Row(
        "write lock",
        "another process holds the write lock: half a second in the tests, ten in the command",
        "spawn in a store that waits for less, and in one that waits for more",
        "StorageBusy after the patience, nothing is written; the patient one succeeds. The loop and readers go on meanwhile.",
        (
            f"{_AROUND}::test_a_lock_that_outlasts_the_patience_is_storage_busy_and_a_longer_patience_outlasts_it",
            f"{_WRITER}::test_a_lock_nobody_lets_go_of_is_a_typed_error_and_nothing_is_written",
            f"{_WRITER}::test_a_lock_that_is_let_go_of_in_time_is_waited_for",
        ),
        "hold",
    ),
    Row(
        "pinned -wal",
        "a reader keeps its transaction open",
        "a store that writes on, and checkpoints",
        "Nobody waits and nothing fails; the reader sees its own state; the -wal is emptied at the close after it has ended.",
        (
            f"{_AROUND}::test_a_reader_that_pins_the_wal_holds_nobody_up_and_costs_room_only_until_it_ends",
            "tests/acceptance/test_shell.py::test_a_reader_that_keeps_its_transaction_open_does_not_block_the_store",
            f"{_WRITER}::test_a_checkpoint_that_cannot_be_taken_costs_nobody_an_answer",
            f"{_WRITER}::test_the_wal_stays_bounded_over_many_commits",
            f"{_WRITER}::test_a_checkpoint_comes_soon_again_where_a_reader_was_in_the_way",
            f"{_WRITER}::test_a_checkpoint_comes_soon_again_where_the_wal_could_not_begin_anew",
        ),
    ),
    Row(
        "fork",
        "the process forks without exec while a store is open",
        "a child that only exits, one that uses what it has inherited, and one that opens the same file",
        "The parent goes on. The child is told StoreClosed by everything, StorageError by a store it opens itself, may close, "
        "and costs the parent neither lock nor -wal; it neither keeps its parent's owner alive nor ends it.",
        (
            f"{_AROUND}::test_a_forked_child_costs_its_parent_nothing_and_is_told_to_fork_before",
            "tests/storage/test_owners.py::test_a_forked_child_does_not_keep_its_parent_alive",
            "tests/storage/test_owners.py::test_a_forked_child_does_not_end_its_parents_life",
        ),
    ),
    Row(
        "gone file",
        "the file is removed, renamed or replaced; a shell makes another in its place; its -wal or -shm is removed",
        "a store at work, also in the middle of a transaction",
        "StorageMoved before anything is acknowledged, and the store has stopped; what was acknowledged is in the renamed file "
        "with its -wal. (Who makes a new file at the old name beside that -wal has SQLite remove the -wal: rename both.)",
        (
            f"{_AROUND}::test_a_store_whose_file_went_away_stops_before_anything_is_acknowledged",
            f"{_AROUND}::test_a_store_beside_whose_file_one_goes_away_stops_before_anything_is_acknowledged",
            f"{_WRITER}::test_a_file_that_is_gone_is_noticed_before_anything_is_acknowledged",
            f"{_WRITER}::test_a_file_that_goes_away_during_a_transaction_is_noticed_before_anything_is_acknowledged",
        ),
    ),
    Row(
        "stray close",
        "something in the store's own process opens and closes the file, which drops SQLite's locks; a sqlite3 shell comes by",
        "a live owner",
        "The shell does not take the -wal away; everybody sees what is acknowledged afterwards.",
        (
            f"{_WRITER}::test_a_stray_close_and_a_shell_do_not_cost_later_commits",
            f"{_WRITER}::test_the_guard_stands_until_the_last_store_of_the_process_closes",
            "tests/acceptance/test_shell.py::test_a_shell_that_comes_and_goes_does_not_take_the_wal_away",
        ),
    ),
    Row(
        "shells",
        "sqlite3 shells read and write beside a store",
        "a store at work",
        "Each reads a whole state and blocks nobody; what both wrote is all there; an outcome cannot be undone by hand.",
        (
            f"{_AROUND}::test_what_a_shell_and_a_store_write_beside_each_other_is_all_there",
            "tests/acceptance/test_shell.py::"
            "test_live_tasks_reads_well_while_the_store_is_writing_and_does_not_block_it",
            "tests/acceptance/test_shell.py::test_a_hand_edit_that_would_undo_history_is_refused",
        ),
    ),
)


def page() -> str:
    """Write the matrix as ``docs/faults.md``."""
    lines = [
        "# Faults",
        "",
        "What goes wrong, where, what must come of it, and what shows it. The expectations are written by hand, in",
        "`tests/faults/matrix.py`, of which this page is made: `python -m tests.faults --write-docs`.",
        "",
        "`pytest tests/faults` takes a sample of the points of each sweep, the same every time (`FAULTS_SEED=…` for",
        "another). `python -m tests.faults` runs every row, with the tests named and the sweeps for as long as `--seconds`",
        "says; `--all` takes every point of them. It fails on a row that did not run, unless that says why it was skipped.",
        "",
        "| row | fault | where | what must come of it | shown by |",
        "|---|---|---|---|---|",
    ]
    for row in MATRIX:
        shown = "<br>".join(f"`{one}`" for one in row.shown)
        sweep = "" if row.sweep is None else f"`python -m tests.faults --only '{row.name}'`"
        shown = "<br>".join(filter(None, (shown, sweep)))
        lines.append(f"| {row.name} | {row.fault} | {row.where} | {row.expected} | {shown} |")
    return "\n".join(lines) + "\n"
