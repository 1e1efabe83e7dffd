"""Drawn launcher configurations, and whether each is valid: told by the documentation's bounds, not by the launcher.

A draw is a run that works, of which a few parts are redrawn; each redrawn part knows whether it is valid (`Part`).
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from tests.support.launch_support import ROOT, alpaca_rows

RANKS = 2
VARIANTS = ("goat", "goat_mini", "pissa", "milora")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAYERS = 2
CONFIGS = ("zero1.json", "zero2.json", "zero2_adamw.json", "zero2_ep.json", "zero3.json")
REMOVED = object()  # as a value in a DeepSpeed config: the key is taken away


@dataclass
class Draw:
    """What is on the command line and in the files that it names.

    Args:
        flags: name -> value; a list is several words.
        config: what the DeepSpeed config holds; text as it is, anything else as JSON.
        data: (suffix, text) of the data file.
        recipe: text of a recipe file beside the flags; None: without one. from_recipe: what it says.
        wrong: what makes it invalid, by where it stands; empty: it is valid.
    """

    flags: dict[str, Any]
    config: Any
    data: tuple[str, str | bytes]
    recipe: str | bytes | None = None
    from_recipe: dict[str, Any] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def set(self, flag: str, value: Any, valid: bool) -> None:
        self.flags[flag.removeprefix("--")] = value
        if not valid:
            self.wrong[flag] = repr(value)

    def value(self, name: str, default: Any) -> Any:
        """What a flag is in the end: the command line wins."""
        found = self.flags.get(name, self.from_recipe.get(name))
        return default if found is None else found

    def table(self, name: str) -> dict[str, Any]:
        found = self.value(name, {})
        return json.loads(found) if isinstance(found, str) else found

    def write(self, folder: Path) -> list[str]:
        """Writes the files; returns the command line."""
        files = {f"rows{self.data[0]}": self.data[1], "ds.json": self.config}
        flags = {"dataset_name": str(folder / f"rows{self.data[0]}"), "deepspeed": str(folder / "ds.json")}
        if self.recipe is not None:
            files["recipe.yaml"] = self.recipe
            flags["config"] = str(folder / "recipe.yaml")
        for name, content in files.items():
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        argv = []
        for name, value in ({k: v for k, v in flags.items() if k not in self.from_recipe} | self.flags).items():
            argv += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        return argv


def _one_of(good: list[Any], bad: list[Any]) -> st.SearchStrategy[tuple[Any, bool]]:
    """(value, whether it is valid)."""
    return st.sampled_from([(v, True) for v in good] + [(v, False) for v in bad])


def _number(low: float, high: float, bad: list[Any]) -> st.SearchStrategy[tuple[Any, bool]]:
    good = st.floats(low, high, allow_subnormal=False).map(lambda v: (v, True))
    return good | st.sampled_from([(v, False) for v in [*bad, "nan", "inf", "much"]])


def _count(low: int, high: int) -> st.SearchStrategy[tuple[Any, bool]]:
    bad = st.integers(-3, low - 1) | st.sampled_from(["two", 1.5, ""])
    return st.integers(low, high).map(lambda v: (v, True)) | bad.map(lambda v: (v, False))


# Flags whose validity does not depend on others.
SINGLE = {
    "r": _count(1, 9),
    "lora_alpha": _number(0.1, 64, [0, -1]),
    "lora_dropout": _number(0, 0.9, [1, 1.5, -0.1]),
    "scaling": _one_of(["alpha", "rslora"], ["gamma", "ALPHA", ""]),
    "router_aux_loss_coef": _number(0, 1, [-1]),
    "router_z_loss_coef": _number(0, 1, [-1e-3]),
    "router_temperature": _number(0.1, 9, [0, -2]),
    "router_jitter": _number(0, 0.9, [1, -0.1]),
    "top_p": _number(0.1, 0.9, [0, 1, 1.1]),
    "shared_expert": _one_of([True, False], ["perhaps"]),
    "expert_compute": _one_of(["dense", "grouped", "fused", "auto"], ["sparse"]),
    "init_lora_weights": _one_of(["true", "false", "goat", "pissa"], ["magic", ""]),
    "target_modules": st.lists(st.sampled_from(LINEARS), min_size=1, max_size=3, unique=True).map(lambda v: (v, True))
    | _one_of(
        [["all-linear"], [r".*self_attn\.(q|v)_proj$"]],
        [["nowhere"], ["q_proj", "nowhere"], [r".*\.nowhere$"], ["embed_tokens"], ["("], [""], ["model"], ["*"]],
    ),
    "rank_pattern": _one_of(
        ['{"q_proj": 3}', r'{".*layers\\.0.*": 2}', "{}"],
        [
            "{",
            "[1]",
            "3",
            '"q"',
            "null]",
            '{"q_proj": 0}',
            '{"q_proj": 1.5}',
            '{"nowhere": 2}',
            '{"(": 2}',
            '{"q_proj": "2"}',
        ],
    ),
    "alpha_pattern": _one_of(['{"q_proj": 8}'], ['{"q_proj": -8}', '{"q_proj": NaN}', '{"q_proj": null}']),
    "modules_to_save": _one_of([["lm_head"]], [["nowhere"]]),
    "learning_rate": _number(1e-6, 1e-2, [-1e-3]),
    "weight_decay": _number(0, 0.5, [-1]),
    "adam_beta1": _number(0, 0.99, [1, -0.5]),
    "adam_epsilon": _number(1e-9, 1e-3, [-1]),
    "max_grad_norm": _number(0, 9, [-1]),
    "per_device_train_batch_size": _count(1, 4),
    "gradient_accumulation_steps": _count(1, 3),
    "max_length": st.integers(300, 600).map(lambda v: (v, True)) | _one_of([], [0, -1, "long", 1.5]),
    "num_train_epochs": _number(0.5, 3, [0, -1]),
    "max_train_samples": _count(1, 20),
    "seed": _one_of([0, 1, 2**31], [-1, "one", 2**32, 2**70]),
    "lr_scheduler_type": _one_of(["linear", "cosine", "constant"], ["steep"]),
    "warmup_steps": _one_of([0, 3, 0.5], [-1, "some"]),
    "save_steps": _one_of([1, 0.5, 500], [0, -1, "often"]),
    "logging_steps": _one_of([1, 10], [0, -1, "often"]),
    "save_strategy": _one_of(["no", "steps", "epoch"], ["hourly"]),
    "eval_strategy": _one_of(["no"], ["epoch", "hourly"]),
    "eval_fraction": _one_of([0, 0.5], [1, -0.5, 2, "half", 1e-9]),
    "optim": _one_of([], ["adamw_torch", "adamv"]),
    "prompt_template": _one_of(["alpaca", "plain"], ["chat", "poem"]),
    "instruction_column": _one_of([], ["question", "", "instruction"]),
    "text_column": _one_of([], ["instruction"]),
    "label_smoothing_factor": _one_of([0], [0.1, -1]),
    "resume_from_checkpoint": _one_of(["false"], ["true", "nowhere", ""]),
    "model_name_or_path": _one_of([], ["/nowhere", "no such model", "../x", "a" * 300, "\u00fc\n"]),
    "dataset_name": _one_of([], ["nowhere.jsonl", "/nowhere", "setup.py", "configs", "\x01", "a" * 300]),
    "task": _one_of(["causal-lm"], ["causal", "sequence-classification", "image-classification"]),
    "no_such_flag": _one_of([], [1, "x"]),
    "dataset_split": _one_of(["train"], ["test", "tra in"]),
    "ep_dispatch": _one_of(["auto", "weights", "tokens"], ["both"]),
    "bf16": _one_of([False], ["perhaps"]),
    "report_to": _one_of(["tensorboard", "none"], ["telegram"]),
    "output_dir": _one_of([], ["setup.py", "configs", "setup.py/x", "a" * 300]),
    "deepspeed": _one_of([], ["nowhere.json", "configs", "a" * 300, "setup.py"]),
    "config": _one_of([], ["nowhere.yaml", "configs", "a" * 300]),
}


# DeepSpeed config: path -> values.
CONFIG_KEYS = {
    "zero_optimization.stage": _one_of([0, 1, 2], [-1, 4, "two", None, 2.5, [], "2x"]),
    "zero_optimization": _one_of([], ["on", 3, [1], None, False]),
    "zero_optimization.reduce_bucket_size": _one_of([1000, "auto"], [-5, "big", None, 0.5]),
    "zero_optimization.overlap_comm": _one_of([True, False], ["perhaps", 7]),
    "zero_optimization.offload_optimizer": _one_of([], [{"device": "moon"}, "cpu", 3, {"devise": "cpu"}]),
    "zero_optimization.stagee": _one_of([], [2]),
    "zero_optimisation": _one_of([], [{"stage": 2}]),
    "optimizer": _one_of(
        [
            {"type": "AdamW", "params": {"lr": "auto"}},
            {"type": "adam"},
            {"type": "SGD", "params": {"lr": "auto", "momentum": 0.9}},
            {"type": "GateRiemannianSGD", "params": {"lr": "auto", "momentum": 0.5}},
        ],
        [
            *(REMOVED, "AdamW", 3, [], {}, {"type": 3}, {"type": "Adan"}, {"type": "AdamW", "params": []}),
            *({"type": "SGD", "params": {"lr": "auto", "momentum": -1}}, {"type": "AdamW", "params": {"lr": [1]}}),
        ],
    ),
    "optimizer.type": _one_of([], ["GateRiemanianAdamW", "", None, "Optimizer", "lr_scheduler", "SGD"]),
    "optimizer.params.lr": _one_of(["auto"], [-1, "fast", None, [1], 0.123]),
    "optimizer.params.betas": _one_of(["auto"], [[2, 0.9], "auto2", [0.9], 0.9, None]),
    "optimizer.params.damping": _one_of([], ["auto", -1, "x", None, [1]]),
    "optimizer.params.no_such": _one_of([], [1]),
    "optimizer.params.weight_decay": _one_of(["auto"], [-1, "x", [0]]),
    "train_batch_size": _one_of(["auto"], [3, 0, -2, "all", 2.5]),
    "train_micro_batch_size_per_gpu": _one_of(["auto"], [0, 77, "x", [1]]),
    "gradient_accumulation_steps": _one_of(["auto"], [0, 77, "x"]),
    "gradient_clipping": _one_of(["auto", 1.0], [-1, "x", [1]]),
    "steps_per_print": _one_of([10], ["x"]),
    "fp16": _one_of(
        [{"enabled": False}, {"enabled": "auto"}],
        [{"enabled": "perhaps"}, 3, "on", {"enabled": True, "loss_scale": "x"}],
    ),
    "bf16": _one_of([{"enabled": False}], [[], {"enabled": []}]),
    "scheduler": _one_of(
        [{"type": "WarmupLR", "params": {"warmup_num_steps": 2, "warmup_max_lr": "auto"}}],
        [
            {"type": "Warmup"},
            3,
            {"type": None},
            {"params": {}},
            {"type": "WarmupLR", "params": {"warmup": 1}},
            {"type": "WarmupLR", "params": 3},
        ],
    ),
    "checkpoint": _one_of([{}], [3, {"tag_validation": "Never"}]),
    "activation_checkpointing": _one_of([{"partition_activations": False}], [3]),
    "communication_data_type": _one_of(["fp32"], ["fp99", 3]),
    "data_types": _one_of([{"grad_accum_dtype": "fp32"}], [{"grad_accum_dtype": "fp99"}, 3]),
    "wall_clock_breakdown": _one_of([False], ["x", 3]),
    "gradient_predivide_factor": _one_of([1.0], ["x", 0]),
    "elasticity": _one_of([{"enabled": False}], [{"enabled": True}, 3]),
    "flops_profiler": _one_of([{"enabled": False}], [3, {"enabled": "x"}]),
}
CONFIG_TEXTS = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"zero2"',
    "{}",
    "{'a': 1}",
    '{"a": 1,}',
    "\x00",
    "{" * 5000,
    '{"a":' * 3000,
    b"\xff\xfe{}",
]


def _with_key(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        config = config.setdefault(name, {})
        if not isinstance(config, dict):
            return
    if value is REMOVED:
        config.pop(last, None)
    else:
        config[last] = copy.deepcopy(value)


# -- data -------------------------------------------------------------------------------------------------------------

GOOD_ROWS: list[Any] = [
    [{"prompt": f"{i}", "completion": "x"} for i in range(12)],
    [{"instruction": f"{i}", "input": None, "output": "x"} for i in range(12)],
    [{"instruction": f"{i}", "output": "x", "other": [i]} for i in range(12)],
    [
        {"instruction": 1, "output": 2, "input": 3},
        {"instruction": "a", "output": 2.5},
        {"instruction": "b", "output": True},
    ]
    * 4,
    [{"prompt": 1, "completion": "x"}, {"prompt": "a", "completion": 3}] * 6,
    [{"instruction": "\u00e4\u0000\U0001f600" * 3, "output": "'\"\\{}"} for _ in range(12)],
]
BAD_ROWS: list[Any] = [
    [{"foo": "a", "bar": "b"}] * 3,
    [{"instruction": "a"}] * 3,
    [{"instruction": "a", "output": None}] * 3,
    [{"instruction": "a", "output": ""}] * 3,
    [{"instruction": ["a"], "output": ["b"]}] * 3,
    [{"instruction": {"x": 1}, "output": {"x": 1}}] * 3,
    [{"prompt": "a", "completion": None}] * 3,
    [{"prompt": ["a"], "completion": "b"}] * 3,
    [{"prompt": {"role": "user"}, "completion": "b"}] * 3,
    [{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "assistant", "content": "y"}]}] * 3,
    [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}] * 3,
    [{"messages": "hello"}] * 3,
    [{"messages": ["a", "b"]}] * 3,
    [{"messages": 3}] * 3,
    [{"messages": [{"from": "human", "value": "x"}]}] * 3,
    [{"instruction": "a", "output": "b"}, {"instruction": 3, "output": {"x": [1]}}],
    [{}, {}],
    [],
    [1, 2],
    [[1], [2]],
    [{"instruction": "a", "output": " "}] * 3,
    [{"instruction": "a", "output": []}] * 3,
    [{"prompt": "a", "completion": "b"}, {"prompt": "a"}],
    [None],
]
BAD_TEXTS = [
    (".jsonl", ""),
    (".jsonl", "\n\n"),
    (".jsonl", "not json\n"),
    (".jsonl", '{"instruction": "a"'),
    (".jsonl", b"\xff\xfe\x00"),
    (".jsonl", b'{"prompt": "caf\xe9", "completion": "x"}\n'),
    (".jsonl", '{"prompt": "' + "a" * 2_100_000 + '", "completion": "x"}\n'),
    (".csv", ""),
    (".csv", "a,b\n"),
    (".csv", 'instruction,output\n"open,1\n'),
    (".csv", "instruction,output\n,\n"),
    (".parquet", "PAR1"),
    (".json", "{}"),
    (".json", "[]"),
    (".json", '{"data": 3}'),
    ("", "hello"),
]


def as_lines(rows: list[Any]) -> tuple[str, str]:
    return ".jsonl", "".join(json.dumps(row) + "\n" for row in rows)


# -- recipes ----------------------------------------------------------------------------------------------------------

# Values that only YAML can say, or that mean there something else than the one who wrote them may think.
RECIPE_KEYS = {
    "r": _one_of([4], ["4x", [4], {"a": 4}, None, 4.5, True, "four"]),
    "top_k": _one_of([1], [[], {}, "many"]),
    "lora_alpha": _one_of([8, 8.5], ["8x", [], {}]),
    "target_modules": _one_of([["q_proj"], "q_proj"], [3, {"q_proj": 1}, [3], [["q_proj"]], [None], []]),
    "learning_rate": _one_of([1.0e-3], ["x", [], True]),
    "rank_pattern": _one_of([{"q_proj": 2}], [[1], 3, {"q_proj": "x"}, {3: 2}, {"q_proj": None}, True]),
    "num_experts_pattern": _one_of([{"q_proj": 9}], [{"q_proj": []}, "q_proj: 4"]),
    "init_lora_weights": _one_of([True, False, "pissa"], [3, [], {}, 0.5]),
    "shared_expert": _one_of([True], ["perhaps", [], 3]),
    "max_length": _one_of([200], [[], "x", 200.5]),
    "seed": _one_of([3], [[], "x"]),
    "model_name_or_path": _one_of([], [3, [], {"a": 1}, True]),
    "dataset_name": _one_of([], [3, ["a", "b"], {"train": "a"}]),
    "task": _one_of(["causal-lm"], [3, ["causal-lm"], {"a": 1}]),
    "deepspeed": _one_of([], [3, True, []]),
    "output_dir": _one_of([], [["a", "b"]]),
    "resume_from_checkpoint": _one_of([False, None], [True, 3, []]),
    "eval_fraction": _one_of([0.5], [[], "x"]),
    "svd_cache_dir": _one_of([], [3, True]),
    "no_such_key": _one_of([], [1]),
    "env": _one_of([], [{}, {"A": "1"}, 3, ["A=1"]]),
}
RECIPE_TEXTS: list[str | bytes] = [
    "",
    "- r",
    "r",
    "r: [",
    "r: 4\n r: 5",
    "3: 4",
    "null: 4",
    "[a]: 4",
    "? {a: 1}\n: 4",
    "!!python/object/apply:os.system ['true']",
    "r: !!python/name:os.system",
    "r: &a [*a]",
    "r: 4\n---\nr: 5",
    b"\xff\xfe",
    "\x00",
    "r: 2001-01-01",
    "r: 0x",
]


@st.composite
def draws(draw: Any, model: Path, output_dir: Path) -> Draw:
    """A run of `model` with up to two kinds of its parts redrawn."""
    flags: dict[str, Any] = {"model_name_or_path": str(model), "output_dir": str(output_dir)}
    name = draw(st.sampled_from(CONFIGS))
    made = Draw(flags, json.loads((ROOT / "configs" / name).read_text()), as_lines(alpaca_rows(12)))
    chosen = draw(st.lists(st.sampled_from(list(PARTS)), max_size=2, unique=True))
    for part in PARTS:
        if part in chosen:
            PARTS[part](draw, made)
    _check_together(made)
    return made


def _redraw_flags(draw: Any, made: Draw) -> None:
    for name in draw(st.lists(st.sampled_from(sorted(SINGLE)), min_size=1, max_size=3, unique=True)):
        made.set(f"--{name}", *draw(SINGLE[name]))


def _redraw_experts(draw: Any, made: Draw) -> None:
    """Numbers that must fit each other: `_check_together` says whether they do."""
    made.flags["num_experts"] = draw(st.integers(1, 8))
    made.flags["top_k"] = draw(st.integers(1, 9))
    made.flags["ep_size"] = draw(st.sampled_from([1, 1, 2, 3, 4, 0]))
    narrow = draw(st.sampled_from([None, None, 1, 2, 9]))
    if narrow is not None:
        made.flags["top_k_pattern"] = json.dumps({"q_proj": narrow})


def _redraw_config(draw: Any, made: Draw) -> None:
    if draw(st.integers(0, 5)) == 0:
        made.config = draw(st.sampled_from(CONFIG_TEXTS))
        made.wrong["config"] = f"{made.config!r:.40}"
        return
    for path in draw(st.lists(st.sampled_from(sorted(CONFIG_KEYS)), min_size=1, max_size=2, unique=True)):
        value, valid = draw(CONFIG_KEYS[path])
        _with_key(made.config, path, value)
        if not valid:
            made.wrong[f"config {path}"] = repr(value)


def _redraw_data(draw: Any, made: Draw) -> None:
    kind = draw(st.sampled_from(["good", "bad", "text"]))
    if kind == "good":
        made.data = as_lines(draw(st.sampled_from(GOOD_ROWS)))
        return
    made.data = as_lines(draw(st.sampled_from(BAD_ROWS))) if kind == "bad" else draw(st.sampled_from(BAD_TEXTS))
    made.wrong["data"] = f"{made.data!r:.120}"


def _redraw_recipe(draw: Any, made: Draw) -> None:
    if draw(st.integers(0, 3)) == 0:
        made.recipe = draw(st.sampled_from(RECIPE_TEXTS))
        made.wrong["recipe"] = repr(made.recipe)
        return
    values = {}
    for name in draw(st.lists(st.sampled_from(sorted(RECIPE_KEYS)), min_size=1, max_size=2, unique=True)):
        values[name], valid = draw(RECIPE_KEYS[name])
        made.flags.pop(name, None)  # the command line would win
        made.wrong.pop(f"--{name}", None)
        if not valid:
            made.wrong[f"recipe {name}"] = repr(values[name])
    made.recipe = yaml.safe_dump(values)
    made.from_recipe = values


PARTS = {
    "data": _redraw_data,
    "config": _redraw_config,
    "experts": _redraw_experts,
    "flags": _redraw_flags,
    "recipe": _redraw_recipe,
}


def _check_together(made: Draw) -> None:
    """What no part knows alone. Values that are wrong by themselves are left out: the draw is invalid anyway."""
    if made.wrong:
        return
    experts, top_k, ep_size = made.value("num_experts", 8), made.value("top_k", 2), made.value("ep_size", 1)
    here = "q_proj" in _targets(made.value("target_modules", LINEARS))
    tables = {
        name: made.table(name) for name in ("rank_pattern", "alpha_pattern", "num_experts_pattern", "top_k_pattern")
    }
    widest = tables["num_experts_pattern"].get("q_proj", experts)
    stage = made.config.get("zero_optimization", {}).get("stage", 0)
    rows = min(made.data[1].count("\n"), made.value("max_train_samples", 99))
    share = float(made.value("eval_fraction", 0))
    segment = 32 // experts  # singular values of a 32 x 32 weight per expert
    together = {
        "r above the singular values of an expert": str(made.value("init_lora_weights", "true")) in VARIANTS
        and made.value("r", 8) > segment,
        "top_k > num_experts": top_k > experts or top_k > widest,
        "top_k_pattern > num_experts": tables["top_k_pattern"].get("q_proj", 1) > widest,
        "a pattern for q_proj, which is not adapted": not here and any("q_proj" in table for table in tables.values()),
        f"ep_size {ep_size} on {RANKS} ranks": ep_size < 1
        or bool(experts % ep_size or widest % ep_size or RANKS % ep_size),
        f"ep_size {ep_size} at stage 3": ep_size > 1 and stage == 3,
        "eval_fraction leaves no rows": share > 0 and not 1 <= round(rows * share) < rows,
    }
    made.wrong |= {what: "" for what, holds in together.items() if holds}


def _targets(value: Any) -> tuple[str, ...]:
    named = (value,) if isinstance(value, str) else tuple(value)
    return ("q_proj", "v_proj") if "self_attn" in named[0] else LINEARS if named[0] == "all-linear" else named
