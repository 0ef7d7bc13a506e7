"""One optimizer step of a family with each loop, checkpointing and LoRA, on one process or two, and
its gradients."""

from __future__ import annotations

import contextlib
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from pre_kernels.integrations import apply_pre, patch_trainer

from .by_hand import copy_of, pre_loss, watch
from .tiny.models import DEPTH, FAMILIES, Batch, batch, build
from .tiny.training import QUIET, InOrder, Recorder

CHECKPOINTING = {"off": None, "non-reentrant": False, "reentrant": True}
AXES: dict[str, list[Any]] = {
    "family": list(FAMILIES),
    "checkpointing": list(CHECKPOINTING),
    # There is no such TRL for Python 3.10.
    "loop": ["plain", "Trainer", *(["TRL"] if find_spec("trl") else [])],
    "tuning": ["full", "LoRA"],
    "processes": [1, 2],
}

MAJOR = transformers.__version__.split(".")[0]

# Cases that do not work without PRe either: (major version of transformers, the values that make a
# case fail).
UPSTREAM: dict[tuple[Any, ...], str] = {
    **{
        (
            "4",
            family,
            "Trainer",
        ): "takes num_items_in_batch and ignores it: its own loss is GA times too large"
        for family in ("vipllava", "llama4", "gemma3n")
    },
    ("4", "paligemma", "TRL"): "attends by whether there are labels, which TRL keeps back",
    ("4", "emu3", "TRL"): (
        "the batch norms of its image tokenizer are in training mode: "
        "codes depend on what ran before"
    ),
    ("4", "llama4", "TRL"): "TRL looks for .model, which it lacks",
    ("4", "glm4v_moe", "reentrant", "full", 2): (
        "an expert without tokens has no gradient: DDP has to find it, "
        "which reentrant checkpointing rules out"
    ),
    ("5", "glm4v_moe", "TRL"): "TRL looks for num_experts, which its config calls otherwise",
    ("5", "llama4", "TRL"): "TRL looks for last_hidden_state, which its output lacks",
}


def upstream(case: dict[str, Any]) -> str | None:
    """The reason why a case does not work without PRe either, or None."""
    return next(
        (reason for key, reason in UPSTREAM.items() if set(key) <= {MAJOR, *case.values()}), None
    )


def allowed(case: dict[str, Any]) -> bool:
    return upstream(case) is None


LAYER = DEPTH // 2
WEIGHT = 0.5
# The numbers of images differ, but those of labels are equal, so all rules for the scale of the
# model's own loss agree.
SAMPLES: list[Any] = [
    [("text", 3), ("image", 8, 8), ("text", 5)],
    [("text", 2), ("image", 8, 8), ("text", 2), ("image", 8, 8), ("text", 4)],
    [("text", 1), ("image", 8, 8), ("text", 7)],
    [("text", 4), ("image", 8, 8), ("text", 1), ("image", 8, 8), ("text", 3)],
]


class Case(NamedTuple):
    family: str
    checkpointing: str
    loop: str
    tuning: str
    processes: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


def sample(family: str, index: int) -> Batch:
    return batch(family, [SAMPLES[index]], seed=index)


def make(case: Case) -> nn.Module:
    """The model. Only its decoder is trained, because under checkpointing DDP allows no parameter
    without a gradient."""
    model = build(case.family)
    model.requires_grad_(False)
    text = model.get_submodule(FAMILIES[case.family].text)
    text.requires_grad_(True)
    # Chameleon's decoder contains its tokenizer of images.
    if hasattr(text, "vqmodel"):
        text.vqmodel.requires_grad_(False)
    if case.tuning == "full":
        return model
    text = FAMILIES[case.family].text.replace(".", r"\.")
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=rf"{text}\..*\.(q_proj|k_proj|v_proj|o_proj)")
    )
    torch.manual_seed(3)
    # B starts at 0, which would hide the gradient of A.
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return peft.train()


def unused(case: Case) -> bool:
    """Whether DDP has to find parameters without a gradient, as for GLM-4V's experts without
    tokens, which are modules in 4.57.

    Elsewhere it is False: reentrant checkpointing needs that, and in a Trainer PEFT's default is
    True.
    """
    return (MAJOR, case.family, case.tuning) == ("4", "glm4v_moe", "full")


def gradients(case: Case, folder: str, attached: bool = True) -> dict[str, Tensor]:
    """The gradients of a step over SAMPLES, one sample per micro-batch. With two processes, each
    calls this."""
    model = make(case)
    torch.manual_seed(0)
    if attached:
        apply_pre(model, LAYER, WEIGHT)
    reentrant = CHECKPOINTING[case.checkpointing]
    if reentrant is not None:
        if case.tuning == "LoRA":
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}
        )
    # A correct training gets no warning.
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PRe: ")
        return (
            plain(case, model)
            if case.loop == "plain"
            else trainer(case, model, Path(folder), attached)
        )


def plain(case: Case, model: nn.Module) -> dict[str, Tensor]:
    rank = 0
    mine = range(len(SAMPLES))
    wrapped: Any = model
    if case.processes == 2:
        rank = torch.distributed.get_rank()
        mine = mine[rank::2]
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused(case))
    for index in mine:
        last = index == mine[-1]
        with contextlib.nullcontext() if case.processes == 1 or last else wrapped.no_sync():
            (wrapped(**sample(case.family, index).inputs).loss / len(mine)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trainer(case: Case, model: nn.Module, folder: Path, attached: bool) -> dict[str, Tensor]:
    recorder = Recorder()
    kind, arguments = TRAINERS[case.loop]()
    reentrant = CHECKPOINTING[case.checkpointing]
    with patch_trainer() if attached else contextlib.nullcontext():
        kind(
            model=model,
            args=arguments(
                output_dir=str(folder),
                per_device_train_batch_size=1,
                gradient_accumulation_steps=len(SAMPLES) // case.processes,
                gradient_checkpointing=reentrant is not None,
                gradient_checkpointing_kwargs={"use_reentrant": bool(reentrant)},
                ddp_find_unused_parameters=unused(case),
                max_steps=1,
                optim="sgd",
                max_grad_norm=0.0,
                remove_unused_columns=False,
                **QUIET,
            ),
            train_dataset=Dataset.from_dict({"sample": list(range(len(SAMPLES)))}),
            data_collator=lambda rows: sample(case.family, rows[0]["sample"]).inputs,
            callbacks=[recorder],
        ).train()
    return recorder.steps[0]


def of_transformers() -> Any:
    from transformers import TrainingArguments

    return InOrder, TrainingArguments


def of_trl() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {name: index for index, name in enumerate(["<pad>", "<s>", "</s>"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    skip = {"skip_prepare_dataset": True}  # the collator makes whole batches

    class InOrderSFT(InOrder, SFTTrainer):
        pass

    return partial(InOrderSFT, processing_class=tokenizer), partial(
        SFTConfig, dataset_kwargs=skip, max_length=None, bf16=False
    )


TRAINERS: dict[str, Any] = {"Trainer": of_transformers, "TRL": of_trl}


def wanted(case: Case, folder: str) -> dict[str, Tensor]:
    """The same gradients by hand, on one process, without checkpointing. TRL computes its own loss
    itself."""
    model = make(case)
    torch.manual_seed(0)
    with apply_pre(model, LAYER, WEIGHT) as handle:
        head = copy_of(handle.head)
    seen = watch(model, case.family, "base_model.model." if case.tuning == "LoRA" else "")
    counts = [int(sample(case.family, i).visual.sum()) for i in range(len(SAMPLES))]
    for index, count in enumerate(counts):
        data = sample(case.family, index)
        own = model(**data.inputs).loss / len(SAMPLES)
        # A loop without patch_trainer takes the mean over micro-batches, patch_trainer that over
        # tokens.
        share = 1 / len(SAMPLES) if case.loop == "plain" else count / sum(counts)
        (
            own * (case.loop != "TRL") + WEIGHT * share * pre_loss(seen, data, [LAYER], head)
        ).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if case.loop == "TRL":
        own = gradients(case._replace(processes=1), folder, attached=False)
        grads = {name: own[name] + gradient for name, gradient in grads.items()}
    return grads | {f"pre_head.{name}": p.grad for name, p in head.items()}
