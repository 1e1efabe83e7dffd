"""Reading data files and telling their layout.

`load_rows` gives a `datasets.Dataset`; `launch.formats` brings its rows into the shape that a task's trainer expects.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict

from launch.errors import UserError
from launch.flags import RunArguments

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NULL_FIRST = re.compile(rb"(\xef\xbb\xbf)?\s*\[?\s*null\b")
HEAD_BYTES = 1 << 16
EVAL_SPLITS = ("validation", "test", "dev", "train")


def load_rows(
    name: str,
    flag: str,
    split: str | None,
    config: str | None = None,
    limit: int | None = None,
    pictures: bool = False,
) -> Dataset:
    """Rows of a local file, a local folder or a dataset on the hub.

    Args:
        name: path or hub id.
        flag: the flag that said so, for messages.
        split: split to take; None: the first of validation, test, dev, train that there is.
        config: configuration of a hub dataset.
        limit: take the first `limit` rows only.
        pictures: a folder with pictures in it is read as such: one folder per class, or a metadata file.

    Raises:
        UserError: nothing there, unreadable, no such split, or no rows.
    """
    found = _load(name, flag, config, pictures)
    if split is None:
        split = next((s for s in EVAL_SPLITS if s in found), None)
    if split not in found:
        raise UserError(f"{flag} {name} has no split {split!r}; it has: {', '.join(map(str, found))}.")
    rows = found[split]
    if len(rows) == 0:
        raise UserError(f"{flag} {name}: split {split!r} is empty.")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _load(name: str, flag: str, config: str | None, pictures: bool) -> DatasetDict:
    """Every split of a dataset, wherever it is."""
    path = Path(name).expanduser()
    # Not path.is_file(), which raises for a name that is too long for a path.
    if os.path.isfile(path):
        return _load_files({"train": [path]}, flag, name)
    if os.path.isdir(path):
        return _load_folder(path, flag, pictures)
    if path.suffix in BUILDERS or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"{flag} {name}: there is no such file or folder (working directory: {Path.cwd()}).")
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:  # the hub client's exceptions have no common base narrower than this
        raise UserError(
            f"{flag} {name} is no local file or folder, and could not be loaded from the hub: "
            f"{type(error).__name__}: {_first_line(error)}"
        ) from error


def _load_folder(folder: Path, flag: str, pictures: bool) -> DatasetDict:
    """Data files of a folder; a file belongs to the split in its name (`boolq.test.jsonl`), else to train."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in BUILDERS and p.is_file())
    if pictures and any(p.suffix.lower() in PICTURES for p in folder.rglob("*")):
        try:
            return datasets.load_dataset("imagefolder", data_dir=str(folder.absolute()))
        except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
            raise UserError(f"{flag} {folder} holds no pictures that can be read: {_first_line(error)}") from error
    if not files:
        raise UserError(f"{flag} {folder}: the folder has no {', '.join(BUILDERS)} file.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        words = file.stem.replace("-", ".").replace("_", ".").split(".")
        split = next((s for s in EVAL_SPLITS if s in words), "train")
        splits.setdefault(split, []).append(file)
    return _load_files(splits, flag, str(folder))


def _load_files(splits: dict[str, list[Path]], flag: str, name: str) -> DatasetDict:
    files = [file for group in splits.values() for file in group]
    kinds = {BUILDERS.get(file.suffix) for file in files}
    if None in kinds:
        unknown = next(file for file in files if file.suffix not in BUILDERS)
        raise UserError(f"{flag} {unknown}: {unknown.suffix or 'no suffix'} is not read; use {', '.join(BUILDERS)}.")
    if len(kinds) > 1:
        raise UserError(f"{flag} {name} mixes kinds of files ({', '.join(sorted(map(str, kinds)))}); keep one kind.")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{flag} {file} is empty.")
        if BUILDERS[file.suffix] == "json":
            _refuse_null_rows(file, flag)
    try:
        return datasets.load_dataset(
            kinds.pop(), data_files={s: [str(f.absolute()) for f in group] for s, group in splits.items()}
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise UserError(f"{flag} {name} could not be read: {_first_line(error.__cause__ or error)}") from error


def _refuse_null_rows(file: Path, flag: str) -> None:
    """pyarrow 26 crashes (SIGSEGV, so that nothing could be said) where the first row that it is given is null."""
    with file.open("rb") as lines:
        if NULL_FIRST.match(lines.read(HEAD_BYTES)):
            raise UserError(f"{flag} {file}: its first row is null; remove it.")
        lines.seek(0)
        for number, line in enumerate(lines, 1) if file.suffix == ".jsonl" else ():
            if line.strip() == b"null":
                raise UserError(f"{flag} {file}: line {number} is null; remove it.")


def load_splits(run: RunArguments, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training rows, and the evaluation rows if there are any."""
    pictures = run.task == "image-classification"
    train = load_rows(
        run.dataset_name, "--dataset_name", run.dataset_split, run.dataset_config, run.max_train_samples, pictures
    )
    if run.eval_dataset_name is not None:
        evaluation = load_rows(
            run.eval_dataset_name,
            "--eval_dataset_name",
            run.eval_dataset_split,
            run.dataset_config if run.eval_dataset_name == run.dataset_name else None,
            run.max_eval_samples,
            pictures,
        )
        return train, evaluation
    if not run.eval_fraction:
        return train, None
    count = round(len(train) * run.eval_fraction)
    if not 1 <= count < len(train):
        raise UserError(f"--eval_fraction {run.eval_fraction} of {len(train)} rows leaves one of the two sets empty.")
    parts = train.train_test_split(test_size=count, seed=seed)
    evaluation = parts["test"]
    if run.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(run.max_eval_samples, count)))
    return parts["train"], evaluation


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
