"""PRe in a Lightning training: λ along its schedule, the log, and checkpoints whose model has no
keys of the head."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback

from .agreement import agree_on_training
from .handle import ATTRIBUTE, PreHandle, find_handle
from .metrics import saw_tokens, to_log

STATE = "pre_head"  # the key of the head in a checkpoint


class PreLightningCallback(Callback):
    """Use this with `apply_pre(self.model)` in a LightningModule's `__init__` or `configure_model`.

    ```python
    lightning.Trainer(max_steps=2, callbacks=[PreLightningCallback()]).fit(module, loader)
    ```

    Every `log_every_n_steps` optimizer steps, counted over epochs, it logs `handle.metrics()` over
    all processes, with "task_loss" as the mean of the forwards' `output.loss` without PRe. Without
    visual tokens since the last log it logs only "task_loss". It sets `handle.progress`, and keeps
    the head under its own key in the checkpoint: `checkpoint["state_dict"]` has the keys of the
    model without PRe, and resuming restores the head. Strategies that write their own checkpoints
    (DeepSpeed, sharded FSDP) keep the head in those.

    Raises:
        RuntimeError: at the start of a training whose module has no handle, or whose model is in
            eval mode, in which `from_pretrained` returns it and Lightning leaves it.
    """

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Raise for a module without PRe, or with another one than on other processes, before it is
        trained."""
        if trainer.world_size > 1:
            agree_on_training(find_handle(pl_module))
        if find_handle(pl_module) is None:
            raise RuntimeError(
                f"PreLightningCallback: {type(pl_module).__name__} has no PRe; call apply_pre on "
                "its model in __init__"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from the step at which the training resumes."""
        self._periods = _periods(trainer)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set λ to its value at the middle of the step."""
        handle = _handle(pl_module)
        steps = trainer.estimated_stepping_batches
        if handle.enabled and not handle.model.training:
            raise RuntimeError(
                f"PreLightningCallback: {type(handle.model).__name__} is in eval mode, as "
                "from_pretrained gives it and Lightning leaves it, so L_PRe would not be added; "
                "call its train() in the module's __init__"
            )
        handle.progress = min((trainer.global_step + 0.5) / max(steps, 1), 1.0)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the metrics since the last log."""
        # Several optimizers may take several steps in a batch, and accumulation none.
        periods = _periods(trainer)
        if periods == self._periods:
            return
        self._periods = periods
        metrics = _handle(pl_module).metrics(
            combine=lambda sums: trainer.strategy.reduce(sums, reduce_op="sum")
        )
        if saw_tokens(metrics):
            metrics = to_log(metrics)
        else:
            metrics = {name: metrics[name] for name in ("task_loss",) if name in metrics}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in metrics.items()}
        )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Move the head from the module's keys to its own key."""
        state = checkpoint["state_dict"]
        checkpoint[STATE] = {
            key: state.pop(key) for key in list(state) if ATTRIBUTE in key.split(".")
        }

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Lightning loads a checkpoint's model before it calls callbacks, so missing keys of the
        head are filled with the head's present values."""
        if find_handle(pl_module) is None:
            return

        def as_it_is(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
            for name, tensor in module.state_dict().items():
                if ATTRIBUTE in name.split("."):
                    state.setdefault(prefix + name, tensor)

        self._hook = pl_module.register_load_state_dict_pre_hook(as_it_is)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hook off."""
        hook = vars(self).pop("_hook", None)
        if hook is not None:
            hook.remove()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restore the head. ValueError if the checkpoint has one of other parameters."""
        head = checkpoint.get(STATE)
        if head is None:
            _handle(pl_module).notices.warn(
                "no head in the checkpoint", folder="it", error=f"no key {STATE!r}"
            )
            return
        own = {n for n in pl_module.state_dict() if ATTRIBUTE in n.split(".")}
        # Strategies that write their own checkpoints leave no keys here, and a module without PRe
        # may be tested with a checkpoint that has a head.
        if head and own and head.keys() != own:
            raise ValueError(
                f"checkpoint: got a head of {sorted(head)}, want {sorted(own)}; call apply_pre "
                "with the settings of the saved head, or upgrade pre-kernels if a newer version "
                "wrote it"
            )
        pl_module.load_state_dict(head, strict=False)


def _periods(trainer: Any) -> int:
    """The number of times that `log_every_n_steps` steps have been taken. 0 steps: never log."""
    every = trainer.log_every_n_steps
    return int(trainer.global_step // every) if every else 0


def _handle(module: Any) -> PreHandle:
    handle = find_handle(module)
    assert handle is not None
    return handle
