"""The experiment: per seed one vision tower and one LLM, then LLaVA's two stages from them, without
and with PRe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from pre_kernels.integrations import apply_pre

from .evaluate import evaluate
from .model import build, learn_to_read, learn_to_see
from .scenes import Scenes, compose, split_digits
from .settings import HEADS, Settings
from .stages import ALIGN, MEASURE, READ, SEE, TUNE, Advance, Bar
from .text import library_source
from .train import train_stage

ARMS = ("without", "with")
# These words in the names of parameters identify the parts of the model.
PROJECTOR = ("multi_modal_projector",)
LLM = ("language_model", "lm_head")
HEAD = ("pre_head",)
# This function takes a model that was measured, and its arm.
Keep = Callable[[LlavaForConditionalGeneration, str], None]


def run_seed(
    seed: int, settings: Settings, device: str, keep: Keep | None, bar: Bar
) -> dict[str, Any]:
    """Run both arms of one seed, and return its metrics "before", "without" and "with". The arms
    share the digits, the scenes, the pre-trained parts and the order of the batches."""
    scenes = split(seed, settings)
    before = pretrained(scenes[0], settings, seed, device, bar)
    with bar(MEASURE, f"seed {seed}: measuring", settings.layers + 1) as advance:
        metrics = evaluate(before, *scenes[1:], settings, None, advance)
    results: dict[str, Any] = {"seed": seed, "before": metrics}
    if keep is not None:
        keep(before, "before")
    for arm in ARMS:
        options = None
        if arm == "with":
            own = HEADS[settings.head]
            options = {"layer": settings.layer, "weight": settings.weight, **own}
        model = copy.deepcopy(before)
        results[arm] = run_arm(f"{arm} PRe", options, model, scenes, settings, seed, bar)
        if keep is not None:
            keep(model, arm)
    return results


def split(seed: int, settings: Settings) -> tuple[Scenes, Scenes, Scenes]:
    """Return the scenes of a seed to train on, to fit probes on, and to test on."""
    training, fitting, test = split_digits(seed)
    return (
        compose(training, settings.train_scenes, seed),
        compose(fitting, settings.test_scenes, seed),
        compose(test, settings.test_scenes, seed),
    )


def pretrained(
    scenes: Scenes, settings: Settings, seed: int, device: str, bar: Bar
) -> LlavaForConditionalGeneration:
    """Return a LLaVA whose tower knows digits and whose LLM knows text. Its projector is untrained,
    so the two parts have never met."""
    torch.manual_seed(seed)
    # transformers' annotation of `to` does not accept a device, hence Any.
    untrained: Any = build(settings)
    model: LlavaForConditionalGeneration = untrained.to(device)
    decoder: Any = LlamaForCausalLM(untrained.config.text_config)
    language: LlamaForCausalLM = decoder.to(device)
    with bar(SEE, f"seed {seed}: {SEE.name}", settings.vision_steps) as advance:
        learn_to_see(model.model.vision_tower, scenes, settings, seed, advance)
    with bar(READ, f"seed {seed}: {READ.name}", settings.text_steps) as advance:
        learn_to_read(language, library_source(settings.text_bytes), settings, seed, advance)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


def run_arm(
    name: str,
    options: dict[str, Any] | None,
    model: LlavaForConditionalGeneration,
    scenes: tuple[Scenes, Scenes, Scenes],
    settings: Settings,
    seed: int,
    bar: Bar,
) -> dict[str, Any]:
    """Train `model` by LLaVA's two stages, without PRe or with it (`options` of `apply_pre`), and
    return its metrics. scenes: those of `split`."""
    torch.manual_seed(seed)
    handle = None if options is None else apply_pre(model, **options)
    head = None if handle is None else handle.head
    logs = []
    curve = []
    for stage, trained, steps, rate in (
        (ALIGN, PROJECTOR, settings.align_steps, settings.align_rate),
        (TUNE, PROJECTOR + LLM, settings.tune_steps, settings.tune_rate),
    ):
        with bar(stage, f"seed {seed}: {stage.name} {name}", steps) as advance:

            def step(loss: float, advance: Advance = advance) -> None:
                if handle is not None:
                    curve.append(handle.metrics()["pre_loss"])
                advance(loss)

            logs += train_stage(model, scenes[0], trained + HEAD, steps, rate, settings, seed, step)
    if handle is not None:
        handle.remove()
    with bar(MEASURE, f"seed {seed}: {MEASURE.name} {name}", settings.layers + 1) as advance:
        metrics = evaluate(model, *scenes[1:], settings, head, advance)
    metrics["train_loss"] = [entry["loss"] for entry in logs]
    if curve:
        metrics["train_pre_loss"] = curve
    return metrics
