"""The launcher's part inside the process of a script: it attaches PRe to the model of each
`transformers.Trainer`, and prints messages."""

from __future__ import annotations

import contextlib
import importlib.abc
import inspect
import os
import shlex
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .attach import apply_pre
from .follow import Following, put
from .handle import PreHandle, find_handle
from .head_options import NO_GROUPS
from .llava import is_original
from .notices import WARNINGS
from .optimizers import parameters, unwrapped
from .resuming import sharded
from .trainer import patch_trainer

# A model whose config has one of these attributes counts as a vision-language model.
OF_VISION_LANGUAGE = (
    "vision_config",
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
)


class Launch:
    """A context manager: every `transformers.Trainer` constructed inside it gets PRe on its model.

    Args:
        settings: keywords for `apply_pre`.
        head: a folder with a saved head to start from.
        again: launcher arguments for the processes that this one starts. None: these processes are
            not changed.
        followed: whether this process was started by a process under the launcher. Then others may
            train, and this one does not report that nothing was trained.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        head: str | None = None,
        again: Sequence[str] | None = None,
        followed: bool = False,
    ) -> None:
        self.settings = settings
        self.head = head
        self.followed = followed
        self.children = Following(again or ())
        self._follows = again is not None
        # By the model's name: whether its finished trainings had a term of PRe.
        self.trained: dict[str, bool] = {}
        self.begun = False  # whether a training with PRe has begun
        self.told = False  # whether a warning was given
        self._attached = False  # whether a handle was made, also by the script itself
        self._stepped = False  # whether an optimizer has stepped
        self._active = False
        self._patched = False
        # Trainers that have the callback, and models that are not vision-language models.
        self._known = weakref.WeakSet[Any]()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Launch:
        self._active = True
        if self._follows:
            self._undo.enter_context(self.children)
        put(self._undo, PreHandle, "__init__", self._noting)
        self._undo.callback(register_optimizer_step_post_hook(self._first_step).remove)
        if "transformers.trainer" in sys.modules:
            self._patch()
        else:  # importing it here would be too early: scripts first set variables that it reads
            self._undo.enter_context(_Importing("transformers.trainer", self._patch))
        return self

    def __exit__(self, *exception: object) -> None:
        # Our wrappers that others have wrapped stay in place, and do nothing.
        self._active = False
        self._undo.close()

    def _noting(self, construct: Callable[..., None]) -> Any:
        def __init__(handle: PreHandle, *args: Any, **kwargs: Any) -> None:
            self._attached = True
            construct(handle, *args, **kwargs)

        return __init__

    def _patch(self) -> None:
        from transformers import Trainer

        if self._patched:
            return
        self._patched = True
        self._undo.enter_context(patch_trainer()).warns = False

        def constructs(construct: Callable[..., None]) -> Any:
            def __init__(trainer: Any, *args: Any, **kwargs: Any) -> None:
                construct(trainer, *args, **kwargs)
                self._prepare(trainer)

            return __init__

        def trains(train: Callable[..., Any]) -> Any:
            def train_(trainer: Any, *args: Any, **kwargs: Any) -> Any:
                self._prepare(trainer)  # someone may have replaced __init__ or the model
                return train(trainer, *args, **kwargs)

            return train_

        def makes_model(model_init: Callable[..., Any]) -> Any:
            def call_model_init(trainer: Any, *args: Any, **kwargs: Any) -> Any:
                model = model_init(trainer, *args, **kwargs)
                self._attach(trainer, model)
                return model

            return call_model_init

        for name, made in (
            ("__init__", constructs),
            ("train", trains),
            ("call_model_init", makes_model),
        ):
            put(self._undo, Trainer, name, made)

    def _prepare(self, trainer: Any) -> None:
        self._attach(trainer, trainer.model)
        if self._active and trainer not in self._known:
            self._known.add(trainer)
            trainer.add_callback(_callback(self, trainer))

    def _attach(self, trainer: Any, model: nn.Module) -> None:
        if (
            not self._active
            or model is None
            or model in self._known
            or find_handle(model) is not None
        ):
            return
        name = type(_inside(model)).__name__
        if "mask_fn" not in self.settings and not _is_vision_language(model):
            self._known.add(model)
            _say(f"not attached to {name}: it is not a vision-language model")
            return
        with _seeded(model, trainer.args.seed):
            handle = apply_pre(model, **self.settings)
        if self.head is not None:
            try:
                handle.load(self.head)
            except BaseException:
                handle.remove()
                raise
        settings = handle.settings()
        size = sum(p.numel() for p in handle.head.parameters())
        _say(
            f"attached to {name}: layer {', '.join(map(str, handle.layers))} of {handle.depth}, "
            f"λ {handle.weight:g}, anchor {settings['anchor']}, level {settings['level']}, "
            f"head of {size:,} parameters" + (f" from {self.head}" if self.head is not None else "")
        )

    def _first_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Warn at the first optimizer step, rather than after the training, if it has no PRe."""
        if self._stepped or not self._active:
            return
        self._stepped = True
        trainer = _stepping_trainer()
        if trainer is None:
            if not self._attached:
                self._warn("launched own loop")
        elif find_handle(trainer.model) is None:
            known = "launched no images" if trainer.model in self._known else "launched unseen"
            self._warn(
                known, trainer=type(trainer).__name__, model=type(_inside(trainer.model)).__name__
            )

    def report(self, failed: bool = False) -> None:
        """Warn if PRe did nothing. If the script `failed`, its own error says why nothing was
        trained, so this does not."""
        for name in self.trained:
            if not self.trained[name]:
                self._warn("launched without terms", model=name)
        if self.begun or self.told or failed or self.followed or self.children.followed:
            return
        started = f"`{self.children.lost[0]}`" if self.children.lost else "those of multiprocessing"
        words = [word for word in self.children.launcher if not word.startswith("--followed")]
        self._warn(
            "launched nothing",
            started=started,
            line=shlex.join(["python", *words, "--", "train.py"]),
        )

    def _warn(self, key: str, **values: Any) -> None:
        self.told = True
        _say(f"WARNING: {WARNINGS[key].format(**values)}")


def _stepping_trainer() -> Any:
    """The Trainer whose optimizer steps, found on the call stack because subclasses may replace any
    method. None in another loop."""
    trainer = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    frame = inspect.currentframe()
    while trainer is not None and frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, trainer):
            return owner
        frame = frame.f_back
    return None


def _inside(model: Any) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    return model if unwrap is None else unwrap()


def _is_vision_language(model: nn.Module) -> bool:
    inside = _inside(model)
    config = getattr(inside, "config", None)
    return is_original(inside) or any(
        getattr(config, name, None) is not None for name in OF_VISION_LANGUAGE
    )


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Draw the head alike on every rank, without changing the random numbers that the script
    draws."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _callback(launch: Launch, trainer: Any) -> Any:
    from transformers import TrainerCallback

    class KeepsHead(TrainerCallback):
        """Saves the head if the trainer's own way of saving leaves it out, and checks that it is
        trained."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            handle = find_handle(trainer.model)
            if handle is None:
                return
            launch.begun = True
            if sharded(trainer) or more.get("optimizer") is None:
                return
            optimizer = unwrapped(more["optimizer"])
            refused = "optimizer refuses" in handle.notices.given
            if refused or type(optimizer).__name__ in NO_GROUPS:
                return  # a warning was given for this
            held = {id(p) for p in parameters(optimizer)}
            if not all(id(p) in held for p in handle.head.parameters() if p.requires_grad):
                raise RuntimeError(
                    f"optimizer: {type(trainer).__name__}'s does not hold the parameters of "
                    "`pre_head`, so the head would not train; make it after the Trainer, from all "
                    "parameters that require grad"
                )

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            handle = find_handle(trainer.model)
            if handle is not None:
                self.save(args.output_dir)
                name = type(_inside(trainer.model)).__name__
                had_terms = handle.contributed or not handle.weight
                launch.trained[name] = had_terms or launch.trained.get(name, False)

        def save(self, folder: str) -> None:
            handle = find_handle(trainer.model)
            if handle is not None:
                handle.save(folder, trainer.model_wrapped, writes=trainer.args.should_save)

    return KeepsHead()


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"PRe: {text}", file=sys.stderr, flush=True)


class _Importing(importlib.abc.MetaPathFinder):
    """A context manager that calls `then` right after module `name` has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name = name
        self.then = then
        self.active = False

    def __enter__(self) -> _Importing:
        self.active = True
        sys.meta_path.insert(0, self)
        return self

    def __exit__(self, *exception: object) -> None:
        self.active = False
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name or not self.active:
            return None
        others = (
            f.find_spec(name, path, target)
            for f in sys.meta_path
            if f is not self and hasattr(f, "find_spec")
        )
        spec = next((s for s in others if s is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                # A module that is found inside the block may be executed after it.
                if self.active:
                    self.then()

            loader.exec_module = exec_module
        return spec
