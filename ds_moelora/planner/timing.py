"""Seconds of a step: FLOPs at the rate that is reached, bytes over the links, and what of both runs side by side.

FLOPs per token and module, forward + backward (+ forward again with checkpointing). The base model is frozen, so its
backward pass has the gradient of the input only:

    base linear     2 I O + 2 I O
    attention       2 s W + 4 s W                  per block; causal, s tokens per sequence, W = heads x head size
    experts         2 c (I + O) + 4 c (I + O)      with c = E r columns (dense) or k r (grouped)
    router          2 E I + 4 E I
"""

from __future__ import annotations

from typing import NamedTuple

from .hardware import Hardware
from .memory import trainable
from .model import Linear, ModelShape
from .traffic import Transfer, dispatch_traffic, received_rows
from .workload import OPTIMIZER_STATES, Choice, Workload


class Flops(NamedTuple):
    """Of one GPU in one step; `experts` are dense or grouped products, `base` is everything else."""

    base: float
    experts: float


class StepTime(NamedTuple):
    """Seconds. `total` = max(compute, overlapped) + exposed + optimizer."""

    compute: float
    overlapped: float
    exposed: float
    optimizer: float

    @property
    def total(self) -> float:
        return max(self.compute, self.overlapped) + self.exposed + self.optimizer

    @property
    def without_overlap(self) -> float:
        """If nothing ran beside anything: the upper bound."""
        return sum(self)


def expert_flops(width: float, work: Workload, choice: Choice) -> float:
    """Of mixtures whose I + O add up to `width`, in one step on one GPU, if routing is even."""
    rows: float = work.tokens
    if work.expert_compute == "grouped":
        columns = float(work.top_k * work.rank)  # T k rows here, as many as arrive from elsewhere
    elif choice.dispatch == "tokens":
        rows, columns = received_rows(work, choice), work.num_experts / choice.ep_size * work.rank
    else:
        columns = float(work.num_experts * work.rank)
    return rows * columns * width * (2 * _forwards(work) + 4)


def step_flops(model: ModelShape, work: Workload, choice: Choice) -> Flops:
    """The table at the top of this file, times the tokens of one GPU."""
    forwards = _forwards(work)
    attention = work.sequence_length * model.attention_width * model.num_blocks
    routers = work.num_experts * model.adapted_in
    per_token = (2 * forwards + 2) * model.linear_numel + (2 * forwards + 4) * (attention + routers)
    return Flops(work.tokens * per_token, expert_flops(model.adapted_width, work, choice))


def _forwards(work: Workload) -> int:
    return 2 if work.checkpointing else 1


def optimizer_seconds(model: ModelShape, work: Workload, choice: Choice, hw: Hardware) -> float:
    """Bytes that the step reads and writes: master copy, gradient and states, 4 each, both ways.

    The Riemannian step reads the weights once more for the Gram matrices, and reads and writes the gradient.
    """
    numbers = 2 * (2 + OPTIMIZER_STATES[work.optimizer]) + (3 if work.riemannian else 0)
    return 4 * numbers * trainable(model, work, choice).owned / hw.memory_bandwidth


def transfer_seconds(transfer: Transfer, hw: Hardware) -> float:
    return hw.network.seconds(transfer.collective, transfer.group, transfer.sent, transfer.calls)


def step_time(model: ModelShape, work: Workload, choice: Choice, hw: Hardware, transfers: list[Transfer]) -> StepTime:
    """The expected time of one step that sends `transfers`."""
    flops = step_flops(model, work, choice)
    rate = hw.dense if work.expert_compute == "dense" else hw.grouped
    overlapped = sum(transfer_seconds(t, hw) for t in transfers if t.overlapped)
    exposed = sum(transfer_seconds(t, hw) for t in transfers if not t.overlapped)
    compute = flops.base / hw.dense + flops.experts / rate
    return StepTime(compute, overlapped, exposed, optimizer_seconds(model, work, choice, hw))


def layer_time(in_features: int, out_features: int, work: Workload, choice: Choice, hw: Hardware) -> StepTime:
    """Forward and backward of one adapted layer, as benchmarks measure it: without reduction and optimizer."""
    layer = ModelShape(
        name="one layer",
        hidden_size=in_features,
        num_blocks=1,
        vocab_size=0,
        attention_width=0,
        base_parameters=in_features * out_features,
        largest_parameter=in_features * out_features,
        linears=(Linear("layer", in_features, out_features, True),),
    )
    time = step_time(layer, work, choice, hw, dispatch_traffic(layer, work, choice))
    return time._replace(optimizer=0.0)
