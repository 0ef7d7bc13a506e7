"""PRe computed the plain way: hooks on a model without checkpointing, autograd, and
`reference.pre_loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels import reference

from .tiny.models import FAMILIES, Batch, build


def watch(model: nn.Module, family: str, base: str = "") -> dict[Any, Tensor]:
    """Add hooks that keep, of the last forward, the embeddings ("embeds"), the projector's input,
    and the output of decoder layer l under the key l."""
    seen: dict[Any, Tensor] = {}
    tiny = FAMILIES[family]
    text = model.get_submodule(base + tiny.text)
    layers = text.layers

    def keep_embeds(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen["embeds"] = kwargs.get("inputs_embeds")

    def keep_first(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if seen["embeds"] is None:  # the text model merges them itself
            seen["embeds"] = args[0] if args else kwargs["hidden_states"]

    layers[0].register_forward_pre_hook(keep_first, with_kwargs=True)
    text.register_forward_pre_hook(keep_embeds, with_kwargs=True)
    for number in range(1, len(layers)):

        def keep(
            module: nn.Module, args: Any, kwargs: dict[str, Any], number: int = number
        ) -> None:
            seen[number] = tiny.hidden(args[0] if args else kwargs["hidden_states"])

        layers[number].register_forward_pre_hook(keep, with_kwargs=True)

    def keep_last(module: nn.Module, args: Any, output: Any) -> None:
        seen[len(layers)] = tiny.hidden(output[0] if isinstance(output, tuple) else output)

    layers[-1].register_forward_hook(keep_last)

    def keep_projector(module: nn.Module, args: Any) -> None:
        seen["projector"] = args[0]

    if tiny.projector is not None:
        model.get_submodule(base + tiny.projector).register_forward_pre_hook(keep_projector)
    return seen


def projector_rows(family: str, data: Batch) -> Tensor:
    """The input rows (N, z) of the projector from which each visual token's embedding was made,
    found by comparing outputs.

    Rows that the projector merges are concatenated.
    """
    model = build(family)
    tiny = FAMILIES[family]
    entered, left = [], []
    model.get_submodule(tiny.projector).register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    made_by = model.get_submodule(tiny.made_by or tiny.projector)
    made_by.register_forward_hook(lambda module, args, output: left.append(output.flatten(0, -2)))
    seen = watch(model, family)
    with torch.no_grad():
        model(**data.inputs)
    del left[len(entered) :]
    # Only directions are compared, because some families scale the output of the projector.
    embedded, made = (
        nn.functional.normalize(rows.double(), dim=-1)
        for rows in (seen["embeds"][data.visual], torch.cat(left))
    )
    distance, row = torch.cdist(embedded, made).min(1)
    assert distance.max() < 1e-5
    assert len(row.unique()) == len(row) == len(made)
    return torch.cat(
        [inputs.reshape(len(rows), -1) for inputs, rows in zip(entered, left, strict=True)]
    )[row]


def copy_of(head: nn.Module) -> dict[str, Tensor]:
    """The head's parameters as separate leaves."""
    return {name: p.detach().clone().requires_grad_() for name, p in head.named_parameters()}


def means(rows: Tensor, lengths: list[int]) -> Tensor:
    """The mean over the rows of each image."""
    if not lengths:
        return rows[:0]
    return torch.stack([part.mean(0) for part in rows.split(lengths)])


def pre_loss(
    seen: dict[Any, Tensor],
    batch: Batch,
    layers: list[int],
    head: dict[str, Tensor],
    level: str = "patch",
    anchor: Tensor | None = None,
    weighting: str = "token",
    chosen: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """L_PRe of the last watched forward, averaged over `layers`. With several layers the keys of
    `head` are `<i>.w1` and so on.

    `chosen` is a bool mask of the drawn terms. Their sum is divided by the drawn fraction of the
    full divisor.
    """
    losses = []
    for index, layer in enumerate(layers):
        prefix = f"{index}." if "0.w1" in head else ""
        w1, b1, w2, b2 = (head.get(prefix + name) for name in ("w1", "b1", "w2", "b2"))
        hidden = seen[layer][batch.visual]
        target = seen["embeds"][batch.visual] if anchor is None else anchor
        if level == "image":
            hidden, target = means(hidden, batch.lengths), means(target, batch.lengths)
        weight = torch.ones(len(hidden))
        if weighting == "image" and level == "patch":
            weight = torch.tensor([1 / n for n in batch.lengths for _ in range(n)])
        divisor = weight.sum()
        if chosen is not None:
            hidden, target, weight = hidden[chosen], target[chosen], weight[chosen]
            divisor = divisor * chosen.sum() / len(chosen)
        more = {"row_weight": weight, "normalizer": divisor}
        losses.append(reference.pre_loss(hidden, target, w1, b1, w2, b2, **more, **options))
    return torch.stack(losses).mean()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Every gradient by parameter name; those of the head are named `pre_head...`."""
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_same_gradients(
    grads: dict[str, Tensor | None],
    wanted: dict[str, Tensor | None],
    rtol: float = 1e-4,
    atol: float = 2e-6,
) -> None:
    assert grads.keys() == wanted.keys()
    for name, gradient in wanted.items():
        other = grads[name]
        if gradient is None or other is None:
            assert gradient is None, f"{name}: no gradient, want one"
            assert other is None, f"{name}: a gradient, want none"
            continue
        torch.testing.assert_close(
            other, gradient, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )


def expected_gradients(
    model: nn.Module,
    family: str,
    batch: Batch,
    head: nn.Module,
    layers: list[int],
    weight: float = 0.5,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss and gradients of the plain `model` with PRe added by hand. The head's gradients are
    named `pre_head.<name>`."""
    seen = watch(model, family)
    parameters = copy_of(head)
    output = model(**batch.inputs)
    loss = output.loss + weight * pre_loss(seen, batch, layers, parameters, **options)
    loss.backward()
    grads = gradients(model) | {f"pre_head.{name}": p.grad for name, p in parameters.items()}
    return loss.detach(), grads
