"""Whether the head is trained as it was made: not frozen, in its dtypes, in an optimizer beside the
model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .notices import Notices
from .optimizers import Steps, parameters, split

SAID = {"optimizer refuses", "optimizer given"}  # warnings that a missing head was already told by


class HeadChecks:
    """The checks of one handle. They are given the head each time, because PEFT may copy it.

    Args:
        model: what the head is attached to.
        head: as it was made.
        name: of the head in the model.
        notices: the handle's.
    """

    def __init__(self, model: nn.Module, head: nn.Module, name: str, notices: Notices) -> None:
        self.model = model
        self.name = name
        self.notices = notices
        self.several = isinstance(head, nn.ModuleList)
        self.was_peft = _is_peft(model)
        self.dtypes = {name: p.dtype for name, p in head.named_parameters()}
        self.steps = Steps()

    def new_training(self) -> None:
        """The steps of another training are forgotten."""
        self.steps = Steps()

    def stepped(self, optimizer: Any, head: nn.Module) -> None:
        """A step of `optimizer` begins."""
        self.steps.see(optimizer, self.model, head)

    def leaves_out_head(self, optimizer: Any, head: nn.Module) -> bool:
        """Whether `optimizer` has parameters of the model, but none of the head's."""
        of_head, others = split(self.model, head)
        held = {id(p) for p in parameters(optimizer)}
        return bool(held & others) and not held & of_head.keys()

    def check_steps(self) -> None:
        """Warn if the optimizers that have stepped leave out the head, or all but the head."""
        left_out = self.steps.verdict()
        if left_out is not None and not self.notices.given & SAID:
            self.notices.warn(
                f"optimizer without the {left_out}", optimizer=", ".join(sorted(self.steps.kinds))
            )

    def check_frozen(self, head: nn.Module) -> None:
        """Warn of a head of which nothing requires grad; a RuntimeError if PEFT did that."""
        # empty where FSDP1 keeps the parameters flat
        trained = [p.requires_grad for p in head.parameters()]
        if any(trained) or not trained:
            if "frozen head" in self.notices.given:  # it is trained now, if the optimizer has it
                self.notices.given.discard("frozen head")
                self.steps.forget()
            return
        if self.was_peft or not _is_peft(self.model):
            self.notices.warn("frozen head")
            return
        # modules_to_save takes no ModuleList
        other = "" if self.several else f', or put "{self.name}" in modules_to_save'
        raise RuntimeError(
            f"model: it was wrapped in PEFT after apply_pre, which froze `{self.name}`, so the "
            f"head would never train; call apply_pre on the PeftModel instead{other}"
        )

    def restore_dtypes(self, head: nn.Module, layer_dtypes: set[torch.dtype]) -> None:
        """Cast parameters back to the dtypes that they were made in, where somebody cast them, and
        say so.

        A head all of whose layers have one dtype, `layer_dtypes`, may have that too.
        """
        changed = {}
        for name, parameter in head.named_parameters():
            # PEFT puts names before those it was made with
            made = next((n for n in self.dtypes if f".{name}".endswith(f".{n}")), None)
            dtype = parameter.dtype if made is None else self.dtypes[made]
            with_layer = layer_dtypes == {parameter.dtype}
            fsdp2 = hasattr(parameter, "full_tensor")  # which has rules of its own
            if parameter.dtype != dtype and not with_layer and not fsdp2:
                changed[name] = (parameter.dtype, dtype)
                parameter.data = parameter.data.to(dtype)
        if changed:
            dtype, wanted = next(iter(changed.values()))
            self.notices.warn("head recast", names=", ".join(changed), dtype=dtype, wanted=wanted)


def _is_peft(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None
