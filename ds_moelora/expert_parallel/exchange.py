"""Moving tokens to experts ("tokens"): every process computes the products of its own experts, for everybody's tokens.

Shape suffixes as in `mixture.operands`, T being this process's tokens and E the experts of all; and L = E / processes
experts of this one; N rows (token, process of an expert that it chose) that this process sends, M that it receives.

Communication phases: all-to-alls with as many rows as there are; nothing is dropped.

    forward   row counts; x (I) and gates (L) of every row to the experts' process; the mixture's output (O) back
    backward  dy (O) to the experts' process; dx (I) and dgates (L) back

Every process of the group takes part in every phase, with no rows as well. dA and dB are sums over the group's tokens,
as DeepSpeed expects of expert parameters: it adds up over the expert-data-parallel group and divides by the world size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..mixture.operands import Grads, Needs, Operands, Products
from ..mixture.routing import chosen_by


class _Rows:
    """Who sends which rows to whom."""

    def __init__(self, chosen: Tensor, group: dist.ProcessGroup) -> None:
        self.group, ranks = group, dist.get_world_size(group)
        wanted = chosen.view(len(chosen), ranks, chosen.shape[1] // ranks).any(-1)
        self.rank, self.token = wanted.t().nonzero(as_tuple=True)
        counts = wanted.sum(0)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=group)
        self.sent, self.received = counts.tolist(), received.tolist()

    def by_process(self, values_TE: Tensor) -> Tensor:
        """(T, E) -> (T, processes, L), a view."""
        ranks = len(self.sent)
        return values_TE.view(len(values_TE), ranks, values_TE.shape[1] // ranks)  # not -1: there may be no tokens

    def there(self, rows_N: Tensor) -> Tensor:
        """(N, a) of this process -> (M, a) for its experts."""
        return self._move(rows_N, self.sent, self.received)

    def back(self, rows_M: Tensor) -> Tensor:
        """(M, a) -> (N, a)."""
        return self._move(rows_M, self.received, self.sent)

    def _move(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        result = rows.new_empty(sum(received), rows.shape[1])
        dist.all_to_all_single(result, rows.contiguous(), received, sent, group=self.group)
        return result


class Exchanged(Products):
    """The products of one call of a mixture; its operands have this process's factors and everybody's gates.

    lora_A is (L, I, R) and lora_B (L, O, R); gates are (T, E).

    Args:
        products: how they are computed here.
    """

    _rows: _Rows

    def __init__(self, group: dist.ProcessGroup, products: Products) -> None:
        self.group, self.products, self.name = group, products, products.name

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        gates = operands.token_gates()
        rows = self._rows = _Rows(chosen_by(gates), self.group)
        # The sign of a gate says whether the expert was chosen, and travels with it.
        gates_M = rows.there(rows.by_process(gates)[rows.token, rows.rank])
        moved = operands._replace(x=rows.there(operands.x[rows.token]), gates=gates_M)
        zeros = base_out.new_zeros(len(gates_M), base_out.shape[1])
        y_M, moved, p = self.products.forward(moved, zeros, True)
        y = base_out if inplace else base_out.clone()
        return y.index_add_(0, rows.token, rows.back(y_M)), moved, p

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        assert needs.dlogits is None, "the router runs before the tokens are sent"
        rows, (num_local, in_features, _) = self._rows, operands.lora_A.shape
        grads = self.products.backward(operands, p, rows.there(dy[rows.token]), needs._replace(onto=None))
        dx = dgates = None
        if grads.x is not None:
            dx = dy.new_zeros(len(dy), in_features) if needs.onto is None else needs.onto
            dx.index_add_(0, rows.token, rows.back(grads.x))
        if grads.gates is not None:
            dgates = grads.gates.new_zeros(len(dy), len(rows.sent) * num_local)
            rows.by_process(dgates)[rows.token, rows.rank] = rows.back(grads.gates)
        return grads._replace(x=dx, gates=dgates)
