"""Fine-tunes a model with a mixture of LoRA experts under DeepSpeed.

    deepspeed launch/train.py --deepspeed configs/zero2.json                    # the embedded demo
    deepspeed launch/train.py --deepspeed configs/zero2.json --config recipe.yaml
    torchrun --nproc_per_node 2 launch/train.py ...        python launch/train.py ...

docs/launcher.md has all flags, data formats and recipes. The order below matters: everything that can be wrong is
checked before torch.distributed opens, and every rank finds it out alone (see `launch.checks.errors`).
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
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
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

import ds_moelora  # noqa: F401  (registers the optimizers and the tuner)
from ds_moelora.checkpoint.processes import everyone
from ds_moelora.monitoring import MoELoRACallback
from ds_moelora.tuner import record_training
from launch.checkpoint import resume, saving
from launch.checkpoint.lock import OutputLock
from launch.checkpoint.stopping import Stopping
from launch.checks import preflight as checks
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.errors import MASTER_PORT, UserError, adopt_rank, process_rank, run_guarded
from launch.checks.extensions import find_free_port, load_collectives, unlink_buffers
from launch.checks.flags import LANGUAGE
from launch.cluster import watchdog
from launch.data import answering, image_text, images
from launch.data.sources import load_data
from launch.demo import defaults as demo
from launch.training import card, modeling, report, trainers


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Runs the launcher in this process.

    Args:
        argv: arguments without the program's name; None: those of the command line.

    Returns:
        The closing summary; None if the run was told to stop (SIGTERM), and has saved a checkpoint instead.

    Raises:
        UserError: something that the caller can put right; raised before a model is loaded where that is possible.
    """
    adopt_rank()
    quieten()
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, demo.DEFAULTS)
    optimizer = checks.preflight(arguments)
    answers = answering.wants_answers(arguments.scoring, arguments.run.task)
    config = modeling.adapter_config(arguments.adapter, arguments.run.task)
    if arguments.demo:
        arguments.run.model_name_or_path = str(demo.base_model())
    processor = load_processor(arguments)
    train, evaluation, model_options = load_data(arguments, processor)
    modeling.check_model(arguments, config, model_options)

    watch, lock = start(arguments, config)
    set_seed(arguments.training.seed)
    model = modeling.load_model(arguments, config, model_options, processor)
    stopping = Stopping(arguments.run.stop_after_nan_steps)
    status = saving.StatusFile(arguments.run.status_file)
    callbacks: list[TrainerCallback] = [trainers.OptimizerGuard(optimizer), stopping, status]
    if arguments.demo:
        callbacks.append(demo.ExactMatch(processor))
    trainer = trainers.build_trainer(arguments, model, processor, train, evaluation, callbacks)
    if trainer.is_world_process_zero():
        report.print_truncation(trainer.truncation)
    if answers:
        trainer.add_callback(answering.AnswerScores(trainer, evaluation, arguments.scoring))
    if "tensorboard" in arguments.training.report_to:
        trainer.add_callback(MoELoRACallback(trainer))
    summary = run(trainer, arguments, optimizer, callbacks)
    status.write(trainer.state, f"{'preempted' if stopping.preempted else 'finished'} {trainer.state.global_step}")
    lock.release()
    if dist.is_initialized():
        dist.barrier()
        if watch is not None:
            watch.stop()
        # Left to the interpreter's end, a rank that is late finds its peers' sockets gone, and aborts.
        dist.barrier()
        dist.destroy_process_group()
    return summary


def load_processor(arguments: Arguments) -> PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin:
    """The tokenizer, what prepares pictures, or both."""
    if arguments.run.task == "image-text-to-text":
        return image_text.load_processor(arguments)
    if arguments.run.task == "image-classification":
        return images.load_image_processor(arguments)
    return modeling.load_tokenizer(arguments)


def quieten() -> None:
    """One rank shows progress bars; deprecations inside the libraries are not the reader's to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch\.distributed)\.")
    if process_rank()[0] > 0:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def start(arguments: Arguments, config: Any) -> tuple[watchdog.Watchdog | None, OutputLock]:
    """Opens torch.distributed, completes the training arguments, and settles which checkpoint the run goes on from.

    Args:
        config: the run's `MoELoRAConfig`.

    Raises:
        UserError: on every rank; the output folder is in use, or the checkpoint is damaged or of another run.
    """
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
    watch = watchdog.start(arguments.run.lost_rank_seconds)
    try:
        arguments.training.start()
    except ValueError as error:
        raise UserError(str(error)) from error
    lock = prepare_output_dir(arguments)
    resume.choose_checkpoint(arguments)
    resume.check_settings(arguments, config)
    return watch, lock


def prepare_output_dir(arguments: Arguments) -> OutputLock:
    """Takes the folder, and removes half-saved checkpoints, and with --overwrite_output_dir all of them."""
    training = arguments.training
    output_dir = Path(training.output_dir)
    lock, refusal = OutputLock(output_dir), None
    if training.process_index == 0:
        try:
            lock.take()
        except (UserError, OSError) as error:
            refusal = str(error)
    refusal = everyone(refusal)[0]
    if refusal is not None:
        raise UserError(refusal)
    if training.process_index == 0:
        resume.clear_partial(output_dir)
        if arguments.run.overwrite_output_dir:
            # A later --resume_from_checkpoint true would take the old run's checkpoints for this one's.
            for path in resume.checkpoints(output_dir):
                shutil.rmtree(path)
    if str(getattr(training.save_strategy, "value", training.save_strategy)) != "no":
        saving.check_shared(output_dir)
    return lock


def run(
    trainer: Trainer, arguments: Arguments, optimizer: str, callbacks: list[TrainerCallback]
) -> dict[str, Any] | None:
    """Trains, evaluates, saves and reports; None if training was told to stop before its end."""
    training, stopping = arguments.training, trainer.stopping
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if stopping.preempted:
        if trainer.is_world_process_zero():
            print(
                f"Stopped by a signal after step {trainer.state.global_step}; the newest complete checkpoint is "
                f"{resume.newest_complete(training.output_dir)}. Go on with --resume_from_checkpoint auto.",
                flush=True,
            )
        return None
    trainer.save_model(training.output_dir)  # before anything that may fail
    if trainer.is_world_process_zero():
        print(f"The adapter is saved in {training.output_dir}.", flush=True)
    eval_metrics = trainer.evaluate() if trainer.eval_dataset is not None else {}
    extra = closing_entries(trainer, arguments, callbacks)
    summary = afterwards("the summary", lambda: report.summarize(trainer, optimizer, eval_metrics, extra))
    if trainer.is_world_process_zero():
        record = card.training_record
        model = trainer.accelerator.unwrap_model(trainer.model)
        afterwards(
            "the run in the model card",
            lambda: record_training(model, record(arguments, trainer, optimizer, eval_metrics)),
        )
        afterwards("the model card", lambda: model.create_or_update_model_card(training.output_dir))
        path = afterwards("train_summary.json", lambda: report.write_summary(summary, training.output_dir))
        for callback in callbacks:
            if isinstance(callback, demo.ExactMatch):
                afterwards("the table of answers", callback.print_table)
        afterwards("the summary's table", lambda: report.print_summary(summary, path))
    return summary


def closing_entries(trainer: Trainer, arguments: Arguments, callbacks: list[TrainerCallback]) -> dict[str, Any]:
    """The summary's entries on what was cut, on classes, and on the demo's answers."""
    extra: dict[str, Any] = {"truncation": {name: count.as_dict() for name, count in trainer.truncation.items()}}
    if arguments.run.task not in LANGUAGE:
        extra["regression"] = arguments.run.regression
        classes = [] if arguments.run.regression else sorted(trainer.model.config.id2label.items())
        extra["classes"] = [name for _, name in classes]
    for callback in callbacks:
        if isinstance(callback, demo.ExactMatch):
            extra["exact_match"] = callback.accuracy
    return extra


def afterwards(what: str, act: Callable[[], Any]) -> Any:
    """Does what comes after the adapter is saved; what fails is one line, and fails no run that is done."""
    try:
        return act()
    except Exception as error:  # whatever it is: the work is saved
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.stderr.write(f"The run is done and its adapter is saved; {what} is missing ({reason}).\n")
        return None


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
