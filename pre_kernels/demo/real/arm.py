"""LLaVA's two stages on the little LLaVA: the first once for a seed, the second in arms that start
from it and see the same batches, without PRe or with it."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pre_kernels.diagnostics import LayerCallback
from pre_kernels.integrations import apply_pre, find_handle, patch_trainer
from pre_kernels.screen import write

from ..stages import Bar, Stage
from . import photographs
from .evaluate import evaluate, samples
from .llms import LLMS
from .model import build, tokenizer
from .pieces import Pieces
from .scenes import Scenes
from .settings import Settings
from .stages import ALIGN, LOAD, MEASURE, TUNE
from .text import Batches, Text, caption, questions
from .train import train_stage
from .work import fingerprint

PROJECTOR = "multi_modal_projector"
LANGUAGE = ("language_model", "lm_head")
HEAD = "pre_head"
# The channels of the encoder are standardised over so many scenes.
CALIBRATION = 100
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """How the second stage of an arm differs from that without PRe.

    Attributes:
        options: of `apply_pre`; None: without PRe.
        both: whether PRe is on in the first stage too, which this arm then has for itself.
        trained: what of the LLM learns: all ("full"), LoRA's matrices ("lora") or nothing
            ("frozen").
        rate: the learning rate of the second stage; None: that of the settings.
        longer: the second stage has so many times as many steps.
    """

    options: dict[str, Any] | None = field(default_factory=dict)
    both: bool = False
    trained: str = "full"
    rate: float | None = None
    longer: int = 1


class Seed:
    """A seed: its photographs, and its model before and after the first stage.

    Args:
        folder: keeps what is finished, so that a run that was stopped resumes.
    """

    def __init__(
        self, seed: int, settings: Settings, pieces: Pieces, device: str, folder: Path, bar: Bar
    ) -> None:
        self.seed = seed
        self.settings = settings
        self.folder = folder / f"{settings.llm}-seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.bar = bar
        with bar(LOAD, f"seed {seed}: {LOAD.name}", 1) as advance:
            self.training, *self.halves = photographs.split(_photographs(pieces), seed)
            self.tokenizer = _tokenizer(settings.llm, pieces)
            calibration = Scenes(self.training, CALIBRATION, 10_000 + seed)
            # transformers' annotation of `to` does not accept a device, hence Any.
            built: Any = build(LLMS[settings.llm], pieces, calibration, seed)
            self.model = built.to(device)
            advance(math.nan)

    def before(self) -> Metrics:
        """Return the metrics of the model before any visual training."""
        return self._once("before", lambda work: self._measure(self.model, "before"))

    def aligned(self) -> tuple[Any, Metrics]:
        """Return the model after the first stage without PRe, and its metrics."""
        model = copy.deepcopy(self.model)
        projector = model.get_submodule(f"model.{PROJECTOR}")
        weights = self.folder / "aligned.safetensors"

        def run(work: Path) -> Metrics:
            logs = self._stage(model, 1, ALIGN, caption, "aligned", work)
            save_file(projector.state_dict(), weights)
            return self._measure(model, "aligned") | logs

        metrics = self._once("aligned", run)
        projector.load_state_dict(load_file(weights))
        return model, metrics

    def run(self, name: str, arm: Arm, traced: bool = False) -> Metrics:
        """Return the metrics of an arm after the second stage.

        Args:
            traced: whether to measure layers along the second stage too, into "trace", the entries
                of the Trainer's log.
        """
        # An arm with other options may have had this name.
        key = f"{name} {fingerprint(asdict(arm))}"
        return self._once(key, lambda work: self._run(name, arm, traced, work))

    def _run(self, name: str, arm: Arm, traced: bool, work: Path) -> Metrics:
        model = copy.deepcopy(self.model) if arm.both else self.aligned()[0]
        if arm.trained == "lora":
            _add_lora(model)
        torch.manual_seed(self.seed)
        handle = None
        if arm.options is not None:
            handle = apply_pre(model, head_lr=self.settings.head_rate, **arm.options)
        if arm.both:
            self._stage(model, 1, ALIGN, caption, name, work)
        logs = self._stage(model, 2, TUNE, questions, name, work, arm, traced)
        if handle is not None:
            handle.remove()
        return self._measure(model, name) | logs

    def _stage(
        self,
        model: Any,
        number: int,
        stage: Stage,
        text: Text,
        name: str,
        work: Path,
        arm: Arm | None = None,
        traced: bool = False,
    ) -> Metrics:
        """Train one of the stages, with checkpoints in `work`; return the losses of its steps."""
        settings = self.settings
        steps, rate = settings.align_steps, settings.align_rate
        if arm is not None:
            steps = settings.tune_steps * arm.longer
            rate = settings.tune_rate if arm.rate is None else arm.rate
        _learn(model, "frozen" if arm is None else arm.trained)
        scenes = Scenes(self.training, steps * settings.batch, 100 * self.seed + number)
        batches = Batches(self.tokenizer, LLMS[settings.llm], text, scenes)
        folder = work / f"stage-{number}"
        if arm is not None and arm.trained == "lora":
            # The Trainer cannot resume a model to which LoRA was added.
            shutil.rmtree(folder, ignore_errors=True)
        patch = patch_trainer if find_handle(model) else contextlib.nullcontext
        with self.bar(stage, f"seed {self.seed}: {name}", steps) as advance, patch():
            history = train_stage(
                model,
                batches,
                steps,
                rate,
                settings,
                self.seed,
                folder,
                advance,
                self._watch if traced else None,
            )
        logs = [entry for entry in history if "loss" in entry]
        curves: Metrics = {
            "task_loss": [round(log.get("task_loss", log["loss"]), 4) for log in logs]
        }
        if "pre_loss" in logs[-1]:
            curves["pre_loss"] = [round(log["pre_loss"], 4) for log in logs]
        if traced:
            # A training that resumes measures its checkpoint once more.
            looks = {entry["step"]: entry for entry in history if "score" in entry}
            every = settings.traced_every
            curves["trace"] = [
                look for step, look in looks.items() if step % every == 0 or step == steps
            ]
        return curves

    def _watch(self, trainer: Any) -> LayerCallback:
        """Return what measures layers along a training: the probes and the score as `evaluate`, and
        what `LayerCallback` measures itself on other scenes of the first half."""
        settings = self.settings
        llm = LLMS[settings.llm]
        depth = llm.layers
        own = replace(settings, test_scenes=settings.traced_scenes, every=depth, lens_scenes=1)
        half = Scenes(self.halves[0], own.test_scenes, 2000 * (self.seed + 1))

        def score(model: Any) -> dict[str, float]:
            found = evaluate(model, self.tokenizer, llm, self.halves, own, self.seed)
            scores = {"score": found["accuracy"]}
            for place, layer in enumerate(found["layers"]):
                scores[f"layer_{layer}/identity"] = found["identity"][place]
                scores[f"layer_{layer}/kind"] = found["probe"][place]
            return scores

        return LayerCallback(
            trainer,
            samples(self.tokenizer, llm, half),
            every=settings.traced_every,
            metrics=("structure", "cosine"),
            score=score,
            max_share=None,
        )

    def _measure(self, model: Any, name: str) -> Metrics:
        scenes = self.settings.test_scenes * len(self.halves)
        with self.bar(MEASURE, f"seed {self.seed}: {MEASURE.name} {name}", scenes) as advance:
            llm = LLMS[self.settings.llm]
            return evaluate(
                model, self.tokenizer, llm, self.halves, self.settings, self.seed, advance
            )

    def _once(self, key: str, measure: Callable[[Path], Metrics]) -> Metrics:
        """Return what `measure` returns, from the folder if it is there. It may leave checkpoints
        in the folder that it gets."""
        path = self.folder / f"{key}.json"
        if path.is_file():
            kept: Metrics = json.loads(path.read_text(encoding="utf-8"))
            return kept
        work = self.folder / key
        metrics = measure(work)
        write(path, json.dumps(metrics))
        shutil.rmtree(work, ignore_errors=True)
        return metrics


def _learn(model: Any, trained: str) -> None:
    """Let the projector and PRe's head learn, and what of the LLM is `trained`."""
    for path, parameter in model.named_parameters():
        language = any(part in path for part in LANGUAGE)
        learns = {"full": language, "lora": language and "lora_" in path, "frozen": False}[trained]
        parameter.requires_grad_(PROJECTOR in path or HEAD in path or learns)


def _add_lora(model: Any) -> None:
    """Give every linear layer of the decoder LoRA's matrices."""
    from peft import LoraConfig, inject_adapter_in_model

    linear = r".*language_model.*\.(mlp|self_attn)\..*_proj"
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, target_modules=linear), model)


@cache
def _photographs(pieces: Pieces) -> list[photographs.Photograph]:
    return photographs.load(pieces.photographs)[0]


@cache
def _tokenizer(llm: str, pieces: Pieces) -> Any:
    return tokenizer(LLMS[llm], pieces)
