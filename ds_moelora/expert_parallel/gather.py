"""Moving experts to tokens ("weights"): the experts of one layer, or of a bucket of layers, are gathered on every rank.

Shape suffixes as in `dispatch`. Communication phases, per bucket:

    forward   one all-gather of all its A and B, issued before its first layer's base GEMM and awaited after it
    backward  the same all-gather again (gathered copies kept from the forward pass would be all experts of all layers);
              once the last of its layers has its gradients, one reduce-scatter of all dA and dB, in the parameters'
              dtype

Gathered experts live from the first to the last layer of their bucket, whole gradients likewise.

Autograd does the counting: `_SumOverRanks` gives every layer stand-ins for its whole factors, tensors without memory on
which the layers' gradients meet. Its backward pass runs when the last has arrived, in the same order on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..mixture.compute import ExpertCompute, Needs, no_autocast, refuse_second_derivative
from ..pairs import GateSettings


class ShardedLayer(Protocol):
    """A layer's experts on this rank: `lora_A` (L, I, R) and `lora_B` (L, O, R), and the ranks that have the others."""

    @property
    def lora_A(self) -> Tensor: ...  # noqa: N802

    @property
    def lora_B(self) -> Tensor: ...  # noqa: N802

    @property
    def group(self) -> dist.ProcessGroup: ...


class _Gather:
    """An all-gather of several (L, ...) tensors under way; each becomes (E, ...), by the experts' global numbers."""

    def __init__(self, tensors: Sequence[Tensor], dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        self.shapes, self.dtype = [tensor.shape for tensor in tensors], dtype
        self.mine = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
        # Flat buffers: gloo takes no others.
        self.buffer = self.mine.new_empty(dist.get_world_size(group) * self.mine.numel())
        self.work = dist.all_gather_into_tensor(self.buffer, self.mine, group=group, async_op=True)

    def whole(self, j: int) -> Tensor:
        """Tensor j with the experts of all ranks, as a copy of its own."""
        self.work.wait()
        start, shape = sum(s.numel() for s in self.shapes[:j]), self.shapes[j]
        by_rank = self.buffer.view(-1, self.mine.numel())[:, start : start + shape.numel()]
        return by_rank.reshape(-1, *shape[1:])


class _SumOverRanks(torch.autograd.Function):
    """(L, ...) parameters -> stand-ins of shape (E, ...), never read; backward: one reduce-scatter of all gradients."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        ranks = dist.get_world_size(group)
        return tuple(p.new_zeros(()).expand(ranks * len(p), *p.shape[1:]) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks = dist.get_world_size(ctx.group)
        there = [g for g in grads if g is not None]
        buffer = torch.cat([g.reshape(ranks, -1) for g in there], dim=1)
        mine = buffer.new_empty(buffer.shape[1])
        dist.reduce_scatter_tensor(mine, buffer.view(-1), group=ctx.group)
        parts = iter(mine.split([g.numel() // ranks for g in there]))
        return None, *(None if g is None else next(parts).view(-1, *g.shape[1:]) for g in grads)


class _Pass:
    """A bucket's way forward and back."""

    def __init__(self, factors: dict[int, tuple[Tensor, Tensor]], group: dist.ProcessGroup) -> None:
        self.ahead = set(factors)  # layers that the forward pass has yet to reach
        self.behind: set[int] = set()  # layers that the backward pass has yet to come back to
        trained = [p for pair in factors.values() for p in pair if p.requires_grad]
        sums = iter(_SumOverRanks.apply(group, *trained) if trained else ())
        self.stand_ins = {
            i: tuple(next(sums) if p.requires_grad else p.detach() for p in pair) for i, pair in factors.items()
        }


class Bucket:
    """Layers that run one after the other, and whose experts travel together.

    Args:
        layers: in the order in which the forward pass reaches them; all of one group and dtype.
    """

    def __init__(self, layers: Sequence[ShardedLayer]) -> None:
        self.layers = layers
        self._gather: _Gather | None = None
        self.current: _Pass | None = None
        self._has_graph = False

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers}  # copied and pickled with a model, and never within a pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        Bucket.__init__(self, state["layers"])

    def enter(self, index: int, dtype: torch.dtype) -> Entered | None:
        """Before layer `index` runs: starts the bucket's gather in `dtype`, or finds it under way.

        Every rank must call it for the same layers in the same order.

        Returns:
            None: the layer runs out of turn, and must be gathered by itself.
        """
        if _inside_backward():  # gradient checkpointing runs the layer again
            if len(self.layers) > 1 and not self._has_graph:
                return None  # reentrant: this graph ends where the checkpoint does, perhaps within the bucket
            self.current = None
            self.fetch(dtype)
            return Entered(self, self._new_pass(index, index + 1), index, dtype)
        if index == 0:
            self.drop()  # what an unfinished pass has left may be older than the last step
            self.current, self._has_graph = self._new_pass(0, len(self.layers)), torch.is_grad_enabled()
            self.fetch(dtype)
        if self.current is None or index not in self.current.ahead:
            return None
        if self._gather is None or self._gather.dtype != dtype:
            return None
        return Entered(self, self.current, index, dtype)

    def _new_pass(self, start: int, stop: int) -> _Pass:
        layers = {i: self.layers[i] for i in range(start, stop)}
        return _Pass({i: (layer.lora_A, layer.lora_B) for i, layer in layers.items()}, self.layers[0].group)

    def fetch(self, dtype: torch.dtype) -> _Gather:
        if self._gather is None or self._gather.dtype != dtype:
            self.drop()
            factors = [p for layer in self.layers for p in (layer.lora_A, layer.lora_B)]
            self._gather = _Gather(factors, dtype, self.layers[0].group)
        return self._gather

    def drop(self) -> None:
        if self._gather is not None:
            self._gather.work.wait()
            self._gather = None


class Entered(NamedTuple):
    """One layer in a pass of its bucket."""

    bucket: Bucket
    pass_: _Pass
    layer: int
    dtype: torch.dtype

    def forward(self, comes_back: bool) -> tuple[Tensor, Tensor]:
        """(E, I, R) and (E, O, R) for the layer's forward pass. `comes_back`: a backward pass will follow."""
        if comes_back:
            self.pass_.behind.add(self.layer)
        A, B = self._factors()
        self.leave()
        return A, B

    def leave(self) -> None:
        """The layer needs nothing (more) in its forward pass."""
        bucket, ahead = self.bucket, self.pass_.ahead
        ahead.discard(self.layer)
        if bucket.current is self.pass_:
            if not ahead:
                bucket.current = None
                bucket.drop()
        elif self.layer == len(bucket.layers) - 1:  # run again, and the last to be
            bucket.drop()

    def backward(self) -> tuple[Tensor, Tensor]:
        """The same for its backward pass."""
        self.bucket.current = None
        A, B = self._factors()
        self.pass_.behind.discard(self.layer)
        if not self.pass_.behind:
            self.bucket.drop()
        return A, B

    def _factors(self) -> tuple[Tensor, Tensor]:
        gather = self.bucket.fetch(self.dtype)
        return gather.whole(2 * self.layer), gather.whole(2 * self.layer + 1)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def gathered_moe_lora(
    base_out: Tensor,
    x: Tensor,
    gates: Tensor,
    chosen: Tensor,
    entered: Entered,
    scaling: float,
    settings: GateSettings | None,
    inplace: bool,
    compute: ExpertCompute,
) -> Tensor:
    """`mixture.moe_lora.moe_lora` over the experts of all ranks of a group, by gathering the experts ("weights").

    Args:
        entered: the layer's place in its bucket, entered for the dtype of `base_out`. All else as there; gates and
            chosen are (T, E).
    """
    A, B = entered.pass_.stand_ins[entered.layer]
    settings = settings or GateSettings()
    return _Gathered.apply(base_out, x, gates, chosen, A, B, scaling, settings, inplace, compute, entered)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base_out: Tensor,
        x: Tensor,
        gates: Tensor,
        chosen: Tensor,
        stand_in_A: Tensor,
        stand_in_B: Tensor,
        scaling: float,
        settings: GateSettings,
        inplace: bool,
        compute: ExpertCompute,
        entered: Entered,
    ) -> Tensor:
        with no_autocast(x):
            A, B = entered.forward(any(ctx.needs_input_grad))
            x_compute = x.to(base_out.dtype)
            y, p = compute.forward(base_out, x_compute, gates, chosen, A, B, scaling, inplace)
        if inplace:
            ctx.mark_dirty(base_out)
        ctx.scaling, ctx.settings, ctx.x_dtype, ctx.compute, ctx.entered = scaling, settings, x.dtype, compute, entered
        ctx.param_dtype = stand_in_A.dtype
        ctx.save_for_backward(x_compute if ctx.needs_input_grad[4] else None, p, gates, chosen)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, p, gates, chosen = ctx.saved_tensors
        needs_base, needs_x, needs_gates, _, needs_A, needs_B = ctx.needs_input_grad[:6]
        needs = Needs(needs_x, needs_gates, needs_A, needs_B)
        with no_autocast(dy):
            A, B = ctx.entered.backward()
            grads = ctx.compute.backward(dy, x, p, gates, chosen, A, B, ctx.scaling, ctx.settings, needs)
            dx = None if grads.dx is None else grads.dx.to(ctx.x_dtype)
            # Summed in the parameters' dtype, as DeepSpeed sums them without expert parallelism.
            dA = None if grads.dA is None else grads.dA.to(ctx.param_dtype)
            dB = None if grads.dB is None else grads.dB.to(ctx.param_dtype)
        return dy if needs_base else None, dx, grads.dgates, None, dA, dB, *[None] * 5


class Schedule:
    """Puts the layers of a model into buckets, in the order in which its first training pass reaches them.

    Args:
        size: layers per bucket, at most.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._order: list[Any] | None = []

    def saw(self, layer: Any) -> None:
        """To be called whenever a `ShardedLayer` starts a training pass; sets its `place` once the order is known.

        Args:
            layer: neighbours with equal `bucket_key()` may share a bucket; None: by itself.
        """
        if self._order is None:
            return
        if not _inside_backward() and all(layer is not other for other in self._order):
            self._order.append(layer)
            return
        order, self._order = self._order, None
        for key, run in itertools.groupby(order, key=lambda layer: layer.bucket_key()):
            layers = list(run)
            for start in range(0, len(layers) if key is not None else 0, self.size):
                bucket = Bucket(layers[start : start + self.size])
                for index, member in enumerate(bucket.layers):
                    member.place = (bucket, index)  # type: ignore[attr-defined]
