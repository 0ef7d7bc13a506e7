"""Mistakes with a `transformers.Trainer`, its callbacks, its checkpoints and PEFT.

Given are a tiny LLaVA, `model`, its arguments, `batch`, and `trainer(model, ...)`, which makes a
Trainer of one step that writes into the folder out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pre_kernels.diagnostics import LayerCallback
from pre_kernels.integrations import apply_pre, find_handle, patch_trainer
from pre_kernels.integrations.pre_callback import PreCallback
from tests.integrations.support.tiny import models, training

from .mistakes import Mistake


def trainer(model: Any, **options: Any) -> Any:
    return training.make(Path("out"), model, **options)


def peft() -> Any:
    import peft

    return peft


GIVEN = {
    "torch": lambda: torch,
    "peft": peft,
    "apply_pre": lambda: apply_pre,
    "find_handle": lambda: find_handle,
    "patch_trainer": lambda: patch_trainer,
    "PreCallback": lambda: PreCallback,
    "LayerCallback": lambda: LayerCallback,
    "InOrder": lambda: training.InOrder,
    "LlavaForConditionalGeneration": lambda: type(models.build("llava")),
    "model": lambda: models.build("llava"),
    "batch": lambda: models.batch("llava").inputs,
    "trainer": lambda: trainer,
}
SGD = "optimizer = torch.optim.SGD(model.parameters(), 0.1)\n"
PATCHED = "with patch_trainer(): trainer(model, optimizers=(optimizer, None)).train()"
ADAPTER = 'peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))'
MISTAKES = [
    Mistake(
        "the name of a model",
        'apply_pre("llava-hf/llava-1.5-7b-hf")',
        "model: got 'llava-hf/llava-1.5-7b-hf', want a loaded model; write "
        "apply_pre(AutoModelForImageTextToText.from_pretrained('llava-hf/llava-1.5-7b-hf'))",
        "AutoModelForImageTextToText = model; apply_pre(AutoModelForImageTextToText)",
    ),
    Mistake(
        "the class of a model",
        "apply_pre(LlavaForConditionalGeneration)",
        "model: got the class LlavaForConditionalGeneration, want a loaded model; write "
        "apply_pre(LlavaForConditionalGeneration.from_pretrained(...))",
        "apply_pre(model)",
    ),
    Mistake(
        "a Trainer instead of its model",
        "apply_pre(trainer(model))",
        "model: got a InOrder, want a loaded model; write apply_pre(x.model), where x is that "
        "InOrder",
        "x = trainer(model); apply_pre(x.model)",
    ),
    Mistake(
        "PRe attached twice",
        "apply_pre(model); apply_pre(model)",
        "model: LlavaForConditionalGeneration has PRe attached already; call remove() on its "
        "handle first: find_handle(model).remove()",
        "apply_pre(model); find_handle(model).remove(); apply_pre(model)",
    ),
    Mistake(
        "a model instead of the class of its Trainer",
        "patch_trainer(model)",
        "trainer_class: got a LlavaForConditionalGeneration, want transformers.Trainer or a "
        "subclass; write apply_pre(model) and then patch_trainer(), which patches all Trainers",
        "apply_pre(model); patch_trainer().remove()",
    ),
    Mistake(
        "a Trainer instead of its class",
        "patch_trainer(trainer(model))",
        "trainer_class: got a InOrder, want transformers.Trainer or a subclass; write "
        "patch_trainer(InOrder)",
        "patch_trainer(InOrder).remove()",
    ),
    Mistake(
        "a patched Trainer without apply_pre",
        "with patch_trainer(): trainer(model).train()",
        "PRe: this training has no PRe: patch_trainer() is in use, but the model of InOrder, a "
        "LlavaForConditionalGeneration, has no handle; call apply_pre(trainer.model) before "
        "train(), or inside model_init if there is one",
        "with patch_trainer():\n    its = trainer(model); apply_pre(its.model); its.train()",
    ),
    Mistake(
        "an optimizer of one's own that was made before apply_pre",
        SGD + "apply_pre(model)\n" + PATCHED,
        "PRe: the optimizer given to the Trainer lacks parameters of the head, so they are not "
        "trained; make it after apply_pre, with handle.param_groups()",
        "apply_pre(model)\n" + SGD + PATCHED,
    ),
    Mistake(
        "a checkpoint of a training without PRe",
        'model.save_pretrained("plain"); apply_pre(model).load("plain")',
        "directory: 'plain/pre_head.json' is missing; want both pre_head.json and "
        "pre_head.safetensors",
        'its = apply_pre(model); its.save("with"); its.load("with")',
    ),
    Mistake(
        "PEFT after apply_pre",
        f"apply_pre(model); {ADAPTER}(**batch)",
        "model: it was wrapped in PEFT after apply_pre, which froze `pre_head`, so the head would "
        'never train; call apply_pre on the PeftModel instead, or put "pre_head" in '
        "modules_to_save",
        f"PeftModel = {ADAPTER}; apply_pre(PeftModel); PeftModel(**batch)",
    ),
    Mistake(
        "optimizer groups by a callback",
        "PreCallback(layer=2, head_lr=1e-3)",
        "head_lr: got 0.001, but a callback makes no optimizer groups; use apply_pre and "
        "patch_trainer()",
        "apply_pre(model, layer=2, head_lr=1e-3); patch_trainer().remove()",
    ),
    Mistake(
        "a mistyped setting of a callback",
        "PreCallback(wieght=1, lyer=2)",
        "lyer: got 2, want a setting of apply_pre; did you mean layer?",
        "PreCallback(layer=2)",
    ),
    Mistake(
        "measurements of a model instead of a Trainer",
        "LayerCallback(model, [], every=10)",
        "trainer: got LlavaForConditionalGeneration, want a transformers.Trainer: "
        "LayerCallback(trainer, samples, every)",
        "trainer(model)",
    ),
    Mistake(
        "measurements without images",
        "LayerCallback(trainer(model), [], every=10)",
        "samples: got none, want at least one Sample; load_samples(model, processor, folder) "
        "makes them",
        "from pre_kernels.diagnostics import load_samples",
    ),
    Mistake(
        "measurements at no step",
        "LayerCallback(trainer(model), [], every=0)",
        "every: got 0, want a positive number of steps",
        "trainer(model)",
    ),
]
