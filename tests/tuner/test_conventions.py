"""What PEFT and transformers do with an adapter by its type's name: load it, say what it is, swap it, or refuse it."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from ds_moelora.tuner.config import PEFT_TYPES

from ..support.adapter_support import adapted, batch, config, llama
from ..support.versions import TRANSFORMERS_LOADS_NO_ADAPTER


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """(logits, folder of the base model, folder of the adapter)."""
    folder = tmp_path_factory.mktemp("conventions")
    llama().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config()).eval()
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return model(**batch()).logits, folder / "base", folder / "adapter"


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**batch()).logits


@pytest.mark.skipif(bool(TRANSFORMERS_LOADS_NO_ADAPTER), reason=TRANSFORMERS_LOADS_NO_ADAPTER)
def test_transformers_loads_an_adapter(saved) -> None:
    expected, base, adapter = saved
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), expected)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter))
    assert torch.equal(logits(model), expected)
    if Version(peft.__version__) >= Version(MIN_PEFT_VERSION):  # transformers 5.24 asks for a PEFT yet to come
        model.delete_adapter("default")
        assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(base)))


def test_the_status_says_the_type(saved) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved[1]), saved[2])
    status = model.get_model_status()
    assert status.peft_types == {"default": "MOELORA"}
    assert status.num_adapter_layers == len(model.get_layer_status()) == 6
    assert PeftConfig.from_pretrained(saved[2]).peft_type.value == "MOELORA"


def test_what_takes_lora_alone_is_refused_by_name(saved) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved[1]), saved[2])
    with pytest.raises(ValueError, match=r"Hotswapping only supports .* but MOELORA was passed"):
        hotswap_adapter(model, str(saved[2]), adapter_name="default")
    with pytest.raises(ValueError, match="'MOELORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(llama(), config(), mixed=True)


@pytest.mark.parametrize("name", PEFT_TYPES)
def test_files_with_every_name_load(name: str, tmp_path) -> None:
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": name}))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
