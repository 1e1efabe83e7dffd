"""What lies between the matrix products of a mixture, in one Triton kernel each way, and the factors' copies.

A program takes BLOCK_T tokens and all experts: gates (BLOCK_T, E), and of the rank level one tile (BLOCK_T, E, BLOCK_R)
after the other. Sums are in float32 and in a fixed order: the same bits on every run. Who launches them, and what the
tensors are: `mixture.fused`, and for the routers' losses `mixture.fused_losses`.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 2048  # elements of a rank-level tile: 16 per thread of 4 warps
SECTOR = 16  # ranks at least, where there are as many: 32 bytes in 16 bits
COPIED_AT_ONCE = 2048


def tile_of(num_experts: int, rank: int) -> dict[str, int]:
    """BLOCK_T, E_PAD, BLOCK_R and num_warps."""
    padded = triton.next_power_of_2(num_experts)
    block_r = min(triton.next_power_of_2(rank), max(TILE // padded, SECTOR))
    num_warps = max(padded * block_r, TILE) // 512
    return {"BLOCK_T": max(TILE // (padded * block_r), 1), "E_PAD": padded, "BLOCK_R": block_r, "num_warps": num_warps}


@triton.jit
def _route(z, expert, E: tl.constexpr, TOP_K: tl.constexpr, top_p, HAS_TOP_P: tl.constexpr):
    """`mixture.routing.route` of logits (BLOCK_T, E_PAD): gates, -0.0 where an expert is not chosen."""
    order = tl.where(z != z, float("inf"), z)  # a NaN is chosen, so that it shows in the gates
    taken = (expert >= E) | (order > float("inf"))
    kept = order > float("inf")
    likely = tl.exp(z - tl.max(order, 1, keep_dims=True))
    likely = likely / tl.sum(likely, 1, keep_dims=True)
    mass = tl.sum(likely * 0.0, 1, keep_dims=True)
    for j in range(TOP_K):
        largest = tl.max(tl.where(taken, float("-inf"), order), 1, keep_dims=True)
        first = tl.min(tl.where((order == largest) & (taken == 0), expert, E), 1, keep_dims=True)
        here = expert == first
        if HAS_TOP_P:
            kept = kept | (here & ((mass < top_p) | (j == 0)))
            mass += tl.sum(tl.where(here, likely, 0.0), 1, keep_dims=True)
        else:
            kept = kept | here
        taken = taken | here
    g = tl.where(kept, tl.exp(z - tl.max(tl.where(kept, order, float("-inf")), 1, keep_dims=True)), 0.0)
    return tl.where(kept, g / tl.sum(g, 1, keep_dims=True), -0.0)


@triton.jit
def gate_forward(
    p_ptr, gates_ptr, weighted_ptr, T, p_row, weighted_row, scaling, top_p,
    E: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, LOGITS: tl.constexpr, TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr, BLOCK_T: tl.constexpr, E_PAD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """gates = route(logits) unless TOP_K = 0 (they are given); weighted_ter = s g_te p_ter.

    STEP: columns of p from one expert to the next, R or 0 (shared A). LOGITS: p's column of the first logit.
    """
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    expert = tl.arange(0, E_PAD)[None, :]
    there = (token < T) & (expert < E)
    gates = gates_ptr + token * E + expert
    if TOP_K > 0:
        z = tl.load(p_ptr + token * p_row + LOGITS + expert, there, float("-inf")).to(tl.float32)
        g = _route(z, expert, E, TOP_K, top_p, HAS_TOP_P)
        tl.store(gates, g, there)
    else:
        g = tl.load(gates, there, 0.0)
    if weighted_ptr is not None:
        p_te = p_ptr + token * p_row + expert * STEP
        weighted_te = weighted_ptr + token * weighted_row + expert * R
        factor = (g * scaling)[:, :, None]
        for start in range(0, R, BLOCK_R):
            rank = start + tl.arange(0, BLOCK_R)[None, None, :]
            mask = there[:, :, None] & (rank < R)
            p = tl.load(p_te[:, :, None] + rank, mask, 0.0).to(tl.float32)
            tl.store(weighted_te[:, :, None] + rank, p * factor, mask)


@triton.jit
def gate_backward(
    p_ptr, q_ptr, gates_ptr, dlogits_ptr, rows_x_ptr, rows_A_ptr, weighted_ptr, dgates_ptr,
    T, p_row, q_row, rows_row, weighted_row, scaling, top_p,
    E: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, LOGITS: tl.constexpr, TOP_K: tl.constexpr,
    HAS_TOP_P: tl.constexpr, GATE_SCALING: tl.constexpr, SCALE_INPUT: tl.constexpr,
    BLOCK_T: tl.constexpr, E_PAD: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """weighted = s h p; rows_x = s (g or h) q and rows_A = s h q, both with dz in the columns from LOGITS on.

    dg_te = s sum_r q_ter p_ter goes to dgates if gates are given; else dz_te = dlogits_te + g_te (dg_te - sum_e g dg).
    Every pointer but p_ptr may be None: what is not there is not needed. With STEP = 0 rows are summed over experts.
    """
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
    expert = tl.arange(0, E_PAD)[None, :]
    there = (token < T) & (expert < E)
    if TOP_K > 0:
        z = tl.load(p_ptr + token * p_row + LOGITS + expert, there, float("-inf")).to(tl.float32)
        g = _route(z, expert, E, TOP_K, top_p, HAS_TOP_P)
    else:
        g = tl.load(gates_ptr + token * E + expert, there, 0.0)
    h = g
    if GATE_SCALING == "sqrt":
        h = tl.sqrt(g)
    elif GATE_SCALING == "full":
        h = tl.where(g.to(tl.int32, bitcast=True) != -2147483648, 1.0, 0.0)
    factor_A = (h * scaling)[:, :, None]
    factor_x = factor_A
    if not SCALE_INPUT:
        factor_x = (g * scaling)[:, :, None]
    p_te = p_ptr + token * p_row + expert * STEP
    dg = tl.zeros((BLOCK_T, E_PAD), tl.float32)
    for start in range(0, R, BLOCK_R):
        rank = start + tl.arange(0, BLOCK_R)[None, None, :]
        mask = there[:, :, None] & (rank < R)
        p = tl.load(p_te[:, :, None] + rank, mask, 0.0).to(tl.float32)
        if weighted_ptr is not None:
            tl.store((weighted_ptr + token * weighted_row + expert * R)[:, :, None] + rank, p * factor_A, mask)
        if q_ptr is not None:
            q = tl.load((q_ptr + token * q_row + expert * R)[:, :, None] + rank, mask, 0.0).to(tl.float32)
            dg += tl.sum(q * p, 2)
            if rows_x_ptr is not None:
                _store_rows(rows_x_ptr + token * rows_row, q * factor_x, token < T, expert, rank, mask, R, STEP)
            if rows_A_ptr is not None:
                _store_rows(rows_A_ptr + token * rows_row, q * factor_A, token < T, expert, rank, mask, R, STEP)
    dg *= scaling
    if dgates_ptr is not None:
        tl.store(dgates_ptr + token * E + expert, dg, there)
    if TOP_K > 0 and q_ptr is not None:
        weighted_dg = tl.where(there, g * dg, 0.0)
        dz = weighted_dg - g * tl.sum(weighted_dg, 1, keep_dims=True)
        if dlogits_ptr is not None:
            dz += tl.load(dlogits_ptr + token * E + expert, there, 0.0).to(tl.float32)
        if rows_x_ptr is not None:
            tl.store(rows_x_ptr + token * rows_row + LOGITS + expert, dz, there)
        if rows_A_ptr is not None:
            tl.store(rows_A_ptr + token * rows_row + LOGITS + expert, dz, there)


@triton.jit
def _store_rows(row, value, is_token, expert, rank, mask, R: tl.constexpr, STEP: tl.constexpr):
    if STEP > 0:
        tl.store((row + expert * STEP)[:, :, None] + rank, value, mask)
    else:
        summed = tl.sum(tl.where(mask, value, 0.0), 1, keep_dims=True)
        tl.store(row[:, :, None] + rank, summed, is_token[:, :, None] & (rank < R))


@triton.jit
def _copy(
    source, target, program, F, factor, R: tl.constexpr, R_PAD: tl.constexpr, BLOCK_F: tl.constexpr,
    STACK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(F, BLOCK_F)
    expert = (program // blocks).to(tl.int64)
    feature = (program % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)[:, None]
    rank = tl.arange(0, R_PAD)[None, :]
    mask = (feature < F) & (rank < R)
    stored = (expert * F + feature) * R + rank
    stacked = (expert * R + rank) * F + feature
    if STACK:
        tl.store(target + stacked, tl.load(source + stored, mask).to(tl.float32) * factor, mask)
    else:
        tl.store(target + stored, tl.load(source + stacked, mask).to(tl.float32) * factor, mask)


@triton.jit
def restack(
    source_A, target_A, source_B, target_B, source_W, target_W, programs_A, programs_B, I, O, factor,
    R: tl.constexpr, R_PAD: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_W: tl.constexpr, STACK: tl.constexpr,
):  # fmt: skip
    """Experts (E, F, R) -> rows (E R, F) of A and B, or back; and the router (E, I) times `factor`: one launch.

    A source that is None has no programs.
    """
    program = tl.program_id(0)
    if program < programs_A:
        if source_A is not None:
            _copy(source_A, target_A, program, I, 1.0, R, R_PAD, BLOCK_F, STACK)
    elif program < programs_A + programs_B:
        if source_B is not None:
            _copy(source_B, target_B, program - programs_A, O, 1.0, R, R_PAD, BLOCK_F, STACK)
    else:
        if source_W is not None:
            _copy(source_W, target_W, program - programs_A - programs_B, I, factor, 1, 1, BLOCK_W, STACK)


@triton.jit
def combine(y_ptr, rows_ptr, order_ptr, F, y_row, rows_row, K: tl.constexpr, BLOCK: tl.constexpr):
    """y_t += sum_j rows[order_tj], in this order; a program takes BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    y = y_ptr + token * y_row + column
    total = tl.load(y, mask, 0.0).to(tl.float32)
    for j in range(K):
        total += tl.load(rows_ptr + tl.load(order_ptr + token * K + j) * rows_row + column, mask, 0.0).to(tl.float32)
    tl.store(y, total, mask)


@triton.jit
def _tokens(sequence, n, N, T, packed_ptr, mask_ptr):
    """Rows of the tokens n of a sequence of N, whether the rows exist, and whether they are real tokens."""
    there = n < N
    if packed_ptr is not None:
        row = tl.load(packed_ptr + sequence * N + n, there, T)
        there = there & (row < T)
        real = there
    else:
        row = sequence * N + n
        real = there
        if mask_ptr is not None:
            real = there & (tl.load(mask_ptr + row, there, 0) != 0)
    return row, there, real


@triton.jit
def _softmax(z, real):
    """Probabilities, and log sum exp z, of logits that are -inf beyond E; anything where a token is not `real`."""
    largest = tl.where(real, tl.max(z, 1, keep_dims=True), 0.0)
    likely = tl.exp(z - largest)
    total = tl.where(real, tl.sum(likely, 1, keep_dims=True), 1.0)
    return likely / total, largest + tl.log(total)


@triton.jit
def router_sums(
    logits_ptr, gates_ptr, packed_ptr, mask_ptr, sums_ptr, T, N, logits_row, tiles, E: tl.constexpr,
    E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One of the parts of one sequence, `tiles` tiles of BLOCK_N tokens each. Sums over its real tokens.

    sums (S, parts, 2 E + 2): probabilities, choices of each expert, (log sum exp z)^2, tokens.
    """
    sequence, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    expert = tl.arange(0, E_PAD)[None, :]
    probabilities, choices = tl.zeros((BLOCK_N, E_PAD), tl.float32), tl.zeros((BLOCK_N, E_PAD), tl.float32)
    squares, tokens = tl.zeros((BLOCK_N, 1), tl.float32), tl.zeros((BLOCK_N, 1), tl.float32)
    for tile in range(tiles):
        n = (part * tiles + tile) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        row, _, real = _tokens(sequence, n, N, T, packed_ptr, mask_ptr)
        mask = real & (expert < E)
        z = tl.load(logits_ptr + row * logits_row + expert, mask, float("-inf")).to(tl.float32)
        likely, lse = _softmax(z, real)
        g = tl.load(gates_ptr + row * E + expert, mask, 0.0)
        probabilities += tl.where(mask, likely, 0.0)
        choices += tl.where(mask & (g.to(tl.int32, bitcast=True) != -2147483648), 1.0, 0.0)  # the bits of -0.0
        squares += tl.where(real, lse * lse, 0.0)
        tokens += tl.where(real, 1.0, 0.0)
    at = sums_ptr + (sequence * parts + part) * (2 * E + 2) + expert
    tl.store(at, tl.sum(probabilities, 0, keep_dims=True), expert < E)
    tl.store(at + E, tl.sum(choices, 0, keep_dims=True), expert < E)
    tl.store(at + 2 * E, tl.sum(squares, 0, keep_dims=True), expert < 1)
    tl.store(at + 2 * E + 1, tl.sum(tokens, 0, keep_dims=True), expert < 1)


@triton.jit
def router_losses(
    sums_ptr, weights_ptr, losses_ptr, slopes_ptr, parts, weight, BALANCE: tl.constexpr, Z: tl.constexpr,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One sequence. losses (S, 2), weighted; slopes (S, E + 1): theirs in a token's probabilities, and in lse^2 / 2."""
    sequence = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, E_PAD)[None, :]
    probabilities, choices = tl.zeros((BLOCK_N, E_PAD), tl.float32), tl.zeros((BLOCK_N, E_PAD), tl.float32)
    squares, tokens = tl.zeros((BLOCK_N, 1), tl.float32), tl.zeros((BLOCK_N, 1), tl.float32)
    for start in range(0, parts, BLOCK_N):
        part = start + tl.arange(0, BLOCK_N)[:, None]
        at = sums_ptr + (sequence * parts + part) * (2 * E + 2)
        mask = (part < parts) & (expert < E)
        probabilities += tl.load(at + expert, mask, 0.0)
        choices += tl.load(at + E + expert, mask, 0.0)
        squares += tl.load(at + 2 * E, part < parts, 0.0)
        tokens += tl.load(at + 2 * E + 1, part < parts, 0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + sequence)
    weight = weight / tl.maximum(tl.sum(tokens), 1.0)
    chosen = tl.sum(choices, 0, keep_dims=True)
    slope = chosen / tl.maximum(tl.sum(chosen), 1.0) * (E * weight)
    tl.store(slopes_ptr + sequence * (E + 1) + expert, slope, expert < E)
    tl.store(slopes_ptr + sequence * (E + 1) + E, 2 * weight)
    balance = tl.sum(slope * tl.sum(probabilities, 0, keep_dims=True)) if BALANCE else 0.0
    tl.store(losses_ptr + sequence * 2, balance)
    z = tl.sum(squares) * weight if Z else 0.0
    tl.store(losses_ptr + sequence * 2 + 1, z)


@triton.jit
def router_gradient(
    logits_ptr, packed_ptr, mask_ptr, slopes_ptr, dbalance_ptr, dz_ptr, dlogits_ptr, T, N, logits_row, tiles,
    E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One of the `tiles` tiles of one sequence. dlogits (T, E) of tokens of any sequence, 0 where one is not real."""
    sequence = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    expert = tl.arange(0, E_PAD)[None, :]
    row, there, real = _tokens(sequence, n, N, T, packed_ptr, mask_ptr)
    mask = real & (expert < E)
    z = tl.load(logits_ptr + row * logits_row + expert, mask, float("-inf")).to(tl.float32)
    likely, lse = _softmax(z, real)
    likely = tl.where(mask, likely, 0.0)
    slopes = slopes_ptr + sequence * (E + 1)
    d = tl.zeros((BLOCK_N, E_PAD), tl.float32)
    if dbalance_ptr is not None:
        slope = tl.load(slopes + expert, expert < E, 0.0) * tl.load(dbalance_ptr)
        d += likely * (slope - tl.sum(likely * slope, 1, keep_dims=True))
    if dz_ptr is not None:
        d += likely * (lse * (tl.load(slopes + E) * tl.load(dz_ptr)))
    tl.store(dlogits_ptr + row * E + expert, tl.where(mask, d, 0.0), there & (expert < E))
