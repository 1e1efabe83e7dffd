"""The scorer of arithmetic answers: right values, wrong ones, and text that is no arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.expressions import accuracy, evaluate, score


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3*4-2", 10.0), ("(1+2)/4", 0.75), ("-2*-3", 6.0), (" 7 ", 7.0), ("3-1.5", 1.5)],
)
def test_values(expression: str, value: float) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize("text", ["", "1/0", "x+1", "2**9", "__import__('os')", "1e400", "(" * 300, "True", "1 2"])
def test_no_value(text: str) -> None:
    assert evaluate(text) is None


@given(st.text(max_size=300))
def test_any_text_is_scored(text: str) -> None:
    assert score(text, "1+1 = 2") in {(a, b) for a in (False, True) for b in (False, True)}


def test_expression_and_value_are_scored_apart() -> None:
    reference = "3-1.1666666666666667 = 1.83333"
    assert score("3-1.1666666666666667 = 1.83333", reference) == (True, True)
    assert score("3-1.1666666666666667 = 2", reference) == (True, False)
    assert score("3-1 = 1.83333", reference) == (False, True)
    assert score("1.83333\n3-1", reference) == (True, False)
    assert accuracy([("1+1 = 2", "2*1 = 2"), ("1 = 1", "2 = 2")]) == (0.5, 0.5, 2)


def test_without_answers_there_is_no_score() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])
    with pytest.raises(ValueError, match="has no value"):
        score("1", "about two")
