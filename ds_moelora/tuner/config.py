"""The configuration of a mixture of LoRA experts."""

# ruff: noqa: RUF009  (_option makes a dataclass field)

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.peft_types import PeftType

from ..expert_parallel.spec import DISPATCHES, check_ep_size
from ..mixture.choice import COMPUTES
from ..mixture.goat import VARIANTS, goat_scaling
from .older_peft import IS_OLDER

PEFT_TYPE = "MOELORA"
# What a saved configuration calls it: where PEFT does not find this package, its KeyError shows these words.
PEFT_TYPE_IN_FILES = "MOELORA (pip install ds_moelora; if it is installed, import ds_moelora before loading)"
# What files have called it.
PEFT_TYPES = (
    PEFT_TYPE,
    PEFT_TYPE_IN_FILES,
    "MOELORA (pip install ds_moelora, and import ds_moelora before loading)",
)
# How a run spreads and computes the experts; the adapter is the same, so its file says nothing of it.
RUN_FIELDS = ("ep_size", "ep_dispatch", "expert_compute", "svd_cache_dir")
SCALINGS = ("alpha", "rslora", "goat")
# A configuration may come from a file that anybody wrote: these bounds hold before anything is counted or allocated.
MOST_EXPERTS, MOST_RANK, MOST_ENTRIES = 4096, 16384, 10_000
# An expression that repeats what repeats takes exponential time, n repetitions the n-th power of a name's length.
MOST_REPEATS = 6
_LITERAL = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_REPEATED, _REPEATED_GROUP = re.compile(r"[*+]|\{\d*,\d*\}"), re.compile(r"\)[*+{]")
MOST_RECORD = 1 << 16  # characters of `trained_with` as JSON
# Fields that give single layers another value, and the field whose value it is.
PATTERNS = {
    "rank_pattern": "r",
    "alpha_pattern": "lora_alpha",
    "num_experts_pattern": "num_experts",
    "top_k_pattern": "top_k",
}
# Bounds of numbers that need not be whole, as the fields and messages name them.
_BOUNDS: dict[str, Callable[[Any], bool]] = {
    "> 0": lambda value: value > 0,
    ">= 0": lambda value: value >= 0,
    "in (0, 1)": lambda value: 0 < value < 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
}
_CHOICES = {"scaling": SCALINGS, "ep_dispatch": DISPATCHES, "expert_compute": COMPUTES}


def _option(default: Any, text: str, **more: Any) -> Any:
    """A field with its help text; `dict` as default: an empty one.

    Args:
        more: `most` of a whole number >= 1, or the `bound` of another number (`_BOUNDS`).
    """
    given: dict[str, Any] = {"default_factory": dict} if default is dict else {"default": default}
    return field(**given, metadata={"help": text, **more})


@dataclass
class MoELoRAConfig(PeftConfig):
    """Each target module computes y = W x + s * sum_{i in topk} g_i(x) B_i A_i x; pass it to `peft.get_peft_model`.

    A plain (not frozen) dataclass, because PEFT itself fills in `target_modules` and `base_model_name_or_path`.

    Args:
        r: rank of one expert, >= 1.
        num_experts: E, >= 1. With 1 the layer is a plain LoRA of rank r.
        top_k: experts per token, 1 <= top_k <= num_experts.
        lora_alpha: numerator of the scaling s, > 0.
        lora_dropout: probability in [0, 1) of dropping an element of the experts' input. The router sees all of it.
        target_modules: list of module names (or their endings), a regular expression that matches full names, or
            "all-linear"; None: PEFT's default for LoRA on this architecture.
        exclude_modules: names or a regular expression of modules to leave out.
        scaling: "alpha": s = lora_alpha / r. "rslora": s = lora_alpha / sqrt(r). "goat": s = sqrt(3 eta in / r).
        eta: with scaling="goat": learning rate of full fine-tuning over that of LoRA, > 0.
        init_lora_weights: True: A Kaiming-uniform, B zero, so that training starts at the base model. False: B
            uniform as well, for tests. "goat", "goat_mini", "pissa", "milora": singular triplets of the base weight,
            which gives away their mean, (s / E) sum_i B_i A_i (`mixture.goat`; docs/goat.md).
        rho: with such a start: s B_i A_i = U_i S_i V_i^T / rho, > 0.
        svd_cache_dir: with such a start: a folder in which decompositions are kept, by the weight's hash.
        router_aux_loss_coef: what the load-balancing loss (1 at perfect balance) is multiplied with before it is added
            to the model's loss; 0 switches it off.
        router_z_loss_coef: likewise for the router z-loss, the mean of (log sum exp of the router's logits)^2.
        router_temperature: > 0; the router's logits are divided by it.
        router_jitter: eps in [0, 1): in training the router's input is multiplied by uniform(1 - eps, 1 + eps).
        top_p: p in (0, 1): a token uses its most probable experts up to a probability of p, at most top_k of them.
            None: always top_k.
        shared_expert: one more expert of rank r in each module that every token uses, with gate 1.
        shared_A: the experts of a module have one A in common (HydraLoRA), and a B each.
        rank_pattern, alpha_pattern, num_experts_pattern, top_k_pattern: {name or regular expression: value} for
            modules whose r, lora_alpha, num_experts or top_k differs (`tuner.patterns`).
        ep_size: ranks that share the experts; divides num_experts and the world size. 1: every rank has all of them.
        ep_dispatch: with ep_size > 1: "weights" moves experts to tokens, "tokens" moves tokens to experts, "auto" takes
            what moves fewer bytes with 2,048 tokens per process (`expert_parallel.dispatch`).
        expert_compute: "dense" computes all experts in one product, "grouped" the chosen ones alone, "fused" all of
            them in few launches; "auto" is one of them, by device and size (`mixture.choice`).
        modules_to_save: modules to train and save whole, beside the adapter (e.g. a new classification head).
        target_parameters: beside the mixtures, PEFT's LoRA of rank r on these stacked experts of a MoE base (names or
            their endings, e.g. "experts.down_proj"; docs/moe_base_models.md), without dropout.
        layers_to_transform: index or indices of the layers to adapt; needs `target_modules` as a list.
        layers_pattern: name of the list of layers, e.g. "layers" or "h"; needs `layers_to_transform`.
        trained_with: what the launcher trained it with (template, length, precision, data, optimizer), as JSON has it;
            changes nothing about the adapter.

    Raises:
        ValueError: a value out of range; the message gives the value, the bound and the remedy.
    """

    # The alias is for torchrun, which takes `--r` for one of its own flags, even behind the script's name.
    r: int = _option(8, "Rank of one expert.", most=MOST_RANK, aliases=["--lora_r"])
    num_experts: int = _option(8, "Number of LoRA experts in each adapted module.", most=MOST_EXPERTS)
    top_k: int = _option(2, "Number of experts that each token uses.", most=MOST_EXPERTS)
    lora_alpha: float = _option(16.0, "Numerator of the scaling.", bound="> 0")
    lora_dropout: float = _option(0.0, "Dropout probability on the experts' input.", bound="in [0, 1)")
    target_modules: list[str] | str | None = _option(None, "Module names, a regular expression, or 'all-linear'.")
    exclude_modules: list[str] | str | None = _option(None, "Module names, or a regular expression, to leave out.")
    scaling: str = _option("alpha", "'alpha': alpha / r; 'rslora': alpha / sqrt(r); 'goat': sqrt(3 eta in / r).")
    eta: float = _option(1.0, "With scaling='goat': learning rate of full tuning over LoRA's.", bound="> 0")
    init_lora_weights: bool | str = _option(
        True, "True: random A, zero B. 'goat', 'goat_mini', 'pissa', 'milora': from the weight's SVD."
    )
    rho: float = _option(10.0, "With an SVD start: how far the factors are scaled down.", bound="> 0")
    svd_cache_dir: str | None = _option(None, "With an SVD start: folder that keeps decompositions. Not saved.")
    router_aux_loss_coef: float = _option(
        1e-3, "Coefficient of the load-balancing loss; 0 switches it off.", bound=">= 0"
    )
    router_z_loss_coef: float = _option(0.0, "Coefficient of the router z-loss; 0 switches it off.", bound=">= 0")
    router_temperature: float = _option(1.0, "What the router's logits are divided by.", bound="> 0")
    router_jitter: float = _option(
        0.0, "eps: in training the router's input is times uniform(1 - eps, 1 + eps).", bound="in [0, 1)"
    )
    top_p: float | None = _option(
        None, "Use the most probable experts up to this probability, at most top_k.", bound="in (0, 1)"
    )
    shared_expert: bool = _option(False, "One more expert that every token uses.")
    shared_A: bool = _option(False, "One A for all experts of a module (HydraLoRA).")
    rank_pattern: dict[str, int] = _option(dict, "{name or regular expression: r} where r differs.")
    alpha_pattern: dict[str, float] = _option(dict, "{name or regular expression: lora_alpha} where it differs.")
    num_experts_pattern: dict[str, int] = _option(dict, "{name or regular expression: num_experts} where it differs.")
    top_k_pattern: dict[str, int] = _option(dict, "{name or regular expression: top_k} where it differs.")
    ep_size: int = _option(1, "Ranks that share the experts. Not saved: it is the run's.", most=MOST_EXPERTS)
    ep_dispatch: str = _option("auto", "With ep_size > 1: move 'weights', 'tokens', or 'auto'. Not saved.")
    expert_compute: str = _option("auto", "'auto', 'dense', 'grouped' or 'fused'. Not saved.")
    modules_to_save: list[str] | None = _option(None, "Modules to train and save whole, beside the adapter.")
    target_parameters: list[str] | None = _option(None, "Stacked experts of a MoE base that get PEFT's LoRA.")
    layers_to_transform: list[int] | int | None = _option(None, "Indices of the layers to adapt.")
    layers_pattern: list[str] | str | None = _option(None, "Name of the list of layers, with layers_to_transform.")
    trained_with: dict[str, Any] | None = _option(None, "What it was trained with; written by the launcher.")

    weights_follow = False  # no field: the adapter is being made to load weights into it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)  # `patches.add_peft_type` makes it a member
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name}={_shown(getattr(self, name))} must be a name, or None.")
        for name in self.__dataclass_fields__:
            if (name, getattr(self, name)) != ("top_p", None):
                self._check_number(name, getattr(self, name))
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k={self.top_k} is larger than num_experts={self.num_experts}: a token cannot use more experts "
                f"than there are. Lower top_k to at most {self.num_experts}, or raise num_experts."
            )
        check_ep_size(self.ep_size, self.num_experts)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={_shown(getattr(self, name))} is unknown; use one of {', '.join(known)}.")
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights not in VARIANTS:
            raise ValueError(
                f"init_lora_weights={_shown(self.init_lora_weights)} is unknown; use True (random A, zero B), False "
                f"(random A and B) or one of {', '.join(VARIANTS)} (from the weight's singular values)."
            )
        self._check_shared()
        self._check_patterns()
        self._check_effect()
        self._check_targets()
        self._check_record()

    def _check_number(self, name: str, value: Any, shown_as: str = "") -> None:
        """Raises a ValueError for a value that the field `name` cannot have, if it is a number's."""
        item = self.__dataclass_fields__[name]
        what, remedy = f"{shown_as or name}={_shown(value)}", f"The default is {item.default}."
        most, bound = item.metadata.get("most"), item.metadata.get("bound")
        if most is not None:
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{what} must be an integer >= 1. {remedy}")
            if int(value) > most:
                raise ValueError(f"{what} must be at most {most}. {remedy}")
        if bound is not None:
            try:
                fits = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
            except OverflowError:  # an integer beyond the largest float
                fits = False
            if not (fits and _BOUNDS[bound](value)):
                raise ValueError(f"{what} must be a number {bound}. {remedy}")

    def _check_shared(self) -> None:
        for name in ("shared_expert", "shared_A"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.shared_A and self.from_svd:
            raise ValueError(
                f"shared_A=True cannot be used with init_lora_weights={self.init_lora_weights!r}, which gives every "
                "expert an A of its own segment of the spectrum. Use init_lora_weights=True, or shared_A=False."
            )
        if self.shared_A and self.ep_size > 1:
            raise ValueError(
                f"shared_A=True cannot be used with ep_size={self.ep_size}: the optimizer needs sum_i B_i^T B_i over "
                "the experts of all ranks for the one A, and pairs there belong to one rank's experts. Use ep_size=1 "
                "(ZeRO-3 shards the factors), or shared_A=False."
            )

    def _check_patterns(self) -> None:
        for pattern, name in PATTERNS.items():
            table = getattr(self, pattern)
            if isinstance(table, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in table):
                table = {str(key): value for key, value in table}  # from `to_dict`
                setattr(self, pattern, table)
            if not isinstance(table, dict):
                raise ValueError(
                    f"{pattern}={table!r} must be a dict {{name or regular expression: {name}}}, e.g. {{'q_proj': 4}}."
                )
            if len(table) > MOST_ENTRIES:
                raise ValueError(f"{pattern} has {len(table)} entries; use at most {MOST_ENTRIES}.")
            for key, value in table.items():
                _check_expression(pattern, key)
                self._check_number(name, value, f"{pattern}[{key!r}]")

    def _check_effect(self) -> None:
        """Raises a ValueError for a setting that the others leave without effect."""
        svd_start, svd_only = "init_lora_weights='goat' (or another start from singular values)", self.from_svd
        for name, has_effect, needs in (
            ("lora_alpha", self.scaling != "goat", "scaling='alpha' or 'rslora'"),
            ("eta", self.scaling == "goat", "scaling='goat'"),
            ("rho", svd_only, svd_start),
            ("svd_cache_dir", svd_only, svd_start),
            ("ep_dispatch", self.ep_size > 1, "ep_size > 1"),
        ):
            default = type(self).__dataclass_fields__[name].default
            if not has_effect and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without {needs}; leave {name} out, "
                    "or change the other."
                )

    def _check_targets(self) -> None:
        if self.target_parameters and (IS_OLDER or self.ep_size > 1 or self.scaling == "goat"):
            raise ValueError(
                f"target_parameters={_shown(self.target_parameters)} needs PEFT 0.21 or newer, ep_size=1 and "
                f"scaling='alpha' or 'rslora'; here are PEFT {version('peft')}, ep_size={self.ep_size} and "
                f"scaling={self.scaling!r}."
            )
        lists = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")
        for name in (*lists, "layers_to_transform"):
            self._check_entries(name, int if name == "layers_to_transform" else str)
        # Like PEFT's LoraConfig: sets make the lookup of every module's name cheap.
        if self.target_modules is not None and not isinstance(self.target_modules, str):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if self.exclude_modules is not None and not isinstance(self.exclude_modules, str):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.target_modules is not None and not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} is empty; name the modules to adapt, e.g. "
                "['q_proj', 'v_proj'], or pass 'all-linear', or None for PEFT's default."
            )
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            if isinstance(getattr(self, name), str):
                _check_expression(name, getattr(self, name))
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be used with target_modules={self.target_modules!r}; "
                        "pass target_modules as a list of names, or put the layers into the regular expression."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform; pass both."
            )

    def _check_record(self) -> None:
        record = self.trained_with
        if record is None:
            return
        try:
            fits = isinstance(record, dict) and len(json.dumps(record)) <= MOST_RECORD
        except (TypeError, ValueError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"trained_with={_shown(record)} must be a JSON object of at most {MOST_RECORD} characters; or leave "
                "it out."
            )

    def _check_entries(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        what = "numbers of layers" if kind is int else "names"
        if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
            return
        if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(entry, kind) for entry in value):
            raise ValueError(f"{name}={_shown(value)} must be a list of {what}.")
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{name} has {len(value)} entries; use at most {MOST_ENTRIES}.")

    @property
    def from_svd(self) -> bool:
        """Whether the experts start from singular triplets of the base weight."""
        return isinstance(self.init_lora_weights, str)

    def scaling_of(self, in_features: int) -> float:
        """s of a layer: lora_alpha / r, lora_alpha / sqrt(r) ("rslora") or sqrt(3 eta in / r) ("goat")."""
        if self.scaling == "goat":
            return goat_scaling(in_features, self.r, self.eta)
        return self.lora_alpha / (self.r if self.scaling == "alpha" else math.sqrt(self.r))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's; the file's `peft_type` also tells whoever loads it without this package what is missing."""
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file; name a folder.")
        folder.mkdir(parents=True, exist_ok=True)
        # Aside, then renamed: ranks that all save to one folder each leave a whole file.
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{CONFIG_NAME}.") as aside:
            super().save_pretrained(aside, **kwargs)
            path = Path(aside) / CONFIG_NAME
            content = json.loads(path.read_text())
            content["peft_type"] = PEFT_TYPE_IN_FILES
            path.write_text(json.dumps(content, indent=2, sort_keys=True))
            path.replace(folder / CONFIG_NAME)

    def to_dict(self) -> dict[str, Any]:
        """The adapter's fields, without the run's, and with sets as sorted lists: saving twice writes the same file.

        Patterns become lists of [expression, value]: PEFT sorts keys when it writes, but the first that fits counts.
        """
        kept = {key: value for key, value in super().to_dict().items() if key not in RUN_FIELDS}
        kept |= {pattern: [list(item) for item in getattr(self, pattern).items()] for pattern in PATTERNS}
        return {key: sorted(v) if isinstance(v, set) else v for key, v in kept.items()}


def _check_expression(pattern: str, key: Any) -> None:
    try:
        re.compile(key)
    except (TypeError, re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{pattern}: {_shown(key)} is not a regular expression ({error}); use the end of a module's name, e.g. "
            "'q_proj'."
        ) from error
    plain = _LITERAL.sub("x", key)
    if _REPEATED_GROUP.search(plain) or len(_REPEATED.findall(plain)) > MOST_REPEATS:
        raise ValueError(
            f"{pattern}: {_shown(key)} repeats a group, or has more than {MOST_REPEATS} repetitions, and may take "
            "hours for one name; write a simpler expression, such as r'.*layers\\.[0-3]\\..*', or a list of names."
        )


def _shown(value: Any) -> str:
    """For messages: a file may hold anything of any length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
