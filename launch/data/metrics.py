"""Scores: of answers against references, of classes against labels, of numbers against numbers, of tokens.

The same in training (`launch/train.py`) and afterwards (`launch/evaluate.py`). Scores of classes and numbers are
scikit-learn's and SciPy's.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn
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
    """Accuracy, F1 and Matthews' correlation, as scikit-learn defines them.

    `f1` is that of class 1 (MRPC's and QQP's, whose class 1 is the positive one), given for two classes only;
    `f1_macro` the mean over classes that occur. 0 / 0 is 0.

    Args:
        predicted, labels: (n,) class ids, n >= 1.

    Source: Wang et al., "GLUE" (arXiv 1804.07461), table 1.
    """
    scores = {
        "accuracy": sklearn.accuracy_score(labels, predicted),
        "f1_macro": sklearn.f1_score(labels, predicted, average="macro", zero_division=0),
        # Of one class alone there is no correlation, and scikit-learn warns instead of saying so.
        "matthews": sklearn.matthews_corrcoef(labels, predicted) if len({*labels, *predicted}) > 1 else 0.0,
    }
    if max(predicted.max(), labels.max()) <= 1:
        scores["f1"] = sklearn.f1_score(labels == 1, predicted == 1, zero_division=0)
    return {name: float(value) for name, value in scores.items()}


def regression_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation (NaN where either side is constant), mean squared error.

    Args:
        predicted, labels: (n,) numbers.
    """
    predicted, labels = predicted.astype(np.float64), labels.astype(np.float64)
    constant = np.ptp(predicted) == 0 or np.ptp(labels) == 0
    return {
        "pearson": math.nan if constant else float(stats.pearsonr(predicted, labels).statistic),
        "spearman": math.nan if constant else float(stats.spearmanr(predicted, labels).statistic),
        "mse": float(sklearn.mean_squared_error(labels, predicted)),
    }


def head_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Scores of a model with a head, as transformers' Trainer asks for them (`compute_metrics`).

    Labels that are whole numbers are classes, and the class with the largest logit is the prediction; others are
    numbers, and so is the single output. `loss` is the mean over rows of what the head is trained on, and takes the
    place of the Trainer's mean over batches, which moves with their size.

    Args:
        prediction: `predictions` (rows, classes), or (rows, 1) for numbers; `label_ids` (rows,).
    """
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(prediction.label_ids).reshape(-1)
    if np.issubdtype(labels.dtype, np.floating):
        scores = regression_scores(logits.reshape(-1), labels)
        return {**scores, "loss": scores["mse"]}
    scores = classification_scores(logits.argmax(-1), labels)
    scores["loss"] = float(np.mean(np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(len(labels)), labels]))
    return {**scores, "majority_class_accuracy": float(np.bincount(labels).max() / len(labels))}


def token_scores(nll: float, right: float, tokens: float) -> dict[str, float]:
    """Mean loss per token, its exponential, and the share of tokens that are the model's first choice.

    Args:
        nll: sum of -log p over all tokens that have a label. right: how many of them are the most probable token.
        tokens: how many there are.
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
