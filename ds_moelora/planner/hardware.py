"""What computes and what carries bytes: presets of published figures, or a machine that a benchmark has measured.

Published bandwidths are per GPU and direction. They are multiplied with `efficiency`, an assumption, not a measurement.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

GB = 1e9
EFFICIENCY = 0.8  # of a link's published bandwidth
UTILISATION = 0.4  # of a GPU's peak in dense products, over a whole step
GROUPED_PENALTY = 0.5  # grouped products against dense ones; no measurement on GPUs exists


class Link(NamedTuple):
    """Bytes per second that one GPU sends, and seconds until the first of them arrives."""

    bandwidth: float
    latency: float


LINKS = {
    "nvlink4": Link(450 * GB, 5e-6),  # H100, H200: 900 GB/s in both directions together
    "nvlink3": Link(300 * GB, 5e-6),  # A100
    "pcie5": Link(64 * GB, 8e-6),
    "pcie4": Link(32 * GB, 8e-6),
    "infiniband-800": Link(100 * GB, 10e-6),  # Gb/s per GPU
    "infiniband-400": Link(50 * GB, 10e-6),
    "infiniband-200": Link(25 * GB, 10e-6),
    "ethernet-100": Link(12.5 * GB, 30e-6),
}


class GPU(NamedTuple):
    """Bytes of memory, peak dense bf16 FLOP/s, bytes per second of its memory; published figures."""

    memory: float
    peak: float
    memory_bandwidth: float


GPUS = {
    "h100": GPU(80 * GB, 989e12, 3.35e12),
    "h200": GPU(141 * GB, 989e12, 4.8e12),
    "a100-80gb": GPU(80 * GB, 312e12, 2.0e12),
    "a100-40gb": GPU(40 * GB, 312e12, 1.55e12),
}


class Group(NamedTuple):
    """A process group: how many ranks, and how many of them share a node."""

    ranks: int
    per_node: int


@dataclass(frozen=True, kw_only=True)
class TwoLevelNetwork:
    """Nodes whose GPUs are joined by `intra`, and which reach other nodes by one `inter` link per GPU.

    Seconds of c calls in a group of n ranks, m of them per node, each of which sends `sent` bytes altogether:

        one node        sent / B_intra
        several nodes   sent / min(B_intra, m B_inter): the m ranks of a node share what crosses its border
        all_to_all      the slower of the share (n-m)/(n-1) over B_inter and the rest over B_intra
        and             c latency ceil(log2 n)
    """

    intra: Link
    inter: Link

    def seconds(self, collective: str, group: Group, sent: float, calls: float) -> float:
        n, m = group
        if n < 2:
            return 0.0
        rounds = calls * math.ceil(math.log2(n))
        if m == n:
            return rounds * self.intra.latency + sent / self.intra.bandwidth
        waiting = rounds * self.inter.latency
        if collective == "all_to_all":
            outside = (n - m) / (n - 1)
            return waiting + sent * max(outside / self.inter.bandwidth, (1 - outside) / self.intra.bandwidth)
        return waiting + sent / min(self.intra.bandwidth, m * self.inter.bandwidth)


@dataclass(frozen=True)
class CalibratedNetwork:
    """Measured collectives: seconds = calls latency + sent seconds_per_byte, whatever the group.

    An all_reduce is a reduce_scatter and an all_gather of half its bytes each.
    """

    collectives: Mapping[str, tuple[float, ...]]  # latency, seconds per byte

    def seconds(self, collective: str, group: Group, sent: float, calls: float) -> float:
        if group.ranks < 2:
            return 0.0
        if collective == "all_reduce":
            return sum(self.seconds(half, group, sent / 2, calls) for half in ("reduce_scatter", "all_gather"))
        latency, per_byte = self.collectives[collective]
        return calls * latency + sent * per_byte


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and its network.

    Args:
        name: for tables. memory: bytes of a GPU. usable: share of it that a plan may fill; the rest is for the CUDA
            context, NCCL and fragmentation.
        dense, grouped: FLOP/s that are reached in dense and in grouped products. memory_bandwidth: bytes per second.
    """

    name: str
    memory: float
    usable: float = 0.9
    dense: float
    grouped: float
    memory_bandwidth: float
    network: TwoLevelNetwork | CalibratedNetwork


def hardware(
    gpu: str = "h100",
    intra: str | float = "nvlink4",
    inter: str | float = "infiniband-400",
    *,
    latency: float | None = None,
    efficiency: float = EFFICIENCY,
    utilisation: float = UTILISATION,
    peak: float | None = None,
    memory: float | None = None,
    usable: float = 0.9,
) -> Hardware:
    """A machine from presets and the user's own numbers.

    Args:
        gpu: one of `GPUS`. intra, inter: one of `LINKS`, whose bandwidth is multiplied with `efficiency`; or bytes per
            second and GPU, taken as they are.
        latency: seconds, for both; None: the presets'. utilisation: share of `peak` that is reached.
        peak: FLOP/s; memory: bytes; None: the GPU's.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    if gpu not in GPUS:
        raise ValueError(f"gpu={gpu!r} is unknown; use one of {', '.join(GPUS)}.")
    for name, share in (("efficiency", efficiency), ("utilisation", utilisation), ("usable", usable)):
        if not 0 < share <= 1:
            raise ValueError(f"{name}={share} must be in (0, 1].")
    numbers = {"peak": peak, "memory": memory, "latency": latency, "intra": intra, "inter": inter}
    for name, value in numbers.items():
        if isinstance(value, int | float) and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} must be > 0.")
    spec = GPUS[gpu]
    links = [_link(name, value, efficiency, latency) for name, value in (("intra", intra), ("inter", inter))]
    flops = (spec.peak if peak is None else peak) * utilisation
    return Hardware(
        name=f"{gpu}, {_name(intra)} in a node, {_name(inter)} between nodes",
        memory=spec.memory if memory is None else memory,
        usable=usable,
        dense=flops,
        grouped=flops * GROUPED_PENALTY,
        memory_bandwidth=spec.memory_bandwidth * efficiency,
        network=TwoLevelNetwork(intra=links[0], inter=links[1]),
    )


def _name(link: str | float) -> str:
    return link if isinstance(link, str) else f"{link / GB:g} GB/s"


def _link(name: str, value: str | float, efficiency: float, latency: float | None) -> Link:
    if isinstance(value, str):
        if value not in LINKS:
            raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(LINKS)}, or a bandwidth.")
        link = LINKS[value]._replace(bandwidth=LINKS[value].bandwidth * efficiency)
    else:
        link = Link(value, LINKS["infiniband-400"].latency)
    return link if latency is None else link._replace(latency=latency)


def load_calibration(path: str | Path, base: Hardware) -> Hardware:
    """`base` with the collectives and FLOP/s that `benchmarks/bench_expert_parallel.py` measured on a machine.

    The file: {"hardware": ..., "date": ..., "collectives": {"all_gather": {"latency_s", "seconds_per_byte"},
    "reduce_scatter": {...}, "all_to_all": {...}}, "flops_per_second": {"dense", "grouped"}}; bytes are those that one
    rank sends.

    Raises:
        ValueError: no such file, or one that lacks these numbers; says which.
    """
    try:
        found = json.loads(Path(path).read_text())
        dense, grouped = (_positive(found["flops_per_second"], kind) for kind in ("dense", "grouped"))
        collectives = {
            name: tuple(_positive(found["collectives"][name], key) for key in ("latency_s", "seconds_per_byte"))
            for name in ("all_gather", "reduce_scatter", "all_to_all")
        }
    except OSError as error:
        raise ValueError(f"calibration {path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"calibration {path} is not one ({type(error).__name__}: {error}); write it anew with the benchmark."
        ) from error
    name = f"{found.get('hardware', path)}, measured {found.get('date', 'on an unknown date')}"
    return replace(base, name=name, dense=dense, grouped=grouped, network=CalibratedNetwork(collectives))


def _positive(values: Mapping[str, float], key: str) -> float:
    value = float(values[key])
    if not (math.isfinite(value) and value >= 0) or (value == 0 and key != "latency_s"):
        raise ValueError(f"{key}={value} must be > 0")
    return value
