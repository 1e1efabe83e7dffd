"""The whole-matrix, unsharded, one-expert-at-a-time form of the optimizers: slow, readable, and what tests trust.

Nothing here is shared with the fast path except the tags that say which parameters are a pair, and the value below
which damping is raised. Works in the dtype of the parameters, float64 included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..pairs import LoraPair, tag_of
from .preconditioner import NOISE, RELATIVE_DAMPING


def damped_inverse(G: Tensor, damping: float) -> Tensor:
    """`(G + d I)^-1` with `d = max(damping, eps_fp32 * trace(G))`; G: (r, r)."""
    d = max(damping, RELATIVE_DAMPING * G.trace().item())
    return torch.linalg.inv(G + d * torch.eye(len(G), dtype=G.dtype, device=G.device))


def _rank_last(tensor: Tensor, pair: LoraPair, role: str) -> Tensor:
    """A view (E, in or out, r) of a contiguous factor, whatever its storage."""
    if role == "A" and pair.rank_first_A:
        return tensor.reshape(pair.num_experts, pair.rank, -1).mT
    if pair.rank_first_A:
        return tensor.reshape(-1, pair.rank, pair.num_experts).permute(2, 0, 1)
    return tensor.reshape(pair.num_experts, -1, pair.rank)


def spectral_rows(m: Tensor, S: Tensor, damping: float) -> Tensor:
    """`msign(m R) R` with R = (S + d I)^(-1/2), by singular values; m: (n, r), S: (r, r).

    Directions in which |m u|^2 is below NOISE |m|^2 |u|^2, u = R v, are left out.
    """
    d = max(damping, RELATIVE_DAMPING * S.trace().item())
    values, vectors = torch.linalg.eigh(S)
    R = (vectors * (values.clamp_min(0) + d).rsqrt()) @ vectors.T
    U, singular, Vh = torch.linalg.svd(m @ R, full_matrices=False)
    told = singular**2 > NOISE * m.square().sum() * (Vh @ R).square().sum(1)
    return (U * told) @ Vh @ R


class _Reference:
    """
    Args:
        groups: parameters, or groups with options of their own. options: in place of `defaults`.
    """

    defaults: ClassVar[dict[str, Any]]

    def __init__(self, groups: Iterable[Any], **options: Any) -> None:
        assert options.keys() <= self.defaults.keys(), options
        groups = list(groups)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        self.options: dict[nn.Parameter, dict[str, Any]] = {
            p: {**self.defaults, **options, **group} for group in groups for p in group["params"] if p.requires_grad
        }
        self.state: dict[nn.Parameter, dict[str, Any]] = {p: {} for p in self.options}
        self.partner: dict[nn.Parameter, nn.Parameter] = {}  # of every factor of a pair
        halves: dict[LoraPair, nn.Parameter] = {}
        for p in self.options:
            pair, role = tag_of(p) or (None, None)
            if pair is not None and role != "router":
                other = halves.setdefault(pair, p)
                if other is not p:
                    self.partner |= {p: other, other: p}

    @torch.no_grad()
    def step(self) -> None:
        """One step from the parameters' `.grad`; parameters without one stay as they are."""
        grads = {p: p.grad.clone(memory_format=torch.contiguous_format) for p in self.options if p.grad is not None}
        for p in grads.keys() & self.partner.keys():
            pair, role = tag_of(p)  # type: ignore[misc]
            rows = _rank_last(self._prepared(p, grads[p]), pair, role)
            partner = _rank_last(self.partner[p].detach(), pair, "B" if role == "A" else "A")
            for i in range(pair.num_experts):
                S = partner[i].T @ partner[i]
                rows[i].copy_(self._rows(rows[i], S, pair, role, self.options[p]))
        for p, grad in grads.items():
            self._update(p, grad, self.state[p], self.options[p])

    def _prepared(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        """May change the gradient of a factor, in place."""
        return grad

    def _rows(self, rows: Tensor, S: Tensor, pair: LoraPair, role: str, options: dict[str, Any]) -> Tensor:
        """`rows (S + d I)^-1`, that is (B_i^T B_i + d I)^-1 grad_A_i and grad_B_i (A_i A_i^T + d I)^-1.

        Args:
            rows: of one expert's gradient, (in or out, r). S: Gram matrix of its other factor.
        """
        return rows @ damped_inverse(S, options["damping"]) / (pair.scaling**2 if options["include_scaling"] else 1.0)

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        """Moves a parameter, given what became of its gradient."""
        raise NotImplementedError


class ReferenceAdamW(_Reference):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) on preconditioned gradients."""

    defaults: ClassVar = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "damping": 1e-6,
        "include_scaling": False,
    }

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        lr, (b1, b2) = options["lr"], options["betas"]
        t = state["step"] = state.get("step", 0) + 1
        m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * grad
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * grad**2
        p.mul_(1 - lr * options["weight_decay"])
        p.sub_(lr * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + options["eps"]))


class ReferenceSGD(_Reference):
    """SGD with torch's heavy-ball momentum and coupled weight decay on preconditioned gradients."""

    defaults: ClassVar = {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "damping": 1e-6, "include_scaling": False}

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        grad = grad + options["weight_decay"] * p
        velocity = state["velocity"] = options["momentum"] * state.get("velocity", 0) + grad
        p.sub_(options["lr"] * velocity)


class ReferenceMuon(ReferenceAdamW):
    """LoRA-Muon (arXiv 2606.12921) on every expert of the pairs, AdamW on everything else."""

    defaults: ClassVar = {
        "lr": 1e-2,
        "momentum": 0.95,
        "weight_decay": 0.0,
        "damping": 1e-6,
        "aux_lr": 1e-3,
        "aux_betas": (0.9, 0.999),
        "aux_eps": 1e-8,
    }

    def _prepared(self, p: nn.Parameter, grad: Tensor) -> Tensor:
        momentum = self.options[p]["momentum"]
        self.state[p]["m"] = momentum * self.state[p].get("m", 0) + (1 - momentum) * grad
        return grad.copy_(self.state[p]["m"])

    def _rows(self, rows: Tensor, S: Tensor, pair: LoraPair, role: str, options: dict[str, Any]) -> Tensor:
        d = max(options["damping"], RELATIVE_DAMPING * S.trace().item())
        if role == "A" and S.trace() <= pair.rank * d:
            return torch.zeros_like(rows)
        return spectral_rows(rows, S, options["damping"]) / (2 * abs(pair.scaling))

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        if p in self.partner:
            decay = (1 - options["lr"] * options["weight_decay"]) ** 0.5
            p.mul_(decay).sub_(options["lr"] / decay * grad)
        else:
            aux = {name: options[f"aux_{name}"] for name in ("lr", "betas", "eps")}
            super()._update(p, grad, state, {**options, **aux})
