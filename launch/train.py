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
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # Started as a script: Python put this folder first on the path; the repository's root is what is needed.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import quiet, threads  # isort: skip  # noqa: F401  (before torch and DeepSpeed are imported)

import datasets
import deepspeed
import torch.distributed as dist
import transformers
from transformers import Trainer
from transformers.trainer_utils import set_seed

import ds_moelora  # noqa: F401  (registers the optimizers and the tuner)
from ds_moelora.checkpoint.processes import everyone
from ds_moelora.monitoring import MoELoRACallback
from ds_moelora.tuner import record_training
from launch.checkpoint import resume, saving
from launch.checkpoint.lock import OutputLock
from launch.checkpoint.stopping import Stopping
from launch.checks import errors
from launch.checks.arguments import Arguments, parse_arguments
from launch.checks.errors import MASTER_PORT, UserError, adopt_rank, process_rank, run_guarded
from launch.checks.extensions import skip_inference_collectives
from launch.checks.flags import LANGUAGE
from launch.checks.preflight import preflight
from launch.cluster import watchdog
from launch.cluster.agreement import check_same_data
from launch.cluster.processes import find_free_port
from launch.data import answering
from launch.demo import defaults as demo
from launch.training import card, console, modeling, report, trainers
from launch.training.finishing import EvaluateOnce, HubUpload, final_scores, guard_curves, not_fatal
from launch.training.prepared import prepare
from launch.training.remembered import Remember


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
    optimizer = preflight(arguments)
    answers = answering.wants_answers(arguments.scoring, arguments.run.task)
    made, _ = prepare(arguments)
    processor, evaluation = made.processor, made.evaluation
    if arguments.demo:
        arguments.run.model_name_or_path = str(demo.base_model())

    watch, lock = start(arguments, made.config)
    check_same_data({"--dataset_name": made.train, "--eval_dataset_name": evaluation})
    watch.reached("the comparison of data")
    set_seed(arguments.training.seed)
    model = modeling.load_model(arguments, made.config, made.model_options, processor)
    watch.reached("the loading of the model")
    stopping = Stopping(arguments.run.stop_after_nan_steps)
    status = saving.StatusFile(arguments.run.status_file)
    hub = HubUpload(arguments.training)
    exact_match = demo.ExactMatch(processor) if arguments.demo else None
    callbacks = [status, watchdog.Progress(watch), EvaluateOnce(), *filter(None, [exact_match]), hub]
    trainer = trainers.build_trainer(arguments, model, processor, made.train, evaluation, callbacks, stopping)
    remember = Remember(trainer, arguments, optimizer)
    trainer.add_callback(remember)
    guard_curves(trainer)
    if trainer.is_world_process_zero():
        report.print_truncation(trainer.truncation)
    if answers:
        trainer.add_callback(answering.AnswerScores(trainer, evaluation, arguments.scoring))
    progress = console.Progress(trainer, arguments, remember.record)
    trainer.add_callback(MoELoRACallback(trainer, on_report=progress.take))
    trainer.add_callback(progress)  # the last one: its clock begins where the others are done
    summary = run(trainer, arguments, progress, exact_match)
    if summary is not None:
        hub.finish()
    with not_fatal("its line in --status_file", arguments.training.output_dir):
        status.write(trainer.state, f"{'preempted' if stopping.preempted else 'finished'} {trainer.state.global_step}")
    with not_fatal("the end of its lock", arguments.training.output_dir):
        lock.release()
    if dist.is_initialized():
        dist.barrier()
        watch.stop()
        # Left to the interpreter's end, a rank that is late finds its peers' sockets gone, and aborts.
        dist.barrier()
        dist.destroy_process_group()
    return summary


def quieten() -> None:
    """Bars on a terminal, of one rank; deprecation warnings inside the libraries are left out."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft|torch\.distributed)\.")
    if process_rank()[0] > 0 or not quiet.shows_bars():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def start(arguments: Arguments, config: Any) -> tuple[watchdog.Watchdog, OutputLock]:
    """Opens torch.distributed, completes the training arguments, and settles which checkpoint the run goes on from.

    Args:
        config: the run's `MoELoRAConfig`.

    Raises:
        UserError: on every rank; the output folder is in use, or the checkpoint is damaged or of another run.
    """
    if process_rank()[1] == 1:
        # Started by plain `python`: DeepSpeed would look for MPI, which need not be there, to learn that it is alone.
        # A port of its own: several such runs may be on this machine.
        port = str(find_free_port())
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in alone.items():
            os.environ.setdefault(name, value)
    if arguments.training.deepspeed or process_rank()[1] > 1:
        skip_inference_collectives()
        timeout = timedelta(seconds=arguments.training.ddp_timeout)
        watchdog.limit_groups(timeout)
        # Before transformers does: it reads the launcher's environment alone, while DeepSpeed also asks MPI.
        deepspeed.init_distributed(
            timeout=timeout,
            distributed_port=int(os.environ.get("MASTER_PORT", MASTER_PORT)),  # MPI does not set it
        )
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
    """Takes the folder; removes half-saved checkpoints, and with --overwrite_output_dir all of them."""
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
    trainer: Trainer, arguments: Arguments, progress: console.Progress, exact_match: demo.ExactMatch | None
) -> dict[str, Any] | None:
    """Trains, evaluates, saves and reports; None if training was told to stop before its end."""
    training, stopping = arguments.training, trainer.stopping
    errors.training_begins()
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
    eval_metrics = final_scores(trainer)
    if trainer.evaluation_skipped and trainer.is_world_process_zero():
        print("The evaluation was left out because of a signal; launch/evaluate.py scores the adapter.", flush=True)
    if trainer.is_world_process_zero():
        with not_fatal("the model card's part on training", training.output_dir):
            model = trainer.accelerator.unwrap_model(trainer.model)
            record_training(model, card.training_record(arguments, trainer, progress.record, eval_metrics))
            model.create_or_update_model_card(training.output_dir)
    with not_fatal("its summary", training.output_dir):
        return report_run(trainer, arguments, progress, exact_match, eval_metrics)
    return {}


def report_run(
    trainer: Trainer,
    arguments: Arguments,
    progress: console.Progress,
    exact_match: demo.ExactMatch | None,
    eval_metrics: dict[str, float],
) -> dict[str, Any]:
    """The closing summary, written and printed by rank 0."""
    extra: dict[str, Any] = {"truncation": {name: asdict(count) for name, count in trainer.truncation.items()}}
    if arguments.run.task not in LANGUAGE:
        extra["regression"] = arguments.run.regression
        classes = [] if arguments.run.regression else sorted(trainer.model.config.id2label.items())
        extra["classes"] = [name for _, name in classes]
    extra["trained_with"] = progress.record
    if exact_match is not None:
        extra["exact_match"] = exact_match.accuracy
    session = progress.steps, progress.tokens(), progress.seconds
    summary = report.summarize(trainer, progress.record["optimizer"], eval_metrics, session, extra)
    if trainer.is_world_process_zero():
        path = report.write_summary(summary, arguments.training.output_dir)
        with not_fatal("its loss curve", arguments.training.output_dir):
            report.draw_curve(trainer.state.log_history, path.with_name(report.CURVE_NAME))
        if exact_match is not None:
            exact_match.print_table()
        report.print_summary(summary, path)
    return summary


if __name__ == "__main__":
    run_guarded(main, debug="--show_traceback" in sys.argv or bool(os.environ.get("DS_MOELORA_TRACEBACK")))
