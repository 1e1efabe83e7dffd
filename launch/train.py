"""Fine-tunes a model with a mixture of LoRA experts under DeepSpeed.

    deepspeed launch/train.py --deepspeed configs/zero2.json                    # the embedded demo
    deepspeed launch/train.py --deepspeed configs/zero2.json --config recipe.yaml
    torchrun --nproc_per_node 2 launch/train.py ...        python launch/train.py ...

docs/launcher.md has all flags, data formats and recipes. The order below matters: everything that can be wrong is
checked before torch.distributed opens, and every rank finds it out alone (see `launch.errors`).
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datasets
import deepspeed
import torch.distributed as dist
import transformers
from datasets import Dataset
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

import ds_moelora  # noqa: F401  (registers the optimizers and the tuner)
from launch import checks, demo, formats, images, modeling, report, trainers
from launch.arguments import Arguments, parse_arguments
from launch.data import load_splits
from launch.errors import MASTER_PORT, UserError, adopt_rank, process_rank, run_guarded
from launch.extensions import find_free_port, load_collectives, unlink_buffers


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the launcher in this process.

    Args:
        argv: arguments without the program's name; None: those of the command line.

    Returns:
        The closing summary.

    Raises:
        UserError: something that the caller can put right; raised before a model is loaded where that is possible.
    """
    adopt_rank()
    quieten()
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, demo.DEFAULTS)
    optimizer = checks.preflight(arguments)
    config = modeling.adapter_config(arguments.adapter, arguments.run.task)
    if arguments.demo:
        arguments.run.model_name_or_path = str(demo.base_model())
    pictures = arguments.run.task == "image-classification"
    processor = images.load_image_processor(arguments) if pictures else modeling.load_tokenizer(arguments)
    train, evaluation, model_options = load_data(arguments, processor)
    modeling.check_model(arguments, config, model_options)

    start(arguments)
    set_seed(arguments.training.seed)
    model = modeling.load_model(arguments, config, model_options, None if pictures else processor)
    callbacks: list[TrainerCallback] = [trainers.OptimizerGuard(optimizer)]
    if arguments.demo:
        callbacks.append(demo.ExactMatch(processor))
    trainer = trainers.build_trainer(arguments, model, processor, train, evaluation, callbacks)
    summary = run(trainer, arguments, optimizer, callbacks)
    if dist.is_initialized():
        # Left to the interpreter's end, a rank that is late finds its peers' sockets gone, and aborts.
        dist.barrier()
        dist.destroy_process_group()
    return summary


def quieten() -> None:
    """One rank shows progress bars; deprecations inside the libraries are not the reader's to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    if process_rank()[0] > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def load_data(
    arguments: Arguments, processor: PreTrainedTokenizerBase | BaseImageProcessor
) -> tuple[Dataset, Dataset | None, dict[str, Any]]:
    """Training rows, evaluation rows, and what the model's config must know about them (the classes)."""
    run = arguments.run
    if arguments.demo:
        return demo.dataset(arguments.training.seed), None, {}
    train, evaluation = load_splits(run, arguments.training.seed)
    flags = f"--dataset_name {run.dataset_name}", f"--eval_dataset_name {run.eval_dataset_name or run.dataset_name}"
    if run.task == "causal-lm":
        # --chat_template_path gives the tokenizer its template later, in the trainer.
        chat = bool(processor.chat_template or arguments.training.chat_template_path)
        train = formats.causal_rows(train, run, flags[0], chat)
        return train, evaluation and formats.causal_rows(evaluation, run, flags[1], chat), {}
    columns = images.labelled_images if run.task == "image-classification" else formats.classification_texts
    train = columns(train, run, flags[0])
    names = formats.label_names(train, flags[0])
    train = formats.number_labels(train, names, flags[0])
    if evaluation is not None:
        evaluation = formats.number_labels(columns(evaluation, run, flags[1]), names, flags[1])
    ids = dict(enumerate(names))
    return train, evaluation, {"num_labels": len(names), "id2label": ids, "label2id": {n: i for i, n in ids.items()}}


def start(arguments: Arguments) -> None:
    """Opens torch.distributed and completes the training arguments."""
    if process_rank()[1] == 1:
        # Started by plain `python`: DeepSpeed would look for MPI, which need not be there, to learn that it is alone.
        # A port of its own, because DeepSpeed names its shared memory after it.
        port = str(find_free_port())
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    if arguments.training.deepspeed or process_rank()[1] > 1:
        load_collectives()
        # Before transformers does: it reads the launcher's environment alone, while DeepSpeed also asks MPI.
        deepspeed.init_distributed(
            timeout=timedelta(seconds=arguments.training.ddp_timeout),
            distributed_port=int(os.environ.get("MASTER_PORT", MASTER_PORT)),  # for MPI's ranks, whom nobody told
        )
        unlink_buffers()
    try:
        arguments.training.start()
    except ValueError as error:
        raise UserError(str(error)) from error
    output_dir = Path(arguments.training.output_dir)
    if arguments.run.overwrite_output_dir and arguments.training.process_index == 0 and output_dir.is_dir():
        # A later --resume_from_checkpoint true would take the old run's checkpoints for this one's.
        for path in output_dir.iterdir():
            if re.fullmatch(r"checkpoint-\d+", path.name):
                shutil.rmtree(path)


def run(trainer: Trainer, arguments: Arguments, optimizer: str, callbacks: list[TrainerCallback]) -> dict[str, Any]:
    """Trains, evaluates, saves and reports."""
    training = arguments.training
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    eval_metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    # Gathers what ZeRO-3 has sharded; PEFT then writes the adapter alone.
    trainer.save_model(training.output_dir)
    extra: dict[str, Any] = {}
    if arguments.run.task != "causal-lm":
        extra["classes"] = [name for _, name in sorted(trainer.model.config.id2label.items())]
        if trainer.eval_dataset is not None:
            counts = Counter(trainer.eval_dataset.with_format(None)["labels"])
            eval_metrics["eval_majority_class_accuracy"] = max(counts.values()) / counts.total()
    exact_match = next((callback for callback in callbacks if isinstance(callback, demo.ExactMatch)), None)
    if exact_match is not None:
        extra["exact_match"] = exact_match.accuracy
    summary = report.summarize(trainer, optimizer, eval_metrics, extra)
    if trainer.is_world_process_zero():
        path = report.write_summary(summary, training.output_dir)
        if exact_match is not None:
            exact_match.print_table()
        report.print_summary(summary, path)
    return summary


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
