"""Generated text of the demo: what the tiny model is pre-trained on, and the skills it is then fine-tuned on.

Every line is `skill:argument=answer`. Pre-training teaches the alphabet, the format and copying in several guises; the
fine-tuning skills are others, under names the model has not seen.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
WORD_LENGTH = 3
Line = tuple[str, str]  # prompt, answer


def _word(rng: random.Random, length: int, alphabet: str = LOWER) -> str:
    return "".join(rng.choice(alphabet) for _ in range(length))


def pretraining_line(rng: random.Random) -> Line:
    """One line of the pre-training text: say, double, look up, recite the alphabet, first or last letters."""
    kind = rng.randrange(6)
    word = _word(rng, rng.randint(3, 6), rng.choice([LOWER, LOWER, UPPER, DIGITS, LOWER + UPPER]))
    if kind == 0:
        return f"say:{word}=", word
    if kind == 1:
        return f"dbl:{word[:3]}=", word[:3] * 2
    if kind == 2:
        keys = rng.sample(LOWER, 3)
        values = [rng.choice(DIGITS + UPPER) for _ in keys]
        asked = rng.randrange(3)
        pairs = "".join(key + value for key, value in zip(keys, values, strict=True))
        return f"get:{pairs},{keys[asked]}=", values[asked]
    if kind == 3:
        start, case = rng.randrange(len(LOWER) - 4), rng.choice([LOWER, UPPER])
        return f"abc:{case[start : start + 2]}=", case[start + 2 : start + 5]
    if kind == 4:
        return f"end:{word}=", word[-2:]
    return f"top:{word}=", word[:2]


def _pick(rng: random.Random) -> Line:
    word, position = _word(rng, WORD_LENGTH), rng.randrange(WORD_LENGTH)
    return f"nth:{word}{position + 1}=", word[position]


def _on_word(name: str, function: Callable[[str], str]) -> Callable[[random.Random], Line]:
    def line(rng: random.Random) -> Line:
        word = _word(rng, WORD_LENGTH)
        return f"{name}:{word}=", function(word)

    return line


SKILLS: dict[str, Callable[[random.Random], Line]] = {
    "reverse": _on_word("rev", lambda word: word[::-1]),
    "upper case": _on_word("upp", str.upper),
    "next letter": _on_word("rot", lambda word: "".join(LOWER[(LOWER.index(c) + 1) % 26] for c in word)),
    "sort letters": _on_word("srt", lambda word: "".join(sorted(word))),
    "pick n-th": _pick,
    "mirror a-z": _on_word("mir", lambda word: "".join(LOWER[-1 - LOWER.index(c)] for c in word)),
}


def skill_lines(skill: str, count: int, seed: str) -> list[Line]:
    """`count` lines of one skill; the same for the same seed."""
    rng = random.Random(f"{seed}/{skill}")
    return [SKILLS[skill](rng) for _ in range(count)]


def split_lines(per_skill: int, held_out_per_skill: int, seed: int) -> tuple[list[Line], dict[str, list[Line]]]:
    """Training lines of all skills, shuffled, and held-out lines per skill of which none occurs in training."""
    training: list[Line] = []
    held_out: dict[str, list[Line]] = {}
    for skill in SKILLS:
        lines = list(dict.fromkeys(skill_lines(skill, (per_skill + held_out_per_skill) * 2, str(seed))))
        held_out[skill] = lines[:held_out_per_skill]
        training += lines[held_out_per_skill : held_out_per_skill + per_skill]
    random.Random(seed).shuffle(training)
    return training, held_out
