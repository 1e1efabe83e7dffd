"""Model cards: what saving writes, what it leaves alone, and what `push_to_hub` uploads."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers.utils import hub

from ds_moelora.tuner import TrainingRecord, record_training, without_card

from ..support.adapter_support import adapted, bert, llama

RECORD = TrainingRecord(
    "## Training\n\nData: `some/data`.",
    ["some/data"],
    [EvalResult("text-generation", "some/data", "some/data", "exact_match", 0.5)],
)


def test_a_new_card(tmp_path: Path):
    model = adapted(shared_expert=True, rank_pattern={"q_proj": 3})
    record_training(model, RECORD)
    with without_card(model):
        model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model.save_pretrained(tmp_path)
    text, card = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md")
    assert "[More Information Needed]" not in text
    for part in ("| `num_experts` | `4` |", "| `shared_expert` | `True` |", "q_proj", "- PEFT ", "- ds_moelora 0.1.0",
                 "import ds_moelora", "AutoModelForCausalLM", "Data: `some/data`"):  # fmt: skip
        assert part in text
    assert card.data.library_name == "peft"
    assert {"moe-lora", "mixture-of-experts"} <= set(card.data.tags)
    assert card.data.datasets == ["some/data"]
    assert [result.metric_value for result in card.data.eval_results] == [0.5]
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text, "saving twice writes the same card"


def test_its_code_loads_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    bert().save_pretrained(base)
    model = adapted(bert)
    model.base_model.model.config._name_or_path = str(base)
    model.save_pretrained(folder)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert str(base) in code
    names: dict[str, Any] = {}
    exec(code.replace("THIS_FOLDER_OR_REPOSITORY", str(folder)), names)
    assert names["model"].peft_config["default"].num_experts == 4
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict(), "a folder is no repository"


def test_what_somebody_has_written_stays(tmp_path: Path):
    own = "---\nlicense: mit\n---\n# My model\n\nIt reads letters.\n"
    (tmp_path / "README.md").write_text(own)
    model = adapted()
    record_training(model, RECORD)
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nIt reads numbers, too.\n")
    adapted(num_experts=3).save_pretrained(tmp_path)  # a later process that knows nothing of the training
    text, card = (tmp_path / "README.md").read_text(), ModelCard.load(tmp_path / "README.md")
    for part in (
        "# My model",
        "It reads letters.",
        "It reads numbers, too.",
        "Data: `some/data`",
        "| `num_experts` | `3` |",
    ):
        assert text.count(part) == 1, part
    assert "| `num_experts` | `4` |" not in text
    assert card.data.license == "mit"
    assert card.data.datasets == ["some/data"]


def test_cards_of_other_adapters_are_pefts(tmp_path: Path):
    get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "ds_moelora" not in (tmp_path / "README.md").read_text()


class Hub:
    """Takes an upload down instead of making it."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], **kwargs: Any) -> str:
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        return repo_id


FILLED_IN = ModelCard.from_template(ModelCardData()).content.replace(
    "[More Information Needed]", "It reads letters.", 1
)


@pytest.mark.parametrize("on_hub", [None, "# My model\n\nIt reads letters.\n", FILLED_IN])
def test_push_to_hub(on_hub: str | None, monkeypatch: pytest.MonkeyPatch):
    upload, load = Hub(), ModelCard.load.__func__

    def load_card(cls: Any, name: Any, **kwargs: Any) -> ModelCard:
        if name != "me/mixture":
            return load(cls, name, **kwargs)
        if on_hub is None:
            raise EntryNotFoundError("no card")
        return ModelCard(on_hub)

    monkeypatch.setattr(hub, "hf_api", lambda: upload)
    monkeypatch.setattr(ModelCard, "load", classmethod(load_card))
    assert adapted().push_to_hub("mixture") == "me/mixture"
    assert upload.files.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = upload.files["README.md"].decode()
    assert "| `num_experts` | `4` |" in card
    assert ("[More Information Needed]" in card) == (on_hub is FILLED_IN)
    assert ("It reads letters." in card) == (on_hub is not None)
