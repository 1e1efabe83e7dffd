"""Who minimises the routers' auxiliary losses: the model's `loss`, trainers with a loss of their own, or nobody."""

from __future__ import annotations

import string
import warnings

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from ..support.adapter_support import batch, config, llama

COEF = 0.5


def adapted(make=llama, **fields):
    torch.manual_seed(0)
    settings = {"router_aux_loss_coef": COEF, "task_type": "CAUSAL_LM", "num_experts": 4, **fields}
    return get_peft_model(make(), config(**settings))


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            router_aux_loss_coef=0.25,
        )
    )


def said(run) -> list[str]:
    """Warnings that `run` gives of training without the balance loss."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(w.message) for w in caught if "load-balancing" in str(w.message)]


def router_grads(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "router.weight" in n])


def test_the_two_doors_carry_the_same_loss_once() -> None:
    """loss = plain + coef L; plain + coef * aux_loss, TRL's sum, is the same, and so are its gradients."""
    model, inputs = adapted().train(), batch()
    text = model.config.get_text_config()
    assert (text.output_router_logits, text.router_aux_loss_coef) == (False, COEF)
    outputs = model(**inputs)
    assert "aux_loss" not in outputs
    outputs.loss.backward()
    by_loss = router_grads(model)
    model.zero_grad()
    asked = model(**inputs, output_router_logits=True)
    assert torch.equal(asked.loss, outputs.loss)
    assert torch.equal(asked.aux_loss, model.base_model.last_aux_loss)
    logits, labels = asked.logits[:, :-1], inputs["labels"][:, 1:]
    (F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + COEF * asked.aux_loss).backward()
    torch.testing.assert_close(router_grads(model), by_loss, rtol=1e-4, atol=1e-7)


def test_evaluation_gets_it_too_if_it_asks() -> None:
    """TRL evaluates with the sum that it trains with."""
    model, inputs = adapted(), batch()
    trained = model.train()(**inputs, output_router_logits=True)
    with torch.no_grad():
        evaluated = model.eval()(**inputs, output_router_logits=True)
        assert "aux_loss" not in model(**inputs)
        with model.disable_adapter():
            assert model(**inputs, output_router_logits=True).aux_loss == 0
    torch.testing.assert_close(evaluated.aux_loss, trained.aux_loss.detach())
    torch.testing.assert_close(evaluated.loss + COEF * evaluated.aux_loss, trained.loss.detach())


@pytest.mark.parametrize("fields", [{}, {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.125}])
def test_what_is_offered_is_taken_back(fields: dict[str, float]) -> None:
    model = adapted(**fields)
    text = model.config.get_text_config()
    assert text.router_aux_loss_coef == (fields.get("router_z_loss_coef") or COEF)
    model.unload()
    assert not hasattr(text, "router_aux_loss_coef")
    assert not hasattr(text, "output_router_logits")
    assert not hasattr(adapted(router_aux_loss_coef=0.0).config.get_text_config(), "output_router_logits")


def test_a_base_model_with_routers_keeps_its_own_loss() -> None:
    inputs = batch()
    base = mixtral().train()
    own = base(**inputs, output_router_logits=True)
    fields = config(router_aux_loss_coef=COEF, target_modules=["q_proj"], init_lora_weights=True)
    model = get_peft_model(base, fields).train()
    assert model.config.router_aux_loss_coef == 0.25
    assert model.config.output_router_logits is False
    outputs = model(**inputs, output_router_logits=True)
    ours = COEF * model.base_model.last_aux_loss
    torch.testing.assert_close(outputs.aux_loss, own.aux_loss + ours / 0.25)
    torch.testing.assert_close(outputs.loss, own.loss + ours)
    plain = model(**inputs)
    torch.testing.assert_close(plain.loss, own.loss - 0.25 * own.aux_loss + ours)
    model.unload()
    assert base.config.router_aux_loss_coef == 0.25


def own_loop(model, use) -> None:
    inputs = batch()
    for _ in range(2):
        outputs = model(**inputs, output_router_logits=True)
        use(outputs, F.cross_entropy(outputs.logits.flatten(0, 1), inputs["labels"].flatten())).backward()


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_loop_that_leaves_it_out_is_told_once(top_k: int) -> None:
    model = adapted(top_k=top_k).train()
    found = said(lambda: own_loop(model, lambda outputs, loss: loss))
    assert len(found) == 1
    assert "is not part of the loss that is being minimised" in found[0]
    for use in (lambda o, loss: o.loss, lambda o, loss: loss + COEF * o.aux_loss):
        assert not said(lambda use=use: own_loop(adapted(top_k=top_k).train(), use))
    assert not said(lambda: own_loop(adapted(router_aux_loss_coef=0.0).train(), lambda outputs, loss: loss))


def test_it_is_told_under_gradient_checkpointing() -> None:
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert len(said(lambda: own_loop(model, lambda outputs, loss: loss))) == 1
    again = adapted().train()
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not said(lambda: own_loop(again, lambda outputs, loss: outputs.loss))


def test_training_in_eval_mode_is_told_once() -> None:
    model, inputs = adapted().eval(), batch()
    found = said(lambda: [model(**inputs) for _ in range(2)])
    assert len(found) == 1
    assert "Call model.train() before training" in found[0]
    with torch.no_grad():
        assert not said(lambda: adapted().eval()(**inputs))
    assert not said(lambda: adapted().train()(**inputs))
    assert not said(lambda: adapted(inference_mode=True).eval()(**inputs))


PAIRS = [{"prompt": "p" * (3 + i), "completion": "c" * (4 + i)} for i in range(4)]


def letters():
    """One token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *string.ascii_lowercase])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def trained_routers(kind: str, coef: float, folder) -> torch.Tensor:
    """Routers after two steps, and an evaluation, of one of TRL's trainers; the coefficient is the adapter's."""
    import trl
    from datasets import Dataset
    from transformers import set_seed

    set_seed(0)
    fields = dict.fromkeys(("max_steps", "eval_steps", "per_device_train_batch_size", "per_device_eval_batch_size"), 2)
    fields |= dict.fromkeys(("report_to", "save_strategy"), "no") | {"eval_strategy": "steps", "learning_rate": 1e-2}
    fields |= {"output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    rows, more = PAIRS, {}
    if kind == "DPO":
        rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "d" * 5} for row in PAIRS]
    elif kind == "GRPO":
        fields |= {"num_generations": 2, "num_generations_eval": 2, "max_completion_length": 4}
        more = {"reward_funcs": lambda completions, **kwargs: [float(len(set(c))) for c in completions]}
    data = Dataset.from_list(rows)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=llama(),
        args=getattr(trl, f"{kind}Config")(**fields),
        train_dataset=data,
        eval_dataset=data,
        processing_class=letters(),
        peft_config=config(target_modules=["q_proj"], router_aux_loss_coef=coef),
        **more,
    )
    trainer.train()
    return torch.cat([p.detach().flatten() for n, p in trainer.model.named_parameters() if "router.weight" in n])


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl_trains_the_routers_with_it(kind: str, tmp_path) -> None:
    off, on = (trained_routers(kind, coef, tmp_path / str(coef)) for coef in (0.0, 10.0))
    assert torch.isfinite(on).all()
    assert not torch.equal(off, on)


def test_checkpointed_layers_keep_no_router_tensors() -> None:
    """Of the losses two numbers a layer stay between forward and backward: less than one layer's (tokens, experts)."""
    tokens, experts = 4 * 48, 64
    inputs, kept = batch(rows=4, length=48, padded=False), {}
    for coef in (0.0, COEF):
        model = adapted(num_experts=experts, r=1, router_aux_loss_coef=coef).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            outputs = model(**inputs)
        events = profile.profiler.kineto_results.events()
        kept[coef] = sum(event.nbytes() for event in events if event.name() == "[memory]")
        outputs.loss.backward()
    assert kept[COEF] - kept[0.0] < 4 * tokens * experts
