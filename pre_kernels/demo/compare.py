"""The experiment: per seed one vision tower and one LLM, then LLaVA's two stages from them, without
and with PRe."""

from __future__ import annotations

import copy
import dataclasses
import platform
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import pre_kernels
from pre_kernels import sources
from pre_kernels.integrations import apply_pre

from .evaluate import evaluate
from .export import save_model, save_scenes
from .model import Advance, build, learn_to_read, learn_to_see
from .scenes import Scenes, compose, split_digits
from .settings import Settings
from .text import library_source
from .train import train_stage
from .workers import Bar, each_seed

ARMS = ("without", "with")
# This many scenes of each digit are written as files.
SCENES = 12
# These words in the names of parameters identify the parts of the model.
PROJECTOR = ("multi_modal_projector",)
LLM = ("language_model", "lm_head")
HEAD = ("pre_head",)


def compare(
    settings: Settings, device: str, bar: Bar, jobs: int, keep: Path | None = None
) -> dict[str, Any]:
    """Return all measurements, ready for JSON: `seeds` holds, per seed, the metrics "before",
    "without" and "with". `measured` is a digest of the code that the results depend on.

    Seed 0's models, and scenes that no training saw, are written into `keep`.
    """
    start = time.monotonic()
    measured = sources.digest("demo")
    seeds = each_seed(run_seed, settings.seeds, (settings, device, keep), bar, jobs)
    threads = f"CPU, {jobs} × {torch.get_num_threads()} thread"
    return {
        "settings": dataclasses.asdict(settings) | {"layer": settings.pre_layer},
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "versions": {
            "pre_kernels": pre_kernels.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "measured": measured,
        "seconds": round(time.monotonic() - start, 1),
        "seeds": seeds,
    }


def commit() -> str | None:
    """Return the commit of the checkout that runs this, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def run_seed(
    seed: int, settings: Settings, device: str, keep: Path | None, bar: Bar
) -> dict[str, Any]:
    """Run both arms of one seed. They share the digits, the scenes, the pre-trained parts and the
    order of the batches."""
    digits = split_digits(seed)
    sizes = (settings.train_scenes, settings.test_scenes, settings.test_scenes)
    training, fitting, test = (compose(d, n, seed) for d, n in zip(digits, sizes, strict=True))

    before = pretrained(training, settings, seed, device, bar)
    metrics = evaluate(before, fitting, test, settings, None)
    results: dict[str, Any] = {"seed": seed, "before": metrics}
    models = keep / "models" if keep is not None and seed == 0 else None
    if models is not None:
        save_scenes(digits[2], SCENES, seed, models.with_name("scenes"))
        save_model(before, models / "before")
    for arm in ARMS:
        options = {"layer": settings.layer, "weight": settings.weight} if arm == "with" else None
        model = copy.deepcopy(before)
        results[arm] = run_arm(
            f"{arm} PRe",
            options,
            model,
            training=training,
            fitting=fitting,
            test=test,
            settings=settings,
            seed=seed,
            bar=bar,
        )
        if models is not None:
            save_model(model, models / arm)
    return results


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
    with bar(f"seed {seed}: vision tower on digits", settings.vision_steps) as advance:
        learn_to_see(model.model.vision_tower, scenes, settings, seed, advance)
    with bar(f"seed {seed}: LLM on text", settings.text_steps) as advance:
        learn_to_read(language, library_source(settings.text_bytes), settings, seed, advance)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    return model


def run_arm(
    name: str,
    options: dict[str, Any] | None,
    model: LlavaForConditionalGeneration,
    *,
    training: Scenes,
    fitting: Scenes,
    test: Scenes,
    settings: Settings,
    seed: int,
    bar: Bar,
) -> dict[str, Any]:
    """Train `model` by LLaVA's two stages, without PRe or with it (`options` of `apply_pre`), and
    return its metrics."""
    torch.manual_seed(seed)
    handle = None if options is None else apply_pre(model, **options)
    head = None if handle is None else handle.head
    logs = []
    curve = []
    for stage, trained, steps, rate in (
        ("alignment", PROJECTOR, settings.align_steps, settings.align_rate),
        ("instruction tuning", PROJECTOR + LLM, settings.tune_steps, settings.tune_rate),
    ):
        with bar(f"seed {seed}: {stage} {name}", steps) as advance:

            def step(loss: float, advance: Advance = advance) -> None:
                if handle is not None:
                    curve.append(handle.metrics()["pre_loss"])
                advance(loss)

            logs += train_stage(model, training, trained + HEAD, steps, rate, settings, seed, step)
    if handle is not None:
        handle.remove()
    metrics = evaluate(model, fitting, test, settings, head)
    metrics["train_loss"] = [entry["loss"] for entry in logs]
    if curve:
        metrics["train_pre_loss"] = curve
    return metrics
