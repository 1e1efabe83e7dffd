"""The routers' auxiliary losses in few launches: three forward, one backward.

    forward    sums over parts of each sequence -> each sequence's two losses -> their sum
    backward   dz = pi (c - sum_e c pi) + pi lse c_z,  c = w_s E f / n_s,  c_z = 2 w_s / n_s

pi: a token's probabilities (S sequences of N tokens, n_s of them real, with weights w_s); f: the share of an expert in
the choices. Saved for backward: the logits; c and c_z, (S, E + 1) numbers per layer, stay on the node. Sums are in
float32 and in a fixed order: the same bits on every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fused import DTYPES, MAX_EXPERTS, load_kernels
from .triton_operators import NO_TRITON, operator

TILE = 1024  # elements (tokens, E) that a program takes at once: 8 per thread of 4 warps
MOST_PARTS = 128  # of a sequence, whose sums one program adds up


class Sequences(NamedTuple):
    """Which rows of a layer's tokens form sequences, and what these weigh.

    Args:
        shape: (S, N). packed: (S, N) int64, the rows, T and more where a sequence has ended; None: row s N + n.
        mask: (S, N), non-zero where a token is real; None: all are. Not with `packed`.
        weights: (S,) float32; None: 1 / S.
    """

    shape: tuple[int, int]
    packed: Tensor | None = None
    mask: Tensor | None = None
    weights: Tensor | None = None


def covers(logits: Tensor) -> bool:
    """Whether `fused_losses` are the way to compute the losses of a router's logits (T, E)."""
    return logits.is_cuda and NO_TRITON is None and logits.dtype in DTYPES and logits.shape[1] <= MAX_EXPERTS


def fused_losses(
    logits: Tensor, gates: Tensor, sequences: Sequences | None, balance: bool, z: bool
) -> tuple[Tensor, Tensor]:
    """sum_s w_s L_s with `mixture.routing.sequence_balance_loss`, and with `sequence_z_loss`; 0 if not wanted.

    Args:
        logits: (T, E). gates: (T, E) of `route`; constants to autograd.
        sequences: None computes nothing, but saves the same for backward.

    Returns:
        two 0-dim float32 tensors.
    """
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    return _FusedLosses.apply(logits, gates, sequences, balance, z)


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, gates: Tensor, sequences: Sequences | None, balance: bool, z: bool
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits)
        ctx.set_materialize_grads(False)
        if sequences is None:
            return logits.new_zeros(2, dtype=torch.float32).unbind()
        losses, slopes = losses_and_slopes(logits, gates, sequences, balance, z)
        ctx.sequences, ctx.slopes = sequences, slopes
        return losses.unbind()

    @staticmethod
    def backward(ctx: Any, dbalance: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        if dbalance is None and dz is None:
            return (None,) * 5
        (logits,) = ctx.saved_tensors
        return gradient(logits, ctx.sequences, ctx.slopes, dbalance, dz), None, None, None, None


def losses_and_slopes(
    logits: Tensor, gates: Tensor, sequences: Sequences, balance: bool, z: bool
) -> tuple[Tensor, Tensor]:
    """The two losses, (2,), and the slopes [c, c_z], (S, E + 1)."""
    E, (S, N) = logits.shape[1], sequences.shape
    sums = logits.new_empty(S, _parts(E, N), 2 * E + 2, dtype=torch.float32)
    torch.ops.ds_moelora.router_sums(logits, gates.contiguous(), sequences.packed, sequences.mask, sums, N)
    losses, slopes = sums.new_empty(S, 2), sums.new_empty(S, E + 1)
    torch.ops.ds_moelora.router_losses(sums, sequences.weights, losses, slopes, balance, z)
    return losses.sum(0), slopes


def gradient(
    logits: Tensor, sequences: Sequences, slopes: Tensor, dbalance: Tensor | None, dz: Tensor | None
) -> Tensor:
    """The logits' gradient, (T, E) in their dtype, from those of the two losses."""
    shape = logits.shape
    # Rows may belong to no packed sequence.
    dlogits = logits.new_empty(shape) if sequences.packed is None else logits.new_zeros(shape)
    N = sequences.shape[1]
    torch.ops.ds_moelora.router_gradient(logits, sequences.packed, sequences.mask, slopes, dbalance, dz, dlogits, N)
    return dlogits


def tile_of(num_experts: int, length: int) -> dict[str, int]:
    """E_PAD and BLOCK_N for a sum over `length` rows."""
    padded, covering = (1 << (max(n, 1) - 1).bit_length() for n in (num_experts, length))
    return {"E_PAD": padded, "BLOCK_N": max(min(TILE // padded, covering), 1)}


def _parts(E: int, N: int) -> int:
    """Into which a sequence is cut, each a program's."""
    return min(-(-N // tile_of(E, N)["BLOCK_N"]), MOST_PARTS)


def _launch_router_sums(
    logits: Tensor, gates: Tensor, packed: Tensor | None, mask: Tensor | None, sums: Tensor, N: int
) -> None:
    (S, parts, _), (T, E) = sums.shape, logits.shape
    if S * parts:
        tile = tile_of(E, N)
        load_kernels().router_sums[(S, parts)](
            logits, gates, packed, mask, sums, T, N, logits.stride(0), -(-N // (parts * tile["BLOCK_N"])), E=E, **tile
        )


operator(
    "router_sums(Tensor logits, Tensor gates, Tensor? packed, Tensor? mask, Tensor(a!) sums, int N) -> ()",
    _launch_router_sums,
)


def _launch_router_losses(
    sums: Tensor, weights: Tensor | None, losses: Tensor, slopes: Tensor, balance: bool, z: bool
) -> None:
    (S, parts, _), E = sums.shape, slopes.shape[1] - 1
    if S:
        load_kernels().router_losses[(S,)](
            sums, weights, losses, slopes, parts, 1 / S, BALANCE=balance, Z=z, E=E, **tile_of(E, parts)
        )


operator(
    "router_losses(Tensor sums, Tensor? weights, Tensor(a!) losses, Tensor(b!) slopes, bool balance, bool z) -> ()",
    _launch_router_losses,
)


def _launch_router_gradient(
    logits: Tensor, packed: Tensor | None, mask: Tensor | None, slopes: Tensor, dbalance: Tensor | None,
    dz: Tensor | None, dlogits: Tensor, N: int,
) -> None:  # fmt: skip
    (T, E), S = logits.shape, len(slopes)
    tile = tile_of(E, N)
    tiles = -(-N // tile["BLOCK_N"])
    if S * tiles:
        load_kernels().router_gradient[(S * tiles,)](
            logits, packed, mask, slopes, dbalance, dz, dlogits, T, N, logits.stride(0), tiles, E=E, **tile
        )


operator(
    "router_gradient(Tensor logits, Tensor? packed, Tensor? mask, Tensor slopes, Tensor? dbalance, Tensor? dz, "
    "Tensor(a!) dlogits, int N) -> ()",
    _launch_router_gradient,
)
