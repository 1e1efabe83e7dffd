"""Scores arithmetic answers such as "3*4-2 = 10": is the value right, and does the expression have it?

    python launch/evaluate.py ... --score answers --predictions predictions.jsonl
    python -m benchmarks.expressions predictions.jsonl

Expressions are numbers, + - * / and brackets, evaluated by a walk over Python's syntax tree; nothing is executed. A
value counts as right within 1e-4 of the reference, relatively: references are rounded to six digits.
"""

from __future__ import annotations

import ast
import json
import math
import operator
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

TOLERANCE = 1e-4
LONGEST = 200  # characters of an answer that are read
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(expression: str) -> float | None:
    """The value of an arithmetic expression; None if it is none, or has no finite value."""
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError(f"{type(node).__name__} is no arithmetic")


def score(answer: str, reference: str) -> tuple[bool, bool]:
    """(the expression has the reference's value, the value written behind "=" is that of the reference).

    Args:
        answer, reference: "expression = value"; of the answer only the first line is read.
    """
    line = answer.strip().split("\n")[0][:LONGEST]
    expression, _, written = line.partition("=")
    target = evaluate(reference.partition("=")[0])
    if target is None:
        raise ValueError(f"the reference {reference!r} has no value")
    found = (evaluate(expression), evaluate(written))
    expression_is, value_is = (
        v is not None and math.isclose(v, target, rel_tol=TOLERANCE, abs_tol=1e-9) for v in found
    )
    return expression_is, value_is


def accuracy(pairs: Iterable[tuple[str, str]]) -> tuple[float, float, int]:
    """Shares of (answer, reference) pairs with the right expression and the right value, and their number.

    Raises:
        ValueError: there is no pair.
    """
    scores = [score(answer, reference) for answer, reference in pairs]
    if not scores:
        raise ValueError("there are no answers to score.")
    right = [sum(column) / len(scores) for column in zip(*scores, strict=True)]
    return right[0], right[1], len(scores)


if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    expression_share, value_share, count = accuracy((row["written"], row["reference"]) for row in rows)
    print(f"expression right: {expression_share:.1%}, written value right: {value_share:.1%}, of {count} answers")
