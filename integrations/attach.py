"""apply_pre: attach Predictive Regularization to a vision-language model by hooks, without
replacing any part of the model."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels import PreHead, checks
from pre_kernels.checks import IMPLEMENTATIONS, choice

from .agreement import check_same_everywhere
from .arguments import check_module
from .distributed import Group, check_not_wrapped
from .families import check_tokens, find_parts
from .handle import ATTRIBUTE, PreHandle, find_handle
from .head_options import HeadOptions
from .objective import Objective
from .stages import check_stage
from .terms import Target

ANCHORS = ("pre_llm", "pre_projector")
LEVELS = ("patch", "image")
WEIGHTINGS = ("token", "image")
GRAM_OVER = ("image", "batch")
NONFINITE = ("propagate", "skip")
ANCHOR_NORMS = ("none", "center", "spatial")


def apply_pre(
    model: nn.Module,
    layer: int | Sequence[int] | None = None,
    weight: float = 0.5,
    *,
    targets: Sequence[tuple[int, str | Callable[[dict[str, Any], Tensor], Tensor]]] | None = None,
    loss: str = "cosine",
    anchor: str | Callable[[dict[str, Any], Tensor], Tensor] = "pre_llm",
    level: str = "patch",
    hidden_dim: int | None = None,
    activation: str = "gelu",
    bias: bool = True,
    anchor_dim: int | None = None,
    mask_fn: Callable[[dict[str, Any]], Tensor] | None = None,
    text_model: str | nn.Module | None = None,
    layers: str | nn.ModuleList | Sequence[nn.Module | str] | None = None,
    weighting: str = "token",
    fraction: float = 1.0,
    nonfinite: str = "propagate",
    impl: str = "auto",
    group: torch.distributed.ProcessGroup | str | None = None,
    head_dtype: torch.dtype | None = None,
    head_trainable: bool = True,
    head_lr: float | None = None,
    head_weight_decay: float | None = None,
    schedule: str = "constant",
    warmup: float = 0.0,
    labels: str | None = "labels",
    anchor_norm: str = "none",
    gram_over: str = "image",
    depth: int = 2,
    norm: str | None = None,
    dropout: float = 0.0,
) -> PreHandle:
    """Attach PRe to `model`: from now on training forwards with labels add weight · L_PRe to
    output.loss. Returns a handle.

    The predictor becomes `model.pre_head` (a `PreHead`, or a ModuleList of them for a sequence of
    layers), in the dtype and on the device of the layer it reads. Call this after the weights are
    loaded and after `get_peft_model`, with the same seed on all ranks. Create the optimizer and
    shard the model (FSDP, ZeRO) afterwards. The head does not run in eval mode, in `generate()`,
    under `no_grad`, at weight 0, or in a forward without labels unless `labels` is None. A batch
    without images adds 0, with zero gradients for the head.

    Under gradient accumulation every micro-batch adds its own mean. The trainer weights that mean
    as it weights the loss: equally, or by `num_items_in_batch` if the model gets it.
    `patch_trainer` makes it the mean over the whole step. A trainer that removes the labels or
    ignores `output.loss` also needs `patch_trainer`.

    ```python
    handle = apply_pre(model, layer=2, weight=0.5)
    optimizer = torch.optim.AdamW(model.parameters())  # after apply_pre: it includes the head
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
        layer: l in 1..L reads the output of decoder layer l of L (layer L: before the final norm).
            A sequence trains one head per entry and averages their losses. None is L // 2.
        targets: pairs (layer, anchor) instead of `layer` and `anchor`, such as
            `[(8, "pre_llm"), (16, dino)]`. One head is trained per pair, and their losses are
            averaged; a layer may occur several times. The width of a callable anchor is its
            attribute `anchor_dim`. The heads share the visual tokens, the draw of `fraction` and
            the divisor; each anchor is computed once. If an anchor is (N, z) they also share the
            indices of the rows; otherwise each head finds them from the mask, because the host does
            not know their number.
        weight: λ, finite and ≥ 0. Also `handle.weight`.
        loss, activation, bias, hidden_dim, depth, norm, dropout: settings of the predictor, see
            `PreHead`. `hidden_dim` None is the model's width.
        anchor: the target of the prediction. "pre_llm": the embeddings of the visual tokens as they
            enter the decoder. "pre_projector": the projector's input for each visual token (LLaVA;
            Qwen-VL: the patches of a token, concatenated). A callable: `anchor(inputs, rows)` gets
            the forward's arguments as a dict and the bool mask (B, T) of the N visual tokens, and
            returns (B, T, z), or (N, z) in batch-major order, with z = `anchor_dim`. It runs under
            `no_grad` after the forward, and only if the batch has images. `EncoderAnchor` is such a
            callable for an image encoder.
        level: "patch": one term per visual token. "image": hidden states and anchors are first
            averaged over the tokens of each image (or video), which gives one term per image.
        weighting: "token": every visual token has the same weight. "image": every image has the
            same weight, shared equally by its tokens. At level "image" every image has the same
            weight in both cases.
        fraction: the fraction of the terms to compute, in (0, 1]. Each forward draws
            max(1, round(fraction · N)) of the N terms of its batch uniformly from the device's
            default generator, and divides their sum by the drawn fraction of N, so that loss and
            gradient are unbiased. At 1 nothing is drawn. Every process draws by itself. Processes
            with the same seed may draw the same numbers; this adds no bias.
        nonfinite: how to treat visual tokens with a nan or inf in the anchor or in the hidden
            states of a layer that is read. "propagate": the loss and its gradients are not finite.
            "skip": these tokens are left out, and the loss is that of a batch without them. At
            level "image" the mean is then over the other tokens of the image, and a group counts
            only the other tokens. A count that `patch_trainer` takes ahead, or that `defer` gets,
            still includes them; there they are terms of 0. `handle.metrics()` has their number.
            "skip" costs one more pass over the hidden states and the anchors. It does not change
            the model's own loss.
        anchor_dim: z of a callable anchor. None: the callable's attribute `anchor_dim`, or the
            model's width if it has none.
        mask_fn: finds the visual tokens instead of `input_ids`. `mask_fn(inputs)` returns a bool
            mask (B, T), or an integer mask with the number of each token's image (1, 2, ...; 0 for
            text).
        text_model: the module (or its path) whose `.layers` are the decoder layers, if it is not
            found automatically.
        layers: the ModuleList of the decoder layers (or its path), if they are elsewhere. If the
            model computes its L layers from their parts without calling them: a list of L + 1
            modules that it calls with the states before, between and after the layers, such as
            `[*(layer.input_layernorm for layer in text.layers), text.norm]`.
        impl: implementation of the loss, see `fused_pre_loss`.
        group: the processes whose forwards form one batch: a ProcessGroup, or "world". Σℓ is
            divided by the mean number of terms per process. Gradients that are averaged over the
            processes (DDP, FSDP, ZeRO) are then those of the mean over all visual tokens, even if
            batches are uneven or text-only. Under sequence parallelism they are those of the whole
            sequences (at level "image" each image must be whole on one process). Costs one
            all-reduce of one number per forward, in which every process must take part. None: only
            the process's own terms. Not used where `patch_trainer` counts the tokens.
        head_dtype: dtype of the predictor's parameters. None: that of the layer. `torch.float32`
            over a half-precision layer keeps master weights: matmuls still run in the layer's
            dtype, and gradients arrive in float32.
        head_trainable: False freezes the predictor as it is initialised or loaded. L_PRe then
            trains only the model, with 4 of the 6 matmuls and no state in an optimizer.
        head_lr, head_weight_decay: settings of the predictor's own optimizer groups, which
            `patch_trainer` makes (and `handle.param_groups()` for other loops). None: the
            optimizer's settings. Biases are not decayed.
        schedule, warmup: λ stays at `weight` ("constant"), or falls to 0 by half a cosine
            ("cosine"). Before that it rises linearly over the fraction `warmup` of the training.
            `patch_trainer` sets the progress of the training; other loops set `handle.progress`
            (0..1).
        labels: name of the forward's argument that makes the model return a loss. λ · L_PRe is
            added to the loss of forwards that get it. None: L_PRe is computed in every forward in
            training mode, and you add `handle.loss()` to your loss.
        gram_over: with loss "gram": whether the Gram matrices are those of an "image", which must
            be whole on one process, or of the whole "batch" of a forward.
        anchor_norm: "none": the anchors as they are. "center": less their mean over the visual
            tokens that count, drawn by `fraction` or not: those of all processes where `group` or
            `patch_trainer` counts them together (one all-reduce of z + 1 numbers), else those of
            the forward. Under gradient accumulation that is each micro-batch's own mean. "spatial":
            (x - mean) / (std + 1e-6) over the tokens of each image, per channel (iREPA, arXiv
            2512.10794); it needs whole images on a process, and an image of one token gets the
            target 0. Both compute in float32.

    Raises:
        ValueError, TypeError: with the argument, the value it got and the value it needs.
        RuntimeError: if the model already has a handle.
    """
    check_module(model)
    if find_handle(model) is not None:
        raise RuntimeError(
            f"model: {type(model).__name__} has PRe attached already; call remove() on its handle "
            "first: find_handle(model).remove()"
        )
    if hasattr(model, ATTRIBUTE):
        raise RuntimeError(
            f"model: got a {type(model).__name__} with an attribute `{ATTRIBUTE}` of its own, want "
            "that name free for the head; rename the attribute"
        )
    check_not_wrapped(model)
    choice("level", level, LEVELS)
    choice("weighting", weighting, WEIGHTINGS)
    _check_fraction(fraction)
    choice("nonfinite", nonfinite, NONFINITE)
    choice("anchor_norm", anchor_norm, ANCHOR_NORMS)
    choice("gram_over", gram_over, GRAM_OVER)
    if gram_over != "image" and loss != "gram":
        raise ValueError(f"gram_over: got {gram_over!r} with loss={loss!r}, want loss='gram'")
    if loss == "gram" and (fraction < 1 or level == "image"):
        name, value = ("fraction", fraction) if fraction < 1 else ("level", level)
        raise ValueError(
            f"{name}: got {value!r} with loss='gram', which compares all tokens of an image, want "
            f"{1.0 if fraction < 1 else 'patch'!r}"
        )
    if anchor_norm == "spatial" and level == "image":
        raise ValueError(
            "anchor_norm: got 'spatial' with level='image', which makes every target 0, want "
            "'none' or 'center'"
        )
    choice("impl", impl, IMPLEMENTATIONS)
    if targets is not None and (layer, anchor, anchor_dim) != (None, "pre_llm", None):
        raise ValueError(
            "targets: got layer, anchor or anchor_dim too, want layers and anchors in its pairs"
        )
    pairs = [] if targets is None else _pairs(targets)
    for each in [anchor, *(pair[1] for pair in pairs)]:
        if not callable(each):
            choice("anchor", each, ANCHORS)
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
        raise TypeError(
            f"mask_fn: got {type(mask_fn).__name__}, want a callable that returns the mask, such "
            'as lambda inputs: inputs["input_ids"] == image_token_id'
        )
    training = HeadOptions(head_lr, head_weight_decay, schedule, warmup, head_trainable)

    unwrap: Any = getattr(model, "get_base_model", None)  # PEFT's
    inner = model if unwrap is None else unwrap()
    parts = find_parts(inner, text_model, layers)
    if mask_fn is not None:
        parts.merge = None
    else:
        check_tokens(parts, inner)
    width = parts.width
    if targets is None:
        pairs = [(number, anchor) for number in _layers(layer, parts.depth)]
    wanted = [(*_layers(pair[:1], parts.depth), pair[1]) for pair in pairs]
    check_stage(inner, parts, wanted, labels, given=layers is not None)
    heads = []
    described = []
    for number, target in wanted:
        dtype, device = parts.dtype_and_device(number)
        own_dim = anchor_dim
        if target == "pre_projector":
            own_dim = parts.projector_width
        elif own_dim is None:
            own_dim = getattr(target, "anchor_dim", width)
        described.append(Target(number, target, checks.width("anchor_dim", own_dim)))
        heads.append(
            PreHead(
                width,
                hidden_dim,
                own_dim,
                bias=bias,
                activation=activation,
                loss=loss,
                device=device,
                dtype=_head_dtype(head_dtype, dtype),
                depth=depth,
                norm=norm,
                dropout=dropout,
            )
        )
    several = targets is not None or isinstance(layer, Sequence)
    head = nn.ModuleList(heads) if several else heads[0]
    head.requires_grad_(head_trainable)
    check_same_everywhere(head)
    objective = Objective(
        parts=parts,
        targets=tuple(described),
        level=level,
        mask_fn=mask_fn,
        impl=impl,
        loss=loss,
        weighting=weighting,
        fraction=float(fraction),
        group=counted_over,
        nonfinite=nonfinite,
        anchor_norm=anchor_norm,
        gram_over=gram_over if loss == "gram" else None,
    )
    return PreHandle(model, objective, head, weight, training, labels, as_layer=head_dtype is None)


def _check_fraction(fraction: Any) -> None:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(
            f"fraction: got {fraction!r} ({type(fraction).__name__}), want a number in (0, 1]"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction: got {fraction}, want a number in (0, 1]")


def _pairs(targets: Any) -> list[tuple[Any, Any]]:
    """The entries of `targets`, after a check that they are different pairs."""
    pairs = []
    for pair in targets if isinstance(targets, (list, tuple)) else [targets]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(
                f"targets: got {pair!r}, want pairs (layer, anchor), such as "
                '[(8, "pre_llm"), (16, "pre_projector")]'
            )
        pairs.append((pair[0], pair[1]))
    if not pairs or any(pair in pairs[:i] for i, pair in enumerate(pairs)):
        raise ValueError(f"targets: got {targets!r}, want at least one pair, and none twice")
    return pairs


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
        raise ValueError(f"layer: got {layer!r}, want at least one layer, and none twice")
    return tuple(numbers)


def _head_dtype(requested: Any, layer: torch.dtype) -> torch.dtype:
    if requested is None:
        return layer
    if not isinstance(requested, torch.dtype):
        raise TypeError(
            f"head_dtype: got {requested!r}, want a torch.dtype, such as torch.float32, or None"
        )
    if requested != layer and (requested != torch.float32 or layer.itemsize > 2):
        raise ValueError(
            f"head_dtype: got {requested} over a layer in {layer}, want None, {layer}, or float32 "
            "over a half-precision layer"
        )
    return requested
