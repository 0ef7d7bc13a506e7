"""How L_PRe enters what the model returns: weighed like the model's own loss, added to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .parallel import Group


def share(inputs: dict[str, Any], device: torch.device, group: Group | None) -> Tensor | float:
    """1, or this micro-batch's share of the step's label items where the model's own loss is divided by those.

    With a group it is the mean share: Σℓ of all its processes is one micro-batch.
    """
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = inputs.get("shift_labels")
    labels = inputs["labels"][..., 1:] if shifted is None else shifted
    mine = labels.ne(-100).sum().to(device)
    mine = mine / (items.to(device) if torch.is_tensor(items) else items)
    return mine if group is None else group.mean(mine)


def add_to_loss(output: Any, term: Tensor, required: bool) -> Any:
    """`output` with `term` in its loss; a ModelOutput keeps its keys, a tuple its length."""
    is_tuple = isinstance(output, tuple)
    loss = output[0] if is_tuple else output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if not torch.is_tensor(loss) or loss.dim() > 0:
        if not required:
            return output
        raise RuntimeError(
            "model: labels were given but the output has no loss to add L_PRe to; attach to the model that computes it"
        )
    loss = loss + term.to(loss.device)
    if is_tuple:
        return (loss, *output[1:])
    if isinstance(output, dict):
        output["loss"] = loss
    else:
        output.loss = loss
    return output


def logits(output: Any) -> list[Tensor]:
    """Those in what the model returns, where there are any: what a trainer's own loss is made of."""
    if isinstance(output, tuple):
        found = output[1] if len(output) > 1 else None
    else:
        found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    return [found] if torch.is_tensor(found) else []
