"""Rules of handing out failures to those who wait together: owed to all of them, acknowledged after the last."""

from __future__ import annotations

from itertools import permutations

import pytest

from lash_store.gathering import Gathering, Waiter


@pytest.fixture
def gathering() -> Gathering:
    return Gathering()


def test_a_failure_is_settled_when_the_only_one_who_waited_leaves(gathering: Gathering) -> None:
    me = gathering.enter(None)
    gathering.hand_out([5])

    assert gathering.leave(me) == [5]


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_failure_is_owed_to_all_who_waited_and_settled_after_the_last(
    gathering: Gathering, order: tuple[int, ...]
) -> None:
    waiters = [gathering.enter(None) for _ in range(3)]
    gathering.hand_out([5])

    settled = [gathering.leave(waiters[number]) for number in order]

    assert settled == [[], [], [5]]


def test_each_of_several_failures_is_settled(gathering: Gathering) -> None:
    me = gathering.enter(None)
    gathering.hand_out([5, 6])

    assert sorted(gathering.leave(me)) == [5, 6]


def test_what_was_handed_out_to_nobody_is_never_settled(gathering: Gathering) -> None:
    assert gathering.leave(gathering.enter(None)) == []


def test_a_later_waiter_was_told_before_it_came(gathering: Gathering) -> None:
    first = gathering.enter(None)
    gathering.hand_out([5])

    later = gathering.enter(None)

    assert (first.told, later.told) == (frozenset(), frozenset({5}))


def test_a_later_waiter_is_owed_nothing_and_holds_nothing_up(gathering: Gathering) -> None:
    first = gathering.enter(None)
    gathering.hand_out([5])
    later = gathering.enter(None)

    assert gathering.leave(first) == [5]
    assert gathering.leave(later) == []


def test_the_debt_does_not_grow_when_another_is_handed_the_same(gathering: Gathering) -> None:
    first, second = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([5])
    later = gathering.enter(None)
    gathering.hand_out([5])

    assert (gathering.leave(first), gathering.leave(second)) == ([], [5])
    assert gathering.leave(later) == []


def test_a_later_waiter_is_owed_what_fails_after_it_came(gathering: Gathering) -> None:
    first = gathering.enter(None)
    gathering.hand_out([5])
    later = gathering.enter(None)
    gathering.hand_out([5, 6])

    assert later.told == {5}
    assert gathering.leave(first) == [5]
    assert gathering.leave(later) == [6]


def test_who_leaves_without_having_been_handed_anything_is_waited_for_no_more(gathering: Gathering) -> None:
    told, cut_off = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([5])

    assert gathering.leave(cut_off) == []
    assert gathering.leave(told) == [5]


def test_the_last_one_to_leave_settles_even_if_it_was_handed_nothing(gathering: Gathering) -> None:
    told, cut_off = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([5])

    assert gathering.leave(told) == []
    assert gathering.leave(cut_off) == [5]


def test_what_is_settled_is_settled_once_and_nobody_was_told_before(gathering: Gathering) -> None:
    me, stays = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([5])
    gathering.leave(me)
    gathering.leave(stays)

    again = gathering.enter(None)

    # from here on the file says that it was handed out
    assert again.told == frozenset()
    assert gathering.leave(again) == []


def test_at_the_end_nobody_is_owed_anything_and_what_was_is_settled_once(gathering: Gathering) -> None:
    first, second = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([7, 8])
    assert gathering.leave(first) == []

    assert gathering.settle() == [7, 8]

    assert gathering.settle() == []
    assert gathering.leave(second) == []
    assert gathering.is_idle


def test_who_leaves_twice_leaves_once(gathering: Gathering) -> None:
    me, stays = gathering.enter(None), gathering.enter(None)
    gathering.hand_out([5])

    assert [gathering.leave(me), gathering.leave(me), gathering.leave(stays)] == [[], [], [5]]


def test_two_who_wait_in_the_same_body_are_two(gathering: Gathering) -> None:
    first, second = gathering.enter(7), gathering.enter(7)
    gathering.hand_out([5])

    assert gathering.leave(first) == []
    assert gathering.bodies == {7}
    assert gathering.leave(second) == [5]
    assert gathering.bodies == set()


def test_the_bodies_are_those_that_wait_now(gathering: Gathering) -> None:
    outside, inside, other = gathering.enter(None), gathering.enter(7), gathering.enter(8)
    assert gathering.bodies == {7, 8}

    gathering.leave(other)
    gathering.leave(outside)

    assert gathering.bodies == {7}
    gathering.leave(inside)
    assert gathering.bodies == set()


def test_it_is_idle_when_nobody_waits(gathering: Gathering) -> None:
    assert gathering.is_idle

    waiters: list[Waiter] = [gathering.enter(None), gathering.enter(3)]
    assert not gathering.is_idle

    for waiter in waiters:
        gathering.leave(waiter)
    assert gathering.is_idle
