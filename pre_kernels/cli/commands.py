"""The commands: checks of what the machine has, the work, and how it ends."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from pre_kernels import screen
from pre_kernels.check import command as checking
from pre_kernels.diagnostics.run import command
from pre_kernels.fused.products import fastest_dtype
from pre_kernels.loss import unavailable

from .facts import facts, installed

EXTRA = "pip install 'pre-kernels[demo]'"
REAL_EXTRA = "pip install 'pre-kernels[real]'"
MODELS = ("transformers", "accelerate", "safetensors", "numpy")
# These are the modules that each command imports.
DEMO = (
    "einops",
    "sklearn",
    "matplotlib",
    "rich",
    "jinja2",
    "PIL",
    "scipy",
    "threadpoolctl",
    *MODELS,
)
NEEDED = {
    "the demo": DEMO,
    "demo --real": (*DEMO, "gguf", "efficientnet_lite_pytorch", "psutil"),
    "diagnose": ("einops", "matplotlib", "rich", "jinja2", "PIL", *MODELS),
    "trace": ("matplotlib",),
}
# These modules come from packages of another name.
PACKAGES = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
}


def run(options: argparse.Namespace) -> int:
    """Run the command that the options name, and return the exit status."""
    commands = {
        "check": check,
        "demo": demo,
        "diagnose": diagnose,
        "trace": trace,
        "tune": tune,
        "env": env,
    }
    return commands[options.command](options)


def demo(options: argparse.Namespace) -> int:
    """Check the arguments and the packages, then run the demo."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return fail("--device: got cuda, but torch sees no CUDA device; want cpu or auto")
    if options.real:
        return real_demo(options)
    for name in ("fetch", "parts", "llm", "anchor"):
        if getattr(options, name):
            return fail(f"--{name} needs --real")
    from pre_kernels.demo.settings import QUICK, Settings

    settings = QUICK if options.quick else Settings()
    asked = {name: getattr(options, name) for name in ("seeds", "layer", "weight", "head")}
    settings = replace(
        settings, **{name: value for name, value in asked.items() if value is not None}
    )
    if not 1 <= settings.pre_layer <= settings.layers:
        return fail(
            f"--layer: got {settings.pre_layer}, want 1..{settings.layers}, the layers of the "
            "demo's LLM"
        )
    out = options.out or Path("demo-quick-out" if options.quick else "demo-out")
    if problem := missing("the demo", EXTRA) or unwritable(out):
        return fail(problem)

    from pre_kernels.demo import Unsaved

    with screen.starting():
        from pre_kernels.demo.run import run

    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    jobs = options.jobs or (1 if device == "cuda" else os.cpu_count() or 1)
    try:
        run(settings, device, out, jobs=min(jobs, settings.seeds))
    except Unsaved as error:
        screen.say(f"error: {error}")
        return 1
    return 0


def real_demo(options: argparse.Namespace) -> int:
    """Check the arguments, the packages and the parts, then run the demo on real parts."""
    out = options.out or Path("demo-real-quick-out" if options.quick else "demo-real-out")
    if problem := missing("demo --real", REAL_EXTRA) or unwritable(out):
        return fail(problem)

    from pre_kernels.demo import Unsaved
    from pre_kernels.demo.settings import HEADS

    with screen.starting():
        from pre_kernels.demo.real import pieces
        from pre_kernels.demo.real.arm import Arm
        from pre_kernels.demo.real.llms import LLMS
        from pre_kernels.demo.real.run import run
        from pre_kernels.demo.real.settings import QUICK, Settings

    asked = {name: getattr(options, name) for name in ("layer", "weight", "anchor")}
    arm = Arm(
        {name: value for name, value in asked.items() if value is not None}
        | HEADS[options.head or "pre"]
    )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    jobs = options.jobs or (1 if device == "cuda" else os.cpu_count() or 1)
    bf16 = fastest_dtype(torch.bfloat16, torch.device(device)) == torch.bfloat16
    settings = replace(
        QUICK if options.quick else Settings(), llm=options.llm or Settings.llm, bf16=bf16
    )
    parts = pieces.Pieces(options.parts or pieces.default_folder())
    llm = LLMS[settings.llm]
    if options.layer is not None and not 1 <= options.layer <= llm.layers:
        return fail(f"--layer: got {options.layer}, want 1..{llm.layers}, the layers of {llm.name}")
    try:
        if options.fetch:
            if problem := unwritable(parts.folder, "--parts"):
                return fail(problem)
            parts.fetch(llm, print)
        run(settings, arm, options.seeds or 1, parts, device, out, jobs=jobs)
    except ValueError as error:
        return fail(str(error))
    except Unsaved as error:
        screen.say(f"error: {error}")
        return 1
    return 0


def check(options: argparse.Namespace) -> int:
    """Check and time the loss on this machine."""
    if problem := unwritable(options.out):
        return fail(problem)
    try:
        return checking.check(options, facts())
    except (ValueError, OSError) as error:
        return failed(error)


def diagnose(options: argparse.Namespace) -> int:
    """Measure a model's layers on images."""
    if problem := missing("diagnose", "pip install 'pre-kernels[diagnose]'") or unwritable(
        options.out
    ):
        return fail(problem)
    try:
        command.diagnose(options, options.arguments)
    except (ValueError, OSError, ImportError) as error:
        return failed(error)
    return 0


def trace(options: argparse.Namespace) -> int:
    """Plot a training's score against its probe accuracy, or the losses of trainings."""
    if problem := missing("trace", "pip install 'pre-kernels[trace]'"):
        return fail(problem)
    try:
        command.trace(options)
    except (ValueError, OSError) as error:
        return failed(error)
    return 0


def missing(name: str, extra: str) -> str | None:
    """Name the packages that a command needs and how to install them; None if all are there."""
    absent = [module for module in NEEDED[name] if importlib.util.find_spec(module) is None]
    packages = [PACKAGES.get(module, module) for module in absent]
    return f"{name} needs {', '.join(packages)}: {extra}" if packages else None


def unwritable(folder: Path, argument: str = "--out") -> str | None:
    """Say why no file can be written into `folder`, or return None. Makes the folder if it is
    missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        reason = error.strerror or error
        return f"{argument}: cannot write into {folder}: {reason}; choose another folder"


def tune(options: argparse.Namespace) -> int:
    """Time the tiles of the Triton matmuls and save the best."""
    if not torch.cuda.is_available():
        return fail("tune needs a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    if reason := unavailable(device, dtype):
        return fail(f"tune: {reason}")

    from pre_kernels.fused.kernels import tiles
    from pre_kernels.fused.kernels.tune import tune

    if problem := unwritable(tiles.cache_file().parent, "PRE_KERNELS_CACHE"):
        return fail(problem)
    for tuned in tune(options.width or [4096], dtype, device):
        shipped = next(iter(tuned.times))
        best = tuned.times[tuned.best]
        gain = tuned.times[shipped] / best
        print(f"{tuned.name}: {tuple(tuned.best)}, {best:.3f} ms", end="")
        print(f" ({gain:.2f} × as fast as {tuple(shipped)})", flush=True)
    print(f"saved in {tiles.cache_file()}")
    return 0


def env(options: argparse.Namespace) -> int:
    """Print the facts for a bug report, or the table of models."""
    if options.models:
        with screen.starting():
            from pre_kernels.integrations import family_table

        print(
            family_table.markdown()
            if options.markdown
            else family_table.text(installed("transformers"))
        )
        return 0
    if options.markdown:
        return fail("--markdown needs --models")
    rows = facts()
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def failed(error: Exception) -> int:
    """Print the error. A full disk or a closed pipe is not a wrong argument: `screen.run` reports
    it."""
    if not isinstance(error, OSError):
        return fail(str(error))
    if screen.is_disk(error) or isinstance(error, BrokenPipeError):
        raise error
    return fail(screen.why(error))


def fail(message: str) -> int:
    """Print the error, and return argparse's exit status for wrong arguments."""
    screen.say(f"error: {message}")
    return 2
