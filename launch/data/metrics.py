"""Scores: of answers against references, of classes against labels, of numbers against numbers, of tokens.

Plain formulas on NumPy arrays and text, the same in training (`launch/train.py`) and afterwards (`launch/evaluate.py`).
Not scikit-learn: these are a few lines each, for which everybody who trains would have to install it.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
from transformers import EvalPrediction

from launch.checks.errors import UserError

ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
PUNCTUATION = str.maketrans("", "", string.punctuation)


def _number(text: str) -> str:
    """`text` as a number in one spelling, if it is one: "$1,234.50" and "1234.5." are "1234.5"."""
    try:
        value = Decimal(text.strip().strip("$%.").replace(",", ""))
    except InvalidOperation:
        return text
    return f"{value.normalize():f}" if value.is_finite() else text


# What two answers may differ in, in the order in which it is taken away.
NORMALIZERS = {
    "number": _number,
    "case": str.lower,
    "punctuation": lambda text: text.translate(PUNCTUATION),
    "articles": lambda text: ARTICLES.sub(" ", text),
    "whitespace": lambda text: " ".join(text.split()),
}


@dataclass(frozen=True)
class AnswerRule:
    """What counts as the answer in a text, and when two answers are the same.

    Args:
        pattern: regular expression; its first group (the whole match, if it has none) at its first match is the answer.
            None: the whole text is.
        ignore: names of `NORMALIZERS`; spaces at both ends never count.

    Raises:
        UserError: not a regular expression, or an unknown name.
    """

    pattern: str | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = sorted(set(self.ignore) - NORMALIZERS.keys())
        if unknown:
            raise UserError(f"--answer_ignore {unknown[0]} is unknown; choose from: {', '.join(NORMALIZERS)}.")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise UserError(f"--answer_pattern {self.pattern!r} is no regular expression: {error}.") from error

    def extract(self, text: str) -> str | None:
        """The answer in what a model wrote; None if there is none."""
        if self.pattern is not None:
            match = re.search(self.pattern, text)
            if match is None:
                return None
            text = (match.group(1) if match.re.groups else match.group()) or ""
        for name, normalize in NORMALIZERS.items():
            if name in self.ignore:
                text = normalize(text)
        return text.strip()

    def reference(self, text: str) -> str:
        """The answer in the data: as `extract`, or the whole text where the data has the bare answer."""
        found = self.extract(text)
        return found if found is not None else AnswerRule(ignore=self.ignore).extract(text) or ""

    def scores(self, given: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Shares in [0, 1] of texts with the right answer (`exact_match`), and with any (`answered`).

        Args:
            given: what the model wrote. wanted: the data's references, one each.
        """
        answers = [self.extract(text) for text in given]
        right = sum(a is not None and a == self.reference(w) for a, w in zip(answers, wanted, strict=True))
        return {"exact_match": right / len(answers), "answered": 1 - answers.count(None) / len(answers)}


def classification_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation, from the confusion matrix C (rows: labels).

    accuracy = tr C / n; F1 of a class = 2 C_ii / (row sum + column sum), 0 where that is 0 / 0. `f1` is that of class 1
    (MRPC's and QQP's, whose class 1 is the positive one), given for two classes only; `f1_macro` the mean over classes
    that occur. `matthews` is R_K = (n tr C - sum_i r_i c_i) / sqrt((n^2 - sum c_i^2) (n^2 - sum r_i^2)), 0 for 0 / 0;
    for two classes that is Matthews' phi (CoLA's).

    Args:
        predicted, labels: (n,) class ids, n >= 1.

    Source: Wang et al., "GLUE" (arXiv 1804.07461), table 1; R_K: Gorodkin, Comput. Biol. Chem. 28 (2004), 367-374.
    """
    size = int(max(predicted.max(), labels.max())) + 1
    confusion = np.zeros((size, size))
    np.add.at(confusion, (labels, predicted), 1)
    rows, columns, n = confusion.sum(1), confusion.sum(0), confusion.sum()
    occurring = (rows + columns) > 0
    f1 = np.divide(2 * np.diag(confusion), rows + columns, out=np.zeros(size), where=occurring)
    spread = (n * n - (columns * columns).sum()) * (n * n - (rows * rows).sum())
    matthews = (n * np.trace(confusion) - rows @ columns) / math.sqrt(spread) if spread else 0.0
    scores = {"accuracy": np.trace(confusion) / n, "f1_macro": f1[occurring].mean(), "matthews": matthews}
    if size <= 2:
        scores["f1"] = f1[-1] if size == 2 else 0.0
    return {name: float(value) for name, value in scores.items()}


def regression_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's correlation, Spearman's (Pearson's of ranks, equal values sharing their mean rank), mean squared error.

    Correlations are NaN where either side is constant, for then there are none.

    Args:
        predicted, labels: (n,) numbers.
    """
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    return {
        "pearson": _pearson(predicted, labels),
        "spearman": _pearson(_ranks(predicted), _ranks(labels)),
        "mse": float(np.mean((predicted - labels) ** 2)),
    }


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def head_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Scores of a model with a head, as transformers' Trainer asks for them (`compute_metrics`).

    Labels that are whole numbers are classes, and the class with the largest logit is the prediction; others are
    numbers, and so is the single output.
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    labels = np.asarray(prediction.label_ids)
    if np.issubdtype(labels.dtype, np.floating):
        return regression_scores(logits.reshape(-1), labels.reshape(-1))
    scores = classification_scores(logits.argmax(-1), labels)
    return {**scores, "majority_class_accuracy": float(np.bincount(labels).max() / len(labels))}


def head_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """What a head is trained on, as the mean over rows: cross-entropy, or for labels that are numbers squared error.

    Args:
        logits: (rows, classes), or (rows, 1) for numbers. labels: (rows,), whole numbers for classes.
    """
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels).reshape(-1)
    if np.issubdtype(labels.dtype, np.floating):
        return float(np.mean((logits.reshape(-1) - labels) ** 2))
    return float(np.mean(np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(len(labels)), labels]))


def token_scores(nll: float, right: float, tokens: float) -> dict[str, float]:
    """Mean loss per token, its exponential, and the share of tokens that are the model's first choice.

    Args:
        nll: sum of -log p over all tokens that have a label. right: how many of them are the most probable token.
        tokens: how many there are.

    Raises:
        UserError: none.
    """
    if not tokens:
        raise UserError("no row of the evaluation data has an answer within --max_length tokens; raise it.")
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # 700: the largest float is e^709
        "mean_token_accuracy": right / tokens,
        "tokens": tokens,
    }
