"""Run an unmodified training script with PRe: `torchrun … -m pre_kernels.integrations.launch
--layer 16 -- train.py …`.

The script sees the `sys.argv`, `sys.path[0]` and `__main__` that it would get from python. When it
imports `transformers.Trainer`, the launcher patches that class (`patch_trainer`). Every Trainer
that is constructed then gets PRe on its model, before its optimizer is made and before FSDP or
DeepSpeed wrap the model.

The target may also be a command that trains in other processes, such as `… -- trl sft …` or
`… -- accelerate launch train.py`. The launcher follows it into these processes, over any number of
steps.

Modules that import torch are imported when they are needed, since that takes seconds.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib.metadata
import importlib.util
import os
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pre_kernels.screen import starting

from .follow import LAUNCHER, console, is_python, python_flags
from .launch_settings import checked_head, parameters, read_settings, restored, short_options

if TYPE_CHECKING:
    from .launched import Launch

OPTIONS = ("layer", "weight", "config", "set", "head")
LINE = f"python -m {LAUNCHER} … -- train.py"
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
    with restored():
        with starting("before the script started"):
            run, launch = _prepared(arguments)
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


def _prepared(arguments: list[str]) -> tuple[Callable[[], Any], Launch]:
    """A function that runs the target, and the launch inside which it has to run. `sys.argv` and
    `sys.path[0]` are those of the target."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = _parser("--help" in arguments[:cut] or "-h" in arguments[:cut])
    options, unknown = parser.parse_known_args(arguments[:cut])
    if unknown:
        parser.error(f"unrecognized arguments: {unknown[0]}; {_meant(unknown[0])}")
    misplaced = options.target if options.module is None else ["-m", *options.module]
    if misplaced:
        own = arguments[: cut - len(misplaced)]
        line = shlex.join([*own, "--", *misplaced, *arguments[cut + 1 :]])
        start = "…" if "LOCAL_RANK" in os.environ else "python"  # torchrun's options are unknown
        parser.error(
            f"got no -- before {misplaced[0]!r}, want it there: `{start} -m {LAUNCHER} {line}`"
        )
    try:
        run = _target(arguments[cut + 1 :])
        if options.local_rank is not None:
            sys.argv.insert(1, f"--local_rank={options.local_rank}")
        head = checked_head(options.head)
        settings = read_settings(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))
    from .launched import Launch

    return run, Launch(settings, head, _again(options), options.followed is not None)


def _parser(shows_help: bool = False) -> argparse.ArgumentParser:
    shown = [
        f"  {name:<20} default: {p.default}"
        for name, p in (parameters().items() if shows_help else ())
    ]
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
    # A script in front of which `--` is missing, with all that follows it.
    parser.add_argument("target", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    # DeepSpeed's launcher puts --local_rank before all other arguments.
    parser.add_argument("--local_rank", "--local-rank", dest="local_rank", help=argparse.SUPPRESS)
    # The launcher passes --followed to the launchers in processes that it follows: the folder of
    # the modules that settings name.
    parser.add_argument("--followed", help=argparse.SUPPRESS)
    return parser


def _meant(word: str) -> str:
    """What to write instead of an option that the launcher does not have."""
    name = word.lstrip("-").partition("=")[0].replace("-", "_")
    near = difflib.get_close_matches(name, [*OPTIONS, *parameters()], n=1)
    if not near:
        return f"want an option of --help; options of the script go behind it: `{LINE} {word}`"
    if near[0] in OPTIONS:
        return f"did you mean --{near[0]}?"
    return f"want `--set {near[0]}=…` for a setting of apply_pre"


def _again(options: argparse.Namespace) -> list[str]:
    """Launcher arguments that give another process the same settings, even if its working directory
    is another."""
    words = [f"--{name}={value}" for name, value in short_options(options)]
    words += [f"--set={pair}" for pair in options.set]
    words += [
        f"--{n}={os.path.abspath(path)}"
        for n in ("config", "head")
        if (path := getattr(options, n)) is not None
    ]
    return [*words, f"--followed={options.followed or os.path.abspath(sys.path[0])}"]


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
    if script.startswith("-"):
        raise ValueError(
            f"script: got {script!r}, want a script, -m module or command first behind the --; "
            f"options of the launcher go before it: `{LINE}`"
        )
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


if __name__ == "__main__":
    main()
