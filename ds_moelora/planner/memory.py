"""Bytes on one GPU, item by item; docs/scaling.md has the formulas, and what they assume of DeepSpeed 0.19.8."""

from __future__ import annotations

from typing import NamedTuple

from .model import ModelShape
from .traffic import STAGE0_BUCKET, received_rows, reduce_bucket, step_share
from .workload import OPTIMIZER_STATES, Choice, Workload

# Elements; configs/zero3.json, and DeepSpeed's default for the second.
MAX_LIVE_PARAMETERS = 1e9
SUB_GROUP = 1e9
# Matrices of r x r that the step makes of every Gram matrix here (docs/optimizer.md, what it costs).
GRAM_COPIES = 8
# Copies of one layer's experts that a backward pass makes: two flattened factors, dA and dB, the same contiguous;
# with gathered experts one more, the buffer of the gather or of the reduce-scatter.
EXPERT_COPIES, GATHERED_COPIES = 3, 4


class Item(NamedTuple):
    """`phase`: "always", or "backward" or "step", which never meet."""

    name: str
    phase: str
    bytes: float


class Memory(NamedTuple):
    """What lies on one GPU."""

    items: tuple[Item, ...]

    def of(self, phase: str) -> float:
        return sum(item.bytes for item in self.items if item.phase == phase)

    def item(self, name: str) -> float:
        """Bytes of one item; 0 if it does not occur."""
        return sum(item.bytes for item in self.items if item.name == name)

    @property
    def total(self) -> float:
        """always + max(backward, step)."""
        return self.of("always") + max(self.of("backward"), self.of("step"))


class Trainable(NamedTuple):
    """Elements of trainable parameters."""

    experts: float  # P_e = E r sum(I + O)
    routers: float  # P_r = E sum(I)
    local: float  # on one GPU before ZeRO: P_e / ep_size + P_r
    owned: float  # whose optimizer state lies on one GPU


def trainable(model: ModelShape, work: Workload, choice: Choice) -> Trainable:
    """P_e, P_r and a GPU's share of them."""
    experts = float(work.num_experts * work.rank * model.adapted_width)
    routers = float(work.num_experts * model.adapted_in)
    local = experts / choice.ep_size + routers
    return Trainable(experts, routers, local, local if choice.stage == 0 else (experts + routers) / work.gpus)


def memory_per_gpu(model: ModelShape, work: Workload, choice: Choice) -> Memory:
    """All items of one GPU under `choice`."""
    items = [*_weights(model, work, choice), *_training(model, work, choice), *_activations(model, work, choice)]
    return Memory(tuple(item for item in items if item.bytes > 0))


def _weights(model: ModelShape, work: Workload, choice: Choice) -> list[Item]:
    base, count = model.base_parameters * work.base_size, trainable(model, work, choice)
    if choice.stage < 3:
        return [Item("base weights", "always", base), Item("experts and routers", "always", count.local * work.size)]
    every = model.base_parameters + count.experts + count.routers
    live = min(every, MAX_LIVE_PARAMETERS + model.largest_parameter)
    return [
        Item("base weights", "always", base / work.gpus),
        Item("experts and routers", "always", count.owned * work.size),
        Item("gathered weights", "backward", live * work.size),
    ]


def _training(model: ModelShape, work: Workload, choice: Choice) -> list[Item]:
    count, b, stage = trainable(model, work, choice), work.size, choice.stage
    if stage == 1:  # without overlap_comm (configs/zero1.json) it reduces when the backward pass has ended
        gradients = [Item("gradients", "backward", b * count.local), Item("reduced gradients", "step", b * count.owned)]
    else:
        gradients = [Item("gradients", "always", b * (count.local if stage == 0 else count.owned))]
    # Without ZeRO, fp32 parameters are their own master copy and their gradients the optimizer's.
    copied = 0 if stage == 0 and work.dtype == "fp32" else 4 * count.owned
    items = [
        *gradients,
        Item("fp32 master copy", "always", copied),
        Item("optimizer states", "always", 4 * OPTIMIZER_STATES[work.optimizer] * count.owned),
        Item("reduction buffers", "backward", _buffers(model, work, choice)),
        Item("fp32 gradients", "step", min(copied, 4 * SUB_GROUP) if stage == 3 else copied),
    ]
    if work.riemannian:
        # The largest factor's gradient on this GPU, and what the Cholesky factorisations need.
        factor = max(max(shape) for shape in model.adapted_shapes) * work.num_experts * work.rank / choice.ep_size
        grams = GRAM_COPIES * 4 * step_share(model, work, choice).matrices * work.rank**2
        items.append(Item("Riemannian step", "step", grams + 4 * min(factor, count.owned)))
    return items


def _buffers(model: ModelShape, work: Workload, choice: Choice) -> float:
    if work.gpus == 1:
        return 0.0
    if choice.stage == 0:
        return min(trainable(model, work, choice).local, STAGE0_BUCKET) * work.size
    return (2 if choice.stage == 2 else 1) * reduce_bucket(model) * work.size


def _activations(model: ModelShape, work: Workload, choice: Choice) -> list[Item]:
    T, b, H = work.tokens, work.size, model.hidden_size
    block = block_activations(model, work, choice)
    kept = T * H * b * model.num_blocks + block if work.checkpointing else block * model.num_blocks
    logits = T * model.vocab_size * (2 * b + 8)  # and their loss in fp32
    larger = max(logits, mixture_workspace(model, work, choice))
    return [Item("activations", "backward", kept), Item("logits or mixture, the larger", "backward", larger)]


def block_activations(model: ModelShape, work: Workload, choice: Choice) -> float:
    """Bytes that autograd keeps of one block: T (b sum(I + O) + 8 H), and of every adapted module

        dense     T E (r b + 4 + b)    p, the gates in fp32, the logits; with ep_size > 1 one byte more: chosen experts
        grouped   T (k r b + (4 + b) E)
        tokens    M (I b + (E / n) (r b + 5)) + (5 + b) T E for the M rows that arrive

    sum(I + O) over the block's linear modules: what is kept of attention and of the MLP is the inputs and outputs of
    these; 8 H: two norms keep an fp32 copy of their input each.
    """
    T, b, E, r = work.tokens, work.size, work.num_experts, work.rank
    own = T * (b * model.block_width + 8 * model.hidden_size)
    gates = (4 + b + (choice.ep_size > 1)) * T * E
    if choice.dispatch == "tokens":
        rows, local = received_rows(work, choice), E / choice.ep_size
        columns = local * r if work.expert_compute == "dense" else min(work.top_k, local) * r
        mean_in = model.adapted_in / model.num_adapted
        each = rows * (mean_in * b + columns * b + 5 * local) + gates
    else:
        columns = E * r if work.expert_compute == "dense" else work.top_k * r
        each = T * columns * b + gates
    return own + model.adapted_per_block * each


def mixture_workspace(model: ModelShape, work: Workload, choice: Choice) -> float:
    """Bytes that the backward pass of the widest mixture needs for a moment: copies of its experts, and products.

    Dense: T E r (2 b + 8), i.e. q, q scaled, and both in fp32 for the gates' gradient. Grouped: T k rows of x, dy, dx.
    """
    local = work.num_experts / (choice.ep_size if choice.dispatch == "tokens" else 1)
    copies = GATHERED_COPIES if choice.dispatch == "weights" else EXPERT_COPIES
    experts = copies * local * work.rank * model.widest * work.size
    rows = received_rows(work, choice) if choice.dispatch == "tokens" else work.tokens
    if work.expert_compute == "dense":
        return experts + rows * local * work.rank * (2 * work.size + 8)
    return experts + work.tokens * work.top_k * (2 * model.widest + 3 * work.rank) * work.size
