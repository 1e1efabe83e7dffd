"""What a checkpoint records of its run's settings, and what becomes of each setting that differs on resume.

`TABLE` is the one place: adapter, base model and optimizer (`ds_moelora.checkpoint.record.TABLE`), flags, DeepSpeed's
config and data. A flag that no line names is said, so that a new one of transformers is never passed over in silence.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from ds_moelora.checkpoint.record import IGNORE, REFUSE, SAY, Difference, adapter_record, compare, plain, verdict
from ds_moelora.checkpoint.record import TABLE as RUN_TABLE
from ds_moelora.redaction import is_secret, redact
from launch.checks.arguments import Arguments
from launch.cluster.agreement import fingerprint

# Flags that cannot change what is trained.
IGNORED = (
    # places, names, reports
    *("model_name_or_path", "revision", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "deepspeed"),
    *("run_name", "report_to", "project", "trackio_*", "logging_*", "log_*", "disable_tqdm", "status_file", "verbose"),
    *("push_to_hub", "push_to_hub_*", "hub_*", "show_traceback", "include_num_input_tokens_seen"),
    # saving and evaluating
    *("save_*", "eval_*", "per_device_eval_batch_size", "per_gpu_*", "load_best_model_at_end", "batch_eval_metrics"),
    *("metric_for_best_model", "greater_is_better", "max_eval_samples", "include_for_metrics", "do_*", "prediction_*"),
    *("score", "answer_pattern", "answer_ignore", "max_new_tokens", "bf16_full_eval", "fp16_full_eval"),
    "restore_callback_states_from_checkpoint",
    # processes, devices, time-outs
    *("local_rank", "ddp_*", "lost_rank_seconds", "stop_after_nan_steps", "use_cpu"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataset_num_proc", "skip_memory_metrics", "debug", "torch_empty_cache_steps", "trust_remote_code"),
    *("full_determinism", "tf32", "torch_compile*", "parallelism_config", "fsdp*", "tpu_*", "mp_*"),
    *("gradient_checkpointing*", "activation_checkpointing*", "activation_offloading", "use_liger_kernel"),
    *("average_tokens_across_devices_*", "sagemaker_*"),
)
TABLE = (
    ("flag.task", REFUSE),
    ("flag.regression", REFUSE),
    ("flag.load_in_4bit", REFUSE),
    ("flag.eval_fraction", SAY),  # takes rows from training
    *((f"flag.{name}", IGNORE) for name in IGNORED),
    ("flag.*", SAY),
    ("deepspeed.train_batch_size", IGNORE),  # said as samples per step
    ("deepspeed.train_micro_batch_size_per_gpu", IGNORE),
    ("deepspeed.steps_per_print", IGNORE),
    ("deepspeed.wall_clock_breakdown", IGNORE),
    ("deepspeed.zero_optimization.*", IGNORE),  # how, not what; the stage is said as topology
    ("deepspeed.optimizer.type", IGNORE),  # the class is compared
    ("deepspeed.optimizer.params.*", IGNORE),  # the settings are compared
    ("deepspeed.*", SAY),
    ("data.*", SAY),
    *RUN_TABLE,
)
NOT_YET = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform")  # completed with the model


def settings(arguments: Arguments) -> dict[str, Any]:
    """Flags and DeepSpeed's config, as the command line and its files have them; nothing secret."""
    record: dict[str, Any] = {}
    for part in (arguments.run, arguments.scoring, arguments.training):
        record |= {f"flag.{field.name}": getattr(part, field.name) for field in dataclasses.fields(part)}
    path = arguments.training.deepspeed
    if isinstance(path, str | Path) and Path(path).is_file():
        record |= _flat("deepspeed", json.loads(Path(path).read_text()))
    return {
        name: plain(redact(value))
        for name, value in record.items()
        if verdict(name, TABLE) != IGNORE and not is_secret(name)
    }


def data_record(rows: Any) -> dict[str, Any]:
    """Number and content of the rows that the trainer reads; of a stream its first ones."""
    count, digest = fingerprint(rows)
    return {"data.rows": count, "data.digest": digest}


def before_loading(saved: dict[str, Any], arguments: Arguments, config: Any) -> list[Difference]:
    """What differs, as far as it is known before the model is loaded."""
    mine = {**settings(arguments), **adapter_record(config)}
    mine = {name: value for name, value in mine.items() if not name.endswith(NOT_YET)}
    return compare({name: value for name, value in saved.items() if name in mine}, mine, TABLE)


def _flat(name: str, value: Any) -> dict[str, Any]:
    """{"deepspeed.fp16.enabled": True, ...} of nested objects."""
    if not isinstance(value, dict):
        return {name: value}
    return {key: part for inner in value for key, part in _flat(f"{name}.{inner}", value[inner]).items()}
