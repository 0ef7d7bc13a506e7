"""How L_PRe enters what the model returns: weighed like the model's own loss, added to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .distributed import Group, initialized


def loss_share(
    inputs: dict[str, Any], labels: str, device: torch.device, group: Group | None
) -> Tensor | float:
    """1, or this micro-batch's share of the step's label items where the model's own loss is
    divided by those.

    With a group it is the mean share: Σℓ of all its processes is one micro-batch.
    """
    items = inputs.get("num_items_in_batch")
    if items is None:
        return 1.0
    shifted = inputs.get("shift_labels")
    targets = inputs[labels][..., 1:] if shifted is None else shifted
    own_items = targets.ne(-100).sum().to(device)
    share = own_items / (items.to(device) if torch.is_tensor(items) else items)
    return share if group is None else group.mean(share)


def own_loss(output: Any) -> Tensor | None:
    """The loss in what the model returns, of a tuple the first number; None if it has none."""
    loss = _get(output, "loss", _places(output)[0])
    return loss if torch.is_tensor(loss) and loss.dim() == 0 else None


def add_to_loss(output: Any, term: Tensor) -> Any:
    """`output` with `term` in its loss; a ModelOutput keeps its keys, a tuple its length."""
    loss = own_loss(output)
    if loss is None:
        raise RuntimeError(
            "model: labels were given but the output has no loss to add L_PRe to; attach to the "
            "model that computes it"
        )
    return _put(output, "loss", _places(output)[0], loss + term.to(loss.device))


def keep_in_graph(output: Any, term: Tensor) -> Any:
    """`output` with `term` in the graph of its loss, or of its logits if it has none, at a gradient
    of 0.

    DDP looks there for the parameters that are used; `term` is to be back-propagated from
    elsewhere.
    """
    if own_loss(output) is not None:
        return add_to_loss(output, 0 * term)
    if not initialized():  # tied logits cannot be changed in place
        return output
    for values in logits(output):
        tied: Tensor = _Tied.apply(values, term.to(values.device))  # type: ignore[no-untyped-call]
        output = _put(output, "logits", _places(output)[1], tied)
    return output


class _Tied(torch.autograd.Function):
    """A tensor as it is, without a copy of it, and a term in its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        return x.detach()  # no view for autograd, so that it may be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.new_zeros(())


def logits(output: Any) -> list[Tensor]:
    """Those in what the model returns, where there are any: what a trainer's own loss is made
    of."""
    values = _get(output, "logits", _places(output)[1])
    return [values] if torch.is_tensor(values) and values.dim() else []


def tensors(output: Any) -> list[Tensor]:
    """What of the output a loss may be made of, the model's own loss first."""
    values: Iterable[Any] = [output]
    if isinstance(output, dict):
        values = output.values()
    elif isinstance(output, tuple):
        values = output
    return sorted(
        (value for value in values if torch.is_tensor(value)), key=lambda value: value.dim()
    )


def _places(output: Any) -> tuple[int, int]:
    """Of a tuple: where the loss is, its first number, and where the logits are, its first tensor
    with dimensions."""
    if not isinstance(output, tuple):
        return 0, 0
    dims = [value.dim() if torch.is_tensor(value) else None for value in output]
    loss = next((i for i, dim in enumerate(dims) if dim == 0), len(dims))
    return loss, next((i for i, dim in enumerate(dims) if dim), len(dims))


def _get(output: Any, name: str, place: int) -> Any:
    if isinstance(output, tuple):
        return output[place] if len(output) > place else None
    return output.get(name) if isinstance(output, dict) else getattr(output, name, None)


def _put(output: Any, name: str, place: int, value: Tensor) -> Any:
    if isinstance(output, tuple):
        return (*output[:place], value, *output[place + 1 :])
    if isinstance(output, dict):
        output[name] = value
    else:
        setattr(output, name, value)
    return output
