"""Where the auxiliary losses join a training step: two hooks around the base model's forward.

    before    in training, a collector of router decisions is made active (`losses`)
    after     scaled = sum of coef * L joins the model's own `loss`. Whoever builds a loss of their own asks for it by
              `output_router_logits=True`, transformers' word for it, and finds it in `aux_loss`.
    backward  if the gradient of the experts arrives, but none of `scaled`, a warning says that routers are not balanced

TRL's trainers (SFT, DPO, GRPO, KTO, RLOO) ignore `loss`. They ask for `aux_loss`, and add `router_aux_loss_coef` times
it, if the text config has `output_router_logits` (even False) and that coefficient: `offer_aux_loss` puts both there.
A base model that is a mixture of experts itself has both already, for its own routers: its coefficient c stays, and
`aux_loss` gets scaled / c on top of its own.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from .config import MoELoRAConfig
from .experts import MoELoRAExperts
from .losses import (
    BatchLayout,
    RouterRecord,
    auxiliary_loss,
    batch_layout,
    coefs_of,
    start_collecting,
    stop_collecting,
)

_ASKS = "output_router_logits"
_COEF = "router_aux_loss_coef"
_OFF = "router_aux_loss_coef=0 and router_z_loss_coef=0"


class LossHooks:
    """The hooks of one tuner on its base model.

    Args:
        tuner: gets `last_aux_loss` and `last_router_z_loss`, and may have a `router_listener`. model: the base model.
    """

    def __init__(self, tuner: Any, model: nn.Module) -> None:
        self.tuner = tuner
        self._asked = False
        self._offered: float | None = None  # what is in the text config in our name
        self._warned: set[str] = set()
        self._looked = False
        self._handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]

    def remove(self) -> None:
        """Takes the hooks, and what `offer_aux_loss` did, away from the base model."""
        for handle in self._handles:
            handle.remove()
        text = _text_config(self.tuner.model)
        if self._offered is not None and text is not None:
            delattr(text, _ASKS)
            delattr(text, _COEF)
            self._offered = None

    def offer_aux_loss(self, config: MoELoRAConfig) -> None:
        """Tells trainers, in the model's text config, that `aux_loss` can be had, and what to multiply it with.

        Args:
            config: an adapter's; its first coefficient that is not 0 is offered, nothing if both are or it is frozen.
        """
        coef = 0.0 if config.inference_mode else next(filter(None, coefs_of(config)), 0.0)
        text = _text_config(self.tuner.model)
        if coef and text is not None and not hasattr(text, _ASKS) and not hasattr(text, _COEF):
            setattr(text, _ASKS, False)
            setattr(text, _COEF, coef)
            self._offered = coef

    @torch.compiler.disable
    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Starts collecting; what only we understand of the arguments is taken out of them."""
        self._asked = bool(kwargs.get(_ASKS))
        if self._offered is not None:
            kwargs = {name: value for name, value in kwargs.items() if name != _ASKS}
            # SFTTrainer makes it True, and TRL's forward then looks for routers of the base model, which has none.
            setattr(_text_config(model), _ASKS, False)
        if model.training or self._asked:
            listener = self.tuner.router_listener if model.training else None
            start_collecting(self.tuner, _layout(model, kwargs), listener, self._asked)
        elif torch.is_grad_enabled() and "eval" not in self._warned and self._trains(model):
            self._warn(
                "eval",
                "The base model is in eval mode, as from_pretrained leaves it, and a forward pass with gradients ran "
                "through a trainable adapter: without dropout, router jitter and load-balancing loss. Call "
                "model.train() before training, or torch.no_grad() around evaluation.",
            )
        return args, kwargs

    def _trains(self, model: nn.Module) -> bool:
        return any(self.tuner.prefix in name and param.requires_grad for name, param in model.named_parameters())

    @torch.compiler.disable
    def after(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Adds the auxiliary losses to `output`; None (an aborted forward) just ends the collection."""
        records = stop_collecting(self.tuner)
        if output is None or not (model.training or self._asked):
            return output
        if model.training and not self._looked:
            self._looked = True
            self._warn_of_uncalled(model)
        if not records:
            return self._with_aux_loss(output, None)
        _check_recorded(records)
        scaled, plain = auxiliary_loss(records)
        if not model.training:
            return self._with_aux_loss(output, scaled)
        loss = _loss_of(output)
        if loss is None and not self._asked:
            if torch.is_grad_enabled():
                self._warn(
                    "no loss",
                    "The model's forward returned no loss, so the load-balancing loss (or router z-loss) was not added "
                    "to it: pass labels to the model (a label smoother or a compute_loss_func of the Trainer takes "
                    f"them away), or output_router_logits=True and add outputs.aux_loss, or set {_OFF}.",
                )
            return output
        self.tuner.last_aux_loss, self.tuner.last_router_z_loss = (None if v is None else v.detach() for v in plain)
        self._watch(scaled, records)
        if loss is not None:
            output = _with_loss(output, loss + scaled.to(loss))
        return self._with_aux_loss(output, scaled)

    def _with_aux_loss(self, output: Any, scaled: Tensor | None) -> Any:
        """`output` with scaled / c in `aux_loss`, beside the base model's own, if it was asked for."""
        if not self._asked or not isinstance(output, dict):
            return output
        coef = self._offered
        if coef is None:
            coef = getattr(_text_config(self.tuner.model), _COEF, None) or 0.0
        own = output.get("aux_loss")
        if scaled is not None and coef:
            output["aux_loss"] = scaled / coef if own is None else own + (scaled / coef).to(own)
        elif own is None and self._offered is not None:  # no adapter is active
            output["aux_loss"] = torch.zeros((), device=next(self.tuner.model.parameters()).device)
        return output

    def _watch(self, scaled: Tensor, records: list[RouterRecord]) -> None:
        """Warns, once, if a backward pass comes to the routers without having been at `scaled`."""
        node = next((record.node for record in records if record.node is not None), None)
        if "unused" in self._warned or node is None or not scaled.requires_grad:
            return
        reached: list[Tensor] = []
        scaled.register_hook(lambda grad: reached.append(grad) if not reached else None)

        def check(grads: Any) -> None:
            if not reached:
                self._warn(
                    "unused",
                    "The load-balancing loss (or router z-loss) is not part of the loss that is being minimised, so "
                    "that nothing keeps the routers balanced: this training loop builds its own loss from the model's "
                    "outputs and adds neither their `loss` nor their `aux_loss`. Add outputs.loss, which has it, or "
                    f"pass output_router_logits=True to the model and add {_COEF} * outputs.aux_loss; or set {_OFF}.",
                )

        # A node runs after all that its gradients come from, so that `reached` is settled then.
        node.register_prehook(check)

    def _warn_of_uncalled(self, model: nn.Module) -> None:
        """After the first training forward pass."""
        idle = [
            name
            for name, module in model.named_modules()
            if isinstance(module, MoELoRAExperts) and module.router.weight.requires_grad and not module.was_called
        ]
        if idle:
            names = [name.partition(".moelora_experts.")[0] for name in idle]
            self._warn(
                "uncalled",
                f"{len(idle)} adapted modules did not run in the first training forward pass: {', '.join(names[:8])}"
                f"{', ...' if len(idle) > 8 else ''}. If the model reads their weights without calling them, or this "
                "data never reaches them, their mixtures will not be trained: leave them out with exclude_modules.",
            )

    def _warn(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(message, stacklevel=3)


def _text_config(model: nn.Module) -> Any:
    """The configuration in which transformers and TRL look for a language model's router settings; None without one."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    try:
        return find() if callable(find) else None
    except ValueError:  # several text configs, none of which TRL's trainers would find either
        return None


def _layout(model: nn.Module, kwargs: dict[str, Any]) -> BatchLayout:
    is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    shifted = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not is_encoder_decoder
    return batch_layout(kwargs, shifted, is_encoder_decoder)


def _check_recorded(records: list[RouterRecord]) -> None:
    """Refuses routers that ran without autograd inside a forward pass with it.

    Raises:
        ValueError: naming the layer.
    """
    if torch.is_grad_enabled() and not all(record.grad_enabled for record in records):
        layer = next(record.layer for record in records if not record.grad_enabled)
        raise ValueError(
            f"{layer} ran without autograd inside a training forward pass, as under reentrant gradient checkpointing: "
            "its load-balancing loss (or router z-loss) would carry no gradient. Use "
            f"gradient_checkpointing_kwargs={{'use_reentrant': False}}, or {_OFF}."
        )


def _loss_of(output: Any) -> Tensor | None:
    """The loss in a model's output: under its name, at the head of a tuple, or the output itself."""
    if isinstance(output, dict):  # ModelOutput is one
        output = output.get("loss")
    elif isinstance(output, tuple):
        output = output[0] if output else None
    is_loss = isinstance(output, Tensor) and output.dim() == 0 and output.is_floating_point()
    return output if is_loss else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    """The output with another loss in its place."""
    if isinstance(output, dict):
        output["loss"] = loss
        return output
    return (loss, *output[1:]) if isinstance(output, tuple) else loss
