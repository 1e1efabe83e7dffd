"""What a layer launches on a GPU, counted without one, and that nothing there waits for the host.

An operator of this package is one Triton kernel (`mixture.fused`), so that the counts on a CPU, whose operators are the
same but for what is inside them, are those of a GPU.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture import fused, fused_losses, triton_operators
from ds_moelora.mixture.choice import choose_products
from ds_moelora.mixture.dense import DENSE
from ds_moelora.mixture.fused import FUSED
from ds_moelora.mixture.grouped_mm import GROUPED_MM
from ds_moelora.mixture.mixture import Mixed, _forward, mix
from ds_moelora.mixture.operands import Needs, Operands, RoutingRule
from ds_moelora.pairs import GateSettings
from ds_moelora.tuner.losses import BatchLayout, start_collecting, stop_collecting

WITHOUT_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "detach", "promote_types", "lift_fresh"}


class Launches(TorchDispatchMode):
    """Counts operators that are neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name not in WITHOUT_LAUNCH and not is_view:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def launches(config: Any) -> tuple[list[str], list[str]]:
    """Forward and backward, the frozen base included."""
    model = get_peft_model(OneLinear(), config)
    model.train()
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    with Launches() as forward:
        y = model(x)
    dy = torch.ones_like(y)
    with Launches() as backward:
        y.backward(dy)
    return forward.names, backward.names


def config(num_experts: int = 8, **options: Any) -> MoELoRAConfig:
    return MoELoRAConfig(
        num_experts=num_experts, r=4, top_k=2, target_modules=["linear"], router_aux_loss_coef=0.0, **options
    )


@pytest.mark.parametrize("num_experts", [8, 64])
def test_fewer_launches_than_plain_lora(num_experts: int) -> None:
    peft = sum(map(len, launches(LoraConfig(r=32, target_modules=["linear"]))))
    assert peft == 17
    for options in ({}, {"router_temperature": 2.0}, {"top_p": 0.7}, {"shared_A": True}):
        forward, backward = launches(config(num_experts, expert_compute="fused", **options))
        assert (len(forward), len(backward)) == (5, 8), (options, forward, backward)
        between = [name for name in forward + backward if name.startswith("gate_")]
        assert between == ["gate_forward", "gate_backward"]
    # Dropout keeps router and experts apart: two products each way that are one above, and the router's own routing.
    forward, backward = launches(config(num_experts, expert_compute="fused", lora_dropout=0.1))
    assert len(forward) + len(backward) <= 31, (forward, backward)
    dense = sum(map(len, launches(config(num_experts, expert_compute="dense"))))
    assert dense > 40  # so many it was


@pytest.mark.parametrize(("num_experts", "masked"), [(8, False), (64, True)])
def test_four_more_launches_with_the_routers_losses(
    num_experts: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_losses, "covers", lambda logits: True)  # as on CUDA
    library = torch.library.Library("ds_moelora", "IMPL")
    for name in ("router_sums", "router_losses", "router_gradient"):
        library.impl(name, lambda *_: None, "CPU")  # counted alone
    fields = MoELoRAConfig(
        num_experts=num_experts, r=4, top_k=2, target_modules=["linear"], expert_compute="fused", router_z_loss_coef=0.1
    )
    layer = get_peft_model(OneLinear(), fields).train().base_model.model.linear
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    start_collecting(layer, BatchLayout((2, 16), torch.ones(2, 16, dtype=torch.int64) if masked else None))
    with Launches() as forward:
        y = layer(x)
    losses = list(stop_collecting(layer)[0].losses)
    gradients = [torch.ones_like(y), *map(torch.ones_like, losses)]
    with Launches() as backward:
        torch.autograd.backward([y, *losses], gradients)
    assert (len(forward.names), len(backward.names)) == (8, 9), (forward.names, backward.names)
    kernels = [name for name in forward.names + backward.names if name.startswith("router_")]
    assert kernels == ["router_sums", "router_losses", "router_gradient"]


def test_decoding_launches_four_operations_beside_the_base() -> None:
    model = get_peft_model(OneLinear(), config(expert_compute="fused"))
    model.eval()
    x = torch.randn(1, 64, dtype=torch.bfloat16)
    with torch.no_grad(), Launches() as forward:
        model(x)
    assert forward.names == ["mm", "restack", "mm", "gate_forward", "addmm_"]


def operands(num_experts: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16, rank: int = 8) -> Operands:
    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).requires_grad_()

    x = draw(32, 16, dtype=dtype)
    A, B, router = draw(num_experts, 16, rank), draw(num_experts, 24, rank), draw(num_experts, 16)
    return Operands(x, A, B, 1.5, router=router, rule=RoutingRule(2), settings=GateSettings("sqrt"))


def step(o: Operands, products: Any, dlogits: bool = False) -> tuple[Mixed, list[Tensor]]:
    weight = torch.randn(24, 16, device=o.x.device, dtype=o.x.dtype)
    mixed = mix(o, o.x.detach() @ weight.t(), inplace=True, base_weight=weight, products=products)
    assert mixed.logits is not None
    outputs = (mixed.y, mixed.logits) if dlogits else (mixed.y,)
    leaves = [o.x, o.lora_A, o.lora_B, o.router]
    return mixed, list(torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs]))


@pytest.mark.parametrize("num_experts", [8, 64])
def test_chosen_experts_in_at_most_40_launches(num_experts: int) -> None:
    for dlogits in (False, True):
        o = operands(num_experts)
        with Launches() as counted:
            step(o, GROUPED_MM, dlogits)
        draws = [name for name in counted.names if name in ("randn", "ones_like", "fill_")]
        assert len(counted.names) - len(draws) <= 40, counted.names


def test_torchs_grouped_mm_is_the_reference() -> None:
    """On CPUs it multiplies float32 as well."""
    torch.manual_seed(0)
    o = operands(6, dtype=torch.float32)
    torch.manual_seed(1)
    expected = step(o, DENSE, True)
    torch.manual_seed(1)
    actual = step(o, GROUPED_MM, True)
    torch.testing.assert_close(actual[0].y, expected[0].y, rtol=1e-4, atol=1e-4)
    for a, b in zip(actual[1], expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("products", [FUSED, GROUPED_MM])
@pytest.mark.parametrize("gate_scaling", ["none", "sqrt"])
def test_on_a_gpu_nothing_waits_for_the_host_or_mixes_devices(products: Any, gate_scaling: str) -> None:
    """A FakeTensor has no values: an operation whose result the host needs raises, and so do mixed devices.

    Without the autograd engine, which a build of torch without CUDA does not have for such tensors.
    """
    with FakeTensorMode(), torch.no_grad():
        o = operands(8, device="cuda")._replace(settings=GateSettings(gate_scaling))
        base, dy = torch.empty(2, 32, 24, device="cuda", dtype=o.x.dtype)
        mixed, kept, p = _forward(o, base, True, products)
        kept = kept._replace(router=o.router)
        onto, dlogits = torch.empty_like(o.x), torch.empty(32, 8, device="cuda", dtype=o.x.dtype)
        grads = products.backward(kept, p, dy, Needs(True, True, True, True, onto, dlogits))
        tensors = [t for t in (*mixed, p, *grads) if t is not None]
        assert {t.device.type for t in tensors} == {"cuda"}
        assert [None if t is None else t.shape for t in (grads.x, grads.A, grads.B, grads.router)] == [
            o.x.shape, o.lora_A.shape, o.lora_B.shape, (8, 16)
        ]  # fmt: skip
        sequences = fused_losses.Sequences((2, 16), mask=torch.ones(2, 16, device="cuda", dtype=torch.int64))
        losses, slopes = fused_losses.losses_and_slopes(mixed.logits, mixed.gates, sequences, True, True)
        dz = fused_losses.gradient(mixed.logits, sequences, slopes, *losses)
        assert {t.device.type for t in (losses, slopes, dz)} == {"cuda"}
        assert (losses.shape, slopes.shape, dz.shape, dz.dtype) == ((2,), (2, 9), (32, 8), torch.bfloat16)
        with pytest.raises(RuntimeError, match="device"):  # that these would be seen
            base @ torch.empty(24, 2, dtype=base.dtype)
        with pytest.raises(DataDependentOutputException):
            base.sum().item()


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(wish: str, experts: int, k: int, rank: int, dtype: torch.dtype = torch.bfloat16, **more: Any) -> str:
        products = choose_products(wish, experts, k, rank, dtype, "cuda", **more)
        return "grouped_mm" if products is GROUPED_MM else products.name

    assert chosen("auto", 8, 2, 4, num_tokens=8192) == "fused"
    assert chosen("auto", 64, 2, 16, num_tokens=8192) == "grouped_mm"
    assert chosen("auto", 64, 2, 16, num_tokens=1024) == "fused"  # launches would cost more than they save
    assert chosen("auto", 64, 2, 16) == "fused"  # each process's share of the experts
    assert chosen("grouped", 8, 2, 8, num_tokens=1) == "grouped_mm"
    for more in ({"top_p": 0.5}, {"num_A": 1}):
        assert chosen("auto", 64, 2, 16, num_tokens=8192, **more) == "fused"
    assert chosen("auto", 512, 2, 4) == "dense"
    assert chosen("auto", 8, 2, 4, torch.float64) == "dense"
    with pytest.warns(UserWarning, match=r"'fused' becomes 'dense': it takes at most 256 experts of rank 64, not 8 of"):
        assert chosen("fused", 8, 2, 65) == "dense"
    monkeypatch.setattr(fused, "NO_TRITON", "Triton is not there")
    assert chosen("auto", 8, 2, 4) == "dense"
    with pytest.warns(UserWarning, match=r"becomes 'dense': Triton is not there"):
        assert chosen("fused", 8, 2, 4) == "dense"


def test_which_triton_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(found: str | None) -> str:
        if found is None:
            raise importlib.metadata.PackageNotFoundError
        return found

    for found, reason in ((None, "not installed (pip install"), ("3.3.1", "3.3.1 is older than 3.4"), ("3.10.0", None)):
        monkeypatch.setattr(importlib.metadata, "version", lambda _, found=found: version(found))
        why = triton_operators.why_no_triton()
        assert why is None if reason is None else reason in why


def test_keeps_no_more_than_dense() -> None:
    def saved(products: Any) -> int:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            o = operands(8, rank=4)
            base = torch.zeros(32, 24, dtype=torch.bfloat16)
            mix(o, base, products=products)
        weights = {id(t) for t in (o.lora_A, o.lora_B, o.router)}
        return sum(t.untyped_storage().nbytes() for t in tensors if id(t) not in weights)

    assert saved(FUSED) <= saved(DENSE)
