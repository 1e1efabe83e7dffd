"""The Triton kernels of `gpu`. A program does one line of a table, one expert: see `RowBlocks.experts_on`.

Rows of R elements are read in tiles (BLOCK, R_PAD). Sums are float32 and in a fixed order.
"""

import triton
import triton.language as tl

LINE: tl.constexpr = tl.constexpr(6)  # unit, offset, rows, stride of rows, stride of their elements, matrix

MOVED = 256  # elements at once


def tile_of(rank: int, cubic: bool = False) -> dict[str, int]:
    """R_PAD, BLOCK and num_warps; `cubic`: small rows are multiplied with each other element by element."""
    padded = triton.next_power_of_2(rank)
    if padded >= 16:
        return {"R_PAD": padded, "BLOCK": 32, "num_warps": 8 if padded > 32 else 4}
    return {"R_PAD": padded, "BLOCK": (2048 // padded if cubic else 1024) // padded, "num_warps": 4}


def square_of(rank: int) -> dict[str, int]:
    """R_PAD and num_warps of a matrix in registers, twice over: at most 8 elements of it per thread."""
    padded = triton.next_power_of_2(rank)
    return {"R_PAD": padded, "num_warps": 16 if padded > 32 else 4}


@triton.jit
def _tensor(addresses, number):
    return tl.load(addresses + number).to(tl.pointer_type(tl.float32))


@triton.jit
def add_grams(addresses, table, grams, R: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr):
    """G[matrix] += rows^T rows."""
    line = table + tl.program_id(0) * LINE
    unit, offset, rows = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    row_stride, stride, matrix = tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    if tl.load(addresses + unit) != 0:
        x = _tensor(addresses, unit) + offset
        column = tl.arange(0, R_PAD)
        if R_PAD >= 16:
            G = tl.zeros((R_PAD, R_PAD), tl.float32)
            for start in range(0, rows, BLOCK):
                row = (start + tl.arange(0, BLOCK)).to(tl.int64)
                at = row[:, None] * row_stride + column[None, :] * stride
                tile = tl.load(x + at, (row[:, None] < rows) & (column[None, :] < R), 0.0)
                G = tl.dot(tl.trans(tile), tile, G, input_precision="ieee")
        else:
            sums = tl.zeros((BLOCK, R_PAD, R_PAD), tl.float32)
            for start in range(0, rows, BLOCK):
                row = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None, None]
                a, b = column[None, :, None], column[None, None, :]
                left = tl.load(x + row * row_stride + a * stride, (row < rows) & (a < R), 0.0)
                right = tl.load(x + row * row_stride + b * stride, (row < rows) & (b < R), 0.0)
                sums += left * right
            G = tl.sum(sums, 0)
        at = column[:, None] * R + column[None, :]
        there = (column[:, None] < R) & (column[None, :] < R)
        out = grams + matrix * R * R + at
        tl.store(out, tl.load(out, there, 0.0) + G, there)


@triton.jit
def move(addresses, lines, summands, BLOCK: tl.constexpr):
    """One line of `rows.Moves`: unit, offset, elements, side, packed, first of `summands`, how many."""
    line = lines + tl.program_id(0) * 7
    unit, offset, numel = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    side, packed, first, count = tl.load(line + 3), tl.load(line + 4), tl.load(line + 5), tl.load(line + 6)
    if tl.load(addresses + unit) != 0:
        target = _tensor(addresses, unit) + offset
        for start in range(0, numel, BLOCK):
            at = (start + tl.arange(0, BLOCK)).to(tl.int64)
            i, j = at // side, at % side
            there = (at < numel) & (i <= j)  # all elements of what is no matrix: it has one row
            in_triangle = i * side - i * (i - 1) // 2 + j - i
            total = tl.zeros((BLOCK,), tl.float32)
            for p in range(first, first + count):
                source = tl.load(summands + p * 3)
                if tl.load(addresses + source) != 0:
                    place = tl.where(tl.load(summands + p * 3 + 2) != 0, in_triangle, at)
                    total += tl.load(_tensor(addresses, source) + tl.load(summands + p * 3 + 1) + place, there, 0.0)
            tl.store(target + tl.where(packed != 0, in_triangle, at), total, there)
            if (packed == 0) & (numel > side):
                tl.store(target + j * side + i, total, there)


@triton.jit
def _attempt(G, d, R: tl.constexpr, R_PAD: tl.constexpr):
    """(G + d I)^-1 and whether it can be used: see `preconditioner._attempt`. Sweeps have Cholesky's pivots."""
    i, j = tl.arange(0, R_PAD)[:, None], tl.arange(0, R_PAD)[None, :]
    S = G + tl.where(i == j, tl.where(i < R, d, 1.0), 0.0)
    usable = d == d
    for k in tl.range(0, R, loop_unroll_factor=1):
        row = tl.sum(tl.where(i == k, S, 0.0), 0)[None, :]
        column = tl.sum(tl.where(j == k, S, 0.0), 1)[:, None]
        pivot = tl.sum(tl.sum(tl.where((i == k) & (j == k), S, 0.0), 1), 0)
        sound = pivot >= 0.5 * d
        usable = usable & sound
        inverse = 1.0 / tl.where(sound, pivot, 1.0)
        swept = S - column * row * inverse
        swept = tl.where(i == k, row * inverse, swept)
        swept = tl.where(j == k, column * inverse, swept)
        S = tl.where((i == k) & (j == k), -inverse, swept)
    X = tl.where((i < R) & (j < R), -S, 0.0)
    norm = tl.sum(tl.sum(X * d * (X * d), 1), 0)
    return X, usable & (norm <= 4.0 * R)


@triton.jit
def damped_inverse(out, grams, damping, d, relative, R: tl.constexpr, R_PAD: tl.constexpr):
    """`preconditioner.damped_inverse` of one matrix."""
    number = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, R_PAD)[:, None], tl.arange(0, R_PAD)[None, :]
    there = (i < R) & (j < R)
    at = number * R * R + i * R + j
    G = tl.load(grams + at, there, 0.0)
    poison = tl.sum(tl.sum(G * 0.0, 1), 0)
    trace = tl.sum(tl.sum(tl.where(i == j, G, 0.0), 1), 0)
    if damping is not None:
        d = tl.load(damping + number)
    d = tl.maximum(tl.maximum(d, relative * trace), 1.1754943508222875e-38)
    X, usable = _attempt(G, d, R, R_PAD)
    if usable == 0:
        X, raised = _attempt(G, tl.maximum(d, 64.0 * relative * trace), R, R_PAD)
        if raised == 0:
            X = tl.where(i == j, 1.0 / (trace + d), 0.0)
    tl.store(out + at, tl.where(poison == 0.0, X, poison), there)


@triton.jit
def step_rows(
    addresses, units, table, matrices, lr_ptr,
    lr, beta1, beta2, eps, weight_decay, log_beta1, log_beta1_rest, log_beta2, log_beta2_rest,
    R: tl.constexpr, ADAMW: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient rows times matrices[matrix], in place; or, with ADAMW, torch's fused AdamW step with the products."""
    line = table + tl.program_id(0) * LINE
    unit, offset, rows = tl.load(line), tl.load(line + 1), tl.load(line + 2)
    row_stride, stride, matrix = tl.load(line + 3), tl.load(line + 4), tl.load(line + 5)
    if tl.load(addresses + unit) != 0:
        g = _tensor(addresses, unit) + offset
        column = tl.arange(0, R_PAD)
        if ADAMW:
            weight = _tensor(addresses, units + unit) + offset
            average = _tensor(addresses, 2 * units + unit) + offset
            square = _tensor(addresses, 3 * units + unit) + offset
            step = (tl.load(_tensor(addresses, 4 * units + unit)) + 1.0).to(tl.float64)
            if lr_ptr is not None:
                lr = tl.load(lr_ptr)
            # In double precision: 1 - beta2 is 0.001 at the first step.
            first = 1.0 - tl.exp(step * log_beta1 + step * log_beta1_rest)
            second = 1.0 - tl.exp(step * log_beta2 + step * log_beta2_rest)
            rate = lr / first.to(tl.float32)
            correction = tl.sqrt(second.to(tl.float32))
        if matrices is not None:
            M = matrices + matrix * R * R
            if R_PAD >= 16:
                of_M = column[:, None] * R + column[None, :]
                whole = tl.load(M + of_M, (column[:, None] < R) & (column[None, :] < R), 0.0)
        for start in range(0, rows, BLOCK):
            row = (start + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
            at = row * row_stride + column[None, :] * stride
            there = (row < rows) & (column[None, :] < R)
            if matrices is None:
                x = tl.load(g + at, there, 0.0)
            elif R_PAD >= 16:
                x = tl.dot(tl.load(g + at, there, 0.0), whole, input_precision="ieee")
            else:
                x = tl.zeros((BLOCK, R_PAD), tl.float32)
                for k in tl.static_range(R):
                    of_row = tl.load(g + row * row_stride + k * stride, row < rows, 0.0)
                    x += of_row * tl.load(M + k * R + column[None, :], column[None, :] < R, 0.0)
            if ADAMW:
                m, v = tl.load(average + at, there, 0.0), tl.load(square + at, there, 0.0)
                w = tl.load(weight + at, there, 0.0)
                m += (x - m) * (1.0 - beta1)
                v = v * beta2 + x * x * (1.0 - beta2)
                w = w * (1.0 - lr * weight_decay) - rate * m / (tl.sqrt(v) / correction + eps)
                tl.store(average + at, m, there)
                tl.store(square + at, v, there)
                tl.store(weight + at, w, there)
            else:
                tl.debug_barrier()  # other threads may still read what is overwritten
                tl.store(g + at, x, there)
