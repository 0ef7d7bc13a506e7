"""The costs of scale_costs.py and scale_messages.py as tables: those of docs/scale.md, and those of
one training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from .scale_costs import (
    H200,
    MIB,
    MODELS,
    Rates,
    Training,
    head_flop,
    memory,
    model_flop,
    other_bytes,
    pass_bytes,
    seconds,
)
from .scale_messages import Message, of_heads, of_model, small
from .scale_messages import seconds as message_seconds
from .tables import markdown

STRATEGIES = {
    "ddp": "DDP",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp": "FSDP",
    "hsdp": "HSDP",
}
# A LoRA of rank 16 on every linear layer of Vicuna-7B: 16 · (inputs + outputs) of 4 layers of
# attention and 3 of the MLP.
LORA = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))

LLAVA = Training(
    model=MODELS["llava15-7b"], tokens=16 * 1024, visual=16 * 576, sequence=1024, what="full"
)
QWEN = Training(
    model=MODELS["qwen25vl-7b"], tokens=8192, visual=5120, sequence=8192, strategy="fsdp"
)
LARGE = Training(
    model=MODELS["qwen25vl-72b"],
    tokens=8192,
    visual=5120,
    sequence=8192,
    strategy="fsdp",
    ranks=256,
)
BY_NAME = {"llava15-7b": LLAVA, "qwen25vl-7b": QWEN, "qwen25vl-72b": LARGE}

WITH_LORA = replace(LLAVA, frozen=True, trained=LORA, what="LoRA of rank 16")
IN_PARALLEL = replace(LARGE, tensor=8, strategy="zero1")
WORK = (
    LLAVA,
    replace(WITH_LORA, what="LoRA, or a frozen LLM"),
    replace(LLAVA, heads=3, what="3 layers read"),
    replace(LLAVA, frozen_head=True, what="frozen head"),
    QWEN,
    LARGE,
    replace(IN_PARALLEL, what="tensor parallel 8"),
)
_SEVEN = tuple(replace(LLAVA, strategy=name, what="") for name in STRATEGIES if name != "hsdp")
_MANY = replace(LLAVA, strategy="fsdp", heads=3, what="3 layers read")
_OVER_NODES = (replace(LARGE, strategy="hsdp"), IN_PARALLEL)
MEMORY = (
    *_SEVEN,
    _MANY,
    replace(LLAVA, frozen_head=True, what="frozen head"),
    QWEN,
    LARGE,
    *_OVER_NODES,
)
MESSAGES = (
    *_SEVEN,
    _MANY,
    WITH_LORA,
    QWEN,
    LARGE,
    replace(LARGE, own_group=True, what="head as a group"),
    *_OVER_NODES,
)
RANKS = (1, 8, 64, 256, 1024)


def work(trainings: Iterable[Training] = WORK, rates: Rates = H200) -> str:
    """Return a table of FLOP, traffic and predicted times on a GPU in a step."""
    rows: list[Sequence[str]] = [
        (
            "training", "N of tokens", "PRe, TFLOP", "model, TFLOP", "share",
            "with checkpointing", "traffic, GB", "time, ms (predicted)",
            "share of time (predicted)",
        )
    ]  # fmt: skip
    for training in trainings:
        flop = head_flop(training)
        own = model_flop(training)
        time = seconds(training, rates)
        rows.append(
            (
                _name(training),
                f"{training.visual:,} of {training.tokens:,}",
                f"{flop / 1e12:.2f}",
                f"{own / 1e12:,.0f}",
                _share(flop / own),
                _share(flop / model_flop(training, checkpointing=True)),
                f"{(pass_bytes(training) + other_bytes(training)) / 1e9:.1f}",
                f"{time * 1e3:.1f}",
                _share(time / (own / rates.matmul)),
            )
        )
    return markdown(rows)


def memory_table(trainings: Iterable[Training] = MEMORY) -> str:
    """Return a table of the memory on a GPU."""
    rows: list[Sequence[str]] = [
        (
            "training", "strategy", "weights", "gradients", "Adam", "together",
            "whole, in use", "peak of the calls", "dH",
        )
    ]  # fmt: skip
    for training in trainings:
        found = memory(training)
        together = found.weights + found.gradients + found.states
        cells = (*found[:3], together, *found[3:])
        rows.append((_name(training), _strategy(training), *map(_mib, cells)))
    return markdown(rows)


def messages_table(trainings: Iterable[Training] = MESSAGES, rates: Rates = H200) -> str:
    """Return a table of the messages of the heads' parameters and gradients in a step."""
    rows: list[Sequence[str]] = [
        (
            "training", "strategy", "messages of PRe", "sent, MiB", "time, ms (predicted)",
            "model sends, MiB", "share",
        )
    ]  # fmt: skip
    for training in trainings:
        messages = of_heads(training)
        sent = sum(message.sent for message in messages)
        own = sum(message.sent for message in of_model(training))
        rows.append(
            (
                _name(training),
                _strategy(training),
                "; ".join(_message(training, message) for message in messages) or "none",
                _mib(sent),
                f"{message_seconds(training, messages, rates) * 1e3:.2f}",
                _mib(own),
                _share(sent / own) if own else "",
            )
        )
    return markdown(rows)


def ranks_table(training: Training = LLAVA, rates: Rates = H200) -> str:
    """Return a table of what changes with the number of GPUs."""
    rows: list[Sequence[str]] = [
        (
            "GPUs", "share of the FLOP", "DDP: memory, MiB", "sent, MiB", "time, ms (predicted)",
            "FSDP: memory, MiB", "sent, MiB", "time, ms (predicted)",
        )
    ]  # fmt: skip
    for ranks in RANKS:
        row = [f"{ranks:,}", _share(head_flop(training) / model_flop(training))]
        for strategy in ("ddp", "fsdp"):
            one = replace(training, ranks=ranks, strategy=strategy)
            messages = of_heads(one)
            row += [
                _mib(sum(memory(one)[:3])),
                _mib(sum(message.sent for message in messages)),
                f"{message_seconds(one, messages, rates) * 1e3:.2f}",
            ]
        rows.append(row)
    return markdown(rows)


def small_table(heads: int = 1) -> str:
    """Return a table of the messages of a few numbers."""
    rows: list[Sequence[str]] = [("message", "how often", "bytes")]
    rows += [(one.what, one.how_often, f"{one.size:,}") for one in small(heads)]
    return markdown(rows)


def everything(training: Training | None = None, rates: Rates = H200) -> str:
    """Return all tables with titles: those of docs/scale.md, or those of one training."""
    one = None if training is None else [training]
    ranks = [] if one else ["LLaVA-1.5-7B on more GPUs", ranks_table(rates=rates)]
    parts = [
        *ranks,
        "Work of a GPU in an optimizer step",
        work(one or WORK, rates),
        "Memory on a GPU, MiB",
        memory_table(one or MEMORY),
        "Messages of a GPU in an optimizer step",
        messages_table(one or MESSAGES, rates),
        "Messages of a few numbers",
        small_table(1 if training is None else training.heads),
    ]
    return "\n\n".join(parts)


def _name(training: Training) -> str:
    return ", ".join(filter(None, (training.model.name, training.what)))


def _strategy(training: Training) -> str:
    name = STRATEGIES[training.strategy]
    if training.tensor > 1:
        name = f"tensor parallel {training.tensor}, {name}"
    return f"{name}, {training.ranks} GPUs"


def _message(training: Training, message: Message) -> str:
    text = f"{message.calls} {message.name}{'s' * (message.calls > 1)} of {_mib(message.size)} MiB"
    if training.hybrid:
        text += " in the node" if message.inside else " between nodes"
    return text


def _share(value: float) -> str:
    return f"{value:.2%}".replace("%", " %")


def _mib(size: float) -> str:
    value = size / MIB
    return f"{value:,.0f}" if value >= 10 or not value else f"{value:.1f}"
