"""PRe on the model of a `transformers.Trainer` by a callback only, where no class may be
patched."""

from __future__ import annotations

import difflib
import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .agreement import agree_on_training
from .attach import apply_pre
from .distributed import check_no_context_parallelism, initialized
from .handle import PreHandle, find_handle
from .metrics import saw_tokens, to_log
from .optimizers import parameters, unwrapped
from .task_loss import without_pre

# These settings need optimizer groups, which a callback cannot make.
REFUSED = ("head_lr", "head_weight_decay")


class PreCallback(TrainerCallback):
    """Attaches PRe to the Trainer's model, moves λ along its schedule, logs the metrics, and saves
    the head in checkpoints.

    ```python
    # better: Trainer(..., callbacks=[PreCallback(...)])
    trainer.add_callback(PreCallback(layer=16, weight=0.5))
    trainer.train()
    ```

    Given in `callbacks=`, it attaches when the Trainer is made. Added by `trainer.add_callback`, or
    if `model_init` makes the model again, it attaches when training begins. That works in one
    process only, because the model may be wrapped by then, and such a training cannot be resumed
    with its optimizer.

    These need `patch_trainer` instead:

    - the mean over the visual tokens of the whole step; here each micro-batch adds its own mean,
      weighed like its loss;
    - trainers that ignore `output.loss` (TRL's) or take the labels;
    - optimizer groups for the head;
    - resuming a checkpoint of a training without PRe;
    - FSDP1's sharded head;
    - the metrics in reporters (`report_to`), which the Trainer calls before this callback. Here the
      metrics are in `state.log_history` and on the screen.

    The log gets "task_loss", the logged "loss" less PRe's part, if that is known exactly: the
    trainer's loss is `output.loss` times a factor, without fp16's scale, and PRe was on in all
    steps since the last log or in none.

    Args:
        settings: keywords of `apply_pre`.

    Attributes:
        handle: the return value of `apply_pre`; None before that. `callback.handle.remove()` takes
            PRe off.

    Raises:
        ValueError: for `head_lr` or `head_weight_decay`.
        TypeError: for a name that is not an argument of `apply_pre`.
    """

    def __init__(self, **settings: Any) -> None:
        for name in REFUSED:
            if settings.get(name) is not None:
                raise ValueError(
                    f"{name}: got {settings[name]}, but a callback makes no optimizer groups; use "
                    "apply_pre and patch_trainer()"
                )
        known = inspect.signature(apply_pre).parameters
        for name in sorted(settings.keys() - known.keys()):
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{name}: got {settings[name]!r}, want a setting of apply_pre{meant}")
        self.settings = settings
        self.handle: PreHandle | None = None
        self._watch: Any = None
        self._logged_at = 0  # the step of the last log
        self._resets = 0  # how often the handle's sums had been reset after that log

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        """Attach, before the optimizer is made and the model wrapped."""
        self._attach(model)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        **more: Any,
    ) -> None:
        """Attach if this is not done yet; load the head of the checkpoint that is resumed."""
        check_no_context_parallelism()
        if args.world_size > 1:
            agree_on_training(find_handle(model))
        if find_handle(model) is None:
            if initialized() and torch.distributed.get_world_size() > 1:
                raise RuntimeError(
                    f"PreCallback: {type(model).__name__} has no PRe and is wrapped for several "
                    "processes already; pass callbacks=[PreCallback(...)] when the Trainer is "
                    "made, without model_init"
                )
            self._attach(model)
            self._join(unwrapped(optimizer))
        assert self.handle is not None
        self.handle.new_training()
        self.handle.metrics()
        self.handle.restore_dtypes()
        self._logged_at = state.global_step
        self._resets = self.handle.totals.resets
        self._watch = self.handle.watch(optimizer)
        if state.global_step:
            self._resume(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Set λ to its value at the middle of the step."""
        if self.handle is not None:
            self.handle.progress = min((state.global_step + 0.5) / max(state.max_steps, 1), 1.0)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """Put the metrics, over all processes, into a training log."""
        if self.handle is None or "loss" not in (logs or {}):
            return

        def over_processes(totals: Tensor) -> Tensor:
            if initialized():
                totals = totals.to(args.device)
                torch.distributed.all_reduce(totals)
            return totals

        metrics = self.handle.metrics(combine=over_processes)
        # The mean over forwards is not the Trainer's, which may weigh them.
        metrics.pop("task_loss", None)
        task = self._task_loss(logs["loss"], state)
        if task is not None:
            logs["task_loss"] = task
        if saw_tokens(metrics):
            logs |= to_log(metrics)
        state.log_history[-1].update(logs)

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Write the head beside the model."""
        if self.handle is not None:
            self.handle.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Load the best model's head if the Trainer loaded that model. The handle stays, because
        training may continue."""
        if (
            self.handle is not None
            and args.load_best_model_at_end
            and state.best_model_checkpoint is not None
        ):
            self._load(state.best_model_checkpoint)
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _task_loss(self, logged: float, state: Any) -> float | None:
        """`logged` without PRe's part; None if that is not known exactly. Call it after the metrics
        of the log were read."""
        assert self.handle is not None
        totals = self.handle.totals
        steps = state.global_step - self._logged_at
        resets = totals.resets - self._resets
        self._logged_at = state.global_step
        self._resets = totals.resets
        # With more than one reset somebody else, such as patch_trainer, has read the sums.
        if not steps or resets != 1:
            return None
        backward = totals.backward
        if not backward.forwards:
            return logged
        count = steps * (torch.distributed.get_world_size() if initialized() else 1)
        return without_pre(logged, backward.loss / count, backward.added / count)

    def _attach(self, model: nn.Module) -> None:
        self.handle = find_handle(model) or apply_pre(model, **self.settings)

    def _join(self, optimizer: Any) -> None:
        """Put the head's parameters into existing groups. The scheduler has an entry for each
        group, so no new group can be added."""
        assert self.handle is not None
        there = {id(p) for p in parameters(optimizer)}
        for group in self.handle.param_groups():
            biases = group.get("weight_decay") == 0
            plain = [g for g in optimizer.param_groups if (g.get("weight_decay", 0) == 0) == biases]
            (plain or optimizer.param_groups)[0]["params"] += [
                p for p in group["params"] if id(p) not in there
            ]

    def _resume(self, args: Any, state: Any) -> None:
        assert self.handle is not None
        folder = _resumed() or args.resume_from_checkpoint
        if not isinstance(folder, str):
            folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        self._load(folder)

    def _load(self, folder: str) -> None:
        assert self.handle is not None
        try:
            self.handle.load(folder)
        except FileNotFoundError as error:
            self.handle.notices.warn("no head in the checkpoint", folder=folder, error=error)


def _resumed() -> str | None:
    """The folder that `train()` was given. Callbacks do not get it, so the stack is read."""
    frame = inspect.currentframe()
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)) and isinstance(
            frame.f_locals.get("self"), Trainer
        ):
            return os.fspath(folder)
        frame = frame.f_back
    return None
