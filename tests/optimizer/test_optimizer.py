"""The optimizers by themselves: against the reference, against torch, and where something is missing."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_moelora import GateRiemannianAdamW, GateRiemannianMuon, GateRiemannianSGD
from ds_moelora.optimizer.reference import ReferenceAdamW, ReferenceMuon, ReferenceSGD
from ds_moelora.pairs import LoraPair, tag_pair

from ..support.mixture import SHAPES, Mixture, Stack, batches
from ..support.training import OPTIMIZERS, SHARDED, loraplus_groups, run_reference, scattered_groups

CLASSES: dict[str, Any] = {
    "GateRiemannianAdamW": GateRiemannianAdamW,
    "GateRiemannianSGD": GateRiemannianSGD,
    "GateRiemannianMuon": GateRiemannianMuon,
}
REFERENCES: dict[str, Any] = {
    "GateRiemannianAdamW": ReferenceAdamW,
    "GateRiemannianSGD": ReferenceSGD,
    "GateRiemannianMuon": ReferenceMuon,
}


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(model: nn.Module, optimizer: Any, steps: int = 5, scheduler: Any = None, start: int = 0) -> None:
    dtype = next(model.parameters()).dtype
    for micro in batches(steps, 1, 1)[start:]:
        for x, target in micro[0]:
            optimizer.zero_grad()
            model(x.to(dtype), target.to(dtype)).backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def assert_equal_weights(a: nn.Module, b: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("groups", [loraplus_groups, scattered_groups, None])
def test_equals_the_reference_in_float64(kind: str, groups: Any) -> None:
    model = Stack(SHAPES).double()
    given_ = groups(model) if groups else trained(model)
    train(model, CLASSES[kind](given_, **OPTIMIZERS[kind]), steps=10)
    reference = run_reference(kind, 1, **({"groups": groups} if groups else {}))["weights"]
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), reference[name], rtol=1e-9, atol=1e-10)


@given(
    in_features=st.integers(1, 9),
    out_features=st.integers(1, 9),
    experts=st.integers(1, 5),
    rank=st.integers(1, 7),
    kind=st.sampled_from(SHARDED),
    seed=st.integers(0, 50),
)
@settings(max_examples=40, deadline=None)
def test_any_shape(in_features: int, out_features: int, experts: int, rank: int, kind: str, seed: int) -> None:
    """Ranks above in and out included, where every Gram matrix is singular."""
    generator = torch.Generator().manual_seed(seed)

    def pair() -> list[nn.Parameter]:
        shapes = [(experts, in_features, rank), (experts, out_features, rank)]
        params = [nn.Parameter(torch.randn(s, dtype=torch.float64, generator=generator)) for s in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        tag_pair(LoraPair("layer", experts, rank), *params)
        return params

    ours = pair()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()  # type: ignore[union-attr]
    tag_pair(LoraPair("layer", experts, rank), *theirs)
    options = {"lr": 0.1, "damping": 1e-2}
    CLASSES[kind](ours, **options).step()
    REFERENCES[kind](theirs, **options).step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "torch_class"), [("GateRiemannianAdamW", torch.optim.AdamW), ("GateRiemannianSGD", torch.optim.SGD)]
)
def test_other_parameters_follow_torch_exactly(kind: str, torch_class: Any) -> None:
    options = {k: v for k, v in OPTIMIZERS[kind].items() if k != "damping"}
    ours, theirs = nn.Linear(5, 7), nn.Linear(5, 7)
    theirs.load_state_dict(ours.state_dict())
    mixture = Mixture("m", 5, 7, 2, 3, 1)
    optimizers = [
        CLASSES[kind]([*ours.parameters(), *trained(mixture)], **options),
        torch_class(theirs.parameters(), **options, fused=torch_class is torch.optim.AdamW),
    ]
    for step in range(5):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        for optimizer, model in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if model is ours:
                mixture(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_orthonormal_factors_make_a_plain_step() -> None:
    """With B^T B = A A^T = I and no damping the metric is the Euclidean one."""
    A = nn.Parameter(torch.linalg.qr(torch.randn(2, 6, 3, dtype=torch.float64))[0])
    B = nn.Parameter(torch.linalg.qr(torch.randn(2, 5, 3, dtype=torch.float64))[0])
    tag_pair(LoraPair("layer", 2, 3), A, B)
    optimizer = GateRiemannianSGD([A, B], lr=0.5, damping=0.0)
    before = [A.detach().clone(), B.detach().clone()]
    A.grad, B.grad = torch.randn_like(A), torch.randn_like(B)
    grads = [A.grad.clone(), B.grad.clone()]
    optimizer.step()
    for p, old, grad in zip((A, B), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.5 * grad, rtol=1e-6, atol=1e-6)


def test_step_does_not_depend_on_the_split_between_the_factors() -> None:
    """A -> A M, B -> B M^-T leaves A B^T and, without damping, the change of the product unchanged to first order."""
    torch.manual_seed(0)
    A, B = torch.randn(1, 6, 3, dtype=torch.float64), torch.randn(1, 5, 3, dtype=torch.float64)
    M = torch.randn(3, 3, dtype=torch.float64)
    G = torch.randn(5, 6, dtype=torch.float64)  # gradient of W

    def change(A: Tensor, B: Tensor) -> Tensor:
        a, b = nn.Parameter(A.clone()), nn.Parameter(B.clone())
        tag_pair(LoraPair("layer", 1, 3), a, b)
        a.grad, b.grad = (G.T @ B[0])[None], (G @ A[0])[None]
        GateRiemannianSGD([a, b], lr=1e-6, damping=0.0).step()
        return (b[0] @ a[0].T - B[0] @ A[0].T).detach() / 1e-6

    torch.testing.assert_close(change(A, B), change(A @ M, B @ torch.linalg.inv(M).T), rtol=1e-4, atol=1e-4)


def test_damping_to_infinity_is_a_scaled_plain_step() -> None:
    model, plain = Mixture("m", 5, 7, 2, 3, 1), Mixture("m", 5, 7, 2, 3, 1)
    plain.load_state_dict(model.state_dict())
    optimizers = [GateRiemannianSGD(trained(model), lr=1e6, damping=1e8), torch.optim.SGD(trained(plain), lr=1e-2)]
    x = torch.randn(4, 5)
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        m(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(model.lora_A, plain.lora_A, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.lora_B, plain.lora_B, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", SHARDED)
def test_resume_is_bit_equal(kind: str) -> None:
    model = Stack(SHAPES)
    optimizer = CLASSES[kind](scattered_groups(model), **OPTIMIZERS[kind])
    train(model, optimizer, steps=3)
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    train(model, optimizer, steps=6, start=3)

    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    resumed = Stack(SHAPES, seed=7)
    resumed.load_state_dict(state["model"])
    other = CLASSES[kind](scattered_groups(resumed), lr=99.0, damping=9.0)
    other.load_state_dict(state["optimizer"])
    train(resumed, other, steps=6, start=3)
    assert_equal_weights(model, resumed, rtol=0, atol=0)


def test_a_state_of_torch_adamw_can_be_taken_over() -> None:
    model = Stack(SHAPES)
    plain = torch.optim.AdamW(trained(model), fused=True)
    train(model, plain, steps=2)
    optimizer = GateRiemannianAdamW(trained(model), damping=1e-3)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["damping"] == 1e-3
    train(model, optimizer, steps=2)


def test_gate_lr_scale_survives_a_scheduler_and_a_checkpoint() -> None:
    def build() -> tuple[nn.Module, Any, Any]:
        model = Stack(SHAPES)
        optimizer = GateRiemannianSGD(trained(model), lr=1e-2, gate_lr_scale=1e-3)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    model, optimizer, scheduler = build()
    twin = Stack(SHAPES)
    reference = ReferenceSGD(
        [
            {"params": [p for p in trained(twin) if getattr(p, "lora_role", "") != "router"]},
            {"params": [layer.router.weight for layer in twin.layers], "lr": 1e-5},
        ],
        lr=1e-2,
    )
    for step, micro in enumerate(batches(4, 1, 1)):
        x, target = micro[0][0]
        for options in reference.options.values():
            options["lr"] *= 1 if step == 0 else step / (step + 1)
        for m in (model, twin):
            m.zero_grad()
            m(x, target).backward()
        optimizer.step()
        scheduler.step()
        reference.step()
    assert_equal_weights(model, twin, rtol=1e-4, atol=1e-6)
    assert len(optimizer.param_groups) == 2
    assert all(group["lr"] == pytest.approx(1e-2 / 5) for group in optimizer.param_groups)

    _, other, _ = build()
    other.load_state_dict(optimizer.state_dict())
    assert [group["lr_scale"] for group in other.param_groups] == [1.0, 1e-3]


def test_groups_added_later_are_preconditioned() -> None:
    model = Stack(SHAPES).double()
    first, rest = (
        trained(model.layers[0]),
        [p for p in trained(model) if all(p is not q for q in model.layers[0].parameters())],
    )
    optimizer = GateRiemannianSGD(first, **OPTIMIZERS["GateRiemannianSGD"])
    optimizer.add_param_group({"params": rest})
    train(model, optimizer, steps=10)
    reference = run_reference("GateRiemannianSGD", 1)["weights"]
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.detach(), reference[name], rtol=1e-9, atol=1e-10)


def test_pairs_without_a_gradient_and_frozen_pairs_stay() -> None:
    model = Stack(SHAPES)
    for p in model.layers[2].parameters():
        p.requires_grad = False
    params = list(model.parameters())  # frozen ones too, as `model.parameters()` has them
    optimizer = GateRiemannianAdamW(params, lr=1e-2, weight_decay=0.1)
    before = copy.deepcopy(model)
    x, target = batches(1, 1, 1)[0][0][0]
    model(x, target).backward()
    model.layers[0].lora_A.grad = model.layers[0].lora_B.grad = None
    model.layers[1].lora_B.grad = None
    grad = model.layers[1].lora_A.grad.clone()
    optimizer.step()
    for i in (0, 2):
        assert torch.equal(model.layers[i].lora_A, before.layers[i].lora_A)
    assert torch.equal(model.layers[1].lora_B, before.layers[1].lora_B)
    # The half that has a gradient is preconditioned by the one that has none.
    B = before.layers[1].lora_B.double()
    expected = grad.double() @ torch.linalg.inv(B.mT @ B + 1e-6 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(model.layers[1].lora_A.grad.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_pair_thawed_later_is_preconditioned_and_half_a_pair_refused() -> None:
    model = Stack(SHAPES).double()
    model.layers[1].requires_grad_(False)
    optimizer = GateRiemannianSGD(model.parameters(), **OPTIMIZERS["GateRiemannianSGD"])
    x, target = (t.double() for t in batches(1, 1, 1)[0][0][0])
    model(x, target).backward()
    optimizer.step()
    for p in (model.layers[1].lora_A, model.layers[1].lora_B):
        p.requires_grad = True
    optimizer.zero_grad()
    model(x, target).backward()
    grad, B = model.layers[1].lora_A.grad.clone(), model.layers[1].lora_B.detach().clone()
    optimizer.step()
    expected = grad @ torch.linalg.inv(B.mT @ B + 1e-4 * torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(model.layers[1].lora_A.grad, expected, rtol=1e-6, atol=1e-8)
    model.layers[1].lora_B.requires_grad = False
    with pytest.raises(ValueError, match="lora_B is frozen"):
        optimizer.step()


def test_bf16_parameters_use_fp32_algebra() -> None:
    model = Stack(SHAPES).bfloat16()
    twin = copy.deepcopy(model).float()
    for i, layer in enumerate(twin.layers):
        layer.tag(f"{i}")
    for m in (model, twin):
        for i, p in enumerate(trained(m)):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(p.dtype)
        GateRiemannianSGD(trained(m), lr=1e-1, damping=1.0).step()
    # Gradient and weight are each rounded to bf16's 8 bits once.
    assert_equal_weights(model.float(), twin, rtol=2**-7, atol=2**-8)


def test_closure_and_step_hooks_run_once() -> None:
    torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # torch now wraps AdamW.step with its hooks
    model = Stack(SHAPES)
    optimizer = GateRiemannianAdamW(trained(model))
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    x, target = batches(1, 1, 1)[0][0][0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x, target)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx(model(x, target).item(), rel=1.0)
    assert calls == ["pre", "post"]


def test_deepcopied_models_have_to_be_tagged_again() -> None:
    model = copy.deepcopy(Stack(SHAPES))
    with pytest.raises(ValueError, match=r"tag_lora_pairs\(model\)"):
        GateRiemannianAdamW(trained(model))


def test_half_a_pair() -> None:
    model = Stack(SHAPES)
    with pytest.raises(ValueError, match=r"layers\.1.*lora_A but not lora_B"):
        GateRiemannianAdamW([p for p in trained(model) if p is not model.layers[1].lora_B])
    model.layers[1].lora_A.requires_grad = False
    with pytest.raises(ValueError, match=r"layers\.1.*lora_A is frozen"):
        GateRiemannianAdamW(model.parameters())


def test_half_a_pair_added_later() -> None:
    model = Stack(SHAPES)
    optimizer = GateRiemannianAdamW(trained(model.layers[0]))
    optimizer.add_param_group({"params": [model.layers[1].lora_A]})
    with pytest.raises(ValueError, match="lora_A but not lora_B"):
        optimizer.step()


def test_dtensors_are_refused() -> None:
    model = Mixture("m", 5, 7, 2, 3, 1)
    model.lora_A.device_mesh = object()
    with pytest.raises(ValueError, match="DeepSpeed ZeRO instead"):
        GateRiemannianAdamW(trained(model))


def test_sparse_gradient() -> None:
    model = Mixture("m", 5, 7, 2, 3, 1)
    optimizer = GateRiemannianAdamW(trained(model))
    model.lora_A.grad = torch.randn_like(model.lora_A).to_sparse()
    model.lora_B.grad = torch.randn_like(model.lora_B)
    with pytest.raises(ValueError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": math.nan}, "damping=nan must be a finite number"),
        ({"damping": math.inf}, "damping=inf"),
        ({"damping": -1e-6}, "damping=-1e-06"),
        ({"damping": "auto"}, "damping='auto'"),
        ({"damping": True}, "damping=True"),
        ({"gate_lr_scale": math.inf}, "gate_lr_scale=inf"),
        ({"gate_scaling": "sqr"}, "gate_scaling='sqr' is unknown; choose one of 'none', 'sqrt', 'full'"),
        ({"scale_input_grad": 1}, "scale_input_grad=1 must be true or false"),
    ],
)
@pytest.mark.parametrize("kind", SHARDED)
def test_bad_options(kind: str, options: dict[str, Any], message: str) -> None:
    model = Mixture("m", 5, 7, 2, 3, 1)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        CLASSES[kind](trained(model), lr=1e-3, **options)
    with pytest.raises(ValueError, match=message):
        CLASSES[kind]([{"params": trained(model), **options}], lr=1e-3)


def test_bad_include_scaling() -> None:
    with pytest.raises(ValueError, match="include_scaling='s' must be true or false"):
        GateRiemannianSGD(trained(Mixture("m", 5, 7, 2, 3, 1)), lr=1e-3, include_scaling="s")  # type: ignore[arg-type]


def test_nan_in_one_expert_stays_in_that_expert() -> None:
    model = Mixture("m", 5, 7, 3, 2, 3)
    optimizer = GateRiemannianSGD(trained(model), lr=1e-2)
    model(torch.randn(4, 5)).square().mean().backward()
    with torch.no_grad():
        model.lora_A[1, 0, 0] = math.nan
    optimizer.step()
    assert model.lora_B[1].isnan().all()
    assert not model.lora_B[[0, 2]].isnan().any()
    assert not model.lora_A[[0, 2]].isnan().any()
