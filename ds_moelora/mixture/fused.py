"""The mixture in few launches: joined matrix products, and one kernel between them in each direction.

    forward    [p z] = x [A; W_r]^T      g = route(z), u = s g p      y = base + u B
    backward   q = dy B^T      [s g q  dz], [s h q  dz], s h p      dx = [s g q  dz] [A; W_r]      [dA; dW_r] = [..]^T x

Router and experts are one product each way. The frozen base included, a layer launches 5 operations forward and 8
backward, 2 of which copy the experts into rows and their gradients back (docs/architecture.md has the others' counts).
Saved for backward, beside x: [p z]; the gates are computed again.

Tensors of rank level are (T, E*R), experts first. Each kernel is one operator of torch's dispatcher, so that compilers,
FakeTensors and counters see it. On a CPU the operator is written in torch, or is the kernel with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .operands import Grads, Needs, Operands, Products, check_gate_scaling, gate_factor
from .routing import gates_backward, route
from .triton_operators import NO_TRITON, operator

MAX_EXPERTS, MAX_RANK = 256, 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(num_experts: int, rank: int, dtype: torch.dtype, device: str) -> str | None:
    """What `FUSED` does not cover; None if it covers a mixture like this."""
    if num_experts > MAX_EXPERTS or rank > MAX_RANK:
        return f"it takes at most {MAX_EXPERTS} experts of rank {MAX_RANK}, not {num_experts} of rank {rank}"
    if device != "cpu" and dtype not in DTYPES:
        return f"its kernels compute in 16 or 32 bits, not in {dtype}"
    if device not in ("cpu", "cuda"):
        return f"its kernels run on CUDA devices, not on {device}"
    return NO_TRITON if device == "cuda" else None


class _Fused(Products):
    name = "fused"
    routes = True

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        o, dtype = operands, base_out.dtype
        (E, _, R), T = o.lora_B.shape, len(o.x)
        down, up = _stacked(o, dtype)
        p = torch.mm(o.x, down.t(), out=_rows(o.x, T, len(down)))
        gates = o.x.new_empty(T, E, dtype=torch.promote_types(dtype, torch.float32)) if o.gates is None else o.gates
        weighted = _rows(o.x, T, E * R)
        torch.ops.ds_moelora.gate_forward(p, gates, weighted, o.scaling, *_routing(o))
        y = base_out.addmm_(weighted, up) if inplace else torch.addmm(base_out, weighted, up)
        return y, o._replace(gates=gates), p

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        o, T, routed = operands, len(dy), operands.router is not None
        (E, _, R), num_A = o.lora_B.shape, len(o.lora_A)
        send = needs.x or needs.gates or needs.A
        down, up = _stacked(o, p.dtype, needs.x, send)
        q = torch.mm(dy, up.t(), out=_rows(dy, T, E * R)) if send else None
        columns = num_A * R + (E if routed else 0)
        rows_x = _rows(dy, T, columns) if needs.x else None
        rows_A = _rows(dy, T, columns) if needs.A and not (o.scales_alike() and needs.x) else None
        weighted = _rows(dy, T, E * R) if needs.B else None
        wide = torch.promote_types(p.dtype, torch.float32)
        dgates = dy.new_empty(T, E, dtype=wide) if needs.gates and not routed else None
        check_gate_scaling(o.settings.gate_scaling)
        dlogits = None if needs.dlogits is None else needs.dlogits.contiguous()
        torch.ops.ds_moelora.gate_backward(
            p, q, o.gates, dlogits, rows_x, rows_A, weighted, dgates,
            o.scaling, *_routing(o), o.settings.gate_scaling, o.settings.scale_input_grad, E, R,
        )  # fmt: skip
        dx = None
        if rows_x is not None:
            dx = rows_x @ down if needs.onto is None else needs.onto.addmm_(rows_x, down)
        of_A = (rows_x if rows_A is None else rows_A) if needs.A else None
        down_gradient = None if of_A is None else of_A.t() @ o.x
        up_gradient = None if weighted is None else weighted.t() @ dy
        dA, dB, drouter = _gradients(o, down_gradient, up_gradient)
        return Grads(dx, dgates, dA, dB, drouter)


FUSED = _Fused()


def route_at_once(logits: Tensor, top_k: int, top_p: float | None = None) -> Tensor:
    """`mixture.routing.route`, without autograd, in one launch."""
    gates = logits.new_empty(logits.shape, dtype=torch.promote_types(logits.dtype, torch.float32))
    torch.ops.ds_moelora.gate_forward(logits, gates, None, 1.0, top_k, top_p)
    return gates


def _rows(like: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns), uninitialised; rows begin at multiples of 16 bytes, which matrix products on GPUs want."""
    aligned = -(-columns * like.itemsize // 16) * 16 // like.itemsize
    return like.new_empty(rows, aligned).narrow(1, 0, columns)


def _routing(o: Operands) -> tuple[int, float | None]:
    """top_k and top_p; top_k = 0: the gates are given."""
    if o.router is None:
        return 0, None
    assert o.rule is not None
    return o.rule.top_k, o.rule.top_p


def _router_factor(o: Operands) -> float:
    # The temperature goes into the router's copy: its logits, and what goes back through it, are right as they are.
    return 1 / o.rule.temperature if o.router is not None and o.rule is not None else 1.0


def _stacked(o: Operands, dtype: torch.dtype, of_A: bool = True, of_B: bool = True) -> tuple[Tensor, Tensor]:
    """[A; W_r / temperature] as rows (num_A*R + E, I), and B's (E*R, O), in one launch; what is not wanted is empty."""
    (E, O, R), (num_A, I, _) = o.lora_B.shape, o.lora_A.shape
    router = o.router if of_A else None
    down = o.lora_A.new_empty((num_A * R if of_A else 0) + (0 if router is None else E), I, dtype=dtype)
    up = o.lora_B.new_empty(E * R if of_B else 0, O, dtype=dtype)
    A, B = (o.lora_A if of_A else None), (o.lora_B if of_B else None)
    if of_A or of_B:
        to_A, to_router = _parts(down, num_A * R) if of_A else (None, None)
        targets = (to_A, up if of_B else None, None if router is None else to_router)
        torch.ops.ds_moelora.restack(A, B, router, *targets, _router_factor(o), R, True)
    return down, up


def _parts(down: Tensor, rows_of_A: int) -> tuple[Tensor, ...]:
    return down.split([rows_of_A, len(down) - rows_of_A])


def _gradients(o: Operands, down: Tensor | None, up: Tensor | None) -> tuple[Tensor | None, ...]:
    """dA, dB and drouter, in the shape and dtype of their parameters, from the gradients of `_stacked`; one launch."""
    R, num_A = o.lora_B.shape[2], len(o.lora_A)
    dA = None if down is None else torch.empty_like(o.lora_A, memory_format=torch.contiguous_format)
    dB = None if up is None else torch.empty_like(o.lora_B, memory_format=torch.contiguous_format)
    drouter = None
    if down is not None and o.router is not None:
        drouter = torch.empty_like(o.router, memory_format=torch.contiguous_format)
    if down is not None or up is not None:
        of_A, of_router = (None, None) if down is None else _parts(down, num_A * R)
        sources = (of_A, up, None if drouter is None else of_router)
        torch.ops.ds_moelora.restack(*sources, dA, dB, drouter, _router_factor(o), R, False)
    return dA, dB, drouter


# -- the operators ----------------------------------------------------------------------------------------------------


@functools.cache
def load_kernels() -> Any:
    from . import kernels

    return kernels


def _gate_forward(
    p: Tensor, gates: Tensor, weighted: Tensor | None, scaling: float, top_k: int, top_p: float | None
) -> None:
    """gates = route(the last E columns of p) unless top_k = 0, and weighted_ter = s g_te p_ter."""
    (T, E), wide = gates.shape, gates.dtype
    if top_k:
        gates.copy_(route(p[:, p.shape[1] - E :], top_k, top_p))
    if weighted is not None:
        R = weighted.shape[1] // E
        factor = (gates * scaling).unsqueeze(2)
        weighted.copy_((_by_expert(p, E, R, top_k).to(wide) * factor).view(T, E * R))


def _launch_gate_forward(
    p: Tensor, gates: Tensor, weighted: Tensor | None, scaling: float, top_k: int, top_p: float | None
) -> None:
    (T, E), R = gates.shape, 1 if weighted is None else weighted.shape[1] // gates.shape[1]
    if not T:
        return
    kernels, sizes, tile = load_kernels(), _sizes(p, E, R, top_k, top_p), load_kernels().tile_of(E, R)
    kernels.gate_forward[(-(-T // tile["BLOCK_T"]),)](
        p, gates, weighted, T, p.stride(0), 0 if weighted is None else weighted.stride(0), scaling, top_p or 0.0,
        **sizes, **tile,
    )  # fmt: skip


operator(
    "gate_forward(Tensor p, Tensor(a!) gates, Tensor(b!)? weighted, float scaling, int top_k, float? top_p) -> ()",
    _launch_gate_forward,
    _gate_forward,
)


def _gate_backward(
    p: Tensor, q: Tensor | None, gates: Tensor | None, dlogits: Tensor | None, rows_x: Tensor | None,
    rows_A: Tensor | None, weighted: Tensor | None, dgates: Tensor | None, scaling: float, top_k: int,
    top_p: float | None, gate_scaling: str, scale_input_grad: bool, E: int, R: int,
) -> None:  # fmt: skip
    """The kernel `gate_backward` (`mixture.kernels`)."""
    T, wide = len(p), torch.promote_types(p.dtype, torch.float32)
    g = route(p[:, p.shape[1] - E :], top_k, top_p) if gates is None else gates
    h = gate_factor(gate_scaling, g)
    p_TER = _by_expert(p, E, R, top_k).to(wide)
    if weighted is not None:
        weighted.copy_((p_TER * (h * scaling).unsqueeze(2)).view(T, E * R))
    if q is None:
        return
    q_TER = q.unflatten(1, (E, R)).to(wide)
    dg = (q_TER * p_TER).sum(2) * scaling
    if dgates is not None:
        dgates.copy_(dg)
    for rows, factor in ((rows_x, h if scale_input_grad else g), (rows_A, h)):
        if rows is None:
            continue
        columns = rows.shape[1] - (E if top_k else 0)
        value = q_TER * (factor * scaling).unsqueeze(2)
        rows[:, :columns].copy_((value if columns == E * R else value.sum(1)).reshape(T, columns))
        if top_k:
            dz = gates_backward(g, dg)
            rows[:, columns:].copy_(dz if dlogits is None else dz + dlogits)


def _launch_gate_backward(
    p: Tensor, q: Tensor | None, gates: Tensor | None, dlogits: Tensor | None, rows_x: Tensor | None,
    rows_A: Tensor | None, weighted: Tensor | None, dgates: Tensor | None, scaling: float, top_k: int,
    top_p: float | None, gate_scaling: str, scale_input_grad: bool, E: int, R: int,
) -> None:  # fmt: skip
    T = len(p)
    if not T:
        return
    kernels, sizes, tile = load_kernels(), _sizes(p, E, R, top_k, top_p), load_kernels().tile_of(E, R)
    q_row, weighted_row = (0 if tensor is None else tensor.stride(0) for tensor in (q, weighted))
    rows_row = next((rows.stride(0) for rows in (rows_x, rows_A) if rows is not None), 0)
    kernels.gate_backward[(-(-T // tile["BLOCK_T"]),)](
        p, q, gates, dlogits, rows_x, rows_A, weighted, dgates, T, p.stride(0), q_row, rows_row, weighted_row,
        scaling, top_p or 0.0, **sizes, GATE_SCALING=gate_scaling, SCALE_INPUT=scale_input_grad, **tile,
    )  # fmt: skip


operator(
    "gate_backward(Tensor p, Tensor? q, Tensor? gates, Tensor? dlogits, Tensor(a!)? rows_x, Tensor(b!)? rows_A, "
    "Tensor(c!)? weighted, Tensor(d!)? dgates, float scaling, int top_k, float? top_p, str gate_scaling, "
    "bool scale_input_grad, int num_experts, int rank) -> ()",
    _launch_gate_backward,
    _gate_backward,
)


def _restack(
    A: Tensor | None, B: Tensor | None, router: Tensor | None, to_A: Tensor | None, to_B: Tensor | None,
    to_router: Tensor | None, factor: float, rank: int, stack: bool,
) -> None:  # fmt: skip
    """Experts (E, F, R) -> rows (E*R, F), or back, and the router times `factor`."""
    for source, target in ((A, to_A), (B, to_B)):
        if source is not None and target is not None:
            rows, experts = (target, source) if stack else (source, target)
            as_experts = rows.view(len(experts), rank, -1).transpose(1, 2)
            if stack:
                as_experts.copy_(source)
            else:
                target.copy_(as_experts)
    if router is not None and to_router is not None:
        to_router.copy_(router if factor == 1 else router * factor)


def _launch_restack(
    A: Tensor | None, B: Tensor | None, router: Tensor | None, to_A: Tensor | None, to_B: Tensor | None,
    to_router: Tensor | None, factor: float, rank: int, stack: bool,
) -> None:  # fmt: skip
    kernels = load_kernels()
    padded = kernels.triton.next_power_of_2(rank)
    block_f, block_w = kernels.COPIED_AT_ONCE // padded, kernels.COPIED_AT_ONCE
    A, B, router = (None if source is None else source.contiguous() for source in (A, B, router))

    def programs(tensor: Tensor | None, width: int, block: int) -> int:
        return 0 if tensor is None else tensor.numel() // (width * rank) * -(-width // block)

    def width(source: Tensor | None, target: Tensor | None) -> int:
        rows = target if stack else source
        return 1 if rows is None else rows.shape[1]

    I, O = width(A, to_A) if A is not None else width(router, to_router), width(B, to_B)
    of_A, of_B = programs(A, I, block_f), programs(B, O, block_f)
    of_router = 0 if router is None else len(router) * -(-I // block_w)
    kernels.restack[(of_A + of_B + of_router,)](
        A, to_A, B, to_B, router, to_router, of_A, of_B, I, O, factor,
        R=rank, R_PAD=padded, BLOCK_F=block_f, BLOCK_W=block_w, STACK=stack,
    )  # fmt: skip


operator(
    "restack(Tensor? A, Tensor? B, Tensor? router, Tensor(a!)? to_A, Tensor(b!)? to_B, Tensor(c!)? to_router, "
    "float factor, int rank, bool stack) -> ()",
    _launch_restack,
    _restack,
)


def _combine(y: Tensor, rows: Tensor, order: Tensor) -> None:
    """y_t += sum_j rows[order_tj]: y (T, F), rows (N, F), order (T, k)."""
    y.copy_(y + rows[order].to(torch.promote_types(y.dtype, torch.float32)).sum(1))


def _launch_combine(y: Tensor, rows: Tensor, order: Tensor) -> None:
    (T, F), kernels = y.shape, load_kernels()
    if y.numel():
        block = min(kernels.triton.next_power_of_2(F), kernels.TILE)
        kernels.combine[(T, -(-F // block))](
            y, rows, order, F, y.stride(0), rows.stride(0), K=order.shape[1], BLOCK=block
        )


operator("combine(Tensor(a!) y, Tensor rows, Tensor order) -> ()", _launch_combine, _combine)


def _by_expert(p: Tensor, E: int, R: int, top_k: int) -> Tensor:
    """(T, num_A*R [+ E]) -> (T, num_A, R), a view."""
    columns = p.shape[1] - (E if top_k else 0)
    return p[:, :columns].unflatten(1, (columns // R, R))


def _sizes(p: Tensor, E: int, R: int, top_k: int, top_p: float | None) -> dict[str, Any]:
    """The kernels' constants."""
    logits = p.shape[1] - E if top_k else p.shape[1]
    shared = logits == R and E > 1
    return {
        "E": E, "R": R, "STEP": 0 if shared else R, "LOGITS": logits, "TOP_K": top_k, "HAS_TOP_P": top_p is not None,
    }  # fmt: skip
