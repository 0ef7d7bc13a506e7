"""The cost of PRe in a training step of a vision-language model: time and peak memory with it ÷
without it.

python -m bench.training            on a GPU LLaVA-1.5-7B: batch 16 × 1,024 tokens, 576 of them
                                    visual, in bfloat16; on a CPU SmolVLM-256M: batch 6 × 96 tokens,
                                    64 of them visual, in float32
python -m bench.training --tiny     a small model, on either

Weights are random and made on the device. The vision tower is frozen; the rest is trained by fused
AdamW in the weights' dtype under non-reentrant gradient checkpointing. At 7B this takes 13 GiB of
parameters, 13 of gradients, 25 of optimizer state and some 20 of activations and logits.

For the time, steps with and without PRe take turns, and each pair of neighbours gives a ratio. The
peak consists of parameters, gradients, optimizer state and everything that a step adds. On a GPU
the allocator measures it, before PRe is attached and after. On a CPU it is the sum of what is held
before a step and the rise of a fresh process's resident memory during the step. The head's own
parameters, gradients and optimizer state are subtracted from the peak with PRe;
`memory_ratio_with_head` includes them.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pre_kernels import screen
from pre_kernels.check import memory
from pre_kernels.check.device import MIB, Cpu, Cuda, current
from pre_kernels.check.timing import interleaved, spread
from pre_kernels.integrations import PreHandle, apply_pre

from . import ROOT, kept, record, tables, where
from .shapes import DTYPES

IMAGE = 5  # token id
# GiB of the GPU: 51 of parameters, gradients and moments, some 20 of activations, and a reserve
NEEDED = 100
# seconds of the turns, and their minimum number
BUDGET = {"cpu": (150.0, 5), "cuda": (30.0, 10)}
# parts of names of parameters that belong to the image encoder
FROZEN = ("vision_tower", "vision_model")


class Size(NamedTuple):
    """A model and its batch of samples, with one image each."""

    name: str
    config: Callable[[Size], Any]
    dtype: str
    batch: int
    # all tokens of a sample, including visual ones
    tokens: int
    text: dict[str, int]
    vision: dict[str, int]
    layer: int
    scale: int = 1  # scale² patches make a visual token
    images: tuple[int, ...] = ()  # axes of pixel_values between batch and channels


def llava(size: Size) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    return LlavaConfig(
        vision_config=CLIPVisionConfig(**size.vision),
        text_config=LlamaConfig(**size.text),
        image_token_index=IMAGE,
        image_seq_length=visual(size),
    )


def smolvlm(size: Size) -> Any:
    from transformers import LlamaConfig, SmolVLMConfig

    return SmolVLMConfig(
        vision_config=dict(size.vision),
        text_config=LlamaConfig(**size.text),
        image_token_id=IMAGE,
        scale_factor=size.scale,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def transformer(width: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**sizes, "num_attention_heads": heads, **more}


def llama(*sizes: int, kv_heads: int, vocabulary: int, positions: int) -> dict[str, int]:
    more = {"vocab_size": vocabulary, "max_position_embeddings": positions}
    return transformer(*sizes, num_key_value_heads=kv_heads, **more)


LLAVA = Size(
    "llava15-7b",
    llava,
    "bf16",
    16,
    1024,
    llama(4096, 11008, 32, 32, kv_heads=32, vocabulary=32064, positions=4096),
    transformer(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768),
    16,
)
SMOLVLM = Size(
    "smolvlm-256m",
    smolvlm,
    "fp32",
    6,
    96,
    llama(576, 1536, 30, 9, kv_heads=3, vocabulary=49280, positions=8192),
    transformer(768, 3072, 12, 12, image_size=512, patch_size=16),
    15,
    scale=4,
    images=(1,),
)
TINY = Size(
    "tiny",
    llava,
    "bf16",
    2,
    24,
    llama(32, 64, 4, 2, kv_heads=2, vocabulary=64, positions=64),
    transformer(16, 32, 3, 2, image_size=8, patch_size=2, projection_dim=16),
    2,
)
DEFAULT = {"cpu": SMOLVLM, "cuda": LLAVA}


def visual(size: Size) -> int:
    """Return the number of tokens of an image."""
    return (size.vision["image_size"] // size.vision["patch_size"] // size.scale) ** 2


def build(size: Size, device: torch.device) -> nn.Module:
    from transformers import AutoModelForImageTextToText

    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(size.config(size), dtype=DTYPES[size.dtype])
    model.config.use_cache = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN))
    # transformers 5 would make all inputs require gradients, and the backward would go through the
    # frozen encoder.
    model.enable_input_require_grads = lambda: None
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch(size: Size, device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    shape = size.batch, size.tokens
    ids = torch.randint(
        IMAGE + 1, size.text["vocab_size"], shape, generator=generator, device=device
    )
    first = min(35, (size.tokens - visual(size)) // 2)
    ids[:, first : first + visual(size)] = IMAGE
    pixels = (size.batch, *size.images, 3, size.vision["image_size"], size.vision["image_size"])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(
            pixels, generator=generator, device=device, dtype=DTYPES[size.dtype]
        ),
        "labels": ids.masked_fill(ids == IMAGE, -100),
    }


class Step:
    """A training step, with PRe once `attach` was called."""

    def __init__(self, size: Size, device: Cpu | Cuda) -> None:
        torch.manual_seed(0)
        self.size = size
        torch_device = device.torch_device
        self.model = build(size, torch_device)
        self.inputs = batch(size, torch_device)
        trained = (p for p in self.model.parameters() if p.requires_grad)
        # The rate is so small that the model hardly changes, so every step costs the same.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        self.handle: PreHandle | None = None
        self.losses: list[Tensor] = []

    def attach(self) -> PreHandle:
        self.handle = apply_pre(self.model, self.size.layer, weight=0.5)
        self.optimizer.add_param_group({"params": list(self.handle.head.parameters())})
        return self.handle

    def __call__(self) -> None:
        loss = self.model(**self.inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())

    def held_mib(self) -> float:
        """Return the MiB that are held between steps: parameters, buffers, optimizer state, the
        batch."""
        moments = [
            x
            for state in self.optimizer.state.values()
            for x in state.values()
            if isinstance(x, Tensor)
        ]
        tensors = [*self.model.parameters(), *self.model.buffers(), *moments, *self.inputs.values()]
        return sum(x.nbytes for x in tensors) / MIB


def measure(device: Cpu | Cuda, size: Size) -> dict[str, Any]:
    step = Step(size, device)
    without_mib = peak(device, step)
    handle = step.attach()
    head = list(handle.head.parameters())
    with_mib = peak(device, step)
    # its parameters, gradients and two moments
    own_mib = 4 * sum(p.nbytes for p in head) / MIB
    before = [p.detach().clone() for p in head]
    start = time.monotonic()

    def switched(enabled: bool) -> None:
        handle.enabled = enabled
        step()
        which = "with" if enabled else "without"
        tell(f"{time.monotonic() - start:4.0f} s: step {len(step.losses)} done, {which} PRe")

    steps = {"with": lambda: switched(True), "without": lambda: switched(False)}
    seconds, least = BUDGET[device.kind]
    samples = interleaved(device, steps, seconds, least=least)
    pre_loss = handle.metrics()["pre_loss"]
    about = {
        "kind": "training",
        "item": size.name,
        "dtype": size.dtype,
        "batch": size.batch,
        "tokens": size.tokens,
    }
    about |= {"n": size.batch * visual(size), "layer": size.layer}
    if all(torch.equal(p, old) for p, old in zip(head, before, strict=True)):
        return about | {"failed": "the predictor was not trained"}
    if not all(map(math.isfinite, (pre_loss, *torch.stack(step.losses).tolist()))):
        return about | {"failed": "a loss is not finite"}
    times = {name: spread(taken) for name, taken in samples.items()}
    metrics = {
        "pre_loss": pre_loss,
        "with_ms": times["with"]["median_ms"],
        "without_ms": times["without"]["median_ms"],
    }
    metrics |= {
        "q1_ms": times["with"]["q1_ms"],
        "q3_ms": times["with"]["q3_ms"],
        "samples": times["with"]["samples"],
    }
    metrics |= pairs(samples["with"], samples["without"])
    if with_mib and without_mib:
        metrics |= {"with_mib": with_mib, "without_mib": without_mib, "head_mib": own_mib}
        metrics["memory_ratio"] = (with_mib - own_mib) / without_mib
        metrics["memory_ratio_with_head"] = with_mib / without_mib
    return about | metrics


def tell(line: str) -> None:
    """Print the progress, since a step takes seconds."""
    print(line, file=sys.stderr, flush=True)


def pairs(with_ms: Sequence[float], without_ms: Sequence[float]) -> dict[str, float]:
    """Return median and quartiles of the ratios of neighbours. A slow phase of the machine slows
    both of a pair."""
    ratios = [mine / other for mine, other in zip(with_ms, without_ms, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"time_ratio": middle, "time_ratio_q1": low, "time_ratio_q3": high}


def peak(device: Cpu | Cuda, step: Step) -> float | None:
    """Return the total MiB at the peak of the second of two steps. None if the system does not
    say."""
    if device.kind == "cpu":
        if memory.missing():
            return None
        which = "with" if step.handle else "without"
        tiny = ["--tiny"] if step.size is TINY else []
        tell(f"two steps {which} PRe in a process of their own, for the peak")
        mib = memory.fresh("bench.training", "--peak", which, *tiny, folder=ROOT)
        return mib["held_mib"] + mib["rise_mib"]
    step()
    device.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    device.synchronize()
    return torch.cuda.max_memory_allocated() / MIB


def resident(size: Size, attached: bool) -> dict[str, float]:
    """Return the MiB that are held before the second of two steps, and the rise of the resident
    memory of this process during it."""
    step = Step(size, Cpu())
    if attached:
        step.attach()
    rise_mib, _ = memory.second(step)
    return {"held_mib": step.held_mib(), "rise_mib": rise_mib}


def lacks(device: Cpu | Cuda, size: Size) -> str | None:
    """Return why the measurement is not tried. None if it is."""
    if device.kind == "cpu" or size is TINY:
        return None
    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return f"needs a GPU of {NEEDED} GiB, this one has {gib:.0f}" if gib < NEEDED else None


def records(device: Cpu | Cuda, size: Size) -> Iterator[dict[str, Any]]:
    """Yield the record of the size, or why there is none."""
    if reason := lacks(device, size):
        yield {"kind": "training", "item": size.name, "unavailable": reason}
    else:
        yield measure(device, size)


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="use a small model")
    where.add_options(add)
    add(
        "--peak",
        choices=("with", "without"),
        help="print only the peak memory of a step on a CPU, as JSON",
    )
    arguments = parser.parse_args(argv)
    device = current()
    size = TINY if arguments.tiny else DEFAULT[device.kind]
    if arguments.peak:
        print(json.dumps(resident(size, arguments.peak == "with")))
        return 0
    run = kept.start(arguments, device, parser.error)
    run.every(line | record.stamp(device) for line in records(device, size))
    for line in run.records:
        print(tables.markdown([("", ""), *((name, str(value)) for name, value in line.items())]))
    print(*run.told(), sep="\n")
    return run.status or int(any("failed" in line for line in run.records))


if __name__ == "__main__":
    raise SystemExit(screen.run(main))
