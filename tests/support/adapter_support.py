"""Tiny models from configurations, with adapters whose B is live."""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from ds_moelora import MoELoRAConfig

VOCAB = 61


def llama(layers=2):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
        )
    )


def gpt2():
    torch.manual_seed(0)
    zero = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, **zero
        )
    )


def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_ff=48,
            d_kv=8,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


TARGETS = {llama: ["q_proj", "v_proj", "down_proj"], gpt2: ["c_attn", "c_proj"], bert: ["query", "value", "dense"]}
TASKS = {llama: "CAUSAL_LM", gpt2: "CAUSAL_LM", bert: "SEQ_CLS"}


def config(builder=llama, **changes):
    fields = {
        "r": 2,
        "num_experts": 4,
        "top_k": 2,
        "init_lora_weights": False,
        "target_modules": TARGETS[builder],
        "task_type": TASKS[builder],
    }
    return MoELoRAConfig(**{**fields, **changes})


def adapted(builder=llama, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    return get_peft_model(builder().to(dtype), config(builder, **changes), autocast_adapter_dtype=False)


class Net(nn.Module):
    """One module, `lin`, as a model."""

    def __init__(self, lin):
        super().__init__()
        self.lin = lin

    def forward(self, x):
        return self.lin(x)


def wrap(lin, **fields):
    """The model of one module, adapted, with B live."""
    torch.manual_seed(0)
    fields = {"r": 2, "num_experts": 4, "top_k": 2, "init_lora_weights": False, "target_modules": ["lin"], **fields}
    return get_peft_model(Net(lin), MoELoRAConfig(**fields), autocast_adapter_dtype=False)


def batch(builder=llama, rows=4, length=9, padded=True):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        lengths = torch.randint(3, length + 1, (rows,), generator=generator)
        mask = (torch.arange(length) < lengths[:, None]).long()
    labels = torch.arange(rows) % 2 if builder is bert else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_step(model, inputs):
    """(loss, gradients) of one forward and backward pass in training mode."""
    model.train()
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(a, b, rtol=0.0):
    """Equal dicts of tensors: to the bit, or to `rtol` of each tensor's largest entry."""
    assert a.keys() == b.keys()
    assert a
    for name in a:
        bound = rtol * b[name].abs().max().item()
        assert torch.equal(a[name], b[name]) or (a[name] - b[name]).abs().max().item() <= bound, name
