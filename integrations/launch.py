"""Run an unmodified training script with PRe: `torchrun … -m pre_kernels.integrations.launch
--layer 16 -- train.py …`.

The script sees the `sys.argv`, `sys.path[0]` and `__main__` that it would get from python. When it
imports `transformers.Trainer`, the launcher patches that class (`patch_trainer`). Every Trainer
that is constructed then gets PRe on its model, before its optimizer is made and before FSDP or
DeepSpeed wrap the model.

The target may also be a command that trains in other processes, such as `… -- trl sft …` or
`… -- accelerate launch train.py`. The launcher follows it into these processes, over any number of
steps.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .attach import apply_pre
from .checkpoint import CONFIG, WEIGHTS
from .follow import LAUNCHER, console, is_python, python_flags
from .launched import Launch

PARAMETERS = {n: p for n, p in inspect.signature(apply_pre).parameters.items() if n != "model"}
LINE = f"python -m {LAUNCHER} … -- train.py"
# These settings name modules of the model, so they cannot be checked before the model exists.
OF_THE_MODEL = ("text_model", "layers")
EXAMPLES = """\
settings (--set key=value, or the keys of --config), see apply_pre:
{settings}

examples:
  torchrun --nproc-per-node 8 -m {launcher} --layer 16 --weight 0.5 -- train.py --lr 2e-5
  torchrun --nproc-per-node 8 -m {launcher} --config pre.yaml -- -m package.train run.yaml
  deepspeed --module {launcher} --set loss=mse --set level=image -- train.py --deepspeed z3.json
  python -m {launcher} --set anchor=my.module:dino --set anchor_dim=768 -- train.py
  python -m {launcher} --layer [8,16] -- train.py
  python -m {launcher} --layer 16 --head stage1/ -- llamafactory-cli train run.yaml

the launcher follows commands that train in other processes (accelerate, torchrun, deepspeed, trl, \
axolotl,
llamafactory-cli, swift, ...):
  python -m {launcher} --config pre.yaml -- accelerate launch --num_processes 8 train.py --lr 2e-5
  python -m {launcher} --config pre.yaml -- trl sft --config run.yaml

pre.yaml:
  layer: 16
  weight: 0.5
  hidden_dim: 4096
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the target after `--`. Exceptions of the target pass through, `SystemExit` included."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    with _restored():
        try:
            run = _target(arguments[cut + 1 :])
            if options.local_rank is not None:
                sys.argv.insert(1, f"--local_rank={options.local_rank}")
            head = _checked_head(options.head)
            settings = _settings(options)
            launch = Launch(settings, head, _again(options), options.followed is not None)
        except (ValueError, TypeError, OSError, ImportError) as error:
            parser.error(str(error))
        failed = True
        try:
            with launch:
                run()
            failed = False
        except SystemExit as left:
            failed = left.code not in (None, 0)
            raise
        finally:
            launch.report(failed)


def _parser() -> argparse.ArgumentParser:
    shown = [f"  {name:<20} default: {p.default}" for name, p in PARAMETERS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m pre_kernels.integrations.launch",
        usage="%(prog)s [options] -- script.py | -m module | command [its arguments]",
        description=(
            "Train with Predictive Regularization (PRe) without changing the training script."
        ),
        epilog=EXAMPLES.format(settings="\n".join(shown), launcher=LAUNCHER),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--layer",
        metavar="L",
        help="the decoder layers whose output PRe reads: l in 1..L, or [l, ...]",
    )
    parser.add_argument("--weight", metavar="W", help="λ, the weight of L_PRe")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings; --layer, --weight and --set override it",
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="one setting; repeatable"
    )
    parser.add_argument(
        "--head",
        metavar="DIR",
        help="start from the head saved in DIR, such as the output_dir of stage 1",
    )
    # DeepSpeed's launcher puts --local_rank before all other arguments.
    parser.add_argument("--local_rank", "--local-rank", dest="local_rank", help=argparse.SUPPRESS)
    # The launcher passes --followed to the launchers in processes that it follows: the folder of
    # the modules that settings name.
    parser.add_argument("--followed", help=argparse.SUPPRESS)
    return parser


def _again(options: argparse.Namespace) -> list[str]:
    """Launcher arguments that give another process the same settings, even if its working directory
    is another."""
    words = [f"--{name}={value}" for name, value in _short_options(options)]
    words += [f"--set={pair}" for pair in options.set]
    words += [
        f"--{n}={os.path.abspath(path)}"
        for n in ("config", "head")
        if (path := getattr(options, n)) is not None
    ]
    return [*words, f"--followed={options.followed or os.path.abspath(sys.path[0])}"]


def _short_options(options: argparse.Namespace) -> list[tuple[str, str]]:
    """The names and texts of the settings that were given by `--layer` and `--weight`."""
    values = ((name, getattr(options, name)) for name in ("layer", "weight"))
    return [(name, value) for name, value in values if value is not None]


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    argv = sys.argv
    path = list(sys.path)
    try:
        yield
    finally:
        sys.argv = argv
        sys.path[:] = path


def _target(words: list[str]) -> Callable[[], Any]:
    """A function that runs the target. `sys.argv` and `sys.path[0]` are set to the values that
    python would give it."""
    if not words or words == ["-m"]:
        raise ValueError(
            "nothing to run: want `-- script.py …`, `-- -m module …` or `-- command …` at the end"
        )
    if words[0] == "-m":
        name = words[1]
        if not _is_module(name):
            raise ValueError(f"-m: no module named {name!r} can be run")
        sys.argv = words[1:]
        return functools.partial(runpy.run_module, name, run_name="__main__", alter_sys=True)
    script = words[0]
    if is_python(script):
        cut = python_flags(words[1:])
        if cut is None or set(words[1 : 1 + cut]) - {"-u"}:
            raise ValueError(
                f"script: got {' '.join(words[:3])!r}, want a script or -m module; put python's "
                f"own flags behind the python of `{LINE}`"
            )
        return _target(words[1 + cut :])
    sys.argv = words
    path: str | None = script
    if not os.path.isfile(script) or script.endswith(".sh"):
        _check_followable(script)
        for command in importlib.metadata.entry_points(group="console_scripts", name=script):
            return lambda: sys.exit(command.load()())
        path = console(script)
    if path is None:
        is_program = shutil.which(script) is not None
        raise ValueError(
            f"script: {script!r} is not a python program; put it in front: `{script} … {LINE}`"
            if is_program
            else f"script: {script!r} is neither a file nor an installed console command"
        )
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    return functools.partial(runpy.run_path, path, run_name="__main__")


def _check_followable(script: str) -> None:
    """Raise a ValueError for a command whose processes the launcher cannot follow. The error has
    the line that works instead."""
    name = os.path.basename(script)
    if name.endswith(".sh") or name in ("sh", "bash", "dash", "zsh"):
        raise ValueError(
            f"script: {script!r} is a shell or a shell script, which cannot be followed; write "
            f"`{LINE}` into the shell script where it starts python"
        )
    if name in ("ray", "sbatch", "sky", "modal", "docker", "kubectl"):
        raise ValueError(
            f"script: {script!r} runs its command elsewhere, where it cannot be followed; make "
            f"that command `{LINE}`"
        )


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


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `apply_pre`, checked as far as possible without the model."""
    import yaml

    values: dict[str, Any] = {}
    if options.config is not None:
        try:
            with open(options.config, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--config: {options.config!r} is not valid YAML: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(
                f"--config: {options.config!r} holds {type(config).__name__}, want a mapping of "
                "settings"
            )
        where = f"--config {options.config}"
        values |= {_known(name, where): value for name, value in config.items()}
    for pair in [*options.set, *(f"{name}={value}" for name, value in _short_options(options))]:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"--set: got {pair!r}, want key=value")
        try:
            values[_known(name, "--set")] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"--set: {name}: {text!r} is not a valid YAML value: {error}"
            ) from error
    with _restored():
        sys.path += [] if options.followed is None else [options.followed]
        settings = {name: _value(name, value) for name, value in values.items()}
    _rehearse(settings)
    return settings


def _known(name: Any, where: str) -> str:
    if name in PARAMETERS:
        return str(name)
    near = difflib.get_close_matches(str(name), PARAMETERS, n=3)
    meant = (
        f"; did you mean {' or '.join(near)}?" if near else f"; want one of {', '.join(PARAMETERS)}"
    )
    raise ValueError(f"{where}: unknown setting {name!r}{meant}")


def _value(name: str, value: Any) -> Any:
    """A YAML value, converted to the type of the parameter: a number that YAML reads as text, a
    dtype, or a callable given as "module:name"."""
    wanted = str(PARAMETERS[name].annotation)
    if not isinstance(value, str):
        return value
    if "Callable" in wanted and ":" in value:
        return _import(name, value)
    if "dtype" in wanted and isinstance(
        dtype := getattr(torch, value.removeprefix("torch."), None), torch.dtype
    ):
        return dtype
    if "float" in wanted:  # YAML 1.1 takes 1e-3 for text
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _import(name: str, path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name}: cannot import {path!r}: {error}") from error
    return value


def _rehearse(settings: dict[str, Any]) -> None:
    """Call `apply_pre` on a stand-in without data, so that wrong arguments raise before any
    work."""
    layer = settings.get("layer")
    numbers = [n for n in (layer if isinstance(layer, list) else [layer]) if isinstance(n, int)]
    depth = min(max([2, *numbers]), 10_000)
    model: Any = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, 8, device="meta")] * depth)
    model.multi_modal_projector = nn.Linear(8, 8, device="meta")
    config = {
        "model_type": "llava",
        "image_token_id": 1,
        "hidden_size": 8,
        "num_hidden_layers": depth,
    }
    model.config = SimpleNamespace(**config)
    apply_pre(model, **{n: v for n, v in settings.items() if n not in OF_THE_MODEL}).remove()


if __name__ == "__main__":
    main()
