"""The routers' auxiliary losses: each layer's during one forward pass, and their sum.

While a `Collector` is active (the tuner's hooks around the base model's forward see to that), each layer computes its
losses, two numbers, and hands these over. What their gradient needs, the router's logits and gates, is saved for the
backward pass in the layer, by the same operations whether or not anyone listens: gradient checkpointing drops it with
the rest of the layer, and brings it back by a recomputation to which nobody listens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from ..mixture import fused_losses
from ..mixture.fused_losses import Sequences
from ..mixture.routing import chosen_by, sequence_balance_loss, sequence_z_loss
from .config import MoELoRAConfig

_ACTIVE: ContextVar[Collector | None] = ContextVar("ds_moelora_collector", default=None)
_active_in_graphs: Collector | None = None  # the same; compilers do not read context variables


class AuxLosses(NamedTuple):
    """One value per auxiliary loss (a coefficient, or the loss itself).

    Args:
        balance: `mixture.routing.sequence_balance_loss`. z: `mixture.routing.sequence_z_loss`.
    """

    balance: Any
    z: Any


def coefs_of(config: MoELoRAConfig) -> AuxLosses:
    """The coefficients of an adapter."""
    return AuxLosses(float(config.router_aux_loss_coef), float(config.router_z_loss_coef))


@dataclass(eq=False)
class RouterRecord:
    """One router's losses in one forward pass.

    Args:
        adapter: the adapter's name. coefs: its `router_aux_loss_coef` and `router_z_loss_coef`; 0: not computed.
        layer: the layer's name, for messages.
        losses: 0-dim, weighted means over the sequences; 0 where the coefficient is.
        node: the autograd node of the router's logits; None without a gradient, or in a compiled graph.
        grad_enabled: whether autograd was recording.
        before: the record before it. (A compiler would guard the length of a list.)
    """

    adapter: str
    coefs: AuxLosses
    layer: str
    losses: AuxLosses
    node: Any
    grad_enabled: bool
    before: RouterRecord | None = None


class RouterListener(Protocol):
    """Who wants to see what routers and experts do in training (`MoELoRAModel.router_listener`)."""

    def saw_experts(self, experts: Any) -> None:
        """In a layer's forward pass, where its parameters are whole even under ZeRO-3; a `MoELoRAExperts`."""

    def saw_router(self, experts: Any, logits: Tensor, chosen: Tensor, mask: Tensor | None) -> None:
        """In a layer's forward pass: what `sequences_of` makes of a decision."""


@dataclass(eq=False)
class Collector:
    """The records of one forward pass of `owner`; `outer` is the collector of a forward pass around it.

    Layers whose auxiliary losses are switched off hand nothing over; nor do layers in eval mode unless they are
    `asked`.
    """

    owner: Any
    outer: Collector | None
    layout: BatchLayout
    listener: RouterListener | None = None
    asked: bool = False
    last: RouterRecord | None = None

    def records(self) -> list[RouterRecord]:
        """In the order of the layers' calls."""
        found, record = [], self.last
        while record is not None:
            found.append(record)
            record = record.before
        return found[::-1]


def active_collector() -> Collector | None:
    """The collector that this thread's forward pass reports to, or None."""
    return _active_in_graphs if torch.compiler.is_compiling() else _ACTIVE.get()


def _activate(collector: Collector | None) -> None:
    global _active_in_graphs
    _ACTIVE.set(collector)
    _active_in_graphs = collector


def start_collecting(
    owner: Any, layout: BatchLayout, listener: RouterListener | None = None, asked: bool = False
) -> None:
    """Makes a new collector for `owner` active. What an earlier, aborted pass of the same owner left is dropped."""
    stop_collecting(owner)
    _activate(Collector(owner, _ACTIVE.get(), layout, listener, asked))


def stop_collecting(owner: Any) -> list[RouterRecord]:
    """Ends the collector of `owner`, and any inside it, and returns its records ([] if there was none)."""
    collector = _ACTIVE.get()
    while collector is not None and collector.owner is not owner:
        collector = collector.outer
    if collector is None:
        return []
    _activate(collector.outer)
    return collector.records()


@dataclass(frozen=True)
class BatchLayout:
    """How the rows that a layer sees are grouped into sequences.

    Args:
        grid: (B, T) of the model's input, None if unknown.
        mask: (B, T), non-zero where a token is real; None: all are.
        weights: (B,) the weight of each sequence, adding up to 1 over all micro-batches of a step; None: 1 / B.
        packed: (D, N) indices of the tokens of each of the D sequences that are packed into one row of the batch, N the
            longest one's length, filled up with T; they are the sequences then, and B above is D. None: not packed.
    """

    grid: tuple[int, int] | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None
    packed: Tensor | None = None


def batch_layout(kwargs: Mapping[str, Any], labels_are_shifted: bool, is_encoder_decoder: bool = False) -> BatchLayout:
    """Reads the layout of a batch from the keyword arguments of a model's forward.

    With `num_items_in_batch` (passed by transformers' Trainer, which then does not divide the loss by the number of
    accumulation steps) sequence s weighs n_s / num_items_in_batch, n_s being its labels other than -100, counted as
    the Trainer counts them.

    Args:
        kwargs: input_ids, inputs_embeds, attention_mask, labels, shift_labels, num_items_in_batch, and the boundaries
            of packed sequences under transformers' names, cu_seq_lens_q and max_length_q: all optional.
        labels_are_shifted: the model's loss compares position i with label i + 1.
        is_encoder_decoder: two sequences per row. If they are equally long a layer's tokens cannot be told apart by
            their shape, and the mask, which is the encoder's, is then left unused.
    """
    grid, mask = None, None
    for name in ("attention_mask", "input_ids", "inputs_embeds"):
        value = kwargs.get(name)
        if isinstance(value, Tensor) and value.dim() == (3 if name == "inputs_embeds" else 2):
            grid = grid or (value.shape[0], value.shape[1])
            mask = value if name == "attention_mask" else mask
    if is_encoder_decoder:
        targets = [kwargs.get(name) for name in ("decoder_input_ids", "labels")]
        if any(isinstance(t, Tensor) and grid is not None and tuple(t.shape) == grid for t in targets):
            mask = None
    packed = _packed_tokens(kwargs, grid)
    return BatchLayout(grid, mask, _sequence_weights(kwargs, labels_are_shifted, packed), packed)


def _packed_tokens(kwargs: Mapping[str, Any], grid: tuple[int, int] | None) -> Tensor | None:
    """`BatchLayout.packed` from the boundaries (D + 1,) of the sequences and the longest one's length."""
    bounds, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if not isinstance(bounds, Tensor) or longest is None or grid is None or grid[0] != 1:
        return None
    index = bounds[:-1, None].long() + torch.arange(int(longest), device=bounds.device)
    return index.where(index < bounds[1:, None], torch.full_like(index, grid[1]))


def _sequence_weights(kwargs: Mapping[str, Any], labels_are_shifted: bool, packed: Tensor | None) -> Tensor | None:
    num_items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if kwargs.get("shift_labels") is not None:
        labels = kwargs["shift_labels"]
    elif labels_are_shifted and packed is None and isinstance(labels, Tensor):
        labels = labels[..., 1:]  # in a pack the label of a sequence's first token is -100 anyway
    if num_items is None or not isinstance(labels, Tensor) or labels.dim() == 0:
        return None
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(-1)[0].to(labels.device)  # DataParallel hands each replica a (1, n) copy
    trained = labels.ne(-100).reshape(labels.shape[0], -1)
    return (trained if packed is None else _unpacked(trained[0], packed)).sum(1) / num_items


def _unpacked(rows: Tensor, packed: Tensor) -> Tensor:
    """(T, ...) -> (D, N, ...): the rows of each packed sequence, zero where it has ended."""
    return torch.cat([rows, torch.zeros_like(rows[:1])])[packed]


def _sequences(
    rows: int, lead: tuple[int, ...], layout: BatchLayout, device: torch.device
) -> tuple[tuple[int, int], Tensor | None, Tensor | None]:
    """How `rows` tokens form sequences: (S, N), the mask of real tokens, and `BatchLayout.packed`, then without."""
    of_grid = layout.grid is not None and math.prod(layout.grid) == rows
    if layout.packed is not None and of_grid:
        packed = layout.packed.to(device)
        return (packed.shape[0], packed.shape[1]), None, packed
    shape = (rows, 1)
    if len(lead) >= 2:
        shape = (lead[0], math.prod(lead[1:]))
    elif of_grid:
        shape = cast("tuple[int, int]", layout.grid)
    mask = layout.mask
    if mask is not None:
        mask = mask.to(device) if tuple(mask.shape) == shape and lead in (shape, (rows,)) else None
    return shape, mask, None


def sequences_of(
    logits: Tensor, gates: Tensor, lead: tuple[int, ...], layout: BatchLayout
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A router's decision by sequence: logits (S, N, E), chosen (S, N, E), the (S, N) mask of real tokens (None: all).

    Args:
        logits, gates: (T, E). lead: the layer's input shape without its last dimension; T is its product.
    """
    (rows, num_experts), chosen = logits.shape, chosen_by(gates)
    shape, mask, packed = _sequences(rows, lead, layout, logits.device)
    if packed is not None:
        return _unpacked(logits, packed), _unpacked(chosen, packed), packed < rows
    return logits.reshape(*shape, num_experts), chosen.reshape(*shape, num_experts), mask


class _RouterLosses(torch.autograd.Function):
    """(logits, gates) -> balance and z, 0-dim, of one layer; saved for backward: the two."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, gates: Tensor, coefs: AuxLosses, lead: tuple[int, ...], layout: BatchLayout | None
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits, gates)
        ctx.settings = (coefs, lead, layout)
        if layout is None:
            return logits.new_zeros(()), logits.new_zeros(())
        return _weighted_losses(logits, gates, coefs, lead, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, gates = ctx.saved_tensors
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            losses = _weighted_losses(logits, gates, *ctx.settings)
        kept = [(loss, grad) for loss, grad in zip(losses, grads, strict=True) if loss.requires_grad]
        (found,) = torch.autograd.grad([loss for loss, _ in kept], logits, [grad for _, grad in kept])
        return found, None, None, None, None


def router_losses(
    logits: Tensor, gates: Tensor, coefs: AuxLosses, lead: tuple[int, ...], layout: BatchLayout | None
) -> AuxLosses:
    """A layer's losses: weighted sums over sequences, 0-dim; 0 where the coefficient is 0.

    A gradient keeps logits and gates alone, and computes what else it needs in the backward pass. On CUDA devices they
    are computed by `mixture.fused_losses`, in compiled graphs and elsewhere by the formula in torch.

    Args:
        logits, gates: (T, E). lead: see `sequences_of`. layout: None computes nothing, but saves the same for backward.
    """
    if torch.compiler.is_compiling():  # what is kept for the backward pass is the compiler's choice
        assert layout is not None
        return AuxLosses(*_weighted_losses(logits, gates, coefs, lead, layout))
    if fused_losses.covers(logits):
        sequences = None if layout is None else _weighted_sequences(logits, lead, layout)
        return AuxLosses(*fused_losses.fused_losses(logits, gates, sequences, *map(bool, coefs)))
    return AuxLosses(*_RouterLosses.apply(logits, gates, coefs, lead, layout))


def _weighted_sequences(logits: Tensor, lead: tuple[int, ...], layout: BatchLayout) -> Sequences:
    shape, mask, packed = _sequences(len(logits), lead, layout, logits.device)
    weights = _weights(layout, shape[0], logits.device)
    return Sequences(shape, packed, None if mask is None else mask.contiguous(), weights)


def _weights(layout: BatchLayout, sequences: int, device: torch.device) -> Tensor | None:
    """`BatchLayout.weights`, evened out where a layer's sequences are not the batch's."""
    if layout.weights is None:
        return None
    weights = layout.weights.to(device, torch.float32).contiguous()
    return weights if len(weights) == sequences else (weights.sum() / max(sequences, 1)).repeat(sequences)


def _weighted_losses(
    logits: Tensor, gates: Tensor, coefs: AuxLosses, lead: tuple[int, ...], layout: BatchLayout
) -> tuple[Tensor, Tensor]:
    logits, chosen, mask = sequences_of(logits, gates, lead, layout)
    weights = _weights(layout, len(logits), logits.device)

    def weighted(losses: Tensor) -> Tensor:
        return losses.sum() / max(len(logits), 1) if weights is None else (weights * losses).sum()

    none = torch.zeros((), device=logits.device)
    return (
        weighted(sequence_balance_loss(logits, chosen, mask)) if coefs.balance else none,
        weighted(sequence_z_loss(logits, mask)) if coefs.z else none,
    )


def auxiliary_loss(records: list[RouterRecord]) -> tuple[Tensor, AuxLosses]:
    """Auxiliary losses of one forward pass: per sequence, averaged over sequences, then over an adapter's layers.

    Their gradient does not depend on how a batch is cut into micro-batches, or spread over ranks: the mean over
    sequences is linear, and what is not (f_i P_i, the mean over tokens) never crosses a sequence. Rows that belong to
    no known sequence (an input of (rows, features) whose rows are not all of the batch's tokens) are one sequence each.

    Args:
        records: at least one.

    Returns:
        the sum of coef * L over losses and adapters, and every L without its coefficient, summed over adapters (None
        if no adapter has it): 0-dim float32 tensors.
    """
    by_adapter: dict[str, list[RouterRecord]] = {}
    for record in records:
        by_adapter.setdefault(record.adapter, []).append(record)
    scaled = torch.zeros((), device=records[0].losses.balance.device)
    plain: dict[int, Tensor] = {}
    for group in by_adapter.values():
        for which, coef in enumerate(group[0].coefs):
            if coef:
                mean = torch.stack([record.losses[which].to(scaled.device) for record in group]).mean()
                scaled, plain[which] = scaled + coef * mean, plain.get(which, 0) + mean
    return scaled, AuxLosses(*(plain.get(which) for which in range(2)))
