"""Scores against values worked out by hand, or documented by the library that defines them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from launch.checks.errors import UserError
from launch.data.metrics import (
    AnswerRule,
    classification_scores,
    head_scores,
    regression_scores,
    token_scores,
)

EVERYTHING = ("case", "punctuation", "articles", "whitespace")


def scores(labels, predicted):
    return classification_scores(np.array(predicted), np.array(labels))


def test_known_values():
    # scikit-learn's documented examples of f1_score and matthews_corrcoef, and scipy's of spearmanr.
    three = scores([0, 1, 2, 0, 1, 2], [0, 2, 1, 0, 0, 1])
    assert three["accuracy"] == pytest.approx(1 / 3)
    assert three["f1_macro"] == pytest.approx(0.26666666666666666)
    assert "f1" not in three
    two = scores([1, 1, 1, 0], [1, 0, 1, 1])
    assert two["matthews"] == pytest.approx(-1 / 3)
    assert two["f1"] == pytest.approx(2 / 3)  # precision 2/3, recall 2/3
    found = regression_scores(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7]))
    assert found["spearman"] == pytest.approx(0.8207826816681233)
    assert found["mse"] == pytest.approx((16 + 16 + 16 + 16 + 4) / 5)


def test_degenerate_cases():
    same = scores([1, 1], [1, 1])
    assert (same["accuracy"], same["f1"], same["matthews"]) == (1.0, 1.0, 0.0)
    assert scores([0, 0], [0, 0])["f1"] == 0.0
    assert math.isnan(regression_scores(np.ones(3), np.arange(3.0))["pearson"])


def test_a_head_is_scored_by_the_kind_of_its_labels():
    logits = np.array([[0.1, 0.9], [2.0, 1.0], [0.0, 0.5]])
    classes = head_scores(EvalPrediction(logits, np.array([1, 0, 0])))
    assert classes["accuracy"] == pytest.approx(2 / 3)
    assert classes["majority_class_accuracy"] == pytest.approx(2 / 3)
    numbers = head_scores(EvalPrediction((logits[:, :1],), np.array([0.1, 2.0, 0.0], dtype=np.float32)))
    assert numbers["pearson"] == pytest.approx(1.0)


def test_tokens_weigh_alike():
    got = token_scores(nll=6.0, right=1.0, tokens=4.0)
    assert got == {"loss": 1.5, "perplexity": math.exp(1.5), "mean_token_accuracy": 0.25, "tokens": 4.0}
    with pytest.raises(UserError, match="--max_length"):
        token_scores(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("rule", "given", "wanted", "right", "answered"),
    [
        (AnswerRule(), [" yes \n", "no."], ["yes", "no"], 0.5, 1.0),
        (AnswerRule(r"The answer is ([A-E])"), ["The answer is B. A", "B"], ["The answer is B.", "B"], 0.5, 0.5),
        (AnswerRule(r"answer\d"), ["it is answer3, not answer1"], ["the correct answer is answer3"], 1.0, 1.0),
        (AnswerRule(r"is:? (.*)", EVERYTHING), ["is: The  Big-dog!"], ["a bigdog"], 1.0, 1.0),
        (AnswerRule(r"####\s*(.*)", ("number",)), ["#### $1,234.50."], ["1234.5"], 1.0, 1.0),
        (AnswerRule(ignore=("number",)), ["nan", "1e3", "no number"], ["nan", "1000", "no number"], 1.0, 1.0),
    ],
)  # fmt: skip
def test_answers(rule, given, wanted, right, answered):
    assert rule.scores(given, wanted) == {"exact_match": right, "answered": answered}


def test_answer_rules_that_cannot_be():
    with pytest.raises(UserError, match="no regular expression"):
        AnswerRule("(")
    with pytest.raises(UserError, match="choose from: number, case"):
        AnswerRule(ignore=("spelling",))


def test_the_loss_of_a_head_is_torchs():
    logits, generator = torch.randn(7, 3, dtype=torch.float64), np.random.default_rng(0)
    labels = generator.integers(0, 3, 7)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    assert head_scores(EvalPrediction(logits.numpy(), labels))["loss"] == pytest.approx(float(expected), rel=1e-12)
    numbers = generator.normal(size=7)
    expected = torch.nn.functional.mse_loss(logits[:, 0], torch.from_numpy(numbers))
    found = head_scores(EvalPrediction(logits[:, :1].numpy(), numbers))["loss"]
    assert found == pytest.approx(float(expected), rel=1e-12)
