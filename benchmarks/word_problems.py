"""Word problems for a first run, made here: nobody's data, and nothing to download.

    python -m benchmarks.word_problems data/words     # data/words.train.jsonl (200 rows), data/words.test.jsonl (50)

Alpaca rows: `instruction`, `input` (empty), `output` ("3*4-2 = 10"). No problem of the test file is in the other one.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NAMES = ("Tom", "Ana", "Lee", "Mia", "Raj", "Zoe", "Ben", "Ida")
THINGS = ("pens", "apples", "cards", "shells", "stamps", "books")
TEMPLATES = (
    ("{n} has {a} {t} and finds {b} more. How many {t} does {n} have?", "{a}+{b}"),
    ("{n} has {s} {t} and gives {b} away. How many {t} are left?", "{s}-{b}"),
    ("{n} has {a} boxes with {b} {t} each. How many {t} does {n} have?", "{a}*{b}"),
    ("{n} shares {p} {t} among {b} friends. How many {t} does each get?", "{p}/{b}"),
    ("{n} has {a} boxes with {c} {t} each, and loses {b}. How many {t} are left?", "{a}*{c}-{b}"),
)
TRAIN, TEST = 200, 50


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different rows."""
    draw, made = random.Random(seed), {}
    while len(made) < count:
        a, b, c = draw.randint(2, 9), draw.randint(2, 9), draw.randint(10, 20)
        text, expression = draw.choice(TEMPLATES)
        values = {"n": draw.choice(NAMES), "t": draw.choice(THINGS), "a": a, "b": b, "c": c, "s": a + b, "p": a * b}
        expression = expression.format(**values)
        value = round(eval(expression, {"__builtins__": {}}))  # of numbers and signs that stand above
        made[text.format(**values)] = f"{expression} = {value}"
    task = "Solve the problem. Write the expression, then its value. "
    return [{"instruction": task + text, "input": "", "output": answer} for text, answer in made.items()]


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", type=Path, help="of the two files, e.g. data/words")
    prefix = parser.parse_args().prefix
    prefix.parent.mkdir(parents=True, exist_ok=True)
    rows = problems(TRAIN + TEST)
    for name, part in (("train", rows[:TRAIN]), ("test", rows[TRAIN:])):
        path = prefix.with_name(f"{prefix.name}.{name}.jsonl")
        path.write_text("".join(json.dumps(row) + "\n" for row in part))
        print(f"{path}: {len(part)} rows")


if __name__ == "__main__":
    main()
