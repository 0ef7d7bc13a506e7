"""A training step of a LLaVA-1.5-7B with PRe ÷ the same step without: time and peak memory.

python -m bench.training            the real shapes: batch 16 × 1,024 tokens, 576 of them visual
python -m bench.training --tiny     a small model of the same kind, also on a CPU

Weights are random, in bfloat16, made on the device; the vision tower is frozen, the rest is trained by fused AdamW in
bfloat16 under non-reentrant gradient checkpointing. At 7B: 13 GiB of parameters, 13 of gradients, 25 of optimizer state
and some 20 of activations and logits. The peak without PRe is read before it is attached; for the time the steps take
turns, PRe switched on and off. The head's own parameters, gradients and optimizer state are taken off the peak with it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pre_kernels.integrations import apply_pre
from torch import Tensor, nn

from pre_kernels.check.device import MIB, Cpu, Cuda, current
from pre_kernels.check.timing import interleaved, spread

from . import record, report

IMAGE = 5  # token id
NEEDED = 100  # GiB of the GPU: 51 of parameters, gradients and moments, some 20 of activations, room for the unforeseen


class Size(NamedTuple):
    name: str
    batch: int
    tokens: int
    text: dict[str, int]
    vision: dict[str, int]
    layer: int


LLAVA = Size(
    "llava15-7b",
    16,
    1024,
    {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096},
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 336, "patch_size": 14, "projection_dim": 768},
    16,
)
TINY = Size(
    "tiny",
    2,
    24,
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64},
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    | {"image_size": 8, "patch_size": 2, "projection_dim": 16},
    2,
)


def build(size: Size, device: torch.device) -> nn.Module:
    from transformers import (
        AutoModelForImageTextToText,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
    )

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=LlamaConfig(**size.text),
        image_token_index=IMAGE,
        image_seq_length=visual(size),
    )
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def visual(size: Size) -> int:
    """Tokens of an image."""
    return (size.vision["image_size"] // size.vision["patch_size"]) ** 2


def batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = size.batch, size.tokens
    ids = torch.randint(IMAGE + 1, size.text["vocab_size"], shape, generator=generator, device=device)
    first = min(35, (size.tokens - visual(size)) // 2)
    ids[:, first : first + visual(size)] = IMAGE
    pixels = (size.batch, 3, size.vision["image_size"], size.vision["image_size"])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(pixels, generator=generator, device=device, dtype=torch.bfloat16),
        "labels": ids.masked_fill(ids == IMAGE, -100),
    }


def measure(device: Cpu | Cuda, size: Size) -> dict[str, Any]:
    place = device.torch_device
    torch.manual_seed(0)
    model, inputs = build(size, place), batch(size, place)
    fused = device.kind == "cuda"
    # so small a rate that the model stays where it was: every step then costs the same
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6, fused=fused)
    losses: list[Tensor] = []

    def step() -> None:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    without_mib = peak(device, step)
    handle = apply_pre(model, size.layer, weight=0.5)
    head = list(handle.head.parameters())
    optimizer.add_param_group({"params": head})
    with_mib = peak(device, step)
    own_mib = 4 * sum(p.nbytes for p in head) / MIB  # parameters, gradients and both moments
    before = [p.detach().clone() for p in head]

    def switched(enabled: bool) -> None:
        handle.enabled = enabled
        step()

    steps = {"with": lambda: switched(True), "without": lambda: switched(False)}
    times = {name: spread(samples) for name, samples in interleaved(device, steps, 30.0, least=10).items()}
    pre_loss = handle.metrics()["pre_loss"]
    about = {"kind": "training", "item": size.name, "dtype": "bf16", "batch": size.batch, "tokens": size.tokens}
    about |= {"n": size.batch * visual(size), "layer": size.layer}
    if all(torch.equal(p, old) for p, old in zip(head, before, strict=True)):
        return about | {"failed": "the predictor was not trained"}
    if not all(map(math.isfinite, (pre_loss, *torch.stack(losses).tolist()))):
        return about | {"failed": "a loss is not finite"}
    figures = {"pre_loss": pre_loss, "with_ms": times["with"]["median_ms"], "without_ms": times["without"]["median_ms"]}
    figures |= {"q1_ms": times["with"]["q1_ms"], "q3_ms": times["with"]["q3_ms"], "samples": times["with"]["samples"]}
    figures["time_ratio"] = figures["with_ms"] / figures["without_ms"]
    if with_mib and without_mib:
        figures |= {"with_mib": with_mib, "without_mib": without_mib, "head_mib": own_mib}
        figures["memory_ratio"] = (with_mib - own_mib) / without_mib
    return about | figures


def peak(device: Cpu | Cuda, step: Any) -> float | None:
    """MiB allocated in all at the peak of the second of two steps; None where the allocator does not say."""
    step()
    device.synchronize()
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step()
    device.synchronize()
    return torch.cuda.max_memory_allocated() / MIB if device.kind == "cuda" else None


def lacks(device: Cpu | Cuda, size: Size) -> str | None:
    """Why it is not tried; None if it is."""
    if device.kind == "cpu" or size is TINY:
        return None
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"needs a GPU of {NEEDED} GiB, this one has {gib:.0f}" if gib < NEEDED else None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model")
    parser.add_argument("--out", help="folder of the result file; else GPU_OUT, else bench/results")
    arguments = parser.parse_args(argv)
    device = current()
    size = TINY if arguments.tiny else LLAVA
    reason = lacks(device, size)
    line = {"kind": "training", "item": size.name, "unavailable": reason} if reason else measure(device, size)
    record.append(record.file(record.folder(arguments.out), device), line | record.stamp(device))
    print(report.markdown([("", ""), *((name, str(value)) for name, value in line.items())]))
    return "failed" in line


if __name__ == "__main__":
    raise SystemExit(main())
