"""Throughput, bytes, memory and work per rank over the number of ranks: `python -m benchmarks.bench_scaling [--short]`.

Starts `deepspeed --num_gpus N benchmarks/scaling_worker.py` for every N of `--worlds`; with `--hostfile` on all hosts
in it (N processes on each), as `deepspeed --hostfile` would. A Llama of 4 M parameters (random weights) is trained with
a mixture (E = 8, k = 2, r = 4) and GateRiemannianAdamW, beside the same mixture with torch's AdamW, and PEFT's LoRA of
rank E r with AdamW, in the same processes and in turns; per ZeRO stage and ep_size.

    weak      every rank has `--tokens`, however many ranks there are
    strong    all ranks together have 4 times `--tokens`

Columns, per step:

    tokens_per_second   of all ranks, by the slowest rank's wall time
    efficiency          tokens_per_second per rank over that of the smallest world: 1 is linear scaling
    work_efficiency     CPU time per token, the smallest world's over this one's: 1 if ranks add no work
    cpu_ms              CPU time of a rank (mean)
    sent_bytes          that a rank sends, counted at the collectives (mean); `collectives`: their number
    memory_mb           tensors that exist between steps, and the most that a step allocates besides (largest rank)

`ratio` is that of the CPU time to `lora`'s. With fewer cores than ranks, wall time says how cores are shared and
nothing else; bytes, collectives, memory and work per rank do not depend on that. Writes benchmarks/results/scaling.csv,
TensorBoard scalars over the number of ranks (`--logdir`), and docs/images/scaling.png.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.cluster.processes import find_free_port

from .harness import ROOT, Results, Row, arguments, read_rows
from .scaling_plot import IMAGE, draw, write_scalars

CASE = ("mode", "stage", "ep_size", "world", "tokens")
EXTRAS = ("tokens_per_second", "efficiency", "work_efficiency", "cpu_ms", "sent_bytes", "collectives", "memory_mb")
SETTINGS = [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2)]
SHORT = [(2, 1), (2, 2)]


def cases(world: int, hosts: int, short: bool, tokens: int) -> list[dict[str, Any]]:
    """What a launch measures; `tokens` of a case are per rank."""
    ranks = world * hosts
    modes = [("weak", tokens)] if short else [("weak", tokens), ("strong", 4 * tokens // ranks)]
    return [
        {"mode": mode, "stage": stage, "ep_size": ep_size, "world": ranks, "tokens": per_rank}
        for mode, per_rank in modes
        for stage, ep_size in (SHORT if short else SETTINGS)
        if ranks % ep_size == 0
    ]


def launch(world: int, hostfile: Path | None, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs the worker on `world` processes per host and returns what rank 0 wrote.

    Raises:
        RuntimeError: it failed; the message ends with its output.
    """
    bin_folder = Path(sys.executable).parent
    # On several hosts the files must lie where all of them see them.
    with tempfile.TemporaryDirectory(dir=ROOT.parent if hostfile else None) as folder:
        paths = [Path(folder, name) for name in ("cases.json", "results.json")]
        paths[0].write_text(json.dumps(plan))
        command = [str(bin_folder / "deepspeed"), "--master_port", str(find_free_port()), "--num_gpus", str(world)]
        command += ["--hostfile", str(hostfile)] if hostfile else []
        command += [str(ROOT / "scaling_worker.py"), *map(str, paths)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
        environment["PATH"] = f"{bin_folder}{os.pathsep}{environment['PATH']}"
        run = subprocess.run(command, cwd=ROOT.parent, env=environment, capture_output=True, text=True, check=False)
        if run.returncode or not paths[1].exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-4000:]}")
        return json.loads(paths[1].read_text())


def num_hosts(hostfile: Path | None) -> int:
    if hostfile is None:
        return 1
    lines = (line.split("#")[0].strip() for line in hostfile.read_text().splitlines())
    return sum(1 for line in lines if line)


def extras_of(found: dict[str, Any], case: dict[str, Any], name: str, rows: list[Row]) -> dict[str, str]:
    """The extra columns of contender `name`; `rows` hold the smaller worlds (the smallest at ep_size 1, if it has one
    rank), by which efficiencies are measured."""
    wall, cpu = statistics.median(found["wall"]), statistics.median(found["cpu"])
    extras = {
        "tokens_per_second": f"{case['tokens'] / wall * case['world']:.1f}",
        "cpu_ms": f"{cpu * 1e3:.2f}",
        "sent_bytes": f"{found['sent']:.0f}",
        "collectives": f"{found['collectives']:.0f}",
        "memory_mb": f"{found['memory'] / 1e6:.2f}",
    }
    same = {"mode": case["mode"], "stage": str(case["stage"]), "contender": name}
    mine = {**extras, "world": str(case["world"]), "tokens": str(case["tokens"])}
    candidates = [row for row in rows if all(row[column] == value for column, value in same.items())]
    smallest = min([*candidates, mine], key=lambda row: int(row["world"]))

    def per_rank(row: dict[str, str]) -> float:
        return float(row["tokens_per_second"]) / int(row["world"])

    def per_second_of_work(row: dict[str, str]) -> float:
        return int(row["tokens"]) / float(row["cpu_ms"])

    extras["efficiency"] = f"{per_rank(mine) / per_rank(smallest):.3f}"
    extras["work_efficiency"] = f"{per_second_of_work(mine) / per_second_of_work(smallest):.3f}"
    return extras


def main() -> None:
    parser = arguments(__doc__, "scaling")
    parser.add_argument("--worlds", type=int, nargs="+", help="processes (per host); 1 2 4, with --short 1 2")
    parser.add_argument("--hostfile", type=Path, help="DeepSpeed's list of hosts, one `name slots=N` per line")
    parser.add_argument("--tokens", type=int, default=256, help="per rank and step, a multiple of 64 times the worlds")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--logdir", type=Path, default=Path("outputs/scaling"), help="for TensorBoard (%(default)s)")
    args = parser.parse_args()
    hosts, worlds = num_hosts(args.hostfile), sorted(args.worlds or ([1, 2] if args.short else [1, 2, 4]))
    results = Results(args.output, CASE, EXTRAS, fresh=args.fresh)
    for world in worlds:
        wanted = [case for case in cases(world, hosts, args.short, args.tokens) if not results.has(case)]
        if not wanted:
            continue
        for measured in launch(world, args.hostfile, {"cases": wanted, "rounds": 3 if args.short else args.rounds}):
            case, found = measured["case"], measured["found"]
            rows = read_rows(args.output)
            extras = {name: extras_of(values, case, name, rows) for name, values in found.items()}
            results.add(case, "lora", {name: values["cpu"] for name, values in found.items()}, extras)
    rows = read_rows(args.output)
    write_scalars(rows, args.logdir)
    if not args.short:
        draw(rows, IMAGE, args.logdir)
    print(f"tensorboard --logdir {args.logdir}")


if __name__ == "__main__":
    main()
