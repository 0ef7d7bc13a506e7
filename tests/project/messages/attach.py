"""Mistakes when PRe is attached, and in a loop of one's own.

Given are a tiny LLaVA of 4 decoder layers, `model`, its arguments for two samples with labels,
`batch`, the mask of their 12 visual tokens, `visual`; a `text_model` without images,
a `fuyu`, a model of a family that the library does not know, and a `policy` like SmolVLA with its
batch, `frames`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from pre_kernels.integrations import EncoderAnchor, apply_pre
from tests.integrations.support.tiny import interleaved, models
from tests.integrations.support.tiny.fuyu import fuyu

from .mistakes import Mistake


def text_model() -> Any:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.LlamaConfig(num_hidden_layers=2, vocab_size=32, **sizes)
    return transformers.LlamaForCausalLM(config)


GIVEN = {
    "torch": lambda: torch,
    "nn": lambda: nn,
    "apply_pre": lambda: apply_pre,
    "EncoderAnchor": lambda: EncoderAnchor,
    "model": lambda: models.build("llava"),
    "text_model": text_model,
    "batch": lambda: models.batch("llava").inputs,
    "visual": lambda: models.batch("llava").visual,
    "fuyu": fuyu,
    "policy": lambda: interleaved.policy()[0],
    "frames": lambda: interleaved.policy()[1],
    "prefix": lambda: interleaved.prefix,
    "norms": lambda: interleaved.norms,
    "TEXT": lambda: interleaved.TEXT,
    "IMAGE": lambda: models.IMAGE,
}
PROJECTOR_ONLY = (
    "model.requires_grad_(False); model.model.multi_modal_projector.requires_grad_(True)\n"
)
SGD = "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
THREE_STEPS = """
for _ in range(3):
    model(**batch).loss.backward()
    optimizer.step()
"""
IMAGES_UNSEEN = "ids = torch.tensor([[1, IMAGE, IMAGE, 5]]); fuyu(input_ids=ids, labels=ids)"
LOSSES_OF_LOGITS = "for _ in range(3): model(**batch).logits.sum().backward()"
MISTAKES = [
    Mistake(
        "layers counted from 0",
        "apply_pre(model, layer=0)",
        "layer: got 0, want 1..4 (the model has 4 decoder layers)",
        "apply_pre(model, layer=1)",
    ),
    Mistake(
        "a layer beyond the last",
        "apply_pre(model, layer=16)",
        "layer: got 16, want 1..4 (the model has 4 decoder layers)",
        "apply_pre(model, layer=4)",
    ),
    Mistake(
        "numbers of layers as layers=",
        "apply_pre(model, layers=[1, 2])",
        "layers: got list, want a module of the model or its path; numbers of layers go into "
        "layer=",
        "apply_pre(model, layer=[1, 2])",
    ),
    Mistake(
        "a weight below 0",
        "apply_pre(model, weight=-0.5)",
        "weight: got -0.5, want a finite number ≥ 0",
        "apply_pre(model, weight=0.5)",
    ),
    Mistake(
        "a weight as text, as from a config",
        'apply_pre(model, weight="0.5")',
        "weight: got '0.5' (str), want a number",
        "apply_pre(model, weight=0.5)",
    ),
    Mistake(
        "an anchor by another name",
        'apply_pre(model, anchor="projector")',
        "anchor: got 'projector', want one of 'pre_llm', 'pre_projector'",
        'apply_pre(model, anchor="pre_projector")',
    ),
    Mistake(
        "the model's own tower as a frozen encoder",
        "EncoderAnchor(model.model.vision_tower, model, image_mean=None, image_std=None)",
        "encoder: got a module of the model, which would be frozen; want a separate module, or "
        "ema=0.999 for a moving average of it",
        "tower = model.model.vision_tower\n"
        "EncoderAnchor(tower, model, image_mean=None, image_std=None, ema=0.999)",
    ),
    Mistake(
        "four layers in the head of a model",
        "apply_pre(model, depth=4)",
        "depth: got 4, want 1, 2 or 3 layers",
        "apply_pre(model, depth=3)",
    ),
    Mistake(
        "the norm of a head by the name of its module",
        'apply_pre(model, norm="LayerNorm")',
        "norm: got 'LayerNorm', want one of 'layer', 'rms'",
        'apply_pre(model, norm="layer")',
    ),
    Mistake(
        "dropout in the head",
        "apply_pre(model, dropout=0.1)",
        "dropout: got 0.1, want 0: the fused loss keeps no activations, and so no mask of dropped "
        "ones for the backward",
        "apply_pre(model, dropout=0)",
    ),
    Mistake(
        "targets over an image that are averaged over it",
        'apply_pre(model, anchor_norm="spatial", level="image")',
        "anchor_norm: got 'spatial' with level='image', which makes every target 0, want 'none' or "
        "'center'",
        'apply_pre(model, anchor_norm="center", level="image")',
    ),
    Mistake(
        "a layer beside pairs of layers and anchors",
        'apply_pre(model, layer=1, targets=[(2, "pre_projector")])',
        "targets: got layer, anchor or anchor_dim too, want layers and anchors in its pairs",
        'apply_pre(model, targets=[(2, "pre_projector")])',
    ),
    Mistake(
        "layers instead of pairs",
        "apply_pre(model, targets=[1, 2])",
        "targets: got 1, want pairs (layer, anchor), such as "
        '[(8, "pre_llm"), (16, "pre_projector")]',
        'apply_pre(model, targets=[(1, "pre_llm"), (2, "pre_projector")])',
    ),
    Mistake(
        "a width for an anchor that has its own",
        "apply_pre(model, anchor_dim=64)",
        "anchor_dim: got 64 with anchor='pre_llm', which has its own width; want None",
        "apply_pre(model, anchor_dim=None)",
    ),
    Mistake(
        "a mask instead of a function that makes it",
        "apply_pre(model, mask_fn=visual)",
        "mask_fn: got Tensor, want a callable that returns the mask, such as "
        'lambda inputs: inputs["input_ids"] == image_token_id',
        "image_token_id = IMAGE\n"
        'apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"] == image_token_id)',
    ),
    Mistake(
        "steps of warm-up instead of their share",
        "apply_pre(model, warmup=100)",
        "warmup: got 100, want a share of the training, 0..1 (steps of warm-up / steps)",
        "steps = 1000; apply_pre(model, warmup=100 / steps)",
    ),
    Mistake(
        "the head's dtype by its name",
        'apply_pre(model, head_dtype="float32")',
        "head_dtype: got 'float32', want a torch.dtype, such as torch.float32, or None",
        "apply_pre(model, head_dtype=torch.float32)",
    ),
    Mistake(
        "a path that is not in the model",
        'apply_pre(model, text_model="model.text_model")',
        "text_model: got 'model.text_model', which is not a module of the model: LlavaModel has no "
        "attribute `text_model`; the model has model.vision_tower, model.multi_modal_projector, "
        "model.language_model, and those inside",
        'apply_pre(model, text_model="model.language_model")',
    ),
    Mistake(
        "a language model without images",
        "apply_pre(text_model)",
        "model: LlamaForCausalLM's config names no visual tokens (looked for image_token_id, …); "
        "want a vision-language model. If its code keeps the image token's id elsewhere, … set "
        "image_token_id to that id in config.json or in model.config; or pass mask_fn=",
        "text_model.config.image_token_id = 31; apply_pre(text_model)",
    ),
    Mistake(
        "a module that is not of Hugging Face",
        "apply_pre(nn.Linear(2, 2))",
        "model: Linear has no .config; want a Hugging Face vision-language model, or pass layers= "
        "(the ModuleList of the decoder's layers, or its path) and mask_fn=",
        "apply_pre(model)",
    ),
    Mistake(
        "nn.DataParallel",
        "apply_pre(nn.DataParallel(model))",
        "model: got nn.DataParallel, whose replicas share hooks; want the module inside, "
        "apply_pre(model.module), under DDP or FSDP",
        "apply_pre(nn.DataParallel(model).module)",
    ),
    Mistake(
        "a mask_fn that returns floats",
        'apply_pre(model, mask_fn=lambda inputs: (inputs["input_ids"] == IMAGE).float())\n'
        "model(**batch)",
        "mask_fn: returned torch.float32, want a bool or integer tensor (batch, tokens)",
        'apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"] == IMAGE); model(**batch)',
    ),
    Mistake(
        "a mask_fn that returns a mask of other tokens",
        'apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"][:, 1:] == IMAGE)\n'
        "model(**batch)",
        "rows: the visual mask has shape (2, 19), the hidden states (2, 20, 32); pass a mask_fn "
        "that returns a mask of the hidden states' leading shape",
        'apply_pre(model, mask_fn=lambda inputs: inputs["input_ids"] == IMAGE); model(**batch)',
    ),
    Mistake(
        "an anchor with too few rows",
        "apply_pre(model, anchor=lambda inputs, rows: torch.randn(3, 32)); model(**batch)",
        "anchor: got shape (3, 32) for 12 visual tokens in a batch of (2, 20); want (N, z) or "
        "(batch, tokens, z), such as (12, z)",
        "apply_pre(model, anchor=lambda inputs, rows: torch.randn(12, 32)); model(**batch)",
    ),
    Mistake(
        "an anchor of another width",
        "apply_pre(model, anchor=lambda inputs, rows: torch.randn(12, 16)); model(**batch)",
        "anchor: got shape (12, 16), want width 32 (anchor_dim); pass anchor_dim=16 to apply_pre",
        "apply_pre(model, anchor=lambda inputs, rows: torch.randn(12, 16), anchor_dim=16)\n"
        "model(**batch)",
    ),
    Mistake(
        "images that come in an argument of another name",
        "apply_pre(fuyu)\n" + IMAGES_UNSEEN,
        "PRe: input_ids has 2 image tokens, but the forward got none of pixel_values, … (it got "
        "…), so they are taken for text and L_PRe has no term; if images came in another argument, "
        "pass mask_fn= to apply_pre",
        'apply_pre(fuyu, mask_fn=lambda inputs: inputs["input_ids"] == IMAGE)\n' + IMAGES_UNSEEN,
    ),
    Mistake(
        "an optimizer that was made before apply_pre",
        SGD + "apply_pre(model)" + THREE_STEPS,
        "PRe: the optimizer (SGD) steps the model but not `pre_head`, so the head never trains; "
        "make it after apply_pre from all parameters that require grad, or add "
        "handle.param_groups()",
        "apply_pre(model)\n" + SGD + THREE_STEPS,
    ),
    Mistake(
        "an optimizer of the head's groups only",
        "handle = apply_pre(model)\n"
        "optimizer = torch.optim.SGD(handle.param_groups(), 0.1)" + THREE_STEPS,
        "PRe: the optimizer (SGD) steps only `pre_head`, while other parameters of the model "
        "require grad; handle.param_groups() has only the head's groups, so add the model's too",
        "parameters = [*model.parameters()]; handle = apply_pre(model)\n"
        'groups = [*handle.param_groups(), {"params": parameters}]\n'
        "optimizer = torch.optim.SGD(groups, 0.1)" + THREE_STEPS,
    ),
    Mistake(
        "a head that was frozen with the model",
        "apply_pre(model)\n" + PROJECTOR_ONLY + "model(**batch)",
        "PRe: no parameter of `pre_head` requires grad, so the head keeps its weights; if that is "
        "not intended, call handle.head.requires_grad_(True), or call apply_pre after freezing the "
        "model; if it is, use apply_pre(head_trainable=False)",
        PROJECTOR_ONLY + "apply_pre(model); model(**batch)",
    ),
    Mistake(
        "nothing below the layer is trained",
        "model.requires_grad_(False); model.lm_head.requires_grad_(True)\n"
        "apply_pre(model); model(**batch)",
        "PRe: no hidden state that enters L_PRe at layer 2 requires grad, so the model does not "
        "learn from it, at most the head does: nothing at or below that layer is trained; train "
        "the projector or layers below, or choose a later layer",
        PROJECTOR_ONLY + "apply_pre(model); model(**batch)",
    ),
    Mistake(
        "nothing at all is trained",
        "model.requires_grad_(False); model.lm_head.requires_grad_(True)\n"
        "apply_pre(model, head_trainable=False); model(**batch)",
        "PRe: no hidden state that enters L_PRe at layer 2 requires grad, so the model does not "
        "learn from it, at most the head does: nothing at or below that layer is trained; train "
        "the projector or layers below, or choose a later layer",
        PROJECTOR_ONLY + "apply_pre(model, head_trainable=False); model(**batch)",
    ),
    Mistake(
        "a learning rate for a frozen head",
        "apply_pre(model, head_trainable=False, head_lr=1e-3)",
        "head_lr: got 0.001 with head_trainable=False, want None",
        "apply_pre(model, head_trainable=False)",
    ),
    Mistake(
        "layers that the model computes by hand",
        'apply_pre(policy, text_model=TEXT, mask_fn=prefix, labels="batch"); policy(frames)',
        "layers: got decoder layers (LlamaDecoderLayer) that this forward did not call, want "
        "modules that it calls with the hidden states; a model that computes its layers from their "
        "parts, such as SmolVLA and pi0, calls at least their norms: "
        "apply_pre(layers=[*(layer.input_layernorm for layer in text.layers), text.norm])",
        "text = policy.get_submodule(TEXT)\n"
        "layers = [*(layer.input_layernorm for layer in text.layers), text.norm]\n"
        'apply_pre(policy, layers=layers, mask_fn=prefix, labels="batch"); policy(frames)',
    ),
    Mistake(
        "a loop that calls model.forward",
        "apply_pre(policy, layers=norms(policy), mask_fn=prefix, labels='batch')\n"
        "optimizer = torch.optim.SGD(policy.parameters(), 0.1)\n"
        "for _ in range(3): policy.forward(frames)[0].backward(); optimizer.step()",
        "PRe: the optimizer trains Policy, to which PRe is attached, but the last steps had no "
        "call of it, so L_PRe has no term; call it as model(...), because model.forward(...) runs "
        "no hook, or attach to the module that is called",
        "apply_pre(policy, layers=norms(policy), mask_fn=prefix, labels='batch')\n"
        "optimizer = torch.optim.SGD(policy.parameters(), 0.1)\n"
        "for _ in range(3): policy(frames)[0].backward(); optimizer.step()",
    ),
    Mistake(
        "a training in eval mode",
        "apply_pre(model.eval())\n" + SGD + THREE_STEPS,
        "PRe: the last 2 backward passes were of forwards in eval mode, which have no L_PRe, so "
        "the head does not train; call model.train() before training",
        "apply_pre(model.train())\n" + SGD + THREE_STEPS,
    ),
    Mistake(
        "a loss from the logits, without output.loss",
        "apply_pre(model)\n" + LOSSES_OF_LOGITS,
        "PRe: the last 2 L_PRe were computed but never back-propagated, so the head does not "
        "train: the loss that is back-propagated is not output.loss; use patch_trainer(), or add "
        "output.loss",
        "apply_pre(model)\nfor _ in range(3):\n"
        "    output = model(**batch); (output.logits.sum() + output.loss).backward()",
    ),
    Mistake(
        "forwards without labels",
        'apply_pre(model); del batch["labels"]\n' + LOSSES_OF_LOGITS,
        "PRe: the last 2 backward passes were of training forwards without `labels`, which have no "
        "L_PRe, so the head does not train; under a transformers.Trainer use patch_trainer(); in a "
        "loop of your own give the model its labels, name their argument with "
        "apply_pre(labels=...), or pass labels=None and add handle.loss() to the loss",
        'handle = apply_pre(model, labels=None); del batch["labels"]\n'
        "for _ in range(3):\n"
        "    output = model(**batch); (output.logits.sum() + handle.loss()).backward()",
    ),
    Mistake(
        "handle.loss() while the loss is in output.loss",
        "handle = apply_pre(model); model(**batch); handle.loss()",
        "labels: is 'labels', so L_PRe is added to output.loss where the forward gets that "
        "argument; handle.loss() needs apply_pre(..., labels=None)",
        "handle = apply_pre(model, labels=None); model(**batch); handle.loss()",
    ),
    Mistake(
        "a schedule in a loop of one's own",
        'apply_pre(model, schedule="cosine")\n' + SGD + THREE_STEPS,
        "PRe: λ has a schedule, but handle.progress was never set, so λ stays 0.5; set "
        "handle.progress = (step + 0.5) / steps before each step, or use patch_trainer()",
        'handle = apply_pre(model, schedule="cosine")\n' + SGD + "for step in range(3):\n"
        "    steps = 3; handle.progress = (step + 0.5) / steps\n"
        "    model(**batch).loss.backward(); optimizer.step()",
    ),
    Mistake(
        "the progress in steps",
        "step = 16; handle = apply_pre(model); handle.progress = step",
        "progress: got 16, want 0..1, such as (step + 0.5) / steps",
        "step = 16; steps = 100; handle = apply_pre(model); handle.progress = (step + 0.5) / steps",
    ),
    Mistake(
        "the head after remove()",
        'handle = apply_pre(model); handle.remove(); handle.save("saved")',
        "handle: it was removed, and its head with it; use the head before remove()",
        'handle = apply_pre(model); handle.save("saved"); handle.remove()',
    ),
]
