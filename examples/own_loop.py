"""Train a LLaVA-like model on a folder of captioned images in a plain PyTorch loop, with PRe.

Each image, as cat.jpg, has its caption in cat.txt beside it. OUT gets the trained model without a
trace of PRe, and the head in pre_head.safetensors. In the log, `loss` is task_loss + λ · pre_loss.
Run: LLaVA and LLaVA-NeXT, tiny and random, on a CPU. Not run: pretrained weights, a GPU.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pre_kernels.integrations import apply_pre

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("data", type=Path, help="folder with images and captions")
parser.add_argument("out", type=Path, help="folder for the trained model")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="name, or saved model")
parser.add_argument("--layer", type=int, help="the layer that PRe reads (default: half the depth)")
parser.add_argument("--weight", type=float, default=0.5, help="λ (default: 0.5)")
parser.add_argument("--lr", type=float, default=2e-5, help="learning rate (default: 2e-5)")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
processor = AutoProcessor.from_pretrained(args.model)
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=dtype).to(device).train()
model.model.vision_tower.requires_grad_(False)
chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it."}]}]
prompt = processor.apply_chat_template(chat, add_generation_prompt=True)


def collate(files):
    images = [Image.open(file).convert("RGB") for file in files]
    captions = [file.with_suffix(".txt").read_text(encoding="utf-8").strip() for file in files]
    texts = [f"{prompt} {caption}{processor.tokenizer.eos_token}" for caption in captions]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    short = processor(text=[prompt] * len(files), images=images, padding=True, return_tensors="pt")
    mask, asked = batch["attention_mask"], short["attention_mask"]
    is_answer = mask * mask.cumsum(-1) > asked.sum(-1, keepdim=True)  # the prompt has no loss
    return {**batch.to(dtype), "labels": batch["input_ids"].where(is_answer, -100)}


files = [file for file in sorted(args.data.iterdir()) if file.suffix != ".txt"]
handle = apply_pre(model, layer=args.layer, weight=args.weight, head_dtype=torch.float32)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
for step, batch in enumerate(torch.utils.data.DataLoader(files, 4, True, collate_fn=collate)):
    loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses = {"loss": loss.item()} | {k: v for k, v in handle.metrics().items() if "_loss" in k}
    print(f"step {step}:", *(f"{name} {value:.4f}" for name, value in losses.items()))
handle.save(args.out)
handle.remove()
model.save_pretrained(args.out)
processor.save_pretrained(args.out)
