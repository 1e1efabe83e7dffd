"""Command line and recipe file of the launcher.

Flags are the fields of four dataclasses in `launch.checks.flags`: `RunArguments` (what to train on what),
`AdapterArguments` (the mixture), `ScoringArguments` (evaluation) and the training arguments of the task, which are
TRL's `SFTConfig` (causal-lm) or transformers' `TrainingArguments` (classification). `--config recipe.yaml` sets any of
them by name; the command line wins.
"""

from __future__ import annotations

import difflib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ds_moelora.optimizer.defaults import default_learning_rate
from ds_moelora.redaction import redact_words, remember
from launch.checks.errors import UsageError, UserError
from launch.checks.flags import (
    OTHER_FLAGS,
    SCORING_FLAGS,
    TASKS,
    TRAINING_CLASSES,
    AdapterArguments,
    CausalConfig,
    ClassificationConfig,
    ImageConfig,
    RunArguments,
    ScoringArguments,
)

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, or of ds_moelora/_launcher
MOST_USED = (
    *("output_dir", "deepspeed", "learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "eval_strategy", "eval_steps"),
    *("logging_steps", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to", "seed"),
)


@dataclass
class Arguments:
    """Everything the command line and the recipe said. `training` is not started yet.

    Args:
        demo: no model and no dataset was named: the embedded default runs.
    """

    run: RunArguments
    adapter: AdapterArguments
    scoring: ScoringArguments
    training: CausalConfig | ClassificationConfig | ImageConfig
    demo: bool


class _Parser(TrlParser):
    """TrlParser whose complaints are exceptions, so that they take the same way out as every other error.

    A flag that is true, false or, by default, neither may stand alone like every other flag of its kind: `--bf16`. In
    `--help` the trainers' most used flags have a group of their own, before scoring and the rest.
    """

    def __init__(self, classes: tuple[type, ...], **kwargs: Any) -> None:
        super().__init__(classes, **kwargs)
        for action in self._actions:
            if getattr(action.type, "__name__", None) == "string_to_bool" and action.nargs is None:
                action.nargs, action.const = "?", True
        titles = [group.title for group in self._action_groups]
        if OTHER_FLAGS in titles:
            rest = self._action_groups[titles.index(OTHER_FLAGS)]
            first = self.add_argument_group("training, most used")
            self._action_groups.insert(titles.index(SCORING_FLAGS), self._action_groups.pop())
            for action in [action for action in rest._group_actions if action.dest in MOST_USED]:
                rest._group_actions.remove(action)
                first._group_actions.append(action)

    def error(self, message: str) -> None:
        raise UsageError(message)


def parse_arguments(argv: Sequence[str], demo_defaults: dict[str, Any]) -> Arguments:
    """Reads the command line of `launch/train.py` and the recipe that it names; `demo_defaults` are the demo's."""
    recipe, words = _read_recipe(argv)
    chosen = {name: _peek(words, recipe, name) for name in ("task", "model_name_or_path", "dataset_name")}
    task = chosen["task"] or "causal-lm"
    if task not in TASKS:
        raise UsageError(f"--task {task} is unknown; choose one of: {', '.join(TASKS)}.")
    demo = _wants_demo(task, chosen)
    classes = (RunArguments, AdapterArguments, ScoringArguments, TRAINING_CLASSES[task])
    asks = bool({"-h", "--help"} & {*words})
    defaults = demo_defaults if demo else {}
    if asks:  # about runs, not about the demo
        defaults = {"learning_rate": _rate_at_hand(words, recipe)}
    arguments = Arguments(*_parse(classes, words, recipe, "launch/train.py", defaults), demo=demo)
    arguments.training.deepspeed = shipped(arguments.training.deepspeed, ".json")
    return arguments


def shipped(name: Any, suffix: str) -> Any:
    """A file as named; where there is none, the one that comes with the launcher: "configs/zero2.json", or "zero2"."""
    if not isinstance(name, str) or os.path.exists(name):
        return name
    for place in (ROOT / name, ROOT / "configs" / f"{name}{suffix}", ROOT / "configs" / "recipes" / f"{name}{suffix}"):
        if len(name) < 200 and place.is_file():
            return str(place)
    return name


def read_flags(
    classes: tuple[type, ...],
    argv: Sequence[str],
    program: str,
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> tuple[Any, ...]:
    """The command line of another program of this folder as one instance of each class, whose fields are its flags.

    Args:
        translate: what a recipe for training means here.
    """
    recipe, words = _read_recipe(argv)
    return _parse(classes, words, translate(recipe), program, {})


def _parse(
    classes: tuple[type, ...], words: list[str], recipe: dict[str, Any], program: str, defaults: dict[str, Any]
) -> tuple[Any, ...]:
    parser = _Parser(
        classes, prog=program, allow_abbrev=False, usage=f"{program} [flags]; --config recipe.yaml sets any"
    )
    spelled = {option.lstrip("-").replace("-", "_") for action in parser._actions for option in action.option_strings}
    known = spelled - {"h", "help"} | {"config"}
    _refuse_unknown(recipe, known, "recipe key")
    if defaults:
        parser.set_defaults_with_config(**defaults)
    try:
        # The recipe first: of two values the command line's, the later one, wins.
        given = [*_as_words(recipe, parser), *words]
        *parsed, rest = parser.parse_args_into_dataclasses(args=given, return_remaining_strings=True)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    _refuse_unknown([word.split("=")[0].lstrip("-") for word in rest], known, "argument")
    return tuple(parsed)


def non_defaults(arguments: object) -> dict[str, Any]:
    """Fields of a dataclass that differ from their defaults."""
    changed = {}
    for item in fields(arguments):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if getattr(arguments, item.name) != default:
            changed[item.name] = getattr(arguments, item.name)
    return changed


def _wants_demo(task: str, chosen: dict[str, str | None]) -> bool:
    """True for the embedded default; a model without data, or data without a model, is an error."""
    model, data = chosen["model_name_or_path"], chosen["dataset_name"]
    if model and not data:
        raise UsageError(f"--model_name_or_path {model} needs --dataset_name: a file, a folder or a hub id.")
    if data and not model:
        raise UsageError(f"--dataset_name {data} needs --model_name_or_path: a folder or a hub id.")
    if not model and task != "causal-lm":
        raise UsageError(f"--task {task} needs --model_name_or_path and --dataset_name; the demo is a causal-lm.")
    return not model


def _rate_at_hand(words: Sequence[str], recipe: dict[str, Any]) -> float | None:
    """The learning rate that a run with this DeepSpeed config has by default; None: no config that tells."""
    path = Path(shipped(_peek(words, recipe, "deepspeed") or "", ".json"))
    try:
        block = json.loads(path.read_text())["optimizer"]
        rate = block.get("params", {}).get("lr")
        return rate if isinstance(rate, float) else default_learning_rate(block["type"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _peek(argv: Sequence[str], recipe: dict[str, Any], name: str) -> str | None:
    """Value of one flag before the real parser exists, which depends on it."""
    for position, word in reversed(list(enumerate(argv))):
        for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
            if word == spelling and position + 1 < len(argv):
                return argv[position + 1]
            if word.startswith(spelling + "="):
                return word.split("=", 1)[1]
    return None if recipe.get(name) is None else str(recipe[name])


def _read_recipe(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The mapping in the file that `--config` names, empty without one, and the other words."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return {}, words
    position = words.index("--config")
    if position + 1 == len(words):
        raise UsageError("--config needs the path of a YAML file.")
    path = Path(shipped(words[position + 1], ".yaml"))
    if not os.path.isfile(path):  # not path.is_file(), which raises for a name that is too long for a path
        raise UserError(f"--config {path}: there is no such file (working directory: {Path.cwd()}).")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not text, or no such day as 2001-02-30
        raise UserError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError(f"--config {path} holds {type(recipe).__name__}; write one `flag: value` per line.")
    try:
        remember(recipe)
    except RecursionError:
        raise UserError(
            f"--config {path} is nested too deeply, or contains itself: an anchor (&name) stands in its own value."
        ) from None
    return recipe, [*words[:position], *words[position + 2 :]]


def _as_words(recipe: dict[str, Any], parser: _Parser) -> list[str]:
    """A recipe as the command line would say it, so that both are read, and refused, in the same way."""
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*")}
    words = []
    for name, value in recipe.items():
        if value is None:
            continue
        if not isinstance(value, list):
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict | bool) else value}")
        elif name.replace("-", "_") in lists:
            words += [f"--{name}", *map(str, value)]
        else:
            raise UsageError(f"recipe key {name!r} is a list, {value!r}, but takes one value.")
    return words


def _refuse_unknown(names: Iterable[Any], known: set[str], what: str) -> None:
    """Raises for the first name that no flag has, with the flags that look like it."""
    for name in map(str, names):
        if name.replace("-", "_") in known:
            continue
        near = difflib.get_close_matches(name.replace("-", "_"), known, n=3)
        hint = f" Did you mean {' or '.join('--' + n for n in near)}?" if near else " See --help for all of them."
        raise UsageError(f"unknown {what} {name!r}.{hint}")


def command_line() -> str:
    """The command as typed, for the summary, without secrets."""
    return redact_words(sys.argv)
