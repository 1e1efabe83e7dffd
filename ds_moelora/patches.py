"""Everything that this package changes in other libraries, in one list: what, for which versions, and why.

`import ds_moelora` adds names where libraries look them up (the optimizers in `torch.optim`, the adapter type in PEFT's
tables and its enum `PeftType`) and replaces the functions in `PEFT` and, where DeepSpeed is installed, in `DEEPSPEED`.
Those in `OLDER_PEFT` are replaced in PEFT 0.18 to 0.20 alone, those in `expert_parallel()` when the first layer with
`ep_size > 1` is built. Models without mixtures pass through all of them unchanged. `tests/project/test_patches.py`
compares all classes and modules of torch, DeepSpeed, PEFT and transformers before and after, and finds nothing else.

To add a patch: write the wrapper, original -> replacement, beside the code that it belongs to, and a row here.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.version import Version
from peft.utils.peft_types import PeftType

from .checkpoint import guard as checkpoint_guard
from .optimizer import guard as optimizer_guard
from .tuner import base_experts, older_peft, tags
from .tuner.config import PEFT_TYPE
from .tuner.files import card, loading, saving

_MARK = "_ds_moelora_patch"


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One function of another library that is replaced.

    Args:
        library: the distribution's name.
        versions: the first that the replacement was made for, and the first that it was not.
        owner: "module" or "module:Class". name: the function's name there.
        wrapper: original -> replacement.
        reason: why the library's own hooks do not do, and what is wrong without the patch.
    """

    library: str
    versions: tuple[str, str]
    owner: str
    name: str
    wrapper: Callable[[Any], Any]
    reason: str

    def find_owner(self) -> Any:
        """The class or module that has the function."""
        module, _, cls = self.owner.partition(":")
        found = importlib.import_module(module)
        return getattr(found, cls) if cls else found

    def problem(self) -> str | None:
        """Why it cannot be installed here; None if it can."""
        version = metadata.version(self.library)
        known = f"{self.library}>={self.versions[0]},<{self.versions[1]}"
        if not Version(self.versions[0]) <= Version(version) < Version(self.versions[1]):
            return f"{self.owner}.{self.name} was made for {known}, and this is {version}"
        if not hasattr(self.find_owner(), self.name):
            return f"{self.owner}.{self.name} is not there in {self.library} {version}; it was made for {known}"
        return None

    def install(self) -> None:
        """Replaces the function, once; a class method stays one."""
        owner = self.find_owner()
        original = vars(owner).get(self.name, getattr(owner, self.name))
        is_classmethod = isinstance(original, classmethod)
        function = original.__func__ if is_classmethod else original
        if getattr(function, _MARK, False):
            return
        replacement = functools.wraps(function)(self.wrapper(function))
        setattr(replacement, _MARK, True)
        setattr(owner, self.name, classmethod(replacement) if is_classmethod else replacement)


PEFT_VERSIONS = ("0.18", "0.23")
DEEPSPEED_VERSIONS = ("0.16.9", "0.20")
_MODEL, _ENGINE = "peft:PeftModel", "deepspeed.runtime.engine:DeepSpeedEngine"
_peft = functools.partial(Patch, library="peft", versions=PEFT_VERSIONS, owner=_MODEL)
_deepspeed = functools.partial(Patch, library="deepspeed", versions=DEEPSPEED_VERSIONS, owner=_ENGINE)

PEFT = (
    _peft(
        name="load_adapter",
        wrapper=loading.load_checked,
        reason="No hook tells a tuner that weights will be loaded into the adapter that it makes. Without it every "
        "base weight is decomposed (minutes) for starting factors that the file replaces, and a damaged file "
        "ends in an error without its name.",
    ),
    _peft(
        name="from_pretrained",
        wrapper=loading.load_checked,
        reason="As load_adapter, which it calls only after the adapter has been made.",
    ),
    _peft(
        name="create_or_update_model_card",
        wrapper=card.describe_in_card,
        reason="PEFT writes the card itself and asks no tuner. Without it the card does not say how to load a mixture.",
    ),
    _peft(
        name="_upload_modified_files",
        wrapper=card.describe_before_upload,
        reason="push_to_hub writes the hub's card, or an empty template, over the one that was just saved.",
    ),
    _peft(
        owner="peft.tuners.lora.layer:ParamWrapper",
        name="_activate_lora",
        wrapper=base_experts.activate_lora,
        reason="It makes the product of the factors of all experts before any function sees them. Without it "
        "use_lora_experts saves neither time nor memory. Other models' layers pass through unchanged.",
    ),
)

# PEFT has imported these two by name in all of `older_peft.PLACES`.
OLDER_PEFT = tuple(
    Patch(
        library="peft",
        versions=older_peft.VERSIONS,
        owner=place,
        name=name,
        wrapper=wrapper,
        reason="From 0.21 on PEFT asks the tuner how its weights are called in a file. Without it the keys of routers "
        "have the adapter's name in them, and are not found again.",
    )
    for place in older_peft.PLACES
    for name, wrapper in (
        ("get_peft_model_state_dict", older_peft.select_by_tuner),
        ("set_peft_model_state_dict", older_peft.check_by_tuner),
    )
)

# Installed by `import ds_moelora` where DeepSpeed is there. Wrappers here may not import DeepSpeed at their top.
DEEPSPEED = (
    _deepspeed(
        name="_configure_basic_optimizer",
        wrapper=tags.tag_before_building,
        reason="The last place that sees the model before an optimizer that the config names sees its parameters. "
        "Without it plain PEFT LoRA needs a call of tag_lora_pairs in everybody's script.",
    ),
    _deepspeed(
        name="_configure_optimizer",
        wrapper=optimizer_guard.check_after_configuring,
        reason="transformers and accelerate replace optimizers without a word, and no hook sees the one that runs. "
        "Without it AdamW may train in place of the optimizer of this package that was asked for.",
    ),
    _deepspeed(
        name="save_checkpoint",
        wrapper=checkpoint_guard.record_when_saved,
        reason="No hook adds a file to a checkpoint; without its record, loading has nothing to compare with.",
    ),
    _deepspeed(
        name="load_checkpoint",
        wrapper=checkpoint_guard.compare_when_loaded,
        reason="DeepSpeed copies flat partitions wherever sizes fit: one adapter's weights into another's, unsaid.",
    ),
)


def expert_parallel() -> tuple[Patch, ...]:
    """What `ep_size > 1` replaces. A function, since the wrappers' file imports DeepSpeed."""
    from .expert_parallel import engine

    return (
        _deepspeed(
            name="_configure_distributed_model",
            wrapper=engine.check_before_configuring,
            reason="The last place before DeepSpeed makes groups: ZeRO-3 and other settings are refused with a remedy.",
        ),
        _deepspeed(
            name="clip_fp32_gradients",
            wrapper=engine.clip_exactly,
            reason="At stage 0 DeepSpeed averages the norms that ranks take over their own experts.",
        ),
        _deepspeed(
            owner="deepspeed.runtime.engine",
            name="configure_moe_param_groups",
            wrapper=engine.name_groups,
            reason='It wants a list, and a "name" in each group, which neither transformers nor accelerate give.',
        ),
        _peft(
            versions=(older_peft.VERSIONS[1], PEFT_VERSIONS[1]),
            name="save_pretrained",
            wrapper=saving.first_rank_writes,
            reason="With ep_size > 1 every rank calls it and would write its own experts over the others' file. "
            "(An older PEFT cannot load such a file into sharded experts.)",
        ),
    )


def install_at_import(with_deepspeed: bool) -> None:
    """Adds the adapter type to PEFT and installs `PEFT`, and `DEEPSPEED` if it is there.

    Warns, naming them, of patches that do not fit the installed versions; they are left out.
    """
    add_peft_type(PEFT_TYPE)
    older = OLDER_PEFT if older_peft.IS_OLDER else ()
    left_out = install((*PEFT, *older, *(DEEPSPEED if with_deepspeed else ())))
    if left_out:
        warnings.warn(f"ds_moelora leaves out what it does not know: {describe(left_out)}", stacklevel=3)


def install_for_expert_parallelism() -> None:
    """Installs `expert_parallel()`; called for every layer with `ep_size > 1`.

    Raises:
        ValueError: a patch that expert parallelism cannot do without does not fit the installed versions.
    """
    if left_out := install(expert_parallel()):
        raise ValueError(
            f"ep_size > 1 cannot be used here: {describe(left_out)} Install a version in that range, or use ep_size=1."
        )


def install(patches: Iterable[Patch]) -> dict[Patch, str]:
    """Installs what fits the installed versions, and returns the others with what is wrong."""
    left_out = {}
    for patch in patches:
        if problem := patch.problem():
            left_out[patch] = problem
        else:
            patch.install()
    return left_out


def describe(problems: dict[Patch, str]) -> str:
    """What is wrong with each patch, and what is wrong without it."""
    return " ".join(f"{problem}. ({patch.reason})" for patch, problem in problems.items())


def add_peft_type(name: str) -> None:
    """Makes `name` a member of `peft.PeftType`.

    PEFT and transformers read `config.peft_type.value`, and `peft.utils.register_peft_method` asks for a member. An
    enum cannot be extended by public means; its three private tables are the same in Python 3.10 to 3.14.

    Raises:
        RuntimeError: this Python's enums work differently.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    member._sort_order_ = len(PeftType)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)
    if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) is list(PeftType)[-1]):
        raise RuntimeError(f"ds_moelora cannot add {name} to peft.PeftType under this version of Python.")
