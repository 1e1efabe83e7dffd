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


def preconditioned_gradients(
    params: Iterable[nn.Parameter],
    damping: dict[nn.Parameter, float],
    include_scaling: dict[nn.Parameter, bool] | None = None,
) -> dict[nn.Parameter, Tensor]:
    """The gradient of every parameter that has one; in tagged pairs, for every expert i,

        (B_i^T B_i + d I)^-1 grad_A_i        and        grad_B_i (A_i A_i^T + d I)^-1.

    Args:
        params: any order; A: r x in and B: out x r below are the factors of one expert.
        damping: d of each parameter.
        include_scaling: whether a parameter's is divided by s^2, too; None: no.
    """
    params = list(params)
    grads = {p: p.grad.clone(memory_format=torch.contiguous_format) for p in params if p.grad is not None}
    factors: dict[LoraPair, dict[str, nn.Parameter]] = {}
    for p in params:
        tag = tag_of(p)
        if tag is not None and tag[1] != "router":
            factors.setdefault(tag[0], {})[tag[1]] = p
    for pair, roles in factors.items():
        square = {p: pair.scaling**2 if (include_scaling or {}).get(p) else 1.0 for p in roles.values()}
        A, B = (_rank_last(roles[role].detach(), pair, role) for role in "AB")
        for i in range(pair.num_experts):
            if roles["A"] in grads:
                grad_A = _rank_last(grads[roles["A"]], pair, "A")[i].T
                grad_A.copy_(damped_inverse(B[i].T @ B[i], damping[roles["A"]]) @ grad_A / square[roles["A"]])
            if roles["B"] in grads:
                grad_B = _rank_last(grads[roles["B"]], pair, "B")[i]
                grad_B.copy_(grad_B @ damped_inverse(A[i].T @ A[i], damping[roles["B"]]) / square[roles["B"]])
    return grads


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
        self.params = list(self.options)
        self.state: dict[nn.Parameter, dict[str, Any]] = {p: {} for p in self.params}

    def _update(self, p: nn.Parameter, grad: Tensor, state: dict[str, Any], options: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self) -> None:
        """One step from the parameters' `.grad`; parameters without one stay as they are."""
        damping = {p: options["damping"] for p, options in self.options.items()}
        scaled = {p: options["include_scaling"] for p, options in self.options.items()}
        for p, grad in preconditioned_gradients(self.params, damping, scaled).items():
            self._update(p, grad, self.state[p], self.options[p])


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


def spectral_step(m: Tensor, S: Tensor, damping: float) -> Tensor:
    """`msign(m R) R` with R = (S + d I)^(-1/2), by singular values; m: (n, r), S: (r, r).

    Directions in which |m u|^2 is below NOISE |m|^2 |u|^2, u = R v, are left out.
    """
    d = max(damping, RELATIVE_DAMPING * S.trace().item())
    values, vectors = torch.linalg.eigh(S)
    R = (vectors * (values.clamp_min(0) + d).rsqrt()) @ vectors.T
    U, singular, Vh = torch.linalg.svd(m @ R, full_matrices=False)
    told = singular**2 > NOISE * m.square().sum() * (Vh @ R).square().sum(1)
    return (U * told) @ Vh @ R


class ReferenceMuon(_Reference):
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

    @torch.no_grad()
    def step(self) -> None:
        """One step from the parameters' `.grad`; parameters without one stay as they are."""
        factors: dict[LoraPair, dict[str, nn.Parameter]] = {}
        for p in self.params:
            tag = tag_of(p)
            if tag is not None and tag[1] != "router":
                factors.setdefault(tag[0], {})[tag[1]] = p
        before = {p: p.detach().clone() for p in self.params}
        partner = {pair[role]: pair["BA"["AB".index(role)]] for pair in factors.values() for role in "AB"}
        for p in self.params:
            if p.grad is None:
                continue
            options, state = self.options[p], self.state[p]
            if p not in partner:
                aux = {"lr": "aux_lr", "betas": "aux_betas", "eps": "aux_eps"}
                aux_options = {name: options[given] for name, given in aux.items()}
                ReferenceAdamW._update(self, p, p.grad, state, {**options, **aux_options})  # type: ignore[arg-type]
                continue
            m = state["m"] = options["momentum"] * state.get("m", 0) + (1 - options["momentum"]) * p.grad
            (pair, role), c = tag_of(p), (1 - options["lr"] * options["weight_decay"]) ** 0.5  # type: ignore[misc]
            other = _rank_last(before[partner[p]].contiguous(), pair, "BA"["AB".index(role)])
            steps = torch.zeros_like(p, memory_format=torch.contiguous_format)
            for i in range(pair.num_experts):
                S, rows = other[i].T @ other[i], _rank_last(m.contiguous(), pair, role)[i]
                d = max(options["damping"], RELATIVE_DAMPING * S.trace().item())
                if role == "B" or S.trace() > pair.rank * d:
                    _rank_last(steps, pair, role)[i].copy_(spectral_step(rows, S, options["damping"]))
            p.mul_(c).sub_(options["lr"] / (2 * abs(pair.scaling)) / c * steps)
