"""Everything that a run is made of, found and checked before a process waits for another or a weight is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from launch.checks.arguments import Arguments
from launch.data.sources import load_data
from launch.data.values import Rows
from launch.demo import defaults as demo
from launch.training import base_experts, fit, modeling
from launch.training.processors import Processor, processor_of_run


@dataclass
class Prepared:
    """Adapter configuration, processor, rows, and what the model's config must know about them (the classes)."""

    config: Any
    processor: Processor
    train: Rows
    evaluation: Dataset | None
    model_options: dict[str, Any]


def prepare(arguments: Arguments) -> tuple[Prepared, Any]:
    """Reads tokenizer and data, and puts the adapter on a model without weights, which comes second.

    The demo's model is described, not built: that takes a minute, in which a typo should not be waiting.
    """
    task = modeling.TASK_TYPES[arguments.run.task]
    config = modeling.start_adapter(arguments) or base_experts.lora_config(arguments, task)
    config = config or modeling.adapter_config(arguments.adapter, arguments.run.task)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.demo:
            demo.describe_base(folder)
            arguments.run.model_name_or_path = folder
        fit.check_weights(arguments.run.model_name_or_path, "--model_name_or_path")
        fit.check_weights(arguments.run.start_adapter, "--model_name_or_path")
        processor = processor_of_run(arguments)
        train, evaluation, model_options = load_data(arguments, processor)
        skeleton = modeling.build_on_meta(arguments, model_options)
        fit.check_fit(arguments, skeleton, processor, train, evaluation)
        skeleton = modeling.check_model(arguments, config, skeleton)
    return Prepared(config, processor, train, evaluation, model_options), skeleton
