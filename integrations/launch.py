"""Run a training script as it is, with PRe: `torchrun … -m pre_kernels.integrations.launch --layer 16 -- train.py …`.

The script sees the `sys.argv`, `sys.path[0]` and `__main__` that python gives it. Once it imports
`transformers.Trainer`, that is patched (`patch_trainer`), and each one constructed gets PRe on its model: before its
optimizer, and before FSDP or DeepSpeed wrap it.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from . import checkpoint
from .attach import apply_pre
from .checkpoint import CONFIG, WEIGHTS
from .handle import find_handle
from .llava import is_original
from .trainer import patch_trainer, sharded

PARAMETERS = {n: p for n, p in inspect.signature(apply_pre).parameters.items() if n != "model"}
OF_THE_MODEL = ("text_model", "layers")  # name modules of the model, so nothing else can check them
EXAMPLES = """\
settings (--set key=value, or the keys of --config), see apply_pre:
{settings}

examples:
  torchrun --nproc-per-node 8 -m pre_kernels.integrations.launch --layer 16 --weight 0.5 -- train.py --lr 2e-5
  torchrun --nproc-per-node 8 -m pre_kernels.integrations.launch --config pre.yaml -- -m package.train run.yaml
  deepspeed --module pre_kernels.integrations.launch --set loss=mse --set level=image -- train.py --deepspeed z3.json
  python -m pre_kernels.integrations.launch --set anchor=my.module:dino --set anchor_dim=768 -- train.py
  python -m pre_kernels.integrations.launch --layer [8,16] -- train.py
  python -m pre_kernels.integrations.launch --layer 16 --head stage1/ -- some-console-command train.yaml

pre.yaml:
  layer: 16
  weight: 0.5
  hidden_dim: 4096
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the target after `--`; what it raises, `SystemExit` too, comes through."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:cut])
    with _restored():
        try:
            run = _target(arguments[cut + 1 :])
            if given.local_rank is not None:
                sys.argv.insert(1, f"--local_rank={given.local_rank}")
            head = _checked_head(given.head)
            launch = Launch(_settings(given), head)
        except (ValueError, TypeError, OSError, ImportError) as error:
            parser.error(str(error))
        with launch:
            run()
        launch.report()


def _parser() -> argparse.ArgumentParser:
    shown = [f"  {name:<20} default: {p.default}" for name, p in PARAMETERS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m pre_kernels.integrations.launch",
        usage="%(prog)s [options] -- script.py | -m module | command [its arguments]",
        description="Train with Predictive Regularization (PRe) without changing the training script.",
        epilog=EXAMPLES.format(settings="\n".join(shown)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--layer", metavar="L", help="l in 1..L, or [l, ...]: which decoder layers' output PRe reads")
    parser.add_argument("--weight", metavar="W", help="λ, the weight of L_PRe")
    parser.add_argument("--config", metavar="FILE", help="YAML with settings; options given here win over it")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="a setting; may be repeated")
    parser.add_argument("--head", metavar="DIR", help="start from the head saved there, e.g. stage 1's output_dir")
    # deepspeed's launcher puts it before all other arguments
    parser.add_argument("--local_rank", "--local-rank", dest="local_rank", help=argparse.SUPPRESS)
    return parser


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    argv, path = sys.argv, list(sys.path)
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _target(words: list[str]) -> Callable[[], Any]:
    """What to run; `sys.argv` and `sys.path[0]` are from here on as python sets them for it."""
    if not words or words == ["-m"]:
        raise ValueError("nothing to run: want `-- script.py …`, `-- -m module …` or `-- command …` at the end")
    if words[0] == "-m":
        name = words[1]
        if not _is_module(name):
            raise ValueError(f"-m: no module named {name!r} can be run")
        sys.argv = words[1:]
        return functools.partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    script = words[0]
    sys.argv = words
    if os.path.isfile(script):
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = os.path.dirname(os.path.realpath(script))
        return functools.partial(runpy.run_path, script, run_name="__main__")
    for command in importlib.metadata.entry_points(group="console_scripts", name=script):
        return lambda: sys.exit(command.load()())
    raise ValueError(f"script: {script!r} is neither a file nor an installed console command")


def _is_module(name: str) -> bool:
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return False
        raise
    return spec is not None


def _checked_head(folder: str | None) -> str | None:
    for name in (CONFIG, WEIGHTS) if folder is not None else ():
        if not os.path.isfile(path := os.path.join(str(folder), name)):
            raise ValueError(f"--head: {path!r} is missing; want a folder that handle.save() wrote")
    return folder


def _settings(given: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `apply_pre`, all of them checked as far as that is possible without the model."""
    import yaml

    found: dict[str, Any] = {}
    if given.config is not None:
        try:
            with open(given.config, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config: {given.config!r} is no valid YAML: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"--config: {given.config!r} holds {type(config).__name__}, want a mapping of settings")
        found |= {_known(name, f"--config {given.config}"): value for name, value in config.items()}
    for pair in [*given.set, *(f"{n}={v}" for n in ("layer", "weight") if (v := getattr(given, n)) is not None)]:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: got {pair!r}, want key=value")
        try:
            found[_known(name, "--set")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set: {name}: {text!r} is no valid YAML value: {error}") from error
    settings = {name: _value(name, value) for name, value in found.items()}
    _rehearse(settings)
    return settings


def _known(name: Any, where: str) -> str:
    if name in PARAMETERS:
        return str(name)
    near = difflib.get_close_matches(str(name), PARAMETERS, n=3)
    meant = f"; did you mean {' or '.join(near)}?" if near else f"; want one of {', '.join(PARAMETERS)}"
    raise ValueError(f"{where}: unknown setting {name!r}{meant}")


def _value(name: str, value: Any) -> Any:
    """A YAML value as the parameter wants it: a number YAML reads as text, a dtype, a callable as "module:name"."""
    wanted = str(PARAMETERS[name].annotation)
    if not isinstance(value, str):
        return value
    if "Callable" in wanted and ":" in value:
        return _import(name, value)
    if "dtype" in wanted and isinstance(dtype := getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        return dtype
    if "float" in wanted:  # YAML 1.1 takes 1e-3 for text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _import(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: cannot import {path!r}: {error}") from error
    return found


def _rehearse(settings: dict[str, Any]) -> None:
    """`apply_pre` on a stand-in without data, whose checks of its arguments then come before any work."""
    layer = settings.get("layer")
    numbers = [n for n in (layer if isinstance(layer, list) else [layer]) if isinstance(n, int)]
    depth = min(max([2, *numbers]), 10_000)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 8, device="meta")] * depth)
    model.multi_modal_projector = nn.Linear(8, 8, device="meta")
    config = {"model_type": "llava", "image_token_id": 1, "hidden_size": 8, "num_hidden_layers": depth}
    model.config = SimpleNamespace(**config)
    apply_pre(model, **{n: v for n, v in settings.items() if n not in OF_THE_MODEL}).remove()


class Launch:
    """Inside it every `transformers.Trainer` that is constructed gets PRe on its model.

    Args:
        settings: keywords for `apply_pre`.
        head: a folder with a saved head to start from.
    """

    def __init__(self, settings: dict[str, Any], head: str | None = None) -> None:
        self.settings, self.head = settings, head
        self.trained: dict[str, bool] = {}
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Launch:
        if "transformers.trainer" in sys.modules:
            self._patch()
        else:  # not yet: scripts set what transformers reads when it is imported
            finder = _Importing("transformers.trainer", self._patch)
            sys.meta_path.insert(0, finder)
            self._undo.callback(sys.meta_path.remove, finder)
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def _patch(self) -> None:
        from transformers import Trainer

        self._undo.enter_context(patch_trainer())
        target: Any = Trainer
        construct, model_init = target.__init__, target.call_model_init

        @functools.wraps(construct)
        def init(trainer: Any, *args: Any, **kwargs: Any) -> None:
            construct(trainer, *args, **kwargs)
            self._attach(trainer, trainer.model)
            trainer.add_callback(_callback(self, trainer))

        @functools.wraps(model_init)
        def call_model_init(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            model = model_init(trainer, *args, **kwargs)
            self._attach(trainer, model)
            return model

        for name, method in (("__init__", init), ("call_model_init", call_model_init)):
            self._undo.callback(setattr, target, name, getattr(target, name))
            setattr(target, name, method)

    def _attach(self, trainer: Any, model: nn.Module) -> None:
        name = type(_inside(model)).__name__
        if find_handle(model) is not None:
            return
        if "mask_fn" not in self.settings and not _is_vision_language(model):
            _say(f"not attached to {name}: it is no vision-language model")
            return
        with _seeded(model, trainer.args.seed):
            handle = apply_pre(model, **self.settings)
        if self.head is not None:
            try:
                handle.load(self.head)
            except BaseException:
                handle.remove()
                raise
        depth, settings = len(handle._objective.parts.layers), handle.settings()
        size = sum(p.numel() for p in handle.head.parameters())
        _say(
            f"attached to {name}: layer {', '.join(map(str, handle.layers))} of {depth}, λ {handle.weight:g}, "
            f"anchor {settings['anchor']}, level {settings['level']}, head of {size:,} parameters"
            + (f" from {self.head}" if self.head is not None else "")
        )

    def report(self) -> None:
        """Say loudly if PRe did nothing."""
        if not self.trained:
            _say(
                "WARNING: nothing was trained with PRe: in this process the script trained no vision-language model by "
                "a transformers.Trainer; name the script that does, not a command that starts it in other processes"
            )
        for name in self.trained:
            if not self.trained[name]:
                _say(f"WARNING: {name} was trained and no batch had a term of PRe: had it visual tokens?")


def _inside(model: Any) -> Any:
    unwrap = getattr(model, "get_base_model", None)  # PEFT's
    return model if unwrap is None else unwrap()


def _is_vision_language(model: nn.Module) -> bool:
    config = getattr(_inside(model), "config", None)
    return is_original(_inside(model)) or any(
        getattr(config, name, None) is not None
        for name in (
            "vision_config",
            *(f"{kind}_token_{suffix}" for kind in ("image", "video") for suffix in ("id", "index")),
        )
    )


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """The head is drawn alike on every rank, and what the script draws is what it draws without PRe."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _callback(launch: Launch, trainer: Any) -> Any:
    from transformers import TrainerCallback

    class KeepsHead(TrainerCallback):
        """Saves the head where a trainer's own way of saving leaves it out; sees to it that it is trained."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            handle = find_handle(trainer.model)
            if handle is None:
                return
            launch.trained.setdefault(type(_inside(trainer.model)).__name__, False)
            if sharded(trainer) or more.get("optimizer") is None:
                return
            held = {id(p) for group in more["optimizer"].param_groups for p in group["params"]}
            if not all(id(p) in held for p in handle.head.parameters() if p.requires_grad):
                raise RuntimeError(
                    f"optimizer: {type(trainer).__name__}'s does not hold the parameters of `pre_head`, so the head "
                    "would not train; make it after the Trainer, from all parameters that require grad"
                )

        def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.save(os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))

        def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            handle = find_handle(trainer.model)
            if handle is not None:
                self.save(args.output_dir)
                launch.trained[type(_inside(trainer.model)).__name__] |= handle.contributed or not handle.weight

        def save(self, folder: str) -> None:
            handle = find_handle(trainer.model)
            if handle is not None:
                checkpoint.save(handle, folder, trainer.model_wrapped, trainer.args.should_save)

    return KeepsHead()


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"PRe: {text}", file=sys.stderr, flush=True)


class _Importing(importlib.abc.MetaPathFinder):
    """Calls `then` when module `name` has been imported."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        others = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for s in others if s is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.then()

            loader.exec_module = exec_module
        return spec


if __name__ == "__main__":
    main()
