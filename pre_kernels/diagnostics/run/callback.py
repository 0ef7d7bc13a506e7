"""The diagnostics during a training: measure a small held-out set every few steps, into the
trainer's own log.

This is the only module of the diagnostics that imports transformers at the top, because
`LayerCallback` is a `TrainerCallback`. `pre_kernels.diagnostics` imports it when `LayerCallback` is
first used.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from pre_kernels.integrations.reader import Reader, evaluating

from ..measures.layers import LayerReport
from .measure import Sample, measure

# The entries of a report's row that are not metrics.
LABELS = ("layer", "images", "tokens", "notes", "lens_tokens", "probe_test", "probe_chance")


class LayerCallback(TrainerCallback):
    """Measures some layers on held-out images before the first step, every `every` steps and after
    the last step.

    ```python
    trainer.add_callback(LayerCallback(trainer, samples, every=500, layers=(0, 16, 32)))
    ```

    The trainer logs `layer_<l>/<metric>` for every metric of `LayerReport.rows()` that was
    measured, the result of `score`, "layers_seconds" (the time of this measurement) and
    "layers_share" (the share of all measurements in the time of the training so far). Its
    integrations show them. `pre-kernels trace` draws the paper's plot from this log (arXiv
    2603.20808: task score against probe accuracy along training).

    During a measurement the model is in eval mode; afterwards its modes are restored. A measurement
    draws no random number of the training, so the training continues bit for bit as without it.
    Every process measures the same images, because sharded models need all processes. The trainer
    of rank 0 logs.

    A measurement costs a forward of the samples, and what `LayerReport` states for its metrics.
    `max_share` limits it: a measurement is skipped if, after it, measuring would have taken more
    than this share of the training's time. The first skip gives a warning. The first and the last
    measurement are never skipped.

    Args:
        trainer: the `transformers.Trainer` (or subclass) to which this is added.
        samples: held-out images, a few hundred. The probes need at least two of each class.
            `diagnostics.load_samples` makes samples from files.
        every: the number of steps between measurements, positive.
        layers: as in `Reader`. None: the embeddings, half the depth and the last layer.
        metrics: as in `LayerReport`. The default takes a few passes over the features.
        score: called with the trainer's model in eval mode. Returns a number, which is logged as
            "score", or a dict of numbers, which are logged by their names.
        max_share: in (0, 1], or None for no limit.
        seed: the seed of the probes' split.
        reader: further options of `Reader`: mask_fn, text_model, decoder_layers.

    Raises:
        ValueError, TypeError: the message names the argument, what it got and what it needs.
    """

    def __init__(
        self,
        trainer: Any,
        samples: Iterable[Sample],
        every: int,
        layers: Sequence[int] | None = None,
        *,
        metrics: Collection[str] = ("structure", "cosine", "probe"),
        score: Callable[[torch.nn.Module], Any] | None = None,
        max_share: float | None = 0.05,
        seed: int = 0,
        **reader: Any,
    ) -> None:
        if not hasattr(trainer, "model_wrapped"):
            raise TypeError(
                f"trainer: got {type(trainer).__name__}, want a transformers.Trainer: "
                "LayerCallback(trainer, samples, every)"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every: got {every!r}, want a positive number of steps")
        if max_share is not None and not 0 < max_share <= 1:
            raise ValueError(f"max_share: got {max_share!r}, want a share in (0, 1], or None")
        if score is not None and not callable(score):
            raise TypeError(
                f"score: got {type(score).__name__}, want a callable: score(model) returns a number"
            )
        self.samples = list(samples)
        wrong = next((s for s in self.samples if not isinstance(s, Sample)), None)
        if wrong is not None or not self.samples:
            got = "none" if wrong is None else type(wrong).__name__
            raise TypeError(
                f"samples: got {got}, want at least one Sample; load_samples(model, processor, "
                "folder) makes them"
            )
        # Both are made here so that wrong arguments raise now, and not at the first measurement.
        LayerReport(metrics)
        with Reader(trainer.model, layers, **reader) as first:
            depth = first.depth
        self.layers = (
            tuple(sorted({0, max(depth // 2, 1), depth})) if layers is None else tuple(layers)
        )
        self.trainer = trainer
        self.every = every
        self.metrics = metrics
        self.score = score
        self.max_share = max_share
        self.seed = seed
        self.options = reader
        # The step of the last measurement.
        self._measured: int | None = None
        self._warned = False

    def measure(self) -> dict[str, float]:
        """Measure the model as it is now. Returns the metrics by the names under which they are
        logged."""
        model = self.trainer.model
        device = self.trainer.args.device
        report = LayerReport(self.metrics, seed=self.seed)
        devices = [device] if device.type == "cuda" else []
        with Reader(model, self.layers, **self.options) as reader, torch.random.fork_rng(devices):
            # The wrapper is called because DeepSpeed's engine applies autocast around the model.
            # With FSDP the wrapper is trainer.model itself.
            for _ in measure(
                reader, self.samples, report, call=self.trainer.model_wrapped, device=device
            ):
                pass
            measured = {} if self.score is None else self._scores(model)
        for row in report.rows():
            for name, value in row.items():
                if name not in LABELS and value is not None:
                    measured[f"layer_{row['layer']}/{name}"] = value
        return measured

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure before the first step."""
        # When the training began, the seconds of all measurements, and those of the last one.
        self._begun = time.monotonic()
        self._spent = 0.0
        self._last = 0.0
        self._measured = None
        self._log(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps, within `max_share`."""
        if state.global_step % self.every == 0 and self._affordable():
            self._log(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the last step."""
        if self._measured != state.global_step:
            self._log(state)

    def _log(self, state: Any) -> None:
        start = time.monotonic()
        measured = self.measure()
        self._last = time.monotonic() - start
        self._spent += self._last
        self._measured = state.global_step
        measured["layers_seconds"] = round(self._last, 3)
        measured["layers_share"] = round(self._spent / max(time.monotonic() - self._begun, 1e-9), 4)
        # `log` resets should_log, and the trainer would then skip its own log of this step.
        due = self.trainer.control.should_log
        self.trainer.log(measured)
        self.trainer.control.should_log = due

    def _affordable(self) -> bool:
        if self.max_share is None:
            return True
        elapsed = time.monotonic() - self._begun
        share = (self._spent + self._last) / (elapsed + self._last)
        afforded = self._agreed(share <= self.max_share)
        if not afforded and not self._warned:
            self._warned = True
            warnings.warn(
                f"PRe: a measurement of the layers takes {self._last:.1f} s, and with another one "
                f"now measuring would have taken a share of {share:.2f} of the training's time, "
                f"more than max_share={self.max_share}; some measurements are skipped. Pass a "
                "larger every or max_share, or fewer samples or layers",
                stacklevel=2,
            )
        return afforded

    def _agreed(self, afforded: bool) -> bool:
        """The decision of rank 0. Clocks differ between processes, and a sharded model needs all of
        them to decide alike."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return afforded
        from accelerate.utils import broadcast

        return bool(broadcast(torch.tensor(int(afforded), device=accelerator.device)))

    def _scores(self, model: torch.nn.Module) -> dict[str, float]:
        assert self.score is not None
        with evaluating(model), torch.no_grad():
            returned = self.score(model)
        scores = dict(returned) if isinstance(returned, dict) else {"score": returned}
        for name, value in scores.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not math.isfinite(value)
            ):
                raise ValueError(f"score: returned {value!r} for {name!r}, want a finite number")
        return scores
