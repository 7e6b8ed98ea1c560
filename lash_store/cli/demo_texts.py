"""Owns the demo's texts and what is found in them: the same ones every time, and a count that can be checked."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from random import Random

from pydantic import JsonValue

__all__ = ["count_words", "make_text", "make_texts", "summary", "text_id", "whole_words"]

_SENTENCES = 64

_NOUNS = (
    *(
        "archive",
        "bridge",
        "canal",
        "compass",
        "courier",
        "current",
        "engine",
        "estuary",
        "ferry",
        "forecast",
        "garden",
    ),
    *(
        "glacier",
        "harbour",
        "island",
        "journal",
        "lantern",
        "ledger",
        "library",
        "lighthouse",
        "machine",
        "map",
        "mill",
    ),
    *(
        "mirror",
        "museum",
        "observatory",
        "orchard",
        "parcel",
        "pilot",
        "quarry",
        "railway",
        "reservoir",
        "river",
        "road",
    ),
    *(
        "school",
        "signal",
        "station",
        "storm",
        "survey",
        "telegraph",
        "tower",
        "tunnel",
        "valley",
        "village",
        "workshop",
    ),
)
_ADJECTIVES = (
    "ancient",
    "broad",
    "careful",
    "distant",
    "faithful",
    "hidden",
    "narrow",
    "northern",
    "patient",
    "restless",
)
_VERBS = ("carries", "crosses", "follows", "guards", "maps", "measures", "outlives", "passes", "repairs", "watches")
_TAILS = ("before dawn", "after the flood", "in every season", "without a pause", "by evening")
_DULL = frozenset({"a", "after", "and", "before", "by", "every", "for", "in", "of", "the", "without"})

_WORD = re.compile(r"[a-z]+")
_SENTENCE = re.compile(r"[^.]+\.")


def text_id(number: int) -> str:
    """Return the id of the task that reads text *number*."""
    return f"text-{number:02d}"


def make_text(number: int) -> str:
    """Write text *number*, a few kilobytes about a few things; the same on every machine."""
    random = Random(f"lash_store demo {number}")
    nouns = random.sample(_NOUNS, 9)
    lines = []
    for _ in range(_SENTENCES):
        first, second = random.choice(nouns[:3]), random.choice(nouns)
        lines.append(
            f"The {random.choice(_ADJECTIVES)} {first} {random.choice(_VERBS)} "
            f"the {second} and the {random.choice(nouns)} {random.choice(_TAILS)}."
        )
    return "\n".join(lines) + "\n"


def make_texts(folder: Path, count: int) -> list[Path]:
    """Write the texts 1 to *count* into a folder."""
    paths = [folder / f"{text_id(number)}.txt" for number in range(1, count + 1)]
    for number, path in enumerate(paths, start=1):
        path.write_text(make_text(number), encoding="ascii")
    return paths


def whole_words(chunk: bytes, *, is_last: bool) -> bytes:
    """Return the beginning of a chunk up to its last white space, so that no word is counted as two halves."""
    if is_last:
        return chunk
    end = max(chunk.rfind(b" "), chunk.rfind(b"\n")) + 1
    return chunk[:end] if end else chunk


def count_words(text: str) -> Counter[str]:
    """Count the words of a text."""
    return Counter(_WORD.findall(text.lower()))


def summary(text: str, counts: Mapping[str, int]) -> dict[str, JsonValue]:
    """Sum a text up: how many words, the five it is about, and the sentence that holds most of them."""
    telling = Counter({word: count for word, count in counts.items() if word not in _DULL})
    sentences = [" ".join(found.split()) for found in _SENTENCE.findall(text)]
    best = max(sentences, key=lambda sentence: sum(telling[word] for word in set(_WORD.findall(sentence.lower()))))
    top: list[JsonValue] = [
        [word, count] for word, count in sorted(telling.items(), key=lambda one: (-one[1], one[0]))[:5]
    ]
    return {"words": sum(counts.values()), "distinct": len(counts), "top": top, "sentence": best}
