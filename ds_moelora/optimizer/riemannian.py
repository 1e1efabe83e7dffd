"""GateRiemannianAdamW and GateRiemannianSGD: torch's AdamW and SGD on Riemannian-preconditioned gradients.

Per expert, with G_A = A A^T and G_B = B^T B taken before the step (Sun et al., arXiv 2502.15828; Zhang & Pilanci,
arXiv 2402.02347):

    grad_A <- (G_B + d I)^-1 grad_A        grad_B <- grad_B (G_A + d I)^-1        d = max(damping, eps_fp32 * trace)

(both divided by s^2 with `include_scaling`), then the ordinary AdamW / SGD update. An optimizer is three things: the
Gram matrices that it needs and what it makes of them, one r x r matrix per expert (`sharding.exchange`, by
`preconditioner.damped_inverse`), and an element-wise update (torch's, whose state has the same shape everywhere).

Under ZeRO the gradients are preconditioned inside `step()`, on the slice that each process owns, after DeepSpeed has
reduced, unscaled and clipped them: `optimizer.sharding` says how. Parameters without a tag follow torch's rule exactly.
The gate scaling acts in the layers' backward pass: `optimizer.gates`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import nn

from ..pairs import tag_of
from .factors import Factor, collect_pairs
from .gates import GateHold
from .groups import ParamGroup, as_groups, as_tensor, expert_group_name, scaled_learning_rates
from .guard import await_step, stepped
from .kernels.adamw import CppAdamW
from .kernels.cpp import Kernels, load_kernels
from .options import DEFAULTS, PairOptions, check_options
from .sharding.exchange import ShardedPreconditioner
from .sharding.zero import GROUP_KEY, Storage, find_storage, is_stage_3
from .step_statistics import StepStatistics


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch wraps `step` of every optimizer class that is instantiated with the step hooks; ours runs them already."""
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step


class _Located(NamedTuple):
    """Where the parameters are, and what steps them there. `holder` tells whether they have moved since."""

    holder: Hashable
    storage: Storage
    preconditioner: ShardedPreconditioner
    update: CppAdamW | None


class _GateRiemannian(torch.optim.Optimizer):
    """What both optimizers share. Stands before torch's class in the method resolution order.

    DeepSpeed replaces `param_groups[i]["params"]`, hides groups while it steps one, and drops empty ones. So the
    parameters that a group was given (`_members`) and its dict (`_known_groups`) are kept by the group's number.
    """

    _base: type[torch.optim.Optimizer]
    _fused_dtypes: frozenset[torch.dtype]  # for which torch's fused kernel is asked for
    _update_type: type[CppAdamW] | None = None
    statistics: StepStatistics | None = None  # set by who wants to know what the next steps do
    compiled = False
    _kernels: Kernels | None = None

    def _construct(self, params: Any, pair_options: PairOptions, compiled: bool, **torch_options: Any) -> None:
        groups, options = as_groups(params), asdict(pair_options)
        for group in groups or [{}]:
            check_options({**options, **group})
        self._forget_pairs(options)
        self._use_kernels(compiled)
        tensors = [as_tensor(p) for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype in self._fused_dtypes for p in tensors) or None
        super().__init__(groups, **torch_options, fused=fused)  # type: ignore[call-arg]
        self.defaults.update(options)
        self._collect()
        await_step(self._factors or [], type(self).__name__)

    def _use_kernels(self, compiled: bool) -> None:
        if not isinstance(compiled, bool):
            raise ValueError(f"compiled={compiled!r} must be true or false.")
        self.compiled, self._kernels = compiled, load_kernels() if compiled else None

    def _forget_pairs(self, options: dict[str, Any]) -> None:
        self._options = options
        self._known_groups: dict[int, ParamGroup] = {}
        self._members: dict[int, list[nn.Parameter]] = {}
        self._factors: list[Factor] | None = None
        self._trained: list[bool] = []
        self._located: _Located | None = None
        self._gates = GateHold(self)

    # -- parameter groups ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, but some parameters get groups of their own.

        Routers in a group whose `gate_lr_scale` is not 1: a group with that scale. Experts that are spread over
        processes (`ep_size > 1`): one group per process group with the keys "moe" and "name", as DeepSpeed wants them.
        """
        (given,) = as_groups([param_group])
        given = {**self._options, **given}
        check_options(given)
        splits_routers = "lr_scale" not in given and given["gate_lr_scale"] != 1.0
        parts: dict[tuple[bool, str], list[Any]] = {(False, ""): []}
        for p in given["params"]:
            is_router = splits_routers and (tag_of(as_tensor(p)) or (None, None))[1] == "router"
            shared_by = "" if "moe" in given else expert_group_name(as_tensor(p))
            parts.setdefault((is_router, shared_by), []).append(p)
        for (is_router, shared_by), members in parts.items():
            if members or not given["params"]:
                extra = {"moe": True, "name": shared_by} if shared_by else {}
                lr_scale = given["gate_lr_scale"] if is_router else 1.0
                group = {"lr_scale": lr_scale, **given, **extra, "params": members, GROUP_KEY: len(self._known_groups)}
                super().add_param_group(group)
                self._known_groups[group[GROUP_KEY]] = group
                self._members[group[GROUP_KEY]] = list(group["params"])
        self._factors = None

    def _collect(self) -> None:
        """Finds the pairs, and holds their layers at this optimizer's gate settings."""
        self._factors = collect_pairs(self._members)
        self._trained = self._requires_grad()
        self._located = None
        self._gates.take(self._factors, self._known_groups)

    def _requires_grad(self) -> list[bool]:
        return [p.requires_grad for params in self._members.values() for p in params]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled": self.compiled}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` and on unpickling: the groups are new dicts, with the loaded settings."""
        super().__setstate__(state)
        if not hasattr(self, "_options"):
            self._forget_pairs(dict(DEFAULTS))
            self._use_kernels(self.compiled)
        for index, group in enumerate(self.param_groups):
            for name, value in {**self._options, "lr_scale": 1.0, GROUP_KEY: index}.items():
                group.setdefault(name, value)
            self._known_groups[group[GROUP_KEY]] = group
            self._members.setdefault(group[GROUP_KEY], list(group["params"]))
        self._collect()

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Preconditions the gradients of all pairs in place, then takes torch's step.

        A parameter without a gradient is left alone, as in torch; the other factor of its pair is preconditioned all
        the same.

        Raises:
            ValueError: a closure under ZeRO, a sparse gradient, half a pair, `compiled` without effect.
        """
        taken_over = self._located is not None and self._located.storage.sharded
        if self._factors is None or (not taken_over and self._trained != self._requires_grad()):
            self._collect()  # groups were added, or parameters frozen or thawed (which ZeRO does not follow)
        located = self._locate()
        loss = None
        if closure is not None:
            if located is not None and located.storage.sharded:
                raise ValueError(
                    "a closure cannot be evaluated inside a ZeRO step, whose gradients are reduced before it: call "
                    "engine.backward(loss) and engine.step() without a closure."
                )
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), scaled_learning_rates(self.param_groups), ExitStack() as until_stepped:
            if located is not None:
                self._precondition(located, until_stepped)
            _unhooked(self._base.step)(self)
        if located is not None and self.statistics is not None:
            self.statistics.end()
        return loss

    def _precondition(self, located: _Located, until_stepped: ExitStack) -> None:
        """Preconditions what this call steps, or steps it; then torch's step must run before `until_stepped` closes."""
        _, storage, preconditioner, update = located
        units, watched = storage.units(self.param_groups), self.statistics
        preconditioner.watch = None
        if watched is not None:  # what is watched are preconditioned gradients, which `update` does not write
            watched.begin(preconditioner, storage, units)
            preconditioner(units)
            watched.after_preconditioning()
        elif update is not None:
            update.begin(self)
            until_stepped.enter_context(update.finished(preconditioner(units, update)))
        else:
            preconditioner(units)

    def _locate(self) -> _Located | None:
        """Where the parameters are now: DeepSpeed takes them over after the optimizer was built. None: no pairs."""
        factors, groups = self._factors, self._known_groups
        assert factors is not None
        if not factors:
            return None
        first = factors[0].param
        held = groups[factors[0].group]["params"]
        holder = (is_stage_3(first) or tuple(id(p) for p in held[:1]), len(groups))
        if self._located is None or self._located.holder != holder:
            trained = [(p, index) for index, ps in self._members.items() for p in ps if p.requires_grad]
            storage = find_storage([p for p, _ in trained], [index for _, index in trained], groups)
            position = {id(p): i for i, (p, _) in enumerate(trained)}
            preconditioner = ShardedPreconditioner(
                factors,
                [storage.placement(position[id(f.param)]) for f in factors],
                storage.flat,
                # Functions of the groups alone: what referred to the optimizer would outlive its last other reference.
                damping=lambda i: groups[factors[i].group]["damping"],
                divisor=lambda i: factors[i].pair.scaling ** 2 if groups[factors[i].group]["include_scaling"] else 1.0,
                comm_device=first.device,
                kernels=self._kernels,
            )
            update = self._update_type(storage.held) if self._kernels and self._update_type else None
            self._located = _Located(holder, storage, preconditioner, update)
            stepped(factors)
        return self._located


class GateRiemannianAdamW(_GateRiemannian, torch.optim.AdamW):
    """AdamW on gate-scaled Riemannian-preconditioned gradients (gRAdamW of arXiv 2502.15828), exact under ZeRO.

    `m, v` are the moments of the preconditioned gradient; decoupled weight decay; bias correction; torch's fused
    kernel. Parameters outside LoRA pairs follow `torch.optim.AdamW` exactly.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`. The paper uses lr 1e-5.
        damping: d in (G + d I)^-1, raised to eps_fp32 * trace(G) where that is larger.
        gate_scaling: factor on the gradient that reaches an expert's factors, given its gate g: "none" (g), "sqrt"
            (sqrt(g), the paper's choice) or "full" (1). Set in the layers as long as this optimizer lives.
        scale_input_grad: put the same factor on the gradient into the layer's input, as the published code does.
        gate_lr_scale: factor on the routers' learning rate (paper: 1e-3). Each group's routers become a group of their
            own with the key `lr_scale`, applied inside the step, whatever a scheduler writes into `lr`.
        include_scaling: divide both inverses by s^2, as the metric of s B A demands: the step of s B A then no longer
            depends on how it is split between s and the factors. False, as published, ignores s.
        compiled: have C++ kernels do the work on pairs, in one pass with AdamW's (`optimizer.kernels.cpp`): float32 on
            CPUs, CPU offload included; ranks 1, 2, 4, 8, 16; torch does other ranks. Gradients are not overwritten.

    The five before the last can be set per parameter group.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, a layer that another living optimizer holds at
            another gate scaling, `compiled` without a compiler; at `step()`: see there.
    """

    _base = torch.optim.AdamW
    _update_type = CppAdamW
    _fused_dtypes = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        compiled: bool = False,
    ) -> None:
        options = PairOptions(
            damping=damping,
            gate_scaling=gate_scaling,
            scale_input_grad=scale_input_grad,
            gate_lr_scale=gate_lr_scale,
            include_scaling=include_scaling,
        )
        self._construct(params, options, compiled, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


class GateRiemannianSGD(_GateRiemannian, torch.optim.SGD):
    """SGD on gate-scaled Riemannian-preconditioned gradients (gRSGD of arXiv 2502.15828), exact under ZeRO.

    Momentum and coupled weight decay as in `torch.optim.SGD`, which parameters outside LoRA pairs follow exactly.

    Args:
        params: parameters or groups, among them the lora_A and lora_B of at least one tagged pair.
        lr, momentum, weight_decay: as in `torch.optim.SGD`. The paper uses lr 3e-5.
        damping, gate_scaling, scale_input_grad, gate_lr_scale, include_scaling: as in `GateRiemannianAdamW`.
        compiled: as there, but the update itself stays torch's.

    Raises:
        ValueError: no pairs, half a pair, an option out of range, a layer that another living optimizer holds at
            another gate scaling, `compiled` without a compiler; at `step()`: see there.
    """

    _base = torch.optim.SGD
    # torch 2.13's fused SGD takes wrong steps with bf16 parameters on CPUs, and fails with momentum once a parameter
    # gets its first gradient after the others (tests/optimizer/test_optimizer.py has both cases).
    _fused_dtypes = frozenset()

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        gate_scaling: str = "sqrt",
        scale_input_grad: bool = False,
        gate_lr_scale: float = 1.0,
        include_scaling: bool = False,
        compiled: bool = False,
    ) -> None:
        options = PairOptions(
            damping=damping,
            gate_scaling=gate_scaling,
            scale_input_grad=scale_input_grad,
            gate_lr_scale=gate_lr_scale,
            include_scaling=include_scaling,
        )
        self._construct(params, options, compiled, lr=lr, momentum=momentum, weight_decay=weight_decay)
