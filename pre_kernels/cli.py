"""The command line: `pre-kernels check | demo | diagnose | trace | tune | env`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from . import __version__, screen
from .check import command as checking
from .diagnostics.run import command
from .fused.products import half_precision
from .loss import unavailable

EXTRA = "pip install 'pre-kernels[demo]'"
MODELS = ("transformers", "accelerate", "safetensors", "numpy")
# These are the modules that each command imports.
NEEDED = {
    "the demo": (
        "einops",
        "sklearn",
        "matplotlib",
        "rich",
        "jinja2",
        "PIL",
        "scipy",
        "threadpoolctl",
        *MODELS,
    ),
    "diagnose": ("einops", "matplotlib", "rich", "jinja2", "PIL", *MODELS),
    "trace": ("matplotlib",),
}
# These modules come from packages of another name.
PACKAGES = {"sklearn": "scikit-learn", "PIL": "pillow"}
EXAMPLES = """\
examples:
  pre-kernels check                       check and time the loss on this machine
  pre-kernels demo                        train without and with PRe, then show the table and save
                                          the plot
  pre-kernels demo --quick                smoke test: too short to show an effect
  pre-kernels demo --seeds 5 --out runs   more seeds, files into runs/
  pre-kernels demo --layer 8 --weight 1   regularise the last layer instead, twice as strongly
  pre-kernels diagnose MODEL IMAGES       write an HTML report on the visual tokens of each layer
  pre-kernels trace out/                  score against probe accuracy along a training
  pre-kernels trace a/ b/ --loss          draw the task loss of two trainings in one plot
  pre-kernels tune --width 4096           time the tiles of the Triton matmuls and save the best
  pre-kernels env                         print versions and devices, for a bug report
  pre-kernels env --models                list the vision-language models that PRe attaches to
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status."""
    return screen.run(lambda: perform(sys.argv[1:] if arguments is None else arguments))


def perform(arguments: Sequence[str]) -> int:
    """Parse the arguments and run the command that they name."""
    options = parser().parse_args(arguments)
    options.arguments = list(arguments)
    run = {
        "check": check,
        "demo": demo,
        "diagnose": diagnose,
        "trace": trace,
        "tune": tune,
        "env": env,
    }[options.command]
    return run(options)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, whose help texts `--help` prints."""
    top = argparse.ArgumentParser(
        prog="pre-kernels",
        description="Predictive Regularization (PRe) for vision-language models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    checking.add_parser(commands, width)
    show = commands.add_parser(
        "demo",
        help="train a tiny LLaVA without and with PRe and compare them",
        description="Train a tiny LLaVA on scenes of handwritten digits without and with PRe, "
        "several seeds each, and compare task accuracy, L_PRe, linear probes and the semantic "
        "contrast ratio over depth. This takes minutes on a CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    show.add_argument("--seeds", type=whole, metavar="N", help="run seeds 0 .. N-1 (default: 2)")
    show.add_argument(
        "--quick", action="store_true", help="smoke test: too short to show an effect"
    )
    show.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for the results (default: %(default)s)",
    )
    show.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto (the default) takes a GPU if there is one",
    )
    show.add_argument(
        "--jobs",
        type=whole,
        metavar="N",
        help="how many seeds to run in parallel (default: one per CPU core; 1 on a GPU)",
    )
    show.add_argument(
        "--layer",
        type=int,
        metavar="L",
        help="the layer that PRe reads, 1 .. 8 (default: half the depth, 4)",
    )
    show.add_argument(
        "--weight", type=weight, metavar="W", help="λ, the weight of L_PRe (default: 0.5)"
    )
    command.add_parsers(commands, whole)
    tuning = commands.add_parser(
        "tune",
        help="time the tiles of the Triton matmuls on this GPU and save the best",
        description='Time the candidate tiles of impl="triton" for square weights on this GPU, and '
        "save the fastest in $PRE_KERNELS_CACHE (else ~/.cache/pre_kernels), where later processes "
        "find them. Optional: the package ships tiles for each architecture.",
    )
    tuning.add_argument(
        "--width",
        type=width,
        action="append",
        metavar="D",
        help="width of the weights; repeat the option for more (default: 4096)",
    )
    tuning.add_argument(
        "--dtype",
        choices=("bf16", "fp16"),
        default="bf16",
        help="dtype of the matmuls (default: %(default)s)",
    )
    about = commands.add_parser(
        "env",
        help="print versions and devices, for bug reports, or the models that PRe attaches to",
        description="Print the versions and devices that matter in a bug report, and which "
        'implementation of the loss impl="auto" picks; or, with --models, the families of '
        "vision-language models that apply_pre knows.",
    )
    about.add_argument(
        "--models", action="store_true", help="print the table of supported families instead"
    )
    about.add_argument(
        "--markdown", action="store_true", help="with --models: print the table in Markdown"
    )
    return top


def whole(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least 1")
    return int(text)


def width(text: str) -> int:
    """Parse a width that tensor descriptors can take: a multiple of 16."""
    if not text.isascii() or not text.isdecimal() or int(text) < 16 or int(text) % 16:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a multiple of 16")
    return int(text)


def weight(text: str) -> float:
    """Parse a weight of the loss: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number above 0")
    return value


def demo(options: argparse.Namespace) -> int:
    """Check the arguments and the packages, then run the demo."""
    from .demo.settings import QUICK, Settings

    settings = QUICK if options.quick else Settings()
    asked = {name: getattr(options, name) for name in ("seeds", "layer", "weight")}
    settings = replace(
        settings, **{name: value for name, value in asked.items() if value is not None}
    )
    if not 1 <= settings.pre_layer <= settings.layers:
        return fail(
            f"--layer: got {settings.pre_layer}, want 1..{settings.layers}, the layers of the "
            "demo's LLM"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        return fail("--device: got cuda, but torch sees no CUDA device; want cpu or auto")
    if problem := missing("the demo", EXTRA) or unwritable(options.out):
        return fail(problem)

    from .demo.run import run

    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    jobs = options.jobs or (1 if device == "cuda" else os.cpu_count() or 1)
    run(settings, device, options.out, jobs=min(jobs, settings.seeds))
    return 0


def check(options: argparse.Namespace) -> int:
    """Check and time the loss on this machine."""
    if problem := unwritable(options.out):
        return fail(problem)
    try:
        return checking.check(options, facts())
    except (ValueError, OSError) as error:
        return fail(str(error))


def diagnose(options: argparse.Namespace) -> int:
    """Measure a model's layers on images."""
    if problem := missing("diagnose", "pip install 'pre-kernels[diagnose]'") or unwritable(
        options.out
    ):
        return fail(problem)
    try:
        command.diagnose(options, options.arguments)
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error))
    except KeyboardInterrupt as stop:
        raise type(stop)("the same command resumes from what is saved") from None
    return 0


def trace(options: argparse.Namespace) -> int:
    """Plot a training's score against its probe accuracy, or the losses of trainings."""
    if problem := missing("trace", EXTRA):
        return fail(problem)
    try:
        command.trace(options)
    except (ValueError, OSError) as error:
        return fail(str(error))
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
        return f"{argument}: cannot write into {folder}: {error.strerror or error}"


def tune(options: argparse.Namespace) -> int:
    """Time the tiles of the Triton matmuls and save the best."""
    if not torch.cuda.is_available():
        return fail("tune needs a GPU, and torch sees none")
    device = torch.device("cuda", torch.cuda.current_device())
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[options.dtype]
    if reason := unavailable(device, dtype):
        return fail(f"tune: {reason}")

    from .fused.kernels import tiles
    from .fused.kernels.tune import tune

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
        from .integrations import family_table

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


def facts() -> dict[str, str]:
    """Return versions, devices and settings, for bug reports."""
    packages = ("triton", "einops", "transformers", "accelerate", "peft", "trl")
    rows = [
        ("pre-kernels", version("pre-kernels") + commit()),
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        *((name, version(name)) for name in packages),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            size = f"{card.total_memory / 2**30:.0f} GiB"
            text = f"{card.name}, compute capability {card.major}.{card.minor}, {size}"
            rows.append((f"GPU {index}", text))
    else:
        rows.append(("GPU", "none that torch can use"))
    rows.append(('impl="auto"', ": ".join(automatic())))
    rows.append(("CPU products", half_precision()))
    rows += [
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith(("PRE_KERNELS_", "TRITON_"))
    ]
    return dict(rows)


def version(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    return installed(package) or "not installed"


def commit() -> str:
    """Return the commit that pip recorded on installation (PEP 610), or an empty string."""
    try:
        record = metadata.distribution("pre-kernels").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return ""
    commit_id = json.loads(record or "{}").get("vcs_info", {}).get("commit_id")
    return f" (commit {commit_id})" if commit_id else ""


def installed(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def automatic() -> tuple[str, str]:
    """Return the implementation that `impl="auto"` picks on this machine, and why."""
    if not torch.cuda.is_available():
        return "torch", "no GPU that torch can use"
    device = torch.device("cuda", torch.cuda.current_device())
    reason = unavailable(device, torch.bfloat16)
    if reason is not None:
        return "torch", reason
    return (
        "blas",
        "on GPU tensors, or triton where only the device knows how many rows a mask has; torch on "
        "CPU tensors",
    )


def fail(message: str) -> int:
    """Print the error, and return argparse's exit status for wrong arguments."""
    screen.say(f"error: {message}")
    return 2


if __name__ == "__main__":
    sys.exit(main())
