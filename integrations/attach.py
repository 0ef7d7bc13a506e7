"""apply_pre: Predictive Regularization on a vision-language model, by hooks; nothing of the model
is replaced."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels import PreHead, checks
from pre_kernels.checks import IMPLEMENTATIONS, choice

from .distributed import Group, check_not_wrapped, check_same_everywhere
from .families import check_tokens, find_parts
from .handle import ATTRIBUTE, PreHandle, find_handle
from .head_options import HeadOptions
from .objective import Objective

ANCHORS = ("pre_llm", "pre_projector")
LEVELS = ("patch", "image")
WEIGHTINGS = ("token", "image")
NONFINITE = ("propagate", "skip")


def apply_pre(
    model: nn.Module,
    layer: int | Sequence[int] | None = None,
    weight: float = 0.5,
    *,
    loss: str = "cosine",
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor] = "pre_llm",
    level: str = "patch",
    hidden_dim: int | None = None,
    activation: str = "gelu",
    bias: bool = True,
    anchor_dim: int | None = None,
    mask_fn: Callable[[dict[str, Any]], Tensor] | None = None,
    text_model: str | nn.Module | None = None,
    layers: str | nn.ModuleList | None = None,
    weighting: str = "token",
    fraction: float = 1.0,
    nonfinite: str = "propagate",
    impl: str = "auto",
    group: torch.distributed.ProcessGroup | str | None = None,
    head_dtype: torch.dtype | None = None,
    head_lr: float | None = None,
    head_weight_decay: float | None = None,
    schedule: str = "constant",
    warmup: float = 0.0,
    labels: str | None = "labels",
) -> PreHandle:
    """Attach PRe to `model`: from now on training forwards with labels add weight · L_PRe to
    output.loss. Returns a handle.

    The predictor becomes `model.pre_head` (a `PreHead`, or a ModuleList of them for a sequence of
    layers), in the dtype and on the device of the layer it reads. Call this after weights are
    loaded and after `get_peft_model`, with one seed on all ranks; create the optimizer and shard
    the model (FSDP, ZeRO) after it. Eval, `generate()`, `no_grad`, a forward without labels and
    weight 0 never reach the head. A batch without images adds 0, with zero gradients for the head.

    Under gradient accumulation every micro-batch adds its own mean, weighed as the trainer weighs
    its loss: like all others, or by its share of `num_items_in_batch` where the model is given
    that. `patch_trainer` makes it the mean of the whole step; a trainer that takes the labels away
    or ignores `output.loss` also needs it.

    ```python
    handle = apply_pre(model, layer=2, weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters())  # after it, so that the head is trained too
    for batch in batches:
        model(**batch).loss.backward()  # L_LM + λ · L_PRe
        optimizer.step()
        optimizer.zero_grad()
    print(handle.metrics()["pre_loss"])
    handle.save(folder)
    handle.remove()
    ```

    Args:
        model: a Hugging Face vision-language model with a loss, or a `PeftModel` around one.
        layer: l in 1..L reads what l of the L decoder layers made (L: before the final norm); a
            sequence trains one head per entry and averages their losses; None is L // 2.
        weight: λ, finite and ≥ 0; also `handle.weight`.
        loss, activation, bias, hidden_dim: of the predictor, see `PreHead`. `hidden_dim` None: the
            model's width.
        anchor: "pre_llm": the visual tokens' embeddings as they enter the decoder. "pre_projector":
            what the projector maps to them (LLaVA; Qwen-VL: a token's patches, concatenated). A
            callable: `anchor(inputs, rows)` gets the forward's arguments as a dict and the bool
            mask (B, T) of the N visual tokens, and returns (B, T, z), or (N, z) in batch-major
            order; it runs under `no_grad` after the forward and only if the batch has images;
            `anchor_dim` is its z. `EncoderAnchor` is one for an encoder of images.
        level: "patch": a term per visual token. "image": the mean over each image's (or video's)
            tokens of hidden states and anchors first, a term per image.
        weighting: "token": every visual token counts the same. "image": every image does, its
            tokens having the weight 1 / their number. At level "image" every image does anyway.
        fraction: in (0, 1], of the terms, drawn anew in each forward from the device's default
            generator: of a batch's N, max(1, round(fraction · N)), any as likely as others, and
            divided by their share of N, so that the expected loss and gradient are those of all. At
            1 nothing is drawn. Every process draws by itself; those that are seeded alike may draw
            the same numbers, which biases nothing.
        nonfinite: of visual tokens with a nan or inf in the anchor or in a hidden state of one of
            the layers. "propagate": the loss is not finite, nor are the gradients. "skip": they are
            left out, and the loss is that of the batch without them: at level "image" the mean over
            an image's other tokens, and a group counts the others alone. What `patch_trainer`
            counts ahead, or `defer` is given, still has them: there they are terms of 0.
            `handle.metrics()` says how many there were. One more pass over the layers' hidden
            states and the anchors. The loss of the model itself stays what it is.
        anchor_dim: z of a callable anchor; None is its attribute `anchor_dim`, else the model's
            width.
        mask_fn: finds the visual tokens instead of `input_ids`: `mask_fn(inputs)` returns a bool
            mask (B, T), or an integer one with the number of each token's image (1, 2, ...; 0 for
            text).
        text_model: the module (or its path) whose `.layers` are the decoder's, where it is not
            found by itself.
        layers: the ModuleList of the decoder's layers (or its path), where they are elsewhere.
        impl: of the loss, see `fused_pre_loss`.
        group: the processes whose forwards are one: a ProcessGroup, or "world". Σℓ is divided by
            the number of terms of all of them over the number of processes, so that averaged
            gradients (DDP, FSDP, ZeRO) are those of the mean over all visual tokens, uneven or
            text-only as the processes' batches may be, and those of whole sequences under sequence
            parallelism (level "image": images whole on one process). Costs one all-reduce of a
            number per forward, in which every process has to take part. None: a process's own
            terms. Where `patch_trainer` counts, this is not used.
        head_dtype: of the predictor's parameters; None: the layer's. `torch.float32` over a layer
            in half precision keeps master weights: products still run in the layer's dtype,
            gradients arrive in float32.
        head_lr, head_weight_decay: of the predictor's own optimizer groups, which `patch_trainer`
            makes, and `handle.param_groups()` for other loops. None: what the optimizer gives the
            rest. Biases are not decayed.
        schedule, warmup: λ is `weight` all along ("constant"), or falls to 0 by half a cosine
            ("cosine"), after a linear rise over the share `warmup` of the training. `patch_trainer`
            sets where in the training a step is; other loops set `handle.progress` (0..1).
        labels: the argument of the forward that makes it one with a loss, to which λ · L_PRe is
            added. None: every forward in training mode counts, and its L_PRe is yours to add, by
            `handle.loss()`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is wanted.
        RuntimeError: if a handle is attached already.
    """
    if isinstance(model, nn.DataParallel):
        raise TypeError(
            "model: got nn.DataParallel, whose replicas share hooks; want the module inside, under "
            "DDP or FSDP"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, want an nn.Module")
    if find_handle(model) is not None or hasattr(model, ATTRIBUTE):
        raise RuntimeError(
            f"model: {type(model).__name__} has PRe attached already; call handle.remove() first"
        )
    check_not_wrapped(model)
    choice("level", level, LEVELS)
    choice("weighting", weighting, WEIGHTINGS)
    _check_fraction(fraction)
    choice("nonfinite", nonfinite, NONFINITE)
    choice("impl", impl, IMPLEMENTATIONS)
    if not callable(anchor):
        choice("anchor", anchor, ANCHORS)
    if anchor_dim is not None and not callable(anchor):
        raise ValueError(
            f"anchor_dim: got {anchor_dim} with anchor={anchor!r}, which has its own width; "
            "want None"
        )
    if labels is not None and not isinstance(labels, str):
        raise TypeError(
            f"labels: got {type(labels).__name__}, want the name of the forward's argument, or None"
        )
    counted_over = None if group is None else Group(group)
    if mask_fn is not None and not callable(mask_fn):
        raise TypeError(f"mask_fn: got {type(mask_fn).__name__}, want a callable")
    training = HeadOptions(head_lr, head_weight_decay, schedule, warmup)

    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's
    inner = model if unwrap is None else unwrap()
    parts = find_parts(inner, text_model, layers)
    if mask_fn is not None:
        parts.merge = None
    else:
        check_tokens(parts, inner)
    numbers = _layers(layer, len(parts.layers))
    width = parts.width
    if anchor == "pre_projector":
        anchor_dim = parts.projector_width
    elif anchor_dim is None:
        anchor_dim = getattr(anchor, "anchor_dim", width)
    checks.width("anchor_dim", anchor_dim)

    heads = []
    for number in numbers:
        dtype, device = parts.dtype_and_device(number)
        heads.append(
            PreHead(
                width,
                hidden_dim,
                anchor_dim,
                bias=bias,
                activation=activation,
                loss=loss,
                device=device,
                dtype=_head_dtype(head_dtype, dtype),
            )
        )
    head = nn.ModuleList(heads) if isinstance(layer, Sequence) else heads[0]
    check_same_everywhere(head)
    objective = Objective(
        parts=parts,
        layers=numbers,
        anchor=anchor,
        anchor_dim=anchor_dim,
        level=level,
        mask_fn=mask_fn,
        impl=impl,
        loss=loss,
        weighting=weighting,
        fraction=float(fraction),
        group=counted_over,
        nonfinite=nonfinite,
    )
    return PreHandle(model, objective, head, weight, training, labels, as_layer=head_dtype is None)


def _check_fraction(fraction: Any) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction: got {type(fraction).__name__}, want a number in (0, 1]")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, want a number in (0, 1]")


def _layers(layer: Any, depth: int) -> tuple[int, ...]:
    if layer is None:
        return (max(depth // 2, 1),)
    numbers = []
    for entry in layer if isinstance(layer, Sequence) and not isinstance(layer, str) else [layer]:
        try:
            number = operator.index(entry)
        except TypeError:
            number = None
        if number is None or isinstance(entry, bool):
            raise TypeError(
                f"layer: got {entry!r}, want an int in 1..{depth}, a sequence of them, or None"
            )
        if not 1 <= number <= depth:
            raise ValueError(
                f"layer: got {number}, want 1..{depth} (the model has {depth} decoder layers)"
            )
        numbers.append(number)
    if not numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"layer: got {layer!r}, want at least one layer and none twice")
    return tuple(numbers)


def _head_dtype(requested: Any, layer: torch.dtype) -> torch.dtype:
    if requested is None:
        return layer
    if not isinstance(requested, torch.dtype):
        raise TypeError(f"head_dtype: got {requested!r}, want a torch.dtype or None")
    if requested != layer and (requested != torch.float32 or layer.itemsize > 2):
        raise ValueError(
            f"head_dtype: got {requested} over a layer in {layer}, want None, {layer}, or float32 "
            "over halves"
        )
    return requested
