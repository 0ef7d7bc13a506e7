"""The arguments of `pre-kernels diagnose` and `pre-kernels trace`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pre_kernels.diagnostics.measures import METRICS
from pre_kernels.diagnostics.run import TRACE_DEFAULTS

from .layout import table

DTYPES = ("auto", "float32", "bfloat16", "float16")
DIAGNOSE = (
    table("""
examples:
pre-kernels diagnose llava-hf/llava-1.5-7b-hf photos/
    curves over depth, for any images
pre-kernels diagnose out/without photos/ --compare out/with
    did PRe help? both models in one report
pre-kernels diagnose MODEL photos/ --masks masks/
    masks of objects: the semantic contrast ratio
pre-kernels diagnose MODEL val2017/ --masks instances_val2017.json --limit 500
    ... or annotations of COCO
pre-kernels diagnose MODEL imagenet/ --limit 2000 --layers 0,8,16,24,32
    a folder for each class: linear probes
pre-kernels diagnose MODEL photos/ --labels labels.csv
    ... or a CSV with columns image and label
"""),
    "IMAGES contains images, or a subfolder of images for each class. --masks is a folder with a "
    "PNG for each image, in which each value is an object, or a file of COCO annotations. To "
    "resume an interrupted run, give the same command again.",
)
TRACE = (
    table("""
examples:
pre-kernels trace out/checkpoint-5000
    what LayerCallback logged, drawn over steps
pre-kernels trace out/checkpoint-5000 --score eval_vqa_accuracy
    against a score that the trainer logged
pre-kernels trace without/ with/ --layer 16 --scores without.csv with.csv
    two runs, with scores from CSV files with columns step and score
pre-kernels trace without/ with/ --loss --out loss.png
    the task loss of both runs over steps, in one plot
"""),
    "Reads trainer_state.json, which the Trainer writes into every checkpoint. LOG is this file, a "
    "folder with it, or a folder with checkpoint-* folders, of which the last one is read.",
)


def add_diagnose(commands: Any, at_least: Callable[[str, int], int]) -> None:
    """Add `pre-kernels diagnose` to the commands."""
    show = commands.add_parser(
        "diagnose",
        help="measure what each layer of a model keeps of its visual tokens: an HTML report",
        description="Run images through a vision-language model and measure, layer by layer, what "
        "its visual tokens keep: probes, patch structure, spectrum, similarity to the input of the "
        "LLM, logit lens. Writes report.html, layers.csv and diagnosis.json.",
        epilog=DIAGNOSE,
    )
    show.option(
        "MODEL", "folder that save_pretrained wrote (also that of an adapter), or a name on the hub"
    )
    show.option("IMAGES", "folder of images, or of a subfolder for each class", type=Path)
    show.option("--compare MODEL", "another model; may be repeated", action="append", default=[])
    show.option("--masks PATH", "folder of PNGs, or COCO annotations (*.json)", type=Path)
    show.option(
        "--background A,B",
        "mask values to treat as background (default: 0,255)",
        type=integers,
        default=(0, 255),
    )
    show.option(
        "--labels CSV",
        "file with columns image and label, instead of a subfolder for each class",
        type=Path,
    )
    show.option("--layers A,B", "0 is the input of the LLM (default: all)", type=integers)
    show.option(
        "--metrics A,B",
        f"some of {', '.join(METRICS)} (default: all)",
        type=some_metrics,
        default=METRICS,
    )
    show.option("--no-lens", "do not measure the logit lens")
    show.option(
        "--limit N",
        "use at most N images, balanced over classes (default: all)",
        type=lambda text: at_least(text, 1),
    )
    show.option(
        "--maps N",
        "draw heat maps for N images (default: %(default)s)",
        type=lambda text: at_least(text, 0),
        default=3,
    )
    show.option("--prompt TEXT", 'text after the image (default: "Describe the image.")')
    show.option(
        "--dtype NAME",
        f"one of {', '.join(DTYPES)} (default: auto, as the weights are saved)",
        choices=DTYPES,
        default="auto",
    )
    show.option(
        "--device NAME",
        "auto: a GPU if there is one; spread: all GPUs, for a large model (default: auto)",
        default="auto",
    )
    show.option(
        "--seed N",
        "seed for the order of images and the probes' split (default: %(default)s)",
        type=int,
        default=0,
    )
    show.option("--trust-remote-code", "run code that comes with the model")
    show.option(
        "--out DIR",
        "folder for the files (default: %(default)s)",
        type=Path,
        default=Path("diagnose-out"),
    )


def add_trace(commands: Any) -> None:
    """Add `pre-kernels trace` to the commands."""
    trace = commands.add_parser(
        "trace",
        help="draw a training's score against its probe accuracy, or its loss, from the log",
        description="Draw the paper's plot from the log of a training with LayerCallback: task "
        "score and probe accuracy of a layer over steps, and one against the other. With --loss: "
        "the task loss of each run over steps, which every log of a Trainer has.",
        epilog=TRACE,
    )
    trace.add_argument(
        "logs", type=Path, nargs="+", metavar="LOG", help="trainer_state.json, or a folder with one"
    )
    trace.option("--layer L", "layer to draw (default: the middle one in the log)", type=int)
    trace.option(
        "--metric NAME",
        "metric of the layer (default: %(default)s)",
        old="--figure",
        default=TRACE_DEFAULTS["metric"],
    )
    trace.option(
        "--score NAME",
        "name of the score in the log (default: %(default)s)",
        default=TRACE_DEFAULTS["score"],
    )
    trace.option(
        "--scores CSV",
        "files with columns step and score, one for each LOG, instead of --score",
        type=Path,
        nargs="+",
    )
    trace.option(
        "--loss",
        "draw the task loss instead: task_loss of the log, or loss where the log has no "
        "L_PRe; as logged, and smoothed over a twentieth of the steps",
    )
    trace.option(
        "--out FILE", "png, svg or pdf (default: trace.png, with --loss loss.png)", type=Path
    )


def integers(text: str) -> tuple[int, ...]:
    """Whole numbers from 0, separated by commas."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, want whole numbers separated by commas, such as 0,8,16"
        )
    return tuple(map(int, parts))


def some_metrics(text: str) -> tuple[str, ...]:
    """Some of the names in `METRICS`, separated by commas."""
    parts = tuple(text.split(","))
    if not set(parts) <= set(METRICS):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, want some of {', '.join(METRICS)}, separated by commas"
        )
    return parts
