"""Checks that the head is trained: it is not frozen, keeps its dtypes, and is in an optimizer
beside the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .notices import Notices
from .optimizers import Steps, parameters, split
from .tokens import capturing
from .watchdog import PATIENCE

# After one of these warnings the user already knows that the optimizer lacks the head.
SAID = {"optimizer refuses", "optimizer given"}


class HeadChecks:
    """The checks of one handle. Each call gets the head, because PEFT may replace it by a copy.

    Args:
        model: the model that the head is attached to.
        head: the head right after it was made.
        name: the name of the head in the model.
        notices: the warnings of the handle.
    """

    def __init__(self, model: nn.Module, head: nn.Module, name: str, notices: Notices) -> None:
        self.model = model
        self.name = name
        self.notices = notices
        self.several = isinstance(head, nn.ModuleList)
        self.was_peft = _is_peft(model)
        self.frozen = not any(p.requires_grad for p in head.parameters())  # on purpose
        self.dtypes = {name: p.dtype for name, p in head.named_parameters()}
        self.steps = Steps()

    def new_training(self) -> None:
        """Forget the steps of the previous training."""
        self.steps = Steps()

    def stepped(self, optimizer: Any, head: nn.Module, wanted: bool) -> None:
        """Record that a step of `optimizer` begins. If PRe is `wanted`, warn if the model was not
        called before the last ones."""
        self.steps.see(optimizer, self.model, head)
        late = wanted and self.steps.uncalled >= PATIENCE
        if late and "called inside" not in self.notices.given:
            of_head, others = split(self.model, head)
            # Another optimizer may have got the id of one that is gone.
            if {id(p) for p in parameters(optimizer)} & (of_head.keys() | others):
                self.notices.warn("not called", model=type(self.model).__name__)

    def called(self) -> None:
        """Record a call of the model."""
        self.steps.calls += 1
        self.steps.uncalled = 0
        if capturing():  # replays of a CUDA graph call nothing
            self.notices.settle("not called")

    def leaves_out_head(self, optimizer: Any, head: nn.Module) -> bool:
        """Whether `optimizer` has parameters of the model but none of the head."""
        of_head, others = split(self.model, head)
        held = {id(p) for p in parameters(optimizer)}
        return bool(of_head and held & others) and not held & of_head.keys()

    def check_steps(self) -> None:
        """Warn if the optimizers that have stepped lack the head, or have only the head."""
        left_out = self.steps.verdict()
        if left_out is not None and not self.notices.given & SAID:
            self.notices.warn(
                f"optimizer without the {left_out}", optimizer=", ".join(sorted(self.steps.kinds))
            )

    def check_frozen(self, head: nn.Module) -> None:
        """Warn if no parameter of the head requires grad, unless it was made so.

        Raises:
            RuntimeError: if the head was frozen by PEFT.
        """
        # The list is empty if FSDP1 keeps the parameters flat.
        trained = [p.requires_grad for p in head.parameters()]
        if any(trained) or not trained or self.frozen:
            # The head was unfrozen, so the optimizers have to be looked at again.
            if "frozen head" in self.notices.given:
                self.notices.given.discard("frozen head")
                self.steps.forget()
            return
        if self.was_peft or not _is_peft(self.model):
            self.notices.warn("frozen head")
            return
        # PEFT's modules_to_save does not accept a ModuleList.
        other = "" if self.several else f', or put "{self.name}" in modules_to_save'
        raise RuntimeError(
            f"model: it was wrapped in PEFT after apply_pre, which froze `{self.name}`, so the "
            f"head would never train; call apply_pre on the PeftModel instead{other}"
        )

    def restore_dtypes(self, head: nn.Module, layer_dtypes: set[torch.dtype]) -> None:
        """Cast parameters that someone has cast back to the dtypes they were made in, and warn.

        If all layers that the head reads have one dtype (`layer_dtypes`), the head may have that
        dtype too.
        """
        changed = {}
        for name, parameter in head.named_parameters():
            # PEFT puts a prefix before the names that the head was made with.
            made = next((n for n in self.dtypes if f".{name}".endswith(f".{n}")), None)
            dtype = parameter.dtype if made is None else self.dtypes[made]
            with_layer = layer_dtypes == {parameter.dtype}
            fsdp2 = hasattr(parameter, "full_tensor")  # FSDP2 has its own rules for dtypes
            if parameter.dtype != dtype and not with_layer and not fsdp2:
                changed[name] = (parameter.dtype, dtype)
                parameter.data = parameter.data.to(dtype)
        if changed:
            dtype, wanted = next(iter(changed.values()))
            self.notices.warn("head recast", names=", ".join(changed), dtype=dtype, wanted=wanted)


def _is_peft(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None
