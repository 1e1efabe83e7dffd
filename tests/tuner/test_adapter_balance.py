"""The auxiliary losses inside a model's loss: what is added, when, and that splitting a batch changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ds_moelora import MoELoRAConfig
from ds_moelora.mixture.routing import chosen_by, route, sequence_balance_loss, sequence_z_loss
from ds_moelora.tuner.losses import active_collector, batch_layout

from ..support.adapter_support import adapted, assert_same, batch, bert, gpt2, gradients, llama, train_step

COEF = 0.7
# Transformers computes Llama's norms and every causal loss in float32 whatever the model's dtype.
EXACT = 1e-6


def part(inputs, rows):
    return {name: value[rows] for name, value in inputs.items()}


def layer_losses(model, inputs, z_loss=False):
    """Each layer's mean over sequences, from its router's logits, without any of the collecting."""
    seen, handles = [], []
    for module in model.modules():
        if type(module).__name__ == "MoELoRAExperts":
            handles.append(module.router.register_forward_hook(lambda m, a, out, k=module.top_k: seen.append((out, k))))
    model(**inputs)
    for handle in handles:
        handle.remove()
    rows, length = inputs["input_ids"].shape
    result = []
    for logits, k in seen:
        chosen = chosen_by(route(logits, k))
        if logits.shape[0] == rows * length:
            shape, mask = (rows, length, -1), inputs["attention_mask"]
        else:
            shape, mask = (logits.shape[0], 1, -1), None
        logits, chosen = logits.view(shape), chosen.view(shape)
        losses = sequence_z_loss(logits, mask) if z_loss else sequence_balance_loss(logits, chosen, mask)
        result.append(losses.mean())
    return torch.stack(result)


@pytest.mark.parametrize("builder", [llama, gpt2, bert])
@pytest.mark.parametrize("plain_peft_model", [False, True])
def test_coef_times_the_loss_is_added_once(builder, plain_peft_model):
    # Without a task_type PEFT calls the base model directly, not the tuner.
    fields = {"task_type": None} if plain_peft_model else {}
    with_loss = adapted(builder, torch.float64, router_aux_loss_coef=COEF, **fields)
    without = adapted(builder, torch.float64, router_aux_loss_coef=0.0, **fields)
    assert (type(with_loss) is PeftModel) == plain_peft_model
    inputs = batch(builder)
    aux = layer_losses(without.train(), inputs).mean()
    difference = train_step(with_loss, inputs)[0] - train_step(without, inputs)[0]
    torch.testing.assert_close(difference.double(), COEF * aux, rtol=1e-5, atol=0)
    last = with_loss.base_model.last_aux_loss
    torch.testing.assert_close(last.double(), aux)
    assert not last.requires_grad
    assert without.base_model.last_aux_loss is None
    assert active_collector() is None


@pytest.mark.parametrize("builder", [llama, bert])
@pytest.mark.parametrize("coefs", [(0.0, 0.3), (0.7, 0.3)])
def test_each_loss_is_added_with_its_own_coefficient(builder, coefs):
    names = ("router_aux_loss_coef", "router_z_loss_coef")
    without = adapted(builder, torch.float64, router_aux_loss_coef=0.0)
    with_loss = adapted(builder, torch.float64, **dict(zip(names, coefs, strict=True)))
    inputs = batch(builder)
    balance, z = layer_losses(without.train(), inputs).mean(), layer_losses(without, inputs, z_loss=True).mean()
    difference = train_step(with_loss, inputs)[0] - train_step(without, inputs)[0]
    torch.testing.assert_close(difference.double(), coefs[0] * balance + coefs[1] * z, rtol=1e-5, atol=0)
    tuner = with_loss.base_model
    torch.testing.assert_close(tuner.last_router_z_loss.double(), z)
    assert (tuner.last_aux_loss is None) == (coefs[0] == 0)


def test_evaluation_and_unlabelled_calls_are_untouched():
    model, inputs = adapted(router_aux_loss_coef=COEF), batch()
    twin = adapted(router_aux_loss_coef=0.0)
    assert torch.equal(model.eval()(**inputs).loss, twin.eval()(**inputs).loss)
    model.train()
    inputs.pop("labels")
    with pytest.warns(UserWarning, match="returned no loss.*router_aux_loss_coef=0"):
        assert model(**inputs).loss is None
    assert model.base_model.last_aux_loss is None


def test_tuple_outputs():
    model, inputs = adapted(router_aux_loss_coef=COEF).train(), batch()
    torch.testing.assert_close(model(**inputs, return_dict=False)[0], model(**inputs).loss)


def test_dict_and_scalar_outputs_of_other_models():
    class Model(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.lin, self.wrap = nn.Linear(4, 4), wrap

        def forward(self, x):
            return self.wrap(self.lin(x).mean())

    losses = []
    for coef in (0.0, COEF):
        for wrap, unwrap in ((lambda v: {"loss": v}, lambda o: o["loss"]), (lambda v: v, lambda o: o)):
            torch.manual_seed(0)
            fields = {"target_modules": ["lin"], "num_experts": 3, "top_k": 1, "router_aux_loss_coef": coef}
            model = get_peft_model(Model(wrap), MoELoRAConfig(**fields))
            losses.append(unwrap(model.train()(torch.ones(2, 5, 4))).item())
    assert losses[0] == losses[1]
    assert losses[2] == losses[3] > losses[0]


def test_an_exception_ends_the_collection():
    model, inputs = adapted(router_aux_loss_coef=COEF).train(), batch()
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + 1000, labels=inputs["labels"])
    assert active_collector() is None
    expected = adapted(router_aux_loss_coef=COEF).train()(**inputs).loss
    assert torch.equal(model(**inputs).loss, expected)


def test_a_deep_copy_has_a_loss_of_its_own_and_unloads_alone():
    model = adapted(router_aux_loss_coef=COEF)
    twin, inputs = copy.deepcopy(model), batch()
    loss, _ = train_step(twin, inputs)
    assert model.base_model.last_aux_loss is None
    assert twin.base_model.last_aux_loss is not None
    unloaded = twin.unload()
    assert not unloaded._forward_hooks
    assert torch.equal(train_step(model, inputs)[0], loss)


@pytest.mark.parametrize("builder", [llama, bert])
@pytest.mark.parametrize("splits", [[4, 4], [1] * 8])
@pytest.mark.parametrize("loss", ["balance", "z"])
def test_gradient_is_the_mean_over_micro_batches(builder, splits, loss):
    """The Trainer's way without num_items_in_batch: equal micro-batches, each loss divided by their number."""
    model, inputs = adapted(builder, torch.float64, router_aux_loss_coef=0.0, top_p=0.6), batch(builder, rows=8)
    whole = aux_gradients(model, inputs, [8], loss)
    assert_same(aux_gradients(model, inputs, splits, loss), whole, rtol=EXACT)


@pytest.mark.parametrize("splits", [[1, 2, 5], [1] * 8])
def test_gradient_is_the_sum_with_num_items_in_batch(splits):
    """The Trainer's way with num_items_in_batch: any micro-batches, losses summed. Here the whole loss is split."""
    coefs = {"router_aux_loss_coef": COEF, "router_z_loss_coef": COEF}
    model, inputs = adapted(dtype=torch.float64, **coefs), batch(rows=8)
    num_items = inputs["labels"][:, 1:].ne(-100).sum()
    totals = []
    for sizes in ([8], splits):
        model.train()
        model.zero_grad()
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            model(**part(inputs, rows), num_items_in_batch=num_items).loss.backward()
            start += size
        totals.append(gradients(model))
    assert_same(totals[1], totals[0], rtol=EXACT)


def aux_gradients(model, inputs, splits, loss):
    """Gradient of one auxiliary loss alone: that of the whole loss minus that with the coefficient at zero."""
    result = []
    for coef in (COEF, 0.0):
        for module in model.modules():
            if type(module).__name__ == "MoELoRAExperts":
                module.coefs = module.coefs._replace(**{loss: coef})
        model.train()
        model.zero_grad()
        start = 0
        for size in splits:
            (model(**part(inputs, slice(start, start + size))).loss / len(splits)).backward()
            start += size
        result.append(gradients(model))
    difference = {name: result[0][name] - result[1][name] for name in result[0] if "router" in name}
    assert all(value.abs().max() > 1e-6 for value in difference.values())
    return difference


def test_padding_does_not_matter():
    coefs = {"router_aux_loss_coef": COEF, "router_z_loss_coef": COEF}
    model, inputs = adapted(dtype=torch.float64, **coefs).train(), batch(length=9)
    padded = {
        "input_ids": nn.functional.pad(inputs["input_ids"], (0, 5), value=7),
        "attention_mask": nn.functional.pad(inputs["attention_mask"], (0, 5)),
        "labels": nn.functional.pad(inputs["labels"], (0, 5), value=-100),
    }
    loss, grads = train_step(model, inputs)
    padded_loss, padded_grads = train_step(model, padded)
    torch.testing.assert_close(padded_loss, loss)
    assert_same(padded_grads, grads, rtol=EXACT)


def test_layout_of_a_batch():
    ids = torch.zeros(2, 3, dtype=torch.long)
    labels = torch.tensor([[1, 2, -100], [5, -100, -100]])
    mask = torch.ones(2, 3)
    assert batch_layout({"input_ids": ids}, True).grid == (2, 3)
    assert batch_layout({"inputs_embeds": torch.zeros(2, 3, 4)}, True).grid == (2, 3)
    assert batch_layout({"attention_mask": torch.ones(2, 1, 3, 3)}, True).mask is None
    assert batch_layout({"attention_mask": mask}, True).mask is mask
    assert batch_layout({"labels": labels}, True).weights is None
    both = {"labels": labels, "num_items_in_batch": 4}
    assert batch_layout(both, True).weights.tolist() == [0.25, 0]
    assert batch_layout(both, False).weights.tolist() == [0.5, 0.25]
    assert batch_layout({**both, "shift_labels": labels}, True).weights.tolist() == [0.5, 0.25]
    assert batch_layout({**both, "num_items_in_batch": torch.tensor([[4.0]])}, False).weights.tolist() == [0.5, 0.25]
    # An encoder-decoder's mask is the encoder's: of no use where both lengths agree.
    encoder = {"input_ids": ids, "attention_mask": mask}
    assert batch_layout({**encoder, "labels": labels}, False, True).mask is None
    assert batch_layout({**encoder, "labels": labels[:, :2]}, False, True).mask is mask


def test_trainer_gives_the_same_weights_for_any_accumulation(tmp_path):
    """One SGD step of the real Trainer on 8 sequences, as 1 x 8 and 4 x 2."""
    inputs = batch(rows=8)
    dataset = [{name: value[i] for name, value in inputs.items()} for i in range(8)]
    finals = []
    for accumulation in (1, 4):
        model = adapted(router_aux_loss_coef=COEF)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(model=model, args=arguments, train_dataset=dataset).train()
        finals.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
    start = {n: p.detach() for n, p in adapted().named_parameters() if n in finals[0]}
    assert max((finals[0][n] - start[n]).abs().max() for n in start) > 1e-4
    assert_same(finals[1], finals[0], rtol=1e-5)  # float32 sums in another order, relative to the largest weight
