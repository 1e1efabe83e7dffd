"""What all optimizers of pairs share: finding the pairs, and one step of them wherever DeepSpeed put the parameters.

An optimizer is three things (docs/optimizer.md, "Adding an optimizer"):

    Grams           of both factors, and of the gradients' rows too if `_needs_gradient_grams`
    matrices        `_matrices` makes one r x r matrix per expert of them, by which every gradient row is multiplied
    update          element-wise, from the products: that of torch's class, or an `Update` where this is not enough

Under ZeRO this happens inside `step()`, on the slice that each process owns, after DeepSpeed has reduced, unscaled and
clipped the gradients: `optimizer.sharding` says how. Gate scaling acts in the layers' backward pass: `optimizer.gates`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..pairs import tag_of
from .factors import Factor, collect_pairs
from .gates import GateHold
from .groups import ParamGroup, as_groups, as_tensor, check_options, expert_group_name, scaled_learning_rates
from .guard import await_step
from .kernels import choose, load
from .kernels.rows import AdamWState, Extents, Kernels, capturing
from .sharding.exchange import Matrices, ShardedPreconditioner
from .sharding.zero import GROUP_KEY, Storage, find_storage, is_stage_3
from .step_statistics import StepStatistics


class Update(Protocol):
    """An element-wise update of some units, in place of torch's. Built once parameters are where they stay."""

    keeps_gradients: bool  # the products are not written into the gradients

    def begin(self, optimizer: torch.optim.Optimizer, units: set[Hashable]) -> None:
        """Before the Gram matrices are taken. May change the gradients of `units`."""

    def state_of(self, unit: Hashable) -> AdamWState | None:
        """What kernels need to update a unit's rows as they multiply them; None: they only multiply."""

    def finished(self, done: Extents) -> AbstractContextManager[None]:
        """Updates the rest of its units, and hides their gradients from torch's step meanwhile."""


class _Located(NamedTuple):
    """Where the parameters are, and what steps them there. `holder` tells whether they have moved since."""

    holder: Hashable
    storage: Storage
    preconditioner: ShardedPreconditioner
    update: Update | None


class GateRiemannian(torch.optim.Optimizer):
    """Stands before torch's class in the method resolution order.

    DeepSpeed replaces `param_groups[i]["params"]`, hides groups while it steps one, and drops empty ones. So the
    parameters that a group was given (`_members`) and its dict (`_known_groups`) are kept by the group's number.
    """

    _base: type[torch.optim.Optimizer]
    # For which torch's fused kernel is asked for.
    _fused_dtypes: frozenset[torch.dtype] = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
    _needs_gradient_grams = False
    statistics: StepStatistics | None = None  # set by who wants to know what the next steps do
    kernels = "auto"
    _loaded: Kernels | None = None  # what `kernels` names

    # -- what an optimizer defines ------------------------------------------------------------------------------------

    @staticmethod
    def _settings(factor: Factor, group: ParamGroup) -> tuple[float, ...]:
        """The numbers for a factor's gradient that `_matrices` wants; the damping is the first one."""
        raise NotImplementedError

    @classmethod
    def _matrices(cls, kernels: Kernels | None) -> Matrices:
        """The function (partners' Gram matrices, gradients' or None, *settings) -> matrices; all (N, r, r)."""
        raise NotImplementedError

    @classmethod
    def _update(cls, storage: Storage, factor_units: set[Hashable], kernels: Kernels | None) -> Update | None:
        """None: torch's."""
        return None

    @staticmethod
    def _part(role: str | None, group: ParamGroup) -> tuple[str, float]:
        """Name and `lr_scale` of the part of a group that a parameter belongs to; `role`: of its tag."""
        scale = group["gate_lr_scale"] if role == "router" else 1.0
        return ("router", scale) if scale != 1.0 and "lr_scale" not in group else ("", group.get("lr_scale", 1.0))

    # -- construction -------------------------------------------------------------------------------------------------

    def _construct(self, given: dict[str, Any]) -> None:
        """`given`: the constructor's `locals()`. What torch's class does not take are options of pairs."""
        given = {name: value for name, value in given.items() if name != "self"}
        groups = as_groups(given.pop("params"))
        kernels = given.pop("kernels", "auto")
        known = inspect.signature(self._base).parameters
        options = {name: value for name, value in given.items() if name not in known}
        for group in groups or [{}]:
            check_options({**given, **group})
        self._forget_pairs(options)
        self._use_kernels(kernels)
        tensors = [as_tensor(p) for group in groups for p in group["params"]]
        fused = all(p.device.type in ("cpu", "cuda") and p.dtype in self._fused_dtypes for p in tensors) or None
        if "capturable" in known and isinstance(given["lr"], Tensor) and given["lr"].is_cuda:
            given["capturable"] = True  # what torch wants for a step in a CUDA graph
        super().__init__(groups, **{name: given[name] for name in given.keys() & known}, fused=fused)  # type: ignore[call-arg]
        self.defaults.update(options)
        self._collect()
        await_step(self._factors or [], type(self).__name__)

    def _use_kernels(self, kernels: str) -> None:
        self.kernels, self._loaded = kernels, load(kernels)

    def _forget_pairs(self, options: dict[str, Any]) -> None:
        self._options = options
        self._known_groups: dict[int, ParamGroup] = {}
        self._members: dict[int, list[nn.Parameter]] = {}
        self._factors: list[Factor] | None = None
        self._trained: list[bool] = []
        self._located: _Located | None = None
        self._gates = GateHold(self)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As torch's, but some parameters get groups of their own.

        Parts with another `lr_scale`: see `_part`. Experts that are spread over processes (`ep_size > 1`): one group
        per process group with the keys "moe" and "name", as DeepSpeed wants them.
        """
        (given,) = as_groups([param_group])
        given = {**self._options, **given}
        settings = {**self.defaults, **given}
        check_options(settings)
        parts: dict[tuple[str, str], list[Any]] = {} if given["params"] else {("", ""): []}
        scales = {"": 1.0}
        for p in given["params"]:
            _, role = tag_of(as_tensor(p)) or (None, None)
            part, scales[part] = self._part(role, settings)
            parts.setdefault((part, "" if "moe" in given else expert_group_name(as_tensor(p))), []).append(p)
        for part, shared_by in sorted(parts):
            extra = {"moe": True, "name": shared_by} if shared_by else {}
            extra |= {"params": parts[part, shared_by], "lr_scale": scales[part], GROUP_KEY: len(self._known_groups)}
            group = {**given, **extra}
            number = group[GROUP_KEY]
            super().add_param_group(group)
            self._known_groups[number], self._members[number] = group, list(group["params"])
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
        return {**super().__getstate__(), "kernels": self.kernels, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by `load_state_dict` and on unpickling: the groups are new dicts, with the loaded settings."""
        unpickled = not hasattr(self, "_options")
        super().__setstate__(state)
        if unpickled:
            self._forget_pairs(self._options)
            self._use_kernels(self.kernels)
        for index, group in enumerate(self.param_groups):
            for name, value in {**self._options, "lr_scale": 1.0, GROUP_KEY: index}.items():
                group.setdefault(name, value)
            self._known_groups[group[GROUP_KEY]] = group
            self._members.setdefault(group[GROUP_KEY], list(group["params"]))
        self._collect()

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Multiplies the gradients of all pairs by their matrices, in place, then takes the element-wise step.

        A parameter without a gradient is left alone, as in torch; the other factor of its pair is stepped all the same.

        Raises:
            ValueError: a closure under ZeRO, a sparse gradient, half a pair, `kernels` without effect, a CUDA graph
                that cannot capture the step.
        """
        taken_over = self._located is not None and self._located.storage.sharded
        if self._factors is None or (not taken_over and self._trained != self._requires_grad()):
            self._collect()  # groups were added, or parameters frozen or thawed (which ZeRO does not follow)
        if capturing():
            self._refuse_capture()
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
                self._step_pairs(located, until_stepped)
            _unhooked(self._base.step)(self)
        if located is not None and self.statistics is not None:
            self.statistics.end()
        return loss

    def _refuse_capture(self) -> None:
        """Refuses to be recorded by a CUDA graph where its replay would do something else.

        Raises:
            ValueError: the reason, and the remedy.
        """
        reason = None
        if self._needs_gradient_grams:
            reason = "its eigendecomposition waits for the device; capture the rest of the step without the optimizer"
        elif self._located is None:
            reason = "nothing is planned yet; take one step before the capture"
        elif not all(isinstance(group["lr"], Tensor) and group["lr"].is_cuda for group in self.param_groups):
            reason = 'a number lr would stay what it is now; build with lr=torch.tensor(lr, device="cuda")'
        elif self.statistics is not None:
            reason = "its statistics allocate; take reported steps outside the graph"
        if reason:
            raise ValueError(f"a CUDA graph cannot capture a step of {type(self).__name__}: {reason}.")

    def _step_pairs(self, located: _Located, until_stepped: ExitStack) -> None:
        """Does all that torch's step, which must run before `until_stepped` closes, does not do."""
        _, storage, preconditioner, update = located
        units, watched = storage.units(self.param_groups), self.statistics
        preconditioner.watch = None
        if watched is not None:
            watched.begin(preconditioner, storage, units)
            if update is not None and update.keeps_gradients:  # the products are what is watched
                update = None
        if update is not None:
            update.begin(self, units)
        done = preconditioner(units, update.state_of) if update is not None else preconditioner(units)
        if watched is not None:
            watched.after_preconditioning()
        if update is not None:
            until_stepped.enter_context(update.finished(done))

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
            places = [storage.placement(position[id(f.param)]) for f in factors]
            settings, units = self._settings, dict.fromkeys(place.unit for place in places)
            replicated = not storage.sharded and dist.is_available() and dist.is_initialized()
            kernels = choose(
                self.kernels,
                self._loaded,
                [storage.flat(unit)[0] for unit in units],
                {factor.rank for factor in factors},
                replicated=replicated and dist.get_world_size() > 1,
            )
            preconditioner = ShardedPreconditioner(
                factors,
                places,
                storage.flat,
                self._matrices(kernels),
                # A function of the groups alone: what referred to the optimizer would outlive its last other reference.
                settings=lambda i: settings(factors[i], groups[factors[i].group]),
                gradient_grams=self._needs_gradient_grams,
                comm_device=first.device,
                kernels=kernels,
            )
            update = self._update(storage, set(units), kernels)
            self._located = _Located(holder, storage, preconditioner, update)
            await_step(factors, "")
        return self._located


def scaled(matrices: Tensor, scale: Tensor | float) -> Tensor:
    """`scale * matrices`; a number, or one for each matrix."""
    if isinstance(scale, Tensor):
        return matrices * scale[:, None, None]
    return matrices if scale == 1.0 else matrices * scale


def _unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch wraps `step` of every optimizer class that is instantiated with the step hooks; ours runs them already."""
    while getattr(step, "hooked", False) and hasattr(step, "__wrapped__"):
        step = step.__wrapped__
    return step
