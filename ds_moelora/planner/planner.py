"""All ways to run a workload, and the one to choose: the fastest that fits, or the simplest of those about as fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from .hardware import GB, Hardware
from .memory import Memory, memory_per_gpu
from .model import ModelShape
from .timing import StepTime, step_flops, step_time
from .traffic import Transfer, step_traffic
from .workload import Choice, Workload

# Times this close are equal, given what the model leaves out.
EQUALLY_FAST = 1.05
MOST_GPUS = 65536


class DoesNotFitError(ValueError):
    """No way to run the workload fits; the message has the least number of GPUs, or another remedy.

    Args:
        least_gpus: the least number of GPUs that fits; None: no number does.
    """

    def __init__(self, message: str, least_gpus: int | None) -> None:
        super().__init__(message)
        self.least_gpus = least_gpus


class Candidate(NamedTuple):
    """One way to run, with what it takes."""

    choice: Choice
    memory: Memory
    transfers: list[Transfer]
    time: StepTime
    fits: bool

    @property
    def sent(self) -> float:
        """Bytes that one GPU sends per step."""
        return sum(t.sent for t in self.transfers)


class Plan(NamedTuple):
    """`best` of `candidates`, and why."""

    model: ModelShape
    work: Workload
    hardware: Hardware
    candidates: list[Candidate]
    best: Candidate
    reasons: list[str]


def choices(work: Workload) -> Iterator[Choice]:
    """Stages 0 to 3; with 0 to 2 every `ep_size` that divides E and N, and both dispatches."""
    for stage in range(4 if work.gpus > 1 else 1):
        yield Choice(stage=stage)
        for ep_size in range(2, min(work.num_experts, work.gpus) + 1) if stage < 3 else ():
            if work.num_experts % ep_size == 0 and work.gpus % ep_size == 0:
                yield Choice(stage=stage, ep_size=ep_size, dispatch="weights")
                yield Choice(stage=stage, ep_size=ep_size, dispatch="tokens")


def evaluate(model: ModelShape, work: Workload, choice: Choice, hw: Hardware) -> Candidate:
    """Memory, traffic and time of one way."""
    memory = memory_per_gpu(model, work, choice)
    transfers = step_traffic(model, work, choice)
    fits = memory.total <= hw.usable * hw.memory
    return Candidate(choice, memory, transfers, step_time(model, work, choice, hw, transfers), fits)


def candidates(model: ModelShape, work: Workload, hw: Hardware) -> list[Candidate]:
    """All ways, the fastest first."""
    return sorted((evaluate(model, work, c, hw) for c in choices(work)), key=lambda c: c.time.total)


def make_plan(model: ModelShape, work: Workload, hw: Hardware) -> Plan:
    """Evaluates all ways and chooses.

    Among those that fit, the fastest and what is within 5% of it; of these the smallest `ep_size`, then the lowest
    stage.

    Raises:
        DoesNotFitError: none does; with the least number of GPUs, or another remedy.
    """
    ways = candidates(model, work, hw)
    fitting = [c for c in ways if c.fits]
    if not fitting:
        least = min(ways, key=lambda c: c.memory.total)
        gpus = least_gpus(model, work, hw)
        raise DoesNotFitError(_remedy(work, hw, least, gpus), gpus)
    near = [c for c in fitting if c.time.total <= EQUALLY_FAST * fitting[0].time.total]
    best = min(near, key=lambda c: (c.choice.ep_size, c.choice.stage, c.time.total))
    return Plan(model, work, hw, ways, best, _reasons(model, work, ways, best, len(near)))


def _reasons(model: ModelShape, work: Workload, ways: list[Candidate], best: Candidate, near: int) -> list[str]:
    fitting = sum(c.fits for c in ways)
    reasons = [f"Of {len(ways)} ways {fitting} fit, {near} within 5% of the fastest; of these it is the simplest."]
    plain = [c for c in ways if c.choice.ep_size == 1 and c.choice.stage < best.choice.stage and not c.fits]
    if plain:
        least = min(plain, key=lambda c: c.memory.total)
        reasons.append(
            f"A lower stage with ep_size 1 does not fit: {least.choice} takes {least.memory.total / GB:.1f} GB, "
            f"{_largest(least.memory)}."
        )
    if best.choice.ep_size > 1:
        other = [c for c in ways if c.choice.ep_size == 1 and c.fits]
        if other:
            times = f"{other[0].time.total:.3g} s, here {best.time.total:.3g} s"
            reasons.append(f"Without expert parallelism the fastest that fits is {other[0].choice}: {times}.")
        else:
            reasons.append("Without expert parallelism nothing fits.")
        reasons.append(_dispatch_reason(ways, best))
    flops = step_flops(model, work, best.choice)
    share = flops.experts / sum(flops)
    if work.expert_compute == "dense" and share > 0.2 and work.top_k < work.num_experts:
        reasons.append(
            f"Dense products over all experts are {share:.0%} of the FLOPs: expert_compute='grouped' would do "
            f"{work.top_k}/{work.num_experts} of them. How fast it is on GPUs has not been measured."
        )
    return reasons


def _dispatch_reason(ways: list[Candidate], best: Candidate) -> str:
    other_way = "tokens" if best.choice.dispatch == "weights" else "weights"
    twin = next(c for c in ways if c.choice == replace(best.choice, dispatch=other_way))
    return (
        f"Moving {best.choice.dispatch} sends {best.sent / GB:.3g} GB per GPU and step in all and takes "
        f"{best.time.total:.3g} s, moving {other_way} {twin.sent / GB:.3g} GB and {twin.time.total:.3g} s."
    )


def _largest(memory: Memory) -> str:
    item = max(memory.items, key=lambda i: i.bytes)
    return f"of which {item.name} {item.bytes / GB:.1f}"


def _remedy(work: Workload, hw: Hardware, least: Candidate, gpus: int | None) -> str:
    limit = hw.usable * hw.memory
    head = (
        f"nothing fits on {work.gpus} GPUs: {least.choice} takes least, {least.memory.total / GB:.1f} GB of "
        f"{limit / GB:.1f} GB per GPU ({_largest(least.memory)}). "
    )
    if gpus is not None:
        return head + f"Use at least {gpus} GPUs, or a smaller batch, fewer experts or a lower rank."
    remedies = [] if work.checkpointing else ["gradient checkpointing"]
    if work.expert_compute == "dense" and work.top_k < work.num_experts:
        remedies.append("expert_compute='grouped'")
    remedies += ["fewer tokens per GPU", "fewer experts", "a lower rank"]
    return head + f"More GPUs do not help; use {', '.join(remedies[:-1])} or {remedies[-1]}."


def least_gpus(model: ModelShape, work: Workload, hw: Hardware) -> int | None:
    """The fewest GPUs beyond `work.gpus`, in whole nodes, on which some way fits; None: no number does.

    Doubles until something fits and then looks at every number above the last that did not.
    """

    def fits(gpus: int) -> bool:
        larger = replace(work, gpus=gpus)
        return any(memory_per_gpu(model, larger, c).total <= hw.usable * hw.memory for c in choices(larger))

    # Fewer than a node: one by one; a started node is filled.
    inside = next((n for n in range(work.gpus + 1, work.gpus_per_node + 1) if fits(n)), None)
    if inside is not None:
        return inside
    step = work.gpus_per_node
    low = -(-work.gpus // step)
    high = 2 * low
    while not fits(high * step):
        low, high = high, 2 * high
        if high * step > MOST_GPUS:
            return None
    return next(nodes * step for nodes in range(low + 1, high + 1) if fits(nodes * step))
