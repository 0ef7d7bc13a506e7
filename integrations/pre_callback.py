"""PRe on the model of a `transformers.Trainer` by a callback alone, where no class may be
patched."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from .attach import apply_pre
from .distributed import initialized
from .handle import PreHandle, find_handle
from .metrics import saw_tokens, to_log
from .optimizers import parameters, unwrapped
from .task_loss import without_pre

# settings that need groups of the optimizer, which a callback cannot make
REFUSED = ("head_lr", "head_weight_decay")


class PreCallback(TrainerCallback):
    """`apply_pre` on the Trainer's model, λ along its schedule, the metrics in its log, the head in
    its checkpoints.

    ```python
    # better: Trainer(..., callbacks=[PreCallback(...)])
    trainer.add_callback(PreCallback(layer=16, weight=0.5))
    trainer.train()
    ```

    Given in `callbacks=`, it attaches when the Trainer is made. Added by `trainer.add_callback`, or
    where `model_init` makes the model again, it attaches when training begins: in one process only,
    since by then the model may be wrapped, and such a training cannot be resumed with its
    optimizer.

    What needs `patch_trainer` instead: the mean over the visual tokens of the whole step (here each
    micro-batch adds its own, weighed like its loss); trainers that ignore `output.loss` (TRL's) or
    take the labels; optimizer groups of the head's own; resuming a checkpoint of a training without
    PRe; FSDP1's sharded head; the metrics in reporters (`report_to`), which come before this in the
    Trainer's list: they are in `state.log_history` and on the screen.

    Args:
        settings: keywords of `apply_pre`.

    Attributes:
        handle: what `apply_pre` returned; None before. `callback.handle.remove()` ends it.

    Raises:
        ValueError: for `head_lr` or `head_weight_decay`.
    """

    def __init__(self, **settings: Any) -> None:
        for name in REFUSED:
            if settings.get(name) is not None:
                raise ValueError(
                    f"{name}: got {settings[name]}, but a callback makes no optimizer groups; use "
                    "apply_pre and patch_trainer()"
                )
        self.settings = settings
        self.handle: PreHandle | None = None
        self._watch: Any = None
        self._logged_at = 0  # the step of the last log
        self._resets = 0  # of the handle's sums, when that was written

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
        """Attach if that is still to be done; take the head of the checkpoint that is resumed."""
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
        """λ at the middle of the step."""
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
        metrics.pop("task_loss", None)  # of forwards, which the Trainer may weigh
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
        """The handle stays: the model may be trained on. With the best model comes its head."""
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
        """`logged` without PRe's part, None where that is not known exactly; after the metrics of
        the log were read."""
        assert self.handle is not None
        totals = self.handle.totals
        steps = state.global_step - self._logged_at
        resets = totals.resets - self._resets
        self._logged_at = state.global_step
        self._resets = totals.resets
        if not steps or resets != 1:  # somebody else, such as patch_trainer, has read the sums
            return None
        backward = totals.backward
        if not backward.forwards:
            return logged
        count = steps * (torch.distributed.get_world_size() if initialized() else 1)
        return without_pre(logged, backward.loss / count, backward.added / count)

    def _attach(self, model: nn.Module) -> None:
        self.handle = find_handle(model) or apply_pre(model, **self.settings)

    def _join(self, optimizer: Any) -> None:
        """Put the head's parameters into groups that are there: the scheduler has an entry for
        each, so no new one."""
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
    """The folder that `train()` was given, which it tells no callback."""
    frame = inspect.currentframe()
    while frame is not None:
        folder = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(folder, (str, os.PathLike)) and isinstance(
            frame.f_locals.get("self"), Trainer
        ):
            return os.fspath(folder)
        frame = frame.f_back
    return None
