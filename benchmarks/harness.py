"""What every benchmark shares: interleaved timing, memory, and a CSV file that says where its figures come from.

A benchmark `bench_NAME.py` is a list of cases. For each case it builds contenders, functions that do one step and take
no arguments, and among them a peer; `measure` times them in turns, and `Results` writes one row for each contender:

    case columns | contender | peer, ratio, ratio_low, ratio_high, median_ms, repetitions | extras | environment

The figure that counts is `ratio`: the median over the rounds of (time of the contender / time of the peer in the same
round). Contenders of a round run within moments of each other, so a machine that slows down slows them down alike.
`ratio_low` and `ratio_high` are the quartiles over the rounds.

A case that the file has already is not run again, so a long run may be stopped and resumed; `--fresh` starts anew.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reports its start and stop on stderr otherwise

import torch

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
Step = Callable[[], object]
TIMES = ("peer", "ratio", "ratio_low", "ratio_high", "median_ms", "repetitions")
ENVIRONMENT = ("date", "commit", "command", "hardware", "versions")
# glibc hands large blocks back to the kernel as soon as they are free, and the next step takes a page fault for every
# 4 KiB of them. These keep the heap: no mmap, no trimming, growth in steps of 256 MiB.
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
HEAPS = ("default", "kept")


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """The options of every benchmark; `name` names its CSV file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few cases, for `make bench`")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.csv", help="the CSV file (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget the cases that the file has already")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no case after that long")
    parser.add_argument("--heap", choices=HEAPS, default="default", help="kept: glibc's mmap and trim switched off")
    return parser


def set_heap(heap: str) -> None:
    """Starts this process again under glibc's settings for `heap`, which it reads at start only; or does nothing."""
    if heap == "kept" and any(os.environ.get(name) != value for name, value in KEPT_HEAP.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEPT_HEAP})


# Time


def _clock(device: torch.device) -> Callable[[Step, int], float]:
    """A function that runs a step some times and returns seconds: CPU time of the process, or the GPU's own clock."""

    def on_cpu(step: Step, calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            step()
        return time.process_time() - start

    def on_gpu(step: Step, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            step()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3

    return on_gpu if device.type == "cuda" else on_cpu


def measure(
    contenders: Mapping[str, Step],
    rounds: int | tuple[int, int, float] = 9,
    sample_s: float = 0.02,
    device: str | torch.device = "cpu",
    run: Callable[[Step, int], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of every contender, one number per round; each round runs all of them, in rotating order.

    Args:
        contenders: name -> one step.
        rounds: after two calls of each to warm up; or (fewest, most, seconds): until that time is spent.
        sample_s: a step shorter than this is called several times per round.
        device: "cpu": CPU time of this process; "cuda": time between two CUDA events.
        run: (step, calls) -> seconds, for another clock (wall time where other processes do the work).
    """
    run = run or _clock(torch.device(device))
    calls = {}
    for name, step in contenders.items():
        run(step, 1)
        calls[name] = max(1, round(sample_s / max(run(step, 1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names, start = list(contenders), time.monotonic()
    fewest, most, seconds = (rounds, rounds, 0.0) if isinstance(rounds, int) else rounds
    for i in range(most):
        if i >= fewest and time.monotonic() - start > seconds:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            samples[name].append(run(contenders[name], calls[name]) / calls[name])
    return samples


def wall_time(step: Step, calls: int) -> float:
    """A clock for `measure`: elapsed time."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return time.perf_counter() - start


def ratio(samples: Mapping[str, Sequence[float]], name: str, peer: str) -> tuple[float, float, float]:
    """Median and quartiles (low, median, high) over the rounds of the time of `name` by that of `peer`."""
    ratios = [s / p for s, p in zip(samples[name], samples[peer], strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, median, high


# Memory


def saved_bytes(forward: Callable[[], Any], without: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `forward()`, each counted once.

    Args:
        without: tensors that exist anyway (inputs, weights); what is saved of them costs nothing.
    """
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def peak_bytes(step: Step, device: str | torch.device = "cpu") -> int:
    """The most memory that torch has allocated at once during `step()`, beyond what it had before."""
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# Where and what


def hardware(device: str | torch.device = "cpu") -> str:
    """The processor's name and what its GEMMs use, with the number of threads; or the GPU's name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set(fields.get("flags", "").split())
    units = "+".join(unit for unit in ("avx512f", "amx_bf16") if unit in flags) or platform.machine()
    name = fields.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {fields.get('cpu family', '?')} model {fields.get('model', '?')}; {units}), " + (
        f"{torch.get_num_threads()} thread(s)"
    )


def commit() -> str:
    """The commit of the working tree, with a "+" if files differ from it; "unknown" in a copy without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = [*git, "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results"]
        changed = subprocess.run(changes, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changed else "")


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """The columns `ENVIRONMENT`."""
    versions = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("peft", "deepspeed", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "command": "python " + " ".join(sys.orig_argv[1:]),
        "hardware": hardware(device),
        "versions": ", ".join(versions),
    }


# Files

Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def case_of(row: Row) -> tuple[tuple[str, str], ...]:
    """What a row is about: its columns before "contender"."""
    names = list(row)
    return tuple((name, row[name]) for name in names[: names.index("contender")])


@dataclass
class Results:
    """The CSV file of one benchmark, written case by case.

    Args:
        path: the file. Rows that it has stay, unless `fresh`.
        case_columns: names of what tells cases apart. extra_columns: names of what is recorded beside times.
        fresh: start with an empty file.
        device: what the contenders run on.
    """

    path: Path
    case_columns: Sequence[str]
    extra_columns: Sequence[str] = ()
    fresh: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.columns = [*self.case_columns, "contender", *TIMES, *self.extra_columns, *ENVIRONMENT]
        self.environment = environment(self.device)
        rows = [] if self.fresh else read_rows(self.path)
        if rows and list(rows[0]) != self.columns:
            raise ValueError(f"{self.path} has other columns than this benchmark writes; pass --fresh to replace it.")
        self.done = {case_of(row) for row in rows}
        if not rows:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writeheader()

    def has(self, case: Mapping[str, Any]) -> bool:
        """Whether the file has this case."""
        return tuple((name, str(case[name])) for name in self.case_columns) in self.done

    def add(
        self,
        case: Mapping[str, Any],
        peer: str,
        samples: Mapping[str, Sequence[float]],
        extras: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Appends a row for every contender, and prints it.

        Args:
            case: the case columns. peer: the contender that ratios refer to.
            samples: what `measure` returned. extras: contender -> extra columns.
        """
        rows = []
        for name, seconds in samples.items():
            low, middle, high = ratio(samples, name, peer)
            times = (peer, f"{middle:.4f}", f"{low:.4f}", f"{high:.4f}", f"{statistics.median(seconds) * 1e3:.4f}")
            row = {**case, "contender": name, **dict(zip(TIMES, (*times, len(seconds)), strict=True))}
            rows.append({**row, **(extras or {}).get(name, {}), **self.environment})
            print("  ".join(f"{key}={row[key]}" for key in (*self.case_columns, "contender", "ratio", "median_ms")))
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerows(rows)
        self.done.add(tuple((name, str(case[name])) for name in self.case_columns))
        sys.stdout.flush()
