"""TRL's SFTTrainer on a tiny LLaVA: a real processor with a vocabulary of 64 words, real images and
real conversations."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from pre_kernels.integrations import apply_pre, patch_trainer

from .models import IMAGE, build
from .training import QUIET, Recorder

TEMPLATE = """{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}
{%- for part in message.content %}{{ part.text }} {% endfor %}{% endgeneration %}
{%- else %}{% for part in message.content %}
{{- '<image>' if part.type == 'image' else part.text }} {% endfor %}
{%- endif %}{% endfor %}"""


def processor() -> LlavaProcessor:
    words = {"<image>" if i == IMAGE else f"w{i}" if i > 3 else f"<{i}>": i for i in range(64)}
    model = Tokenizer(WordLevel(words, unk_token="<3>"))
    model.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<0>", "bos_token": "<1>", "eos_token": "<2>", "unk_token": "<3>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        additional_special_tokens=["<image>"],
        # Without token_type_ids, which transformers 4 adds and its generate() rejects.
        model_input_names=["input_ids", "attention_mask"],
        **special,
    )
    images = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def conversations(counts: list[int]) -> Dataset:
    """One conversation for each number of images, with answers of different lengths."""
    generator = np.random.default_rng(0)
    rows = []
    for index, count in enumerate(counts):
        pixels = generator.integers(0, 255, (count, 8, 8, 3), dtype=np.uint8)
        question = " ".join(f"w{4 + i}" for i in range(3))
        answer = " ".join(f"w{10 + index + i}" for i in range(2 + 3 * index))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"images": [Image.fromarray(image) for image in pixels], "messages": messages})
    return Dataset.from_list(rows)


class InOrder(SFTTrainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(
    counts: list[int],
    folder: Path,
    accumulation: int,
    patched: bool = True,
    attached: bool = True,
    **more: Any,
) -> Any:
    """(gradients of the first step, the handle or None, the trainer)."""
    extra = {name: more.pop(name) for name in ("compute_loss_func", "peft_config") if name in more}
    model = build("llava")
    if "peft_config" in extra:
        from peft import get_peft_model

        model = get_peft_model(model, extra.pop("peft_config"))
    handle = apply_pre(model) if attached else None
    recorder = Recorder()
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(counts) // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 0.0,  # the head keeps its values
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_length": None,
        **QUIET,
    }
    with patch_trainer() if patched else contextlib.nullcontext():
        trainer = InOrder(
            model=model,
            args=SFTConfig(**(options | more)),
            train_dataset=conversations(counts),
            processing_class=processor(),
            callbacks=[recorder],
            **extra,
        )
        trainer.train()
    return recorder.steps[0], handle, trainer


def batches(trainer: Any, counts: list[int]) -> list[dict[str, torch.Tensor]]:
    """What the trainer's collator makes of each conversation alone."""
    return [trainer.data_collator([row]) for row in conversations(counts)]
