"""Sequences that several processes share: trainings whose gradients a test compares with those of
one process."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre, patch_trainer

from .by_hand import copy_of, gradients, pre_loss, watch
from .ranks import config, deepspeed
from .tiny.models import FAMILIES, IMAGE, Batch, batch, build
from .tiny.training import InOrder, Recorder, Samples, arguments

# All have 18 tokens, because gloo gathers only equal lengths. The image of ACROSS is cut. The first
# half of LATE has an image and no label, which `data_of` sees to.
TWO_IMAGES = [("text", 1), ("image", 8, 8), ("text", 3), ("image", 8, 8), ("text", 5)]
LATE = [("image", 8, 8), ("text", 13)]
ACROSS = [("text", 5), ("image", 8, 8), ("text", 8)]
TEXT = [("text", 17)]


class Gathered(torch.autograd.Function):
    """The parts (B, heads, T / 2, width) of both ranks, joined along the sequence."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(2)]
        torch.distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(2, 2)[torch.distributed.get_rank()]


def ring(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Causal attention of this rank's half of the queries to the keys of both ranks."""
    key, value = Gathered.apply(key), Gathered.apply(value)
    mine, total = query.shape[2], key.shape[2]
    place = torch.arange(mine)[:, None] + torch.distributed.get_rank() * mine
    found = nn.functional.scaled_dot_product_attention(
        query, key, value, place >= torch.arange(total)
    )
    return found.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def ulysses() -> Iterator[Any]:
    """DeepSpeed for a training with sequence parallelism, which changes its global state and the
    attention functions of transformers; all of them are put back at the end."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.utils import groups
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = deepspeed()
    module.init_distributed(dist_backend="gloo")
    try:
        yield module
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = own
        parallel_state_sp._SEQUENCE_PARALLEL_GROUP = None
        parallel_state_sp._SEQUENCE_DATA_PARALLEL_GROUP = None
        groups.mpu = None


def plain_tower(family: str, model: nn.Module) -> nn.Module:
    """`model` with eager attention in the vision tower. DeepSpeed replaces the attention function
    of that name everywhere, and a tower has whole images."""
    tower = model.model.visual if "qwen" in family else model.model.vision_tower
    tower.set_attn_implementation("eager")
    return model


def cut_inside(family: str, model: nn.Module) -> None:
    """Hooks for a model that gets its part of a sequence and all images of it, as a list. They
    gather the ids for the merge of text and images, and cut what enters the text model."""
    from deepspeed.utils import groups

    text = model.get_submodule(FAMILIES[family].text)

    def gather(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        group = groups._get_sequence_parallel_group()
        whole = {n: torch.cat(v) for n, v in kwargs.items() if isinstance(v, list)}
        for name in [n for n in ("input_ids", "mm_token_type_ids") if n in kwargs]:
            parts = [torch.empty_like(kwargs[name]) for _ in range(group.size())]
            torch.distributed.all_gather(parts, kwargs[name], group=group)
            whole[name] = torch.cat(parts, 1)
        return args, kwargs | whole | {"position_ids": None}

    def cut(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        group = groups._get_sequence_parallel_group()
        embeds, places = kwargs["inputs_embeds"], kwargs["position_ids"]
        count = embeds.shape[1] // group.size()
        mine = slice(group.rank() * count, (group.rank() + 1) * count)
        own = torch.arange(embeds.shape[1]).expand(embeds.shape[:2])
        # M-RoPE has three rows of places; those of the text come before them.
        places = own if places is None or places.dim() < 3 else torch.cat([own[None], places])
        more = {"inputs_embeds": embeds[:, mine], "position_ids": places[..., mine]}
        return args, kwargs | more | {"attention_mask": None}

    model.register_forward_pre_hook(gather, with_kwargs=True)
    text.register_forward_pre_hook(cut, with_kwargs=True)


def data_of(family: str, samples: list[Any], index: int) -> Batch:
    data = batch(family, [samples[index]], seed=index)
    if samples[index] == LATE:
        labels = data.inputs["labels"]
        labels[:, : labels.shape[1] // 2 + 1] = -100
    return data


def collate(family: str, samples: list[Any], tensors: bool = False) -> Any:
    """A collator of one sample whose images are lists, which DeepSpeed's adapter of data loaders
    gives to every process; `tensors`, which it does not take."""

    def together(indices: list[int]) -> dict[str, Any]:
        (index,) = indices
        inputs = data_of(family, samples, index).inputs
        shape = inputs["input_ids"].shape
        del inputs["attention_mask"]
        inputs["position_ids"] = torch.arange(shape[1]).expand(shape)
        return {
            name: value if value.shape[:2] == shape or tensors else list(value[:, None])
            for name, value in inputs.items()
        }

    return together


def prepared(family: str, first: bool = False, **options: Any) -> tuple[nn.Module, Any]:
    """A model whose sequence is cut inside, and its handle. `first`: PRe is attached before the
    hooks that cut."""
    model = plain_tower(family, build(family))
    if not first:
        cut_inside(family, model)
    handle = apply_pre(model, **options)
    if first:
        cut_inside(family, model)
    return model, handle


def moved(module: Any, model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a step of SGD with the learning rate 1."""
    with module.zero.GatheredParameters(list(model.parameters())):
        return {n: before[n] - p.detach() for n, p in model.named_parameters()}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def trained(
    family: str, samples: list[Any], folder: str, stage: int = 3, tensors: bool = False
) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train one step of all samples with accelerate's sequence parallelism over pairs of processes.
    Returns every gradient, by parameter name, and the logs."""
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    with ulysses() as module, patch_trainer(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="PRe: ")
        model, _ = prepared(family)
        before = values(model)
        accumulation = 2 * len(samples) // torch.distributed.get_world_size()
        handler = DeepSpeedSequenceParallelConfig(
            sp_seq_length_is_variable=True, sp_attn_implementation="sdpa"
        )
        parallelism = ParallelismConfig(
            dp_replicate_size=torch.distributed.get_world_size() // 2,
            sp_size=2,
            sp_backend="deepspeed",
            sp_handler=handler,
        )
        trainer = InOrder(
            model=model,
            args=arguments(
                Path(folder),
                accumulation,
                1,
                deepspeed=config(stage, accumulation),
                learning_rate=1.0,
                parallelism_config=parallelism,
            ),
            train_dataset=Samples(samples),
            data_collator=collate(family, samples, tensors),
        )
        trainer.train()
        return moved(module, model, before), trainer.state.log_history


def looped(
    samples: list[Any], labels: str | None = None, first: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Train one step in a loop of one's own, as DeepSpeed describes it: its data loader, and the
    losses of the parts weighed by their numbers of labels. Returns every gradient.

    With `labels` the model computes the losses."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import (
        UlyssesSPAttentionHF,
        UlyssesSPDataLoaderAdapter,
    )

    all_gather = torch.distributed.nn.functional.all_gather
    rank = torch.distributed.get_rank()
    with ulysses() as module:
        model, handle = prepared("llava", first, group="world", labels=labels, **options)
        before = values(model)
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model, "sdpa", sequence_parallel_size=2, micro_batch_size=1
        )
        engine = module.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            config=config(3, 2),
            mpu=mpu,
        )[0]
        group = mpu.get_sequence_parallel_group()
        own = [collate("llava", samples)([index]) for index in range(rank, len(samples), 2)]
        for data in UlyssesSPDataLoaderAdapter(own, group.rank(), group, 2, "cpu"):
            targets = data["shift_labels"]
            output = engine(**data, **({} if labels is None else {labels: targets}))
            if labels is None:
                del data["shift_labels"]
                losses = nn.functional.cross_entropy(output.logits[0], targets[0], reduction="none")
                loss = losses.sum() / targets.ne(-100).sum().clamp(min=1)
            else:
                loss = output.loss
            counts = torch.stack(all_gather(targets.ne(-100).sum(), group=group))
            every = torch.stack(all_gather(loss, group=group))
            loss = (every.where(counts > 0, 0) * counts).sum() / counts.sum()
            engine.backward(loss if labels is not None else loss + handle.loss())
            engine.step()
        return moved(module, model, before)


def by_hand(
    family: str,
    samples: list[Any],
    scale: float = 1.0,
    together: bool = True,
    model_loss: bool = True,
) -> tuple[dict[str, Tensor | None], float, float]:
    """On one process: the gradients, times `scale`, of the mean over the samples of the model's
    loss, plus 0.5 · L_PRe; that mean; and L_PRe. It is the mean over all visual tokens if
    `together`, else the mean of the samples' means. Without `model_loss` the gradients are those
    of L_PRe."""
    model = plain_tower(family, build(family))
    handle = apply_pre(model)
    head = copy_of(handle.head)
    handle.remove()
    seen = watch(model, family)
    data = [data_of(family, samples, index) for index in range(len(samples))]
    tokens = [int(d.visual.sum()) for d in data]
    loss = pre = torch.zeros(())
    for d, count in zip(data, tokens, strict=True):
        loss = loss + model(**d.inputs).loss / len(data)
        term = pre_loss(seen, d, [2], head, reduction="sum")
        pre = pre + term / (sum(tokens) if together else max(count, 1) * len(data))
    (scale * (loss * model_loss + 0.5 * pre)).backward()
    grads = gradients(model) | {f"pre_head.{n}": p.grad for n, p in head.items()}
    return grads, loss.item(), pre.item()


class OnlyPre(InOrder):
    """Has a loss of its own without gradients, so that all gradients are those of L_PRe."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            compute_loss_func=lambda output, *_, **__: 0 * output.logits.sum(), **options
        )


def whole_batches(samples: list[Any], folder: str, cut_mask: bool) -> dict[str, Tensor]:
    """Train one step of a Trainer under DDP whose processes get the same whole batches, and cut the
    sequence inside the text model. Returns its gradients, all of PRe.

    Without `cut_mask` PRe does not know of the cut."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rank = torch.distributed.get_rank()
    ALL_ATTENTION_FUNCTIONS.register("ring", ring)
    model = build("llava")
    text = model.model.language_model
    text.config._attn_implementation_internal = "ring"

    def mine(whole: Tensor) -> Tensor:
        return whole.chunk(2, 1)[rank]

    def split(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        embeds = kwargs["inputs_embeds"]
        places = torch.arange(embeds.shape[1]).expand(embeds.shape[:2])
        more = {"inputs_embeds": mine(embeds), "position_ids": mine(places)}
        return args, kwargs | more | {"attention_mask": None}

    text.register_forward_pre_hook(split, with_kwargs=True)
    mask_fn = (lambda inputs: mine(inputs["input_ids"] == IMAGE)) if cut_mask else None
    apply_pre(model, mask_fn=mask_fn)
    recorder = Recorder()
    twice = [sample for sample in samples for _ in range(2)]
    seeds = [index for index in range(len(samples)) for _ in range(2)]

    def collate(indices: list[int]) -> dict[str, Any]:
        return data_of("llava", samples, seeds[indices[0]]).inputs

    with patch_trainer(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="PRe: ")
        OnlyPre(
            model=model,
            args=arguments(Path(folder), len(samples), 1, ddp_backend="gloo"),
            train_dataset=Samples(twice),
            data_collator=collate,
            callbacks=[recorder],
        ).train()
    return recorder.steps[0]


def context_trainer(folder: str, samples: list[Any], tower: str = "sdpa", **more: Any) -> Any:
    """A Trainer with accelerate's context parallelism over two processes, and FSDP2, which it
    needs."""
    from accelerate import ParallelismConfig, PartialState
    from accelerate.utils import DistributedType

    os.environ |= {"FSDP_VERSION": "2"}
    model = build("llava")
    model.model.vision_tower.set_attn_implementation(tower)
    plugin = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
    }
    args = arguments(
        Path(folder),
        1,
        1,
        fsdp="full_shard auto_wrap",
        fsdp_config=plugin,
        ddp_backend="gloo",
        parallelism_config=ParallelismConfig(cp_size=2),
    )
    assert args.device.type == "cpu"
    # accelerate does not shard on CPUs, so it is told that this is not one.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU

    def collate(indices: list[int]) -> dict[str, Any]:
        inputs = data_of("llava", samples, indices[0]).inputs
        del inputs["attention_mask"]
        return inputs

    return InOrder(
        model=model, args=args, train_dataset=Samples(samples), data_collator=collate, **more
    )
