"""The rows that a run trains and evaluates on: every data set read and converted alone, then mixed.

TRL's dataset mixtures (`get_dataset`) concatenate what `load_dataset` reads; they have neither weights nor layouts.
Mixing is `datasets`' concatenate and interleave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset, Value, concatenate_datasets, interleave_datasets
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from launch.checks.arguments import Arguments
from launch.checks.errors import UserError, say
from launch.checks.flags import LANGUAGE, NO_TEMPLATE, RunArguments
from launch.data import classification
from launch.data.causal import causal_rows, layout_of
from launch.data.pictures import image_text_rows, labelled_images
from launch.data.rows import load_evaluation, load_splits
from launch.data.values import Rows
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
    whole = getattr(arguments.training, "completion_only_loss", None) is False
    convert = converter(run.task, processor, run.regression, whole)
    parts, held_out, names, worded = [], [], None, False
    for number, name in enumerate(run.dataset_name):
        train, aside = load_splits(run, seed, number)
        if run.task in LANGUAGE:
            worded |= layout_of(train, run, f"--dataset_name {name}")[0] == "instruction"
        elif number == 0:
            names = classification.class_names(train, run)
        parts.append(convert(train, run, flag=f"--dataset_name {name}"))
        if aside is not None:
            held_out.append(convert(aside, run, flag=f"--dataset_name {name}"))
    if run.prompt_template != RunArguments.prompt_template and not worded:
        say(f"--prompt_template {run.prompt_template} is not used: no data set has instruction rows.")
    flag = flag_of_evaluation = f"--dataset_name {' '.join(run.dataset_name)}"
    train, evaluation = mix(parts, run, seed), load_evaluation(run)
    if evaluation is not None:
        flag_of_evaluation = f"--eval_dataset_name {run.eval_dataset_name}"
        evaluation = convert(evaluation, run, flag=flag_of_evaluation)
    elif held_out:
        evaluation = mix(held_out, replace(run, dataset_weights=[]), seed)
        evaluation = evaluation if run.max_eval_samples is None else evaluation.take(run.max_eval_samples)
    if run.task in LANGUAGE:
        chats = not isinstance(train.features["prompt"], Value)
        run.template_used = "chat" if chats else run.prompt_template if worded else NO_TEMPLATE
        return train, evaluation, {}

    names = [] if run.regression else classification.label_names(train, flag, names)
    targets = partial(classification.number_labels, names=names)
    evaluation = None if evaluation is None else targets(evaluation, flag=flag_of_evaluation)
    return targets(train, flag=flag), evaluation, classification.class_options(names)


def converter(task: str, processor: Any, regression: bool = False, whole: bool = False) -> Callable[..., Rows]:
    """What brings rows into the shape of a task's trainer: a function of rows, the data's flags and their name."""
    if task in LANGUAGE:
        kind = causal_rows if task == "causal-lm" else image_text_rows
        return partial(kind, tokenizer=processor, whole=whole)
    kind = labelled_images if task == "image-classification" else classification.classification_texts
    return partial(kind, regression=regression)


def mix(parts: list[Rows], run: RunArguments, seed: int) -> Rows:
    """All rows of all data sets, one after the other; with weights, rows drawn at random.

    With `--dataset_weights` w every row comes from data set i with probability w_i / sum(w), in the order it has
    there. The draws depend on `seed` alone.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.features != parts[0].features for part in parts):
        raise UserError(
            "--dataset_name: chat messages and plain text (or texts and pairs of texts) cannot be mixed. Beside "
            "messages use --prompt_template chat for instruction rows; for classification the same columns in all."
        )
    if not run.dataset_weights:
        return concatenate_datasets(parts)
    total = sum(run.dataset_weights)
    return interleave_datasets(
        parts,
        probabilities=[weight / total for weight in run.dataset_weights],
        seed=seed,
        stopping_strategy=run.dataset_stopping,
    )
