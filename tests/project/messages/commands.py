"""Mistakes on the command lines of `pre-kernels` and the benchmark.

They are made in a folder with a tiny LLaVA, `model`, a language model, `text`, images in `photos`,
and the files of `FILES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.integrations.support.tiny import saved

from .mistakes import Mistake

GIVEN: dict[str, Callable[[], Any]] = {}


def log(*entries: dict[str, float]) -> str:
    """The log of a Trainer: an entry for each step."""
    steps = [{"step": step, **entry} for step, entry in enumerate(entries, 1)]
    return json.dumps({"log_history": steps})


FILES = {
    "file": "",
    "train.py": "",
    "empty/.keep": "",
    "text/config.json": json.dumps({"model_type": "llama"}),
    "names.csv": "picture,kind\n0.png,cat\n",
    "cats.csv": "image,label\n0.png,cat\n1.png,cat\n",
    "classes.csv": "image,label\n0.png,cat\n1.png,dog\n",
    "lost.csv": "image,label\n9.png,cat\n",
    "scores.csv": "step,score\n1,0.2\n2,0.3\n",
    "anchors.py": "def dino(inputs, rows): ...",
    "layer.yaml": "layer: 16\n",
    "typo.yaml": "wieght: 1\n",
    "list.yaml": "- layer\n",
    "plain/trainer_state.json": log({"loss": 2.0}, {"loss": 1.5}),
    "probed/trainer_state.json": log(
        {"layer_2/linear_probe": 0.5, "eval_accuracy": 0.2},
        {"layer_2/linear_probe": 0.6, "eval_accuracy": 0.3},
    ),
}


def make(place: Path) -> None:
    """Write the files."""
    for name, content in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(content, encoding="utf-8")
    (place / "mixed" / "cats").mkdir(parents=True)
    (place / "photos").mkdir()
    for name in ("photos/0", "photos/1", "mixed/0", "mixed/cats/1"):
        Image.new("L", (24, 24), 90).save(place / f"{name}.png")
    saved.llava(place / "model")


DRAWN = "$ pre-kernels trace probed --score eval_accuracy --out trace.svg"
LOSSES = "$ pre-kernels trace plain --loss --out loss.svg"
DIAGNOSE = "$ pre-kernels diagnose model photos"
MISTAKES = [
    Mistake(
        "a mistyped command",
        "$ pre-kernels dem",
        "argument command: got 'dem', want one of check, demo, diagnose, trace, tune, env; did you "
        "mean demo?",
        "$ pre-kernels demo",
    ),
    Mistake(
        "a mistyped option",
        "$ pre-kernels demo --sedes 2",
        "got --sedes 2, want only what pre-kernels demo --help lists; did you mean --seeds?",
        "$ pre-kernels demo --seeds 2",
    ),
    Mistake(
        "a command without its images",
        "$ pre-kernels diagnose model",
        "the following arguments are required: IMAGES",
        DIAGNOSE,
    ),
    Mistake(
        "a number in words",
        "$ pre-kernels demo --layer half",
        "argument --layer: got 'half', want a whole number",
        "$ pre-kernels demo --layer 4",
    ),
    Mistake(
        "a negative number",
        DIAGNOSE + " --maps -1",
        "argument --maps: got '-1', want a whole number of at least 0",
        DIAGNOSE + " --maps 0",
    ),
    Mistake(
        "a plot into a folder that is not there",
        "$ pre-kernels trace probed --score eval_accuracy --out plots/trace.svg",
        "out: plots is not a folder; make it: mkdir -p plots",
        DRAWN,
    ),
    Mistake(
        "an implementation that does not exist",
        "$ pre-kernels check --impl cuda",
        "argument --impl: got 'cuda', want one of blas, triton, fp8, torch",
        "$ pre-kernels check --impl torch",
    ),
    Mistake(
        "no seed",
        "$ pre-kernels demo --seeds 0",
        "argument --seeds: got '0', want a whole number of at least 1",
        "$ pre-kernels demo --seeds 1",
    ),
    Mistake(
        "a layer that the demo's model does not have",
        "$ pre-kernels demo --layer 16",
        "--layer: got 16, want 1..8, the layers of the demo's LLM",
        "$ pre-kernels demo --layer 8",
    ),
    Mistake(
        "a weight of 0",
        "$ pre-kernels demo --weight 0",
        "argument --weight: got '0', want a number above 0",
        "$ pre-kernels demo --weight 0.1",
    ),
    Mistake(
        "a device that is not one",
        "$ pre-kernels demo --device gpu",
        "argument --device: got 'gpu', want one of auto, cpu, cuda; did you mean cpu?",
        "$ pre-kernels demo --device cuda",
    ),
    Mistake(
        "real parts without the real demo",
        "$ pre-kernels demo --parts folder",
        "--parts needs --real",
        "$ pre-kernels demo --real --parts folder",
    ),
    Mistake(
        "the real demo without its parts",
        "$ pre-kernels demo --real --parts folder",
        "the real parts are not all in folder: SmolLM2-135M-Instruct, EfficientNet-Lite0 of "
        "ImageNet, photographs; fetch them (271 MB): "
        "pre-kernels demo --real --fetch --parts folder",
        "$ pre-kernels demo --real --fetch --parts folder",
    ),
    Mistake(
        "a layer that the real demo's model does not have",
        "$ pre-kernels demo --real --layer 31",
        "--layer: got 31, want 1..30, the layers of SmolLM2-135M-Instruct",
        "$ pre-kernels demo --real --layer 30",
    ),
    Mistake(
        "results into a file",
        "$ pre-kernels demo --out file",
        "--out: cannot write into file: File exists; choose another folder",
        "$ pre-kernels demo --out folder",
    ),
    Mistake(
        "a model that is not there",
        "$ pre-kernels diagnose ./modle photos",
        "model: ./modle is not there, want a folder; did you mean model?",
        DIAGNOSE,
    ),
    Mistake(
        "a language model without images for diagnose",
        "$ pre-kernels diagnose text photos",
        "model: text cannot be loaded as a vision-language model: …LlamaConfig…; want one that "
        "AutoModelForImageTextToText loads",
        DIAGNOSE,
    ),
    Mistake(
        "images that are not there",
        "$ pre-kernels diagnose model fotos",
        "images: fotos is not there, want a folder",
        DIAGNOSE,
    ),
    Mistake(
        "a folder without images",
        "$ pre-kernels diagnose model empty",
        "images: empty has no images, neither directly in it nor in its subfolders, want files "
        "that end in .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp",
        DIAGNOSE,
    ),
    Mistake(
        "images beside classes",
        "$ pre-kernels diagnose model mixed",
        "images: mixed has 1 images beside 1 subfolders with images ('cats'), want either images "
        "or a subfolder for each class",
        "$ pre-kernels diagnose model mixed/cats",
    ),
    Mistake(
        "labels under other names",
        DIAGNOSE + " --labels names.csv",
        "labels: names.csv has columns 'picture', 'kind', want a header with exactly one of image, "
        "file, filename, file_name",
        DIAGNOSE + " --labels classes.csv",
    ),
    Mistake(
        "labels of one class",
        DIAGNOSE + " --labels cats.csv",
        "labels: cats.csv has 'cat', want images of at least two classes, for a probe to tell "
        "apart",
        DIAGNOSE + " --labels classes.csv",
    ),
    Mistake(
        "a label of an image that is not there",
        DIAGNOSE + " --labels lost.csv",
        "labels: line 2 of lost.csv names '9.png', want the path of an image in photos, with "
        "forward slashes",
        DIAGNOSE + " --labels classes.csv",
    ),
    Mistake(
        "masks that are not there",
        DIAGNOSE + " --masks msks",
        "masks: msks is not there, want a folder of PNG files or a COCO *.json",
        DIAGNOSE + " --masks photos",
    ),
    Mistake(
        "masks in a file of another kind",
        DIAGNOSE + " --masks file",
        "masks: file is a file of another kind, want a folder of PNG files or a COCO *.json",
        DIAGNOSE + " --masks photos",
    ),
    Mistake(
        "layers in words",
        DIAGNOSE + " --layers all",
        "argument --layers: got 'all', want whole numbers separated by commas, such as 0,8,16",
        DIAGNOSE + " --layers 0,8,16",
    ),
    Mistake(
        "a mistyped metric",
        DIAGNOSE + " --metrics prob",
        "argument --metrics: got 'prob', want some of structure, …, probe, separated by commas",
        DIAGNOSE + " --metrics probe",
    ),
    Mistake(
        "a dtype by its short name",
        DIAGNOSE + " --dtype bf16",
        "argument --dtype: got 'bf16', want one of auto, float32, bfloat16, float16; did you mean "
        "bfloat16?",
        DIAGNOSE + " --dtype bfloat16",
    ),
    Mistake(
        "a device that torch does not know",
        DIAGNOSE + " --device gpu",
        "--device: got 'gpu', which torch cannot use: …; want auto, cpu, cuda, cuda:1 or spread",
        DIAGNOSE + " --device cuda",
    ),
    Mistake(
        "a log that is not there",
        "$ pre-kernels trace plian --loss --out loss.svg",
        "log: plian is not there, want the trainer_state.json of a training, or its folder",
        LOSSES,
    ),
    Mistake(
        "a folder without a log",
        "$ pre-kernels trace empty --loss --out loss.svg",
        "log: empty has no trainer_state.json, neither itself nor in a folder checkpoint-*, want a "
        "folder to which a Trainer has saved a checkpoint, or trainer.save_state()",
        LOSSES,
    ),
    Mistake(
        "a metric that was not logged",
        "$ pre-kernels trace probed --metric knn --score eval_accuracy --out trace.svg",
        "log: probed has no metric 'knn' of a layer, want a training with LayerCallback, or "
        "--metric with one of linear_probe; --loss draws the loss, which every log has",
        DRAWN,
    ),
    Mistake(
        "a log without measurements of layers",
        "$ pre-kernels trace plain",
        "log: plain has no metric 'linear_probe' of a layer, want a training with LayerCallback; "
        "--loss draws the loss, which every log has",
        LOSSES,
    ),
    Mistake(
        "a score under another name",
        "$ pre-kernels trace probed",
        "score: probed has no step with both 'layer_2/linear_probe' (2 steps) and 'score' (0) as "
        "numbers; pass score= to LayerCallback, or evaluate at the same steps; the log has "
        "eval_accuracy, which --score draws",
        DRAWN,
    ),
    Mistake(
        "a layer that was not logged",
        DRAWN + " --layer 16",
        "layer: got 16, want one of those in probed: 2",
        DRAWN,
    ),
    Mistake(
        "a plot that is not a picture",
        "$ pre-kernels trace probed --score eval_accuracy --out trace.txt",
        "out: got 'trace.txt', want a name that ends in .png, .svg, .pdf",
        DRAWN,
    ),
    Mistake(
        "a layer for a plot of losses",
        "$ pre-kernels trace plain --loss --layer 2 --out loss.svg",
        "--layer: got 2 with --loss, want none, as only the loss is drawn",
        LOSSES,
    ),
    Mistake(
        "scores for one log of two",
        "$ pre-kernels trace probed plain --scores scores.csv --out trace.svg",
        "scores: got 1 files for 2 logs, want one for each",
        "$ pre-kernels trace probed --scores scores.csv --out trace.svg",
    ),
    Mistake(
        "too few rows for a check",
        "$ pre-kernels check --rows 10",
        "argument --rows: got '10', want a whole number of at least 64",
        "$ pre-kernels check --rows 64",
    ),
    Mistake(
        "a width that tiles do not divide",
        "$ pre-kernels tune --width 1000",
        "argument --width: got '1000', want a multiple of 16",
        "$ pre-kernels tune --width 1024",
    ),
    Mistake(
        "measurements into two places",
        "$ python -m bench.diagnostics --record --results there",
        "--record: got --results there too, want one of them; leave one out",
        "$ python -m bench.diagnostics --record",
    ),
    Mistake(
        "Markdown of something else than models",
        "$ pre-kernels env --markdown",
        "--markdown needs --models",
        "$ pre-kernels env --markdown --models",
    ),
]
