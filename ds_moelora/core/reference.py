"""The whole-matrix, unsharded, one-expert-at-a-time form of the optimizers: slow, readable, and what tests trust.

Nothing here is shared with the fast path except the tags that say which parameters are a pair, and the value below
which damping is raised. Works in the dtype of the parameters, float64 included.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .pairs import LoraPair
from .preconditioner import RELATIVE_DAMPING


def riemannian_gradients(
    A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, damping: float
) -> tuple[Tensor, Tensor]:
    """`(B^T B + d I)^-1 grad_A` and `grad_B (A A^T + d I)^-1` of one expert, `d = max(damping, eps_fp32 * trace)`.

    Args:
        A, grad_A: (r, in).
        B, grad_B: (out, r).
    """

    def inverse(G: Tensor) -> Tensor:
        d = max(damping, RELATIVE_DAMPING * G.trace().item())
        return torch.linalg.inv(G + d * torch.eye(len(G), dtype=G.dtype, device=G.device))

    return inverse(B.T @ B) @ grad_A, grad_B @ inverse(A @ A.T)


def _rank_last(tensor: Tensor, pair: LoraPair, role: str) -> Tensor:
    """A view (E, in or out, r) of a contiguous factor, whatever its storage."""
    if role == "A" and pair.rank_first_A:
        return tensor.reshape(pair.rank, -1).T.unsqueeze(0)
    return tensor.reshape(pair.num_experts, -1, pair.rank)


def _preconditioned(params: list[nn.Parameter], damping: float) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter that has one, with those of tagged pairs preconditioned expert by expert."""
    grads = {p: p.grad.clone(memory_format=torch.contiguous_format) for p in params if p.grad is not None}
    halves: dict[int, dict[str, nn.Parameter]] = {}
    for p in params:
        if getattr(p, "lora_role", None) in ("A", "B"):
            halves.setdefault(id(p.lora_pair), {})[p.lora_role] = p
    for factors in halves.values():
        pair = factors["A"].lora_pair
        A, B = (_rank_last(factors[role].detach(), pair, role) for role in "AB")
        grad_A, grad_B = (
            _rank_last(grads.get(factors[role], torch.zeros_like(factors[role])), pair, role) for role in "AB"
        )
        for i in range(pair.num_experts):
            new_A, new_B = riemannian_gradients(A[i].T, B[i], grad_A[i].T, grad_B[i], damping)
            grad_A[i] = new_A.T
            grad_B[i] = new_B
    return grads


class _Reference:
    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float, damping: float) -> None:
        self.params = [p for p in params if p.requires_grad]
        self.lr, self.weight_decay, self.damping = lr, weight_decay, damping
        self.steps: dict[nn.Parameter, int] = {}

    def _update(self, p: nn.Parameter, grad: Tensor, lr: float, step: int) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, lr_scale: dict[nn.Parameter, float] | None = None) -> None:
        """One step from the parameters' `.grad`; parameters without one stay as they are."""
        for p, grad in _preconditioned(self.params, self.damping).items():
            self.steps[p] = self.steps.get(p, 0) + 1
            self._update(p, grad, self.lr * (lr_scale or {}).get(p, 1.0), self.steps[p])

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


class ReferenceAdamW(_Reference):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) on preconditioned gradients."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
    ) -> None:
        super().__init__(params, lr, weight_decay, damping)
        self.betas, self.eps = betas, eps
        self.m = {p: torch.zeros_like(p) for p in self.params}
        self.v = {p: torch.zeros_like(p) for p in self.params}

    def _update(self, p: nn.Parameter, grad: Tensor, lr: float, step: int) -> None:
        b1, b2 = self.betas
        self.m[p] = b1 * self.m[p] + (1 - b1) * grad
        self.v[p] = b2 * self.v[p] + (1 - b2) * grad**2
        m_hat = self.m[p] / (1 - b1**step)
        v_hat = self.v[p] / (1 - b2**step)
        p.mul_(1 - lr * self.weight_decay)
        p.sub_(lr * m_hat / (v_hat.sqrt() + self.eps))


class ReferenceSGD(_Reference):
    """SGD with torch's heavy-ball momentum and coupled weight decay on preconditioned gradients."""

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
    ) -> None:
        super().__init__(params, lr, weight_decay, damping)
        self.momentum = momentum
        self.buffers: dict[nn.Parameter, Tensor] = {}

    def _update(self, p: nn.Parameter, grad: Tensor, lr: float, step: int) -> None:
        grad = grad + self.weight_decay * p
        if self.momentum:
            grad = grad + self.momentum * self.buffers[p] if p in self.buffers else grad
            self.buffers[p] = grad
        p.sub_(lr * grad)
