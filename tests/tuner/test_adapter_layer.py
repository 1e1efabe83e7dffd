"""One adapted layer: shapes, initialisation, the plain-LoRA case, merging, dropout, autocast, several adapters."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.reference import max_relative_error, reference_layer
from ds_moelora.tuner import MoELoRALayer
from ds_moelora.tuner.layer import in_out_features

from ..support.adapter_support import Net, wrap


def layer_of(model) -> MoELoRALayer:
    return model.base_model.model.lin


def expected(model, x, base, adapter="default", **kwargs):
    """The slow formula on a model's weights; `base` is a copy of the original layer."""
    e, flat = layer_of(model).experts(adapter), x.reshape(-1, x.shape[-1])
    y = reference_layer(flat, base(flat), e.lora_A, e.lora_B, e.router.weight, e.top_k, e.scaling, **kwargs)
    return y.view(*x.shape[:-1], y.shape[-1])


class Plain(nn.Module):
    """Not a torch or transformers class: only has sizes, and can be called."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / 3)

    def forward(self, x):
        return (x @ self.weight.t()).tanh()


BASES = {
    "linear": lambda i, o: nn.Linear(i, o),
    "linear without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "conv1d": lambda i, o: Conv1D(o, i),
    "black box": Plain,
}


LEADS = [(5,), (2, 3), (2, 3, 4), (0,), (2, 0), ()]
# Conv1D itself takes no vectors, and no empty batches of more than two dimensions.
KINDS = [(kind, lead) for kind in BASES for lead in LEADS if kind != "conv1d" or lead not in ((), (2, 0))]


@pytest.mark.parametrize(("kind", "lead"), KINDS)
def test_output_and_gradients_for_any_rank_of_input(kind, lead):
    base = BASES[kind](6, 5).double()
    model, twin = wrap(base), wrap(base)
    x = torch.randn(*lead, 6, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    experts, others = layer_of(model).experts("default"), layer_of(twin).experts("default")
    y, reference = model(x), expected(twin, z, base)
    assert y.shape == (*lead, 5)
    dy = torch.randn_like(y)
    y.backward(dy)
    reference.backward(dy)
    errors = [max_relative_error(y, reference), max_relative_error(x.grad, z.grad)]
    errors += [max_relative_error(getattr(experts, n).grad, getattr(others, n).grad) for n in ("lora_A", "lora_B")]
    errors.append(max_relative_error(experts.router.weight.grad, others.router.weight.grad))
    assert max(errors) < 1e-12, errors
    assert all(p.grad is None for p in base.parameters())


def test_shapes_names_initialisation():
    model = wrap(nn.Linear(400, 30), init_lora_weights=True, num_experts=3, r=7)
    shapes = {
        n.rpartition("moelora_experts.")[2]: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad
    }
    assert shapes == {"default.lora_A": (3, 400, 7), "default.lora_B": (3, 30, 7), "default.router.weight": (3, 400)}
    experts = layer_of(model).experts("default")
    bound = 1 / math.sqrt(400)
    for A in experts.lora_A:  # the distribution that PEFT's Kaiming-uniform gives an (r, in) matrix
        assert 0.98 * bound < A.abs().max() <= bound
        torch.testing.assert_close(A.std(), torch.tensor(bound / math.sqrt(3)), rtol=0.05, atol=0)
    assert experts.lora_A.is_contiguous()
    assert experts.lora_B.is_contiguous()
    assert not experts.lora_B.any()
    x = torch.randn(4, 400)
    assert torch.equal(model(x), layer_of(model).base_layer(x))


@pytest.mark.parametrize("scaling", ["alpha", "rslora"])
@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)])
def test_one_expert_equals_peft_lora(scaling, base):
    base = base.double()
    model = wrap(base, num_experts=1, top_k=1, scaling=scaling)
    rslora, transposed = scaling == "rslora", type(base) is Conv1D
    lora_config = LoraConfig(r=2, lora_alpha=16, target_modules=["lin"], use_rslora=rslora, fan_in_fan_out=transposed)
    lora = get_peft_model(Net(base), lora_config).double()
    experts, twin = layer_of(model).experts("default"), lora.base_model.model.lin
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(experts.lora_A[0].t())
        twin.lora_B["default"].weight.copy_(experts.lora_B[0])
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(model(x), lora(x))
    model(x).square().sum().backward()
    lora(x).square().sum().backward()
    torch.testing.assert_close(experts.lora_A.grad[0].t(), twin.lora_A["default"].weight.grad)
    torch.testing.assert_close(experts.lora_B.grad[0], twin.lora_B["default"].weight.grad)
    assert not experts.router.weight.grad.any()


@pytest.mark.parametrize("base", [nn.Linear(6, 5), Conv1D(5, 6)])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_one_expert_merges_exactly(base, safe_merge):
    weight = base.weight.detach().clone()
    model = wrap(base, num_experts=1, top_k=1)
    x = torch.randn(7, 6)
    before = model(x)
    model.merge_adapter(safe_merge=safe_merge)
    assert layer_of(model).merged
    torch.testing.assert_close(model(x), before)
    with model.disable_adapter():
        torch.testing.assert_close(layer_of(model)(x), type(base).forward(base, x))
        torch.testing.assert_close(base.weight, weight)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(base.weight, weight)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert type(merged.lin) is type(base)
    torch.testing.assert_close(merged(x), before)


def test_safe_merge_refuses_broken_weights():
    model = wrap(nn.Linear(6, 5), num_experts=1, top_k=1)
    layer_of(model).experts("default").lora_A.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        model.merge_adapter(safe_merge=True)


def test_several_experts_refuse_to_merge_and_stay_usable():
    model = wrap(nn.Linear(6, 5))
    x = torch.randn(3, 6)
    before = model(x)
    for merge in (model.merge_and_unload, model.merge_adapter, layer_of(model).merge):
        with pytest.raises(ValueError, match=r"num_experts=4: its gates depend on the token.*num_experts=1"):
            merge()
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="add_weighted_adapter is not supported"):
        model.add_weighted_adapter(["default"], [1.0], "new")


def test_unload_gives_the_base_model_back():
    base = nn.Linear(6, 5)
    model = wrap(base)
    inner = model.base_model.model
    unloaded = model.unload()
    assert unloaded is inner
    assert unloaded.lin is base
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks


def test_dropout_reaches_the_experts_and_not_the_router():
    base = nn.Linear(64, 5)
    model = wrap(base, lora_dropout=0.5)
    experts = layer_of(model).experts("default")
    seen = {}
    experts.router.register_forward_hook(lambda m, args, out: seen.update(router=args[0]))
    experts.dropout.register_forward_hook(lambda m, args, out: seen.update(experts=out))
    x = torch.randn(9, 64)
    model.train()
    y = model(x)
    assert torch.equal(seen["router"], x)
    assert 0.3 < (seen["experts"] == 0).float().mean() < 0.7
    chosen_by = reference_layer(x, base(x), experts.lora_A, experts.lora_B, experts.router.weight, 2, experts.scaling)
    assert not torch.allclose(y, chosen_by)
    torch.testing.assert_close(model.eval()(x), chosen_by)


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_autocast(base_dtype):
    base = nn.Linear(16, 12).to(base_dtype)
    model = wrap(base)
    model.base_model._cast_adapter_dtype("default", True)  # what get_peft_model does by default
    experts = layer_of(model).experts("default")
    assert experts.lora_A.dtype == torch.float32
    x = torch.randn(2, 9, 16).to(base_dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad.dtype == base_dtype
    assert experts.lora_A.grad.dtype == experts.router.weight.grad.dtype == torch.float32
    exact = wrap(nn.Linear(16, 12))
    with torch.no_grad():
        layer_of(exact).base_layer.load_state_dict(base.state_dict())
        layer_of(exact).experts("default").load_state_dict(experts.state_dict())
    z = exact(x.detach().float())
    z.square().sum().backward()
    # bfloat16 has 8 bits; the loss is a sum of 216 squares of rounded numbers
    assert max_relative_error(y, z) < 3e-2
    assert max_relative_error(experts.lora_B.grad, layer_of(exact).experts("default").lora_B.grad) < 6e-2


def test_nobody_else_sees_the_base_output_overwritten():
    base = nn.Linear(6, 5, bias=False)
    model = wrap(base)
    kept = []
    x = torch.randn(2, 3, 6)
    handle = base.register_forward_hook(lambda m, args, out: kept.append(out))
    y = model(x)
    handle.remove()
    assert torch.equal(kept[0], base(x))
    torch.testing.assert_close(model(x), y)


def test_a_view_is_never_overwritten():
    """ZeRO-3's hooks hand the experts a view of the base layer's output, and autograd forbids writing to it."""
    experts = layer_of(wrap(nn.Linear(6, 5))).experts("default")
    x, whole = torch.randn(3, 6), torch.zeros(3, 10)
    out = experts(x, whole[:, :5], inplace=True)
    assert out.any()
    assert not whole.any()
    owned = torch.zeros(3, 5)
    assert experts(x, owned, inplace=True).data_ptr() == owned.data_ptr()


def test_several_adapters():
    base = nn.Linear(6, 5).double()
    model = wrap(base)
    other = MoELoRAConfig(r=3, num_experts=2, top_k=1, init_lora_weights=False, target_modules=["lin"])
    model.add_adapter("other", other)
    x = torch.randn(4, 6, dtype=torch.float64)
    first = model(x)
    assert layer_of(model).active_adapters == ["default"]
    torch.testing.assert_close(first, expected(model, x, base))
    trainable = {n.split("moelora_experts.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"default"}
    model.set_adapter("other")
    second = model(x)
    torch.testing.assert_close(second, expected(model, x, base, "other"))
    trainable = {n.split("moelora_experts.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"other"}
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x), first + second - base(x))
    with pytest.raises(ValueError, match="adapter_names"):
        model(x, adapter_names=["default"] * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("default")
    torch.testing.assert_close(model(x), second)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(model(x), second)


def test_sizes_come_from_attributes_where_zero3_has_emptied_the_weight():
    linear, conv = nn.Linear(6, 5), Conv1D(5, 6)
    for layer in (linear, conv):
        layer.weight.ds_shape = layer.weight.shape
        layer.weight.data = torch.empty(0)
        assert in_out_features(layer) == (6, 5)
        model = wrap(layer)
        assert layer_of(model).experts("default").lora_B.shape == (4, 5, 2)
    del conv.nx, conv.nf
    assert in_out_features(conv) == (6, 5)
    assert in_out_features(nn.Embedding(3, 4)) is None
