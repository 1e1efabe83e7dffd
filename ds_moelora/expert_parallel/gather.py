"""Moving experts to tokens ("weights"): the experts of a layer are gathered on every process that shares them.

Shape suffixes as in `mixture.operands`, E being the experts of all processes; L = E / processes experts of this one.

Communication phases:

    forward   all-gather of A and B, issued before the layer's base product and awaited after it
    backward  the same all-gather again (gathered copies kept from the forward pass would be all experts of all layers);
              one reduce-scatter of dA and dB, in the parameters' dtype

One all-gather is a `Window`: it brings the experts of the layers that come next as well, as many as fit into
`WINDOW_BYTES`, since a small collective costs its latency and hardly more. Which layers come next is what the last
forward pass of the model says; in a backward pass they come in the reverse order. A layer that the window does not have
(the order has changed, a layer is called outside the model's forward pass) is gathered in a window of its own. The
windows depend on nothing but the order of calls, which expert parallelism needs to be the same on all processes.

Gradients of a forward window's layers share one reduce-scatter, which autograd times: a window gives its layers
stand-ins for their whole factors, tensors without memory, whose node runs when the last gradient has arrived.

A window never outlives the pass in which it was issued, so an optimizer's step cannot come between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mixture.operands import Grads, Needs, Operands, Products

WINDOW_BYTES = 1 << 22  # of all processes' experts


class ShardedLayer(Protocol):
    """A layer's experts on this process: `lora_A` (L, I, R), `lora_B` (L, O, R), and the processes with the others."""

    @property
    def lora_A(self) -> Tensor: ...  # noqa: N802

    @property
    def lora_B(self) -> Tensor: ...  # noqa: N802

    @property
    def group(self) -> dist.ProcessGroup: ...


class _Call(NamedTuple):
    """A layer asks for its experts in a dtype."""

    layer: ShardedLayer
    dtype: torch.dtype

    def num_bytes(self) -> int:
        numel = self.layer.lora_A.numel() + self.layer.lora_B.numel()
        return dist.get_world_size(self.layer.group) * numel * self.dtype.itemsize


class Window:
    """One all-gather under way, of the factors of several layers in one dtype and over one group.

    Args:
        calls: the layers.
    """

    def __init__(self, calls: Sequence[_Call]) -> None:
        self.calls, group, dtype = calls, calls[0].layer.group, calls[0].dtype
        factors = [factor.detach() for call in calls for factor in (call.layer.lora_A, call.layer.lora_B)]
        self._shapes = [factor.shape for factor in factors]
        self._mine = torch.cat([factor.reshape(-1).to(dtype) for factor in factors])
        # Flat buffers: gloo takes no others.
        self._buffer = self._mine.new_empty(dist.get_world_size(group) * self._mine.numel())
        self._work = dist.all_gather_into_tensor(self._buffer, self._mine, group=group, async_op=True)
        self._stand_ins = _stand_ins(group, [p for call in calls for p in (call.layer.lora_A, call.layer.lora_B)])

    def wait(self) -> None:
        """Until the buffers are filled, or no longer in use."""
        self._work.wait()

    def has(self, call: _Call) -> bool:
        return any(call.layer is other.layer and call.dtype == other.dtype for other in self.calls)

    def factors(self, layer: ShardedLayer) -> tuple[Tensor, Tensor]:
        """lora_A (E, I, R) and lora_B (E, O, R) by the experts' global numbers, copies."""
        self.wait()
        place = self._place(layer)
        return self._whole(place), self._whole(place + 1)

    def stand_ins(self, layer: ShardedLayer) -> tuple[Tensor, Tensor]:
        """(E, I, R) and (E, O, R), never read; their gradients become those of the layer's lora_A and lora_B."""
        place = self._place(layer)
        return self._stand_ins[place], self._stand_ins[place + 1]

    def _place(self, layer: ShardedLayer) -> int:
        return 2 * next(i for i, call in enumerate(self.calls) if call.layer is layer)

    def _whole(self, j: int) -> Tensor:
        start, shape = sum(s.numel() for s in self._shapes[:j]), self._shapes[j]
        by_rank = self._buffer.view(-1, self._mine.numel())[:, start : start + shape.numel()]
        return by_rank.reshape(-1, *shape[1:])


class _SumOverProcesses(torch.autograd.Function):
    """(L, ...) parameters -> stand-ins of shape (E, ...); backward: one reduce-scatter of all gradients."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *params: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        ranks = dist.get_world_size(group)
        return tuple(p.new_zeros(()).expand(ranks * len(p), *p.shape[1:]) for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ranks = dist.get_world_size(ctx.group)
        there = [grad.reshape(ranks, -1) for grad in grads if grad is not None]
        buffer = torch.cat(there, dim=1)
        mine = buffer.new_empty(buffer.shape[1])
        dist.reduce_scatter_tensor(mine, buffer.view(-1), group=ctx.group)
        parts = iter(mine.split([part.shape[1] for part in there]))
        return None, *(None if g is None else next(parts).view(-1, *g.shape[1:]) for g in grads)


def _stand_ins(group: dist.ProcessGroup, factors: list[Tensor]) -> list[Tensor]:
    """Of those that are trained; a frozen factor stands for itself."""
    trained = [factor for factor in factors if factor.requires_grad]
    # A window that a backward pass has issued may be used by what gradient checkpointing runs again.
    with torch.enable_grad():
        sums = iter(_SumOverProcesses.apply(group, *trained) if trained else ())
    return [next(sums) if factor.requires_grad else factor.detach() for factor in factors]


class Gathers:
    """The windows of one model, one at a time.

    Args:
        window_bytes: the most that a window of several layers takes.
    """

    def __init__(self, window_bytes: int = WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._order: list[_Call] = []  # of the last forward pass
        self._seen: list[_Call] | None = None  # in this forward pass; None outside of one
        self._window: Window | None = None
        self._pass: tuple[str, int] | None = None  # in which the window was issued

    def __getstate__(self) -> dict[str, Any]:
        return {"window_bytes": self._window_bytes}  # copied and pickled with a model, never within a pass

    def __setstate__(self, state: dict[str, Any]) -> None:
        Gathers.__init__(self, **state)

    def follow(self, model: nn.Module) -> None:
        """Learns the order of layers from the forward passes of a model."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        self._drop()
        self._seen = []

    def _end(self, *_: Any) -> None:
        self._drop()
        self._order, self._seen = self._seen or [], None

    def _drop(self) -> None:
        if self._window is not None:
            self._window.wait()
            self._window = None

    def start(self, layer: ShardedLayer, dtype: torch.dtype, backwards: bool = False) -> Window:
        """The window that has the layer's experts in `dtype`, issued now if need be.

        Every process must call it for the same layers in the same order. backwards: its backward pass asks.
        """
        call, here = _Call(layer, dtype), self._where()
        if here is not None and here[0] == "forward":
            self._seen.append(call)  # type: ignore[union-attr]
        if here is None or not self._holds(call, here):
            self._drop()
            self._window, self._pass = Window([call] if here is None else self._ahead(call, backwards)), here
        assert self._window is not None
        return self._window

    def factors(self, layer: ShardedLayer, dtype: torch.dtype, backwards: bool = False) -> tuple[Tensor, Tensor]:
        """lora_A (E, I, R) and lora_B (E, O, R) in `dtype`."""
        factors = self.find(layer, dtype, backwards).factors(layer)
        if self._pass is None or (backwards and self._order and layer is self._order[0].layer):
            self._drop()  # no other layer will ask for it
        return factors

    def find(self, layer: ShardedLayer, dtype: torch.dtype, backwards: bool = False) -> Window:
        """The window that has the layer's experts in `dtype`, started before or not."""
        window = self._window
        if window is None or not self._holds(_Call(layer, dtype), self._where()):
            window = self.start(layer, dtype, backwards)
        return window

    def _where(self) -> tuple[str, int] | None:
        """The pass that is running: ("forward", 0), ("backward", its number), or None: outside of the model."""
        task = torch._C._current_graph_task_id()
        if task != -1:  # gradient checkpointing runs forward passes within a backward pass: they belong to that
            return "backward", task
        return None if self._seen is None else ("forward", 0)

    def _holds(self, call: _Call, here: tuple[str, int] | None) -> bool:
        return self._window is not None and self._pass == here and self._window.has(call)

    def _ahead(self, call: _Call, backwards: bool) -> list[_Call]:
        """The call and those that followed it in the last pass, as far as one window takes them."""
        order = self._order[::-1] if backwards else self._order
        places = [i for i, other in enumerate(order) if other.layer is call.layer]
        window, total = [call], call.num_bytes()
        for other in order[places[0] + 1 :] if places else ():
            total += other.num_bytes()
            same = other.dtype == call.dtype and other.layer.group == call.layer.group
            if not same or total > self._window_bytes:
                break
            if all(other.layer is not member.layer for member in window):
                window.append(other)
        return window


class Gathered(Products):
    """Products with all experts gathered; the operands have a window's stand-ins for the factors.

    Args:
        products: how they are computed then.
    """

    def __init__(self, layer: ShardedLayer, gathers: Gathers, products: Products) -> None:
        self.layer, self.gathers, self.products, self.name = layer, gathers, products, products.name

    def operands(self, dtype: torch.dtype, **others: Any) -> Operands:
        """`mixture.operands.Operands` of the layer, for products in `dtype`."""
        A, B = self.gathers.find(self.layer, dtype).stand_ins(self.layer)
        return Operands(lora_A=A, lora_B=B, **others)

    def forward(self, operands: Operands, base_out: Tensor, inplace: bool) -> tuple[Tensor, Operands, Tensor]:
        A, B = self.gathers.factors(self.layer, base_out.dtype)
        y, _, p = self.products.forward(operands._replace(lora_A=A, lora_B=B), base_out, inplace)
        return y, operands, p

    def backward(self, operands: Operands, p: Tensor, dy: Tensor, needs: Needs) -> Grads:
        A, B = self.gathers.factors(self.layer, p.dtype, backwards=True)
        grads = self.products.backward(operands._replace(lora_A=A, lora_B=B), p, dy, needs)
        # Summed in the parameters' dtype, as DeepSpeed sums them without expert parallelism.
        dtype = operands.lora_A.dtype
        dA, dB = (None if grad is None else grad.to(dtype) for grad in (grads.A, grads.B))
        return grads._replace(A=dA, B=dB)
