"""The layer's inner operations in the forms that were compared: times in milliseconds, medians over rounds in turn.

    OMP_NUM_THREADS=1 python -m benchmarks.products

Shape suffixes as in `mixture.operands`: E r = 80 columns (E = 20, r = 4), T = 2048 tokens, I = O = 1024 and 3072
features.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from .harness import Step, hardware, measure

E, R, K, T = 20, 4, 10, 2048


def layouts(dtype: torch.dtype, features: int) -> dict[str, dict[str, Step]]:
    """Rank-level tensors as (E r, T) or (T, E r); `wide` is x, y or dx."""
    wide, weights = torch.randn(T, features).to(dtype), torch.randn(E * R, features).to(dtype)
    rows = torch.randn(E * R, T).to(dtype)
    columns = rows.t().contiguous()
    gates = torch.rand(T, E)
    return {
        "gates times projection": {
            "(T, E, r)": lambda: columns.view(T, E, R) * gates.to(dtype).unsqueeze(-1),
            "(E, r, T)": lambda: (
                rows.view(E, R, T) * gates.t().to(dtype, memory_format=torch.contiguous_format).unsqueeze(1)
            ),
        },
        "gradient of the stacked factors": {
            "x^T q -> (I, E r)": lambda: wide.t() @ columns,
            "q^T x, q (T, E r)": lambda: columns.t() @ wide,
            "q x, q (E r, T)": lambda: rows @ wide,
        },
        "product onto y or dx": {
            "(T, E r)": lambda: wide.addmm_(columns, weights),
            "(E r, T), transposed view": lambda: wide.addmm_(rows.t(), weights),
            "(E r, T), copied": lambda: wide.addmm_(rows.t().contiguous(), weights),
        },
    }


def router_gradient(dtype: torch.dtype, features: int) -> dict[str, dict[str, Step]]:
    """The router's share of dx and its weight's gradient: by itself, or as E more rows of the experts' products."""
    x, dx = (torch.randn(T, features).to(dtype) for _ in range(2))
    A, W, dp, dlogits = (
        torch.randn(shape).to(dtype) for shape in ((E * R, features), (E, features), (E * R, T), (E, T))
    )

    def apart() -> None:
        dx.addmm_(dp.t().contiguous(), A)
        dx.add_(dlogits.t() @ W)
        _ = dp @ x, dlogits @ x

    def joined() -> None:
        rows = torch.cat([dp, dlogits])
        dx.addmm_(rows.t().contiguous(), torch.cat([A, W]))
        _ = rows @ x

    return {"backward of projections and logits": {"apart": apart, "joined": joined}}


def one_token(dtype: torch.dtype, features: int) -> dict[str, dict[str, Step]]:
    """Projection and output of one token, with factors stored as (E, I, r) and (E, O, r)."""
    x, y = torch.randn(1, features).to(dtype), torch.randn(1, features).to(dtype)
    A = torch.randn(E, features, R).to(dtype)
    p, rows = torch.randn(1, E * R).to(dtype), torch.randn(E, R, 1).to(dtype)

    def stacked() -> Tensor:
        return A.transpose(1, 2).reshape(E * R, features)

    def wide() -> Tensor:
        return A.float().flatten(1)

    kept = stacked()
    return {
        "one token, projection": {
            "copy stacked": lambda: stacked() @ x.t(),
            "bmm": lambda: x @ A,
            "as it lies": lambda: wide() @ x.float().t().expand(-1, R).diag_embed().view(-1, R),
            "kept copy": lambda: kept @ x.t(),
        },
        "one token, output": {
            "copy stacked": lambda: y.addmm_(p, stacked()),
            "bmm, sum": lambda: torch.bmm(A, rows).sum(0),
            "as it lies": lambda: (
                (rows.view(E, R).t().float() @ wide()).view(R, -1, R).diagonal(dim1=0, dim2=2).sum(-1)
            ),
            "kept copy": lambda: y.addmm_(p, kept),
        },
    }


def gates(k: int, num_experts: int) -> dict[str, dict[str, Step]]:
    """Softmax over the k largest of E logits."""
    logits = torch.randn(T, num_experts)

    def scattered() -> Tensor:
        values, index = logits.topk(k, dim=-1, sorted=False)
        torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
        return torch.zeros_like(logits).scatter_(-1, index, values.softmax(-1))

    def masked() -> Tensor:
        index = logits.topk(k, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, True)
        return logits.masked_fill(~chosen, -torch.inf).softmax(-1)

    return {f"gates, {k} of {num_experts}": {"scatter": scattered, "masked_fill": masked}}


def main() -> None:
    print(f"torch {torch.__version__}, {hardware()}\n\n| dtype, features | operation | milliseconds |\n|---|---|---|")
    tables = [("fp32", gates(k, num_experts)) for k, num_experts in ((10, 20), (2, 8))]
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        for features in (1024, 3072):
            for build in (layouts, router_gradient, one_token):
                tables.append((f"{name}, {features}", build(dtype, features)))
    with torch.no_grad():
        for where, operations in tables:
            for operation, forms in operations.items():
                samples = measure(forms, rounds=7, sample_s=0.01)
                times = (f"{form}: {statistics.median(seconds) * 1e3:.3f}" for form, seconds in samples.items())
                print(f"| {where} | {operation} | {'; '.join(times)} |", flush=True)


if __name__ == "__main__":
    main()
