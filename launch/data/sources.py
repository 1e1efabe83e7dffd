"""The rows that a run trains and evaluates on: every data set read and converted alone, then mixed."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset, Features, LargeList, List, Value, concatenate_datasets, interleave_datasets
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError
from launch.checks.flags import LANGUAGE, RunArguments
from launch.data import formats, images
from launch.data.columns import Rows
from launch.data.image_text import image_text_rows
from launch.data.rows import load_evaluation, load_splits
from launch.demo import defaults as demo


def load_data(
    arguments: Arguments, processor: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin
) -> tuple[Rows, Dataset | None, dict[str, Any]]:
    """Training rows, evaluation rows, and what the model's config must know about them (the classes).

    Evaluation rows are set aside from every data set before these are mixed, so that no row that is drawn twice is on
    both sides.
    """
    run, seed = arguments.run, arguments.training.seed
    if arguments.demo:
        return demo.dataset(seed), None, {}
    if run.task in LANGUAGE:
        # --chat_template_path gives the tokenizer its template later, in the trainer.
        chat = bool(processor.chat_template or arguments.training.chat_template_path)
        kind = formats.causal_rows if run.task == "causal-lm" else image_text_rows
        convert = partial(kind, has_chat_template=chat)
    else:
        convert = images.labelled_images if run.task == "image-classification" else formats.classification_texts

    parts, held_out = [], []
    for number, name in enumerate(run.dataset_name):
        train, aside = load_splits(run, seed, number)
        parts.append(convert(train, run, flag=f"--dataset_name {name}"))
        if aside is not None:
            held_out.append(convert(aside, run, flag=f"--dataset_name {name}"))
    flag = f"--dataset_name {' '.join(run.dataset_name)}"
    train = mix(parts, run, seed)
    evaluation = load_evaluation(run)
    if evaluation is not None:
        flag_of_evaluation = f"--eval_dataset_name {run.eval_dataset_name}"
        evaluation = convert(evaluation, run, flag=flag_of_evaluation)
    elif held_out:
        flag_of_evaluation, evaluation = flag, mix(held_out, replace(run, dataset_weights=[]), seed)
        evaluation = evaluation if run.max_eval_samples is None else evaluation.take(run.max_eval_samples)
    if run.task in LANGUAGE:
        return train, evaluation, {}

    if run.regression:
        evaluation = evaluation and formats.number_targets(evaluation, flag_of_evaluation)
        return formats.number_targets(train, flag), evaluation, formats.REGRESSION
    names = formats.label_names(train, flag)
    train = formats.number_labels(train, names, flag)
    if evaluation is not None:
        evaluation = formats.number_labels(evaluation, names, flag_of_evaluation)
    ids = dict(enumerate(names))
    return train, evaluation, {"num_labels": len(names), "id2label": ids, "label2id": {n: i for i, n in ids.items()}}


def mix(parts: list[Rows], run: RunArguments, seed: int) -> Rows:
    """All rows of all data sets, one after the other; with weights, rows drawn at random.

    With `--dataset_weights` w every row comes from data set i with probability w_i / sum(w), in the order it has
    there. The draws depend on `seed` alone.

    Raises:
        UserError: columns that do not fit together, such as chat messages in one data set and text in another.
    """
    if len(parts) == 1:
        return parts[0]
    _refuse_different(parts)
    parts = [_with_plain_strings(part) for part in parts]
    total = sum(run.dataset_weights)
    try:
        if not run.dataset_weights:
            return concatenate_datasets(parts)
        return interleave_datasets(
            parts,
            probabilities=[weight / total for weight in run.dataset_weights],
            seed=seed,
            stopping_strategy=run.dataset_stopping,
        )
    except ValueError as error:
        raise UserError(f"--dataset_name {' '.join(run.dataset_name)} cannot be mixed: {error}") from error


def _refuse_different(parts: list[Rows]) -> None:
    """Data sets of text and of chat messages have no common columns; the first row of each tells them apart."""
    kinds = [{name: isinstance(value, str) for name, value in next(iter(part)).items()} for part in parts]
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(
            "--dataset_name: chat messages and plain text (or texts and pairs of texts) cannot be mixed. Beside "
            "messages use --prompt_template chat for instruction rows; for classification the same columns in all."
        )


def _with_plain_strings(rows: Rows) -> Rows:
    """`rows` whose text has one type: readers of different files disagree about the width of its offsets."""
    if rows.features is None:
        return rows
    return rows.cast(Features({name: _plain(feature) for name, feature in rows.features.items()}))


def _plain(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _plain(part) for name, part in feature.items()}
    if isinstance(feature, List | LargeList):
        return List(_plain(feature.feature))
    return Value("string") if feature == Value("large_string") else feature
