"""How L_PRe is added to the output of a model, weighed like the model's own loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .distributed import Group, initialized, sharing_a_sequence


def loss_share(
    inputs: dict[str, Any], labels: str, device: torch.device, group: Group | None
) -> Tensor | float:
    """The part of a step's labels that this micro-batch has, if the model divides its own loss by
    the labels of the step; else 1.

    With a group it is the mean over its processes, whose forwards are one micro-batch.

    Raises:
        ValueError: if processes share the sequence and the loss is the mean over own labels.
    """
    items = inputs.get("num_items_in_batch")
    if items is None:
        if sharing_a_sequence() > 1:
            # The means of the processes are weighed by their numbers of labels. A process with
            # images but without labels would lose its L_PRe.
            raise ValueError(
                f"labels: got {labels!r}, want None under DeepSpeed's sequence parallelism, where "
                "output.loss is weighed by the labels in this process's part of the sequence; use "
                "patch_trainer() under a transformers.Trainer, and in a loop of your own add "
                "handle.loss() to the loss of the whole sequence"
            )
        return 1.0
    shifted = inputs.get("shift_labels")
    targets = inputs[labels][..., 1:] if shifted is None else shifted
    own_items = targets.ne(-100).sum().to(device)
    share = own_items / (items.to(device) if torch.is_tensor(items) else items)
    return share if group is None else group.mean(share)


def own_loss(output: Any) -> Tensor | None:
    """The loss in a model's output; in a tuple the first 0-d tensor. None if there is none."""
    loss = _get(output, "loss", _places(output)[0])
    return loss if torch.is_tensor(loss) and loss.dim() == 0 else None


def add_to_loss(output: Any, term: Tensor) -> Any:
    """`output` with `term` added to its loss. A ModelOutput keeps its keys, a tuple its length."""
    loss = own_loss(output)
    if loss is None:
        raise RuntimeError(
            "model: labels were given but the output has no loss to add L_PRe to; attach to the "
            "model that computes it, or call apply_pre(model, labels=None) and add handle.loss() "
            "to your loss"
        )
    return _put(output, "loss", _places(output)[0], loss + term.to(loss.device))


def keep_in_graph(output: Any, term: Tensor) -> Any:
    """`output` with `term` in the graph of its loss, or of its logits if there is no loss, with
    gradient 0.

    DDP searches this graph for the parameters that are used. `term` itself is back-propagated from
    another place.
    """
    if own_loss(output) is not None:
        return add_to_loss(output, 0 * term)
    # Without other processes nobody searches the graph, and the logits stay as they are.
    if not initialized():
        return output
    for values in logits(output):
        tied: Tensor = _Tied.apply(values, term.to(values.device))  # type: ignore[no-untyped-call]
        output = _put(output, "logits", _places(output)[1], tied)
    return output


class _Tied(torch.autograd.Function):
    """The same tensor without a copy, with a term in its graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, term: Tensor) -> Tensor:
        # A detached tensor is not a view for autograd, so later code may change it in place.
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, gradient.new_zeros(())


def logits(output: Any) -> list[Tensor]:
    """The logits in a model's output, if there are any; a trainer's own loss is made from them."""
    values = _get(output, "logits", _places(output)[1])
    return [values] if torch.is_tensor(values) and values.dim() else []


def tensors(output: Any) -> list[Tensor]:
    """The tensors of the output that a loss may be made from, the model's own loss first."""
    values: Iterable[Any] = [output]
    if isinstance(output, dict):
        values = output.values()
    elif isinstance(output, tuple):
        values = output
    return sorted(
        (value for value in values if torch.is_tensor(value)), key=lambda value: value.dim()
    )


def _places(output: Any) -> tuple[int, int]:
    """The indices of loss and logits in a tuple: its first 0-d tensor, and its first tensor with
    dimensions."""
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
