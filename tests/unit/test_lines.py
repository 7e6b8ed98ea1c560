"""Rules of how what a process writes becomes lines that may be stored."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lash_store.lines import Batch, Line, Lines
from lash_store.monitor_models import Stream

OUT, ERR = Stream.STDOUT, Stream.STDERR
LIMIT = 16


def lines_of(
    *, keep: int = 1000, line_bytes: int = LIMIT, rate: float = 1e6, most_bytes: int = 1 << 20, now: float = 0.0
) -> Lines:
    return Lines(keep=keep, line_bytes=line_bytes, rate=rate, most_bytes=most_bytes, now=now)


def read(chunks: Iterable[bytes], lines: Lines | None = None) -> Batch:
    """All that comes of one stream that wrote *chunks* and ended."""
    lines = lines or lines_of()
    for chunk in chunks:
        lines.feed(OUT, chunk)
    lines.end(OUT)
    return lines.take(0.0, is_last=True)


def texts(batch: Batch) -> list[str]:
    return [line.text for line in batch.lines]


def numbers(batch: Batch) -> list[int]:
    return [line.number for line in batch.lines]


# --- where a line ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"", []),
        (b"one", ["one"]),
        (b"one\n", ["one"]),
        (b"one\ntwo", ["one", "two"]),
        (b"\n", [""]),
        (b"\n\n\n", ["", "", ""]),
        (b"\none\n\n", ["", "one", ""]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\r\n", [""]),
        (b"one\r\r\n", ["one\r"]),
        (b"10%\r20%\n", ["10%\r20%"]),
        (b"one\x0btwo\x0c\xe2\x80\xa8three\n", ["one\x0btwo\x0c\u2028three"]),
        (b"a\tb\x1b[31m\n", ["a\tb\x1b[31m"]),
    ],
)
def test_a_line_ends_with_a_newline_or_with_its_stream_and_has_no_end_of_its_own(
    written: bytes, expected: list[str]
) -> None:
    assert texts(read([written])) == expected


TALK = "first\r\n\nsecond, with é, 日 and \U0001f600\nno end".encode()


@pytest.mark.parametrize("at", range(len(TALK) + 1))
def test_where_a_chunk_ends_is_not_seen_in_the_lines(at: int) -> None:
    batch = read([TALK[:at], TALK[at:]], lines_of(line_bytes=64))

    assert batch.lines == read([TALK], lines_of(line_bytes=64)).lines
    assert texts(batch) == ["first", "", "second, with é, 日 and \U0001f600", "no end"]
    assert numbers(batch) == [1, 2, 3, 4]


def test_a_stream_read_byte_by_byte_gives_the_same_lines() -> None:
    assert read([bytes([one]) for one in TALK]) == read([TALK])


def cut_up(alphabet: bytes) -> st.SearchStrategy[tuple[bytes, list[bytes]]]:
    """Bytes, long lines among them, and a way to read them in pieces."""
    pieces = st.one_of(
        st.lists(st.sampled_from(alphabet), max_size=6).map(bytes),
        st.integers(LIMIT - 3, LIMIT + 3).map(lambda count: b"x" * count),
        st.just("é€\U0001f600".encode()),
        st.just(b"\n"),
    )
    return st.lists(pieces, max_size=12).flatmap(
        lambda parts: st.lists(st.integers(0, sum(map(len, parts))), max_size=8).map(
            lambda cuts: (b"".join(parts), _cut(b"".join(parts), cuts))
        )
    )


def _cut(whole: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cuts), len(whole)]
    return [whole[begin:end] for begin, end in pairwise(edges)]


@pytest.mark.long
@settings(max_examples=100, deadline=None)
@given(cut_up(b"a\n\0\xc3\xa9\xe2\xff"))
def test_any_bytes_read_in_any_chunks_give_the_same_lines_texts_and_numbers(given: tuple[bytes, list[bytes]]) -> None:
    whole, chunks = given

    assert read(chunks) == read([whole])


@settings(max_examples=100, deadline=None)
@given(cut_up(b"a\n\0\xc3\xa9\xe2\xff\r"))
@example((b"x" * LIMIT + b"\r\n", [b"x" * LIMIT + b"\r", b"\n"]))
def test_the_same_holds_for_lines_that_end_with_cr_lf(given: tuple[bytes, list[bytes]]) -> None:
    whole, chunks = given

    assert read(chunks) == read([whole])


@settings(max_examples=60, deadline=None)
@given(cut_up(b"a\n\0\xc3\xa9\xe2\xff\r"))
def test_the_lines_are_those_of_the_bytes_cut_at_every_newline(given: tuple[bytes, list[bytes]]) -> None:
    whole, _ = given
    ended = whole.split(b"\n")
    if not ended[-1]:
        ended.pop()

    batch = read([whole])

    assert numbers(batch) == list(range(1, len(ended) + 1))
    for line, written in zip(batch.lines, ended, strict=True):
        if not line.is_cut:
            assert line.text == written.removesuffix(b"\r").decode(errors="replace").replace("\0", "\ufffd")
        else:
            assert len(written) > LIMIT
            assert written.decode(errors="replace").replace("\0", "\ufffd").startswith(line.text)


def test_a_stream_that_has_ended_may_end_again_without_another_line() -> None:
    lines = lines_of()
    lines.feed(OUT, b"one")
    lines.end(OUT)
    lines.end(OUT)
    lines.end(ERR)

    assert texts(lines.take(0.0)) == ["one"]


# --- a line that is too long ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "is_cut"), [(LIMIT - 1, False), (LIMIT, False), (LIMIT + 1, True), (100 * LIMIT, True)]
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=repr)
def test_a_line_of_the_limit_is_whole_and_a_longer_one_is_cut_to_it(end: bytes, length: int, is_cut: bool) -> None:
    (line,) = read([b"x" * length + end]).lines

    assert line == Line(1, OUT, "x" * min(length, LIMIT), is_cut)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""], ids=repr)
@pytest.mark.parametrize("length", [LIMIT - 1, LIMIT, LIMIT + 1])
def test_a_line_about_as_long_as_the_limit_is_the_same_byte_by_byte(length: int, end: bytes) -> None:
    written = b"x" * length + end

    assert read([bytes([one]) for one in written]).lines == read([written]).lines


def test_of_a_giant_line_one_piece_is_kept_and_nothing_until_its_newline() -> None:
    lines = lines_of()
    lines.feed(OUT, b"before\n" + b"x" * 10)
    first = lines.take(0.0)
    lines.feed(OUT, b"x" * 10)
    cut = lines.take(0.0)
    for _ in range(50):
        lines.feed(OUT, b"y" * 1000)
    has_news, meanwhile = lines.has_news, lines.take(0.0)
    lines.feed(OUT, b"z\nafter\n")
    last = lines.take(0.0)

    assert first.lines == [Line(1, OUT, "before", False)]
    assert cut.lines == [Line(2, OUT, "x" * LIMIT, True)]
    assert (has_news, meanwhile.lines, meanwhile.written_lines) == (False, [], 0)
    assert meanwhile.written_bytes == 50_000
    assert last.lines == [Line(3, OUT, "after", False)]
    assert (last.written_bytes, last.dropped) == (8, 0)


def test_a_giant_line_without_an_end_is_one_line() -> None:
    batch = read([b"x" * 1000] * 20)

    assert batch.lines == [Line(1, OUT, "x" * LIMIT, True)]
    assert (batch.written_lines, batch.written_bytes, batch.dropped) == (1, 20_000, 0)


def test_two_giant_lines_are_two_lines() -> None:
    batch = read([b"x" * 1000, b"\n" + b"y" * 1000, b"y\n", b"z"])

    assert [(line.number, line.text, line.is_cut) for line in batch.lines] == [
        (1, "x" * LIMIT, True),
        (2, "y" * LIMIT, True),
        (3, "z", False),
    ]


def test_a_giant_line_of_one_stream_does_not_hold_back_the_other() -> None:
    lines = lines_of()
    lines.feed(OUT, b"x" * 100)
    lines.feed(ERR, b"one\n")
    lines.feed(OUT, b"x" * 100)
    lines.feed(ERR, b"two\n")
    lines.feed(OUT, b"\nthree\n")

    assert lines.take(0.0).lines == [
        Line(1, OUT, "x" * LIMIT, True),
        Line(2, ERR, "one", False),
        Line(3, ERR, "two", False),
        Line(4, OUT, "three", False),
    ]


@pytest.mark.parametrize("char", ["é", "€", "\U0001f600"])
@pytest.mark.parametrize("before", range(LIMIT + 1))
@pytest.mark.parametrize("in_chunks", [False, True], ids=["at once", "byte by byte"])
def test_a_limit_inside_a_character_keeps_the_whole_ones_before_it(in_chunks: bool, before: int, char: str) -> None:
    written = ("x" * before + char * LIMIT).encode() + b"\n"

    (line,) = read([bytes([one]) for one in written] if in_chunks else [written]).lines

    whole = (LIMIT - before) // len(char.encode())
    assert line == Line(1, OUT, "x" * before + char * whole, True)


# --- what is no text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\x80", "\ufffd"),
        (b"caf\xe9", "caf\ufffd"),
        (b"a\0b", "a\ufffdb"),
        (b"\0", "\ufffd"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xc0\x80", "\ufffd\ufffd"),
        (b"\xef\xbb\xbfbom", "\ufeffbom"),
    ],
    ids=["lead", "continuation", "Latin-1", "NUL", "only NUL", "a surrogate", "NUL in two bytes", "BOM"],
)
@pytest.mark.parametrize("end", [b"\n", b""], ids=repr)
def test_bytes_that_are_no_utf_8_and_nul_are_replaced(end: bytes, written: bytes, text: str) -> None:
    assert texts(read([written + end])) == [text]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.binary(max_size=400))
def test_whatever_was_written_a_text_can_be_stored_and_is_bounded(out: bytes, err: bytes) -> None:
    lines = lines_of()
    lines.feed(OUT, out)
    lines.feed(ERR, err)
    lines.end(OUT)
    lines.end(ERR)

    for line in lines.take(0.0, is_last=True).lines:
        stored = line.text.encode()
        assert not {"\0", "\n"} & set(line.text)
        # what replaces a byte takes three
        assert len(stored) <= 3 * LIMIT


# --- two streams ----------------------------------------------------------------------------------------------------


def test_each_stream_has_its_own_unfinished_line() -> None:
    lines = lines_of()
    lines.feed(OUT, b"out ")
    lines.feed(ERR, b"err ")
    lines.feed(OUT, b"one\nou")
    lines.feed(ERR, b"one\ner")
    lines.feed(OUT, b"t two")
    lines.feed(ERR, b"r two")
    lines.end(ERR)
    lines.end(OUT)

    assert lines.take(0.0).lines == [
        Line(1, OUT, "out one", False),
        Line(2, ERR, "err one", False),
        Line(3, ERR, "err two", False),
        Line(4, OUT, "out two", False),
    ]


# --- how many are kept ----------------------------------------------------------------------------------------------


def flood(first: int, last: int) -> bytes:
    return b"".join(b"%d\n" % number for number in range(first, last + 1))


@pytest.mark.parametrize("a_chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("keep", [1, 5, 99, 100, 101])
def test_the_newest_lines_are_kept_whatever_the_chunks(keep: int, a_chunk: int) -> None:
    lines = lines_of(keep=keep)
    for first in range(1, 101, a_chunk):
        lines.feed(OUT, flood(first, min(100, first + a_chunk - 1)))

    batch = lines.take(0.0, is_last=True)

    newest = list(range(max(1, 101 - keep), 101))
    assert texts(batch) == [str(number) for number in newest]
    assert numbers(batch) == newest
    assert (batch.written_lines, batch.dropped) == (100, max(0, 100 - keep))


def test_a_flood_in_one_chunk_pushes_out_what_waited() -> None:
    lines = lines_of(keep=3)
    lines.feed(ERR, b"old\n")
    lines.feed(OUT, flood(1, 5))

    batch = lines.take(0.0)

    assert (texts(batch), numbers(batch), batch.dropped) == (["3", "4", "5"], [4, 5, 6], 3)


def test_the_oldest_lines_give_way_once_more_bytes_wait_than_may() -> None:
    lines = lines_of(most_bytes=30)
    lines.feed(OUT, b"".join(bytes([letter]) * 10 + b"\n" for letter in b"abcde"))

    batch = lines.take(0.0)

    assert (texts(batch), batch.dropped) == (["c" * 10, "d" * 10, "e" * 10], 2)


def test_bytes_that_were_stored_make_room_again() -> None:
    lines = lines_of(most_bytes=30)
    kept = []
    for letter in b"abcdef":
        lines.feed(OUT, bytes([letter]) * 15 + b"\n")
        lines.feed(OUT, bytes([letter]) * 15 + b"\n")
        kept.append(lines.take(0.0))

    assert [(len(batch.lines), batch.dropped) for batch in kept] == [(2, 0)] * 6


def test_one_line_is_kept_even_if_it_has_more_bytes_than_may_wait() -> None:
    lines = lines_of(most_bytes=5)
    lines.feed(OUT, b"x" * 10 + b"\n" + b"y" * 10 + b"\n")

    batch = lines.take(0.0)

    assert (texts(batch), batch.dropped) == (["y" * 10], 1)


def test_empty_lines_are_bounded_by_their_number() -> None:
    lines = lines_of(keep=10)
    lines.feed(OUT, b"\n" * 100_000)

    batch = lines.take(0.0, is_last=True)

    assert (texts(batch), batch.written_lines, batch.dropped) == ([""] * 10, 100_000, 99_990)


# --- how quickly ----------------------------------------------------------------------------------------------------


def test_a_burst_is_let_through_and_then_so_many_a_second() -> None:
    lines = lines_of(rate=10, now=100.0)
    lines.feed(OUT, flood(1, 100))

    taken = [lines.take(now) for now in (100.0, 100.0, 101.0, 101.5, 103.5)]

    assert [len(batch.lines) for batch in taken] == [50, 0, 10, 5, 20]
    assert [batch.is_throttled for batch in taken] == [True] * 5
    assert [number for batch in taken for number in numbers(batch)] == list(range(1, 86))


def test_what_was_not_used_is_saved_up_to_a_burst_and_no_further() -> None:
    lines = lines_of(rate=10)
    lines.feed(OUT, flood(1, 50))
    lines.take(0.0)
    lines.feed(OUT, flood(1, 100))

    assert len(lines.take(1_000_000.0).lines) == 50


def test_lines_that_wait_are_not_lost_to_the_rate_alone() -> None:
    lines = lines_of(rate=10)
    lines.feed(OUT, flood(1, 100))

    taken = [lines.take(now * 1.0) for now in range(7)]

    assert [number for batch in taken for number in numbers(batch)] == list(range(1, 101))
    assert [batch.is_throttled for batch in taken] == [True] * 5 + [False] * 2
    assert sum(batch.dropped for batch in taken) == 0


def test_at_the_slowest_rate_a_line_comes_through_at_once_and_the_next_later() -> None:
    lines = lines_of(rate=0.1)
    lines.feed(OUT, flood(1, 3))

    assert [texts(lines.take(now)) for now in (0.0, 5.0, 9.9, 10.1, 15.0, 20.2)] == [["1"], [], [], ["2"], [], ["3"]]


def test_the_oldest_that_wait_give_way_to_a_monitor_that_writes_on() -> None:
    lines = lines_of(rate=1, keep=10)
    lines.feed(OUT, flood(1, 10))
    first = lines.take(0.0)
    lines.feed(OUT, flood(11, 40))
    second = lines.take(1.0)
    last = lines.take(1.0, is_last=True)

    assert texts(first) == ["1", "2", "3", "4", "5"]
    assert (texts(second), second.dropped, second.is_throttled) == (["31"], 25, True)
    assert texts(last) == [str(number) for number in range(32, 41)]


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 150), st.lists(st.floats(0.001, 3), min_size=1, max_size=40))
def test_no_more_lines_come_through_than_a_burst_and_the_rate_allow(rate: float, pauses: list[float]) -> None:
    lines = lines_of(rate=rate, keep=100_000)
    lines.feed(OUT, b"\n" * 20_000)
    now, taken = 0.0, len(lines.take(0.0).lines)
    for pause in pauses:
        now += pause
        taken += len(lines.take(now).lines)
        allowed = max(1.0, 5 * rate) + rate * now
        assert taken <= allowed + 1e-6


def test_the_last_batch_has_all_that_waits_whatever_the_rate() -> None:
    lines = lines_of(rate=0.1)
    lines.feed(OUT, flood(1, 100))
    lines.take(0.0)

    last = lines.take(0.0, is_last=True)

    assert (len(last.lines), last.is_throttled, lines.has_news) == (99, False, False)


def test_who_writes_as_much_as_is_stored_is_not_throttled() -> None:
    lines = lines_of(rate=10)
    batches = []
    for second in range(20):
        lines.feed(OUT, flood(1, 10))
        batches.append(lines.take(float(second)))

    assert not any(batch.is_throttled for batch in batches)
    assert {len(batch.lines) for batch in batches} == {10}


# --- news, and what is told -----------------------------------------------------------------------------------------


def test_nothing_is_news_until_a_line_has_ended() -> None:
    lines = lines_of()
    before = lines.has_news
    lines.feed(OUT, b"half of")
    half = lines.has_news
    lines.feed(OUT, b" it\n")

    assert (before, half, lines.has_news) == (False, False, True)
    lines.take(0.0)
    assert not lines.has_news


def test_lines_that_wait_for_their_turn_are_news_still() -> None:
    lines = lines_of(rate=0.1)
    lines.feed(OUT, flood(1, 2))
    lines.take(0.0)
    waits = lines.has_news
    lines.take(20.0)

    assert (waits, lines.has_news) == (True, False)


def test_the_end_of_a_stream_is_news_if_it_ends_in_a_line() -> None:
    lines = lines_of()
    lines.feed(OUT, b"one\n")
    lines.take(0.0)
    lines.end(OUT)
    without = lines.has_news
    lines.feed(ERR, b"two")
    lines.end(ERR)

    assert (without, lines.has_news) == (False, True)


def test_who_was_throttled_is_so_no_more_after_a_second_of_calm_and_that_is_news() -> None:
    lines = lines_of(keep=5)
    lines.feed(OUT, flood(1, 100))
    first, soon, later = (lines.take(now) for now in (0.0, 0.5, 1.1))

    assert [batch.is_throttled for batch in (first, soon, later)] == [True, True, False]
    assert [batch.is_turn for batch in (first, soon, later)] == [True, False, True]
    assert (later.says_something, lines.has_news, lines.take(2.0).says_something) == (True, False, False)


def test_a_batch_tells_what_was_written_since_the_one_before() -> None:
    lines = lines_of()
    lines.feed(OUT, b"one\ntw")
    first = lines.take(0.0)
    lines.feed(OUT, b"o\n")
    second = lines.take(0.0)
    third = lines.take(0.0)

    assert (first.written_lines, first.written_bytes) == (1, 6)
    assert (second.written_lines, second.written_bytes) == (1, 2)
    assert third == Batch([], 0, 0, 0, is_throttled=False)


@pytest.mark.parametrize(
    "chunks",
    [
        [b"one\ntwo\n"],
        [b"one\ntw", b"o\n"],
        [b"\n\n\n"],
        [b"x" * 100 + b"\none\n"],
        [b"x" * 100, b"\none\n"],
    ],
    ids=["two", "in two chunks", "empty", "a giant line", "a giant line in two chunks"],
)
def test_feeding_says_how_many_lines_that_were(chunks: list[bytes]) -> None:
    lines = lines_of()

    counted = sum(lines.feed(OUT, chunk) for chunk in chunks)

    assert counted == lines.take(0.0).written_lines


DOINGS = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(list(Stream)),
            st.one_of(
                st.binary(max_size=60),
                st.lists(st.sampled_from([b"a\n", b"\n", b"x" * 20, b"yy"]), max_size=12).map(b"".join),
            ),
        ),
        st.sampled_from(list(Stream)),
        st.floats(0, 5),
    ),
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(DOINGS, st.integers(1, 6), st.floats(0.1, 3), st.integers(1, 60))
def test_every_line_is_stored_once_or_counted_as_dropped(
    doings: list[tuple[Stream, bytes] | Stream | float], keep: int, rate: float, most_bytes: int
) -> None:
    lines = lines_of(keep=keep, rate=rate, most_bytes=most_bytes)
    batches: list[Batch] = []
    now, written = 0.0, 0
    for doing in doings:
        if isinstance(doing, float):
            now += doing
            batches.append(lines.take(now))
        elif isinstance(doing, Stream):
            lines.end(doing)
        else:
            written += len(doing[1])
            lines.feed(*doing)
        stored = sum(len(batch.lines) for batch in batches)
        assert sum(batch.written_lines for batch in batches) <= stored + sum(b.dropped for b in batches) + keep
    last = lines.take(now, is_last=True)
    batches.append(last)

    stored = [number for batch in batches for number in numbers(batch)]
    count = sum(batch.written_lines for batch in batches)
    assert len(last.lines) <= keep
    assert len(stored) + sum(batch.dropped for batch in batches) == count
    assert stored == sorted(set(stored))
    assert set(stored) <= set(range(1, count + 1))
    assert sum(batch.written_bytes for batch in batches) == written
    assert all(batch.dropped >= 0 for batch in batches)
    assert (lines.has_news, last.is_throttled and not last.dropped) == (False, False)
