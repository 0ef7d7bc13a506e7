"""Fine-tune Qwen2.5-VL with transformers.Trainer and PRe on conversations about images.

DATA is JSON in LLaVA's form, see README.md. The log's `loss` is task_loss + λ · pre_loss.
Run: Qwen2.5-VL, tiny and random, on a CPU. Not run: pretrained weights, a GPU.
"""

import json
from pathlib import Path

import torch
import transformers
from PIL import Image

from pre_kernels.integrations import apply_pre, patch_trainer


def encode(entry):
    image = Image.open(options.data.parent / entry["image"]).convert("RGB")
    image = vision(images=image, return_tensors="pt")
    pads = "<|image_pad|>" * int(image["image_grid_thw"].prod() // vision.merge_size**2)
    ids = tokenizer.encode("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n")
    labels = [-100] * len(ids)
    for turn in entry["conversations"]:
        role = "assistant" if turn["from"] == "gpt" else "user"
        start = tokenizer.encode(f"<|im_start|>{role}\n")
        text = turn["value"].replace("<image>", f"<|vision_start|>{pads}<|vision_end|>")
        text = tokenizer.encode(f"{text}<|im_end|>\n")
        ids += start + text
        labels += [-100] * len(start) + (text if role == "assistant" else [-100] * len(text))
    return {**image, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def collate(entries):
    samples = [encode(entry) for entry in entries]
    batch = {k: torch.cat([s[k] for s in samples]) for k in ("pixel_values", "image_grid_thw")}
    ids = torch.nn.utils.rnn.pad_sequence([s["input_ids"] for s in samples], True, -1)
    batch |= {"input_ids": ids.clamp(min=0), "attention_mask": (ids >= 0).int()}
    batch["labels"] = torch.nn.utils.rnn.pad_sequence([s["labels"] for s in samples], True, -100)
    batch["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return batch


parser = transformers.HfArgumentParser(transformers.TrainingArguments, description=__doc__)
parser.add_argument("data", type=Path, help="JSON file of conversations")
parser.add_argument("--model", default="Qwen/Qwen2.5-VL-3B-Instruct", help="name, or saved model")
parser.add_argument("--layer", type=int, help="the layer that PRe reads (default: half the depth)")
parser.add_argument("--weight", type=float, default=0.5, help="λ (default: 0.5)")
arguments, options = parser.parse_args_into_dataclasses()
transformers.set_seed(arguments.seed)  # the same head in all processes
arguments.remove_unused_columns = False  # `collate` needs them
data = json.loads(options.data.read_text(encoding="utf-8"))
tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
vision = transformers.AutoImageProcessor.from_pretrained(options.model)
model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
model.model.visual.requires_grad_(False)
apply_pre(model, layer=options.layer, weight=options.weight, head_dtype=torch.float32)
patch_trainer()
trainer = transformers.Trainer(model, arguments, collate, data, processing_class=tokenizer)
trainer.train()
trainer.save_model()
