"""Measure what the visual tokens of a model keep, layer by layer, over a folder of images.

Prints a table and draws it: the cosine with what enters the LLM, the effective dimension, how much
more alike neighbours are than distant patches (spatial contrast), and, where images lie in a folder
for each class, the accuracy of a linear probe. `pre-kernels diagnose` has more, without Python.
Run: LLaVA, tiny and random, on a CPU. Not run: pretrained weights, a GPU.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForImageTextToText, AutoProcessor

from pre_kernels.diagnostics import LayerReport, load_samples, measure
from pre_kernels.integrations import Reader

METRICS = ("cosine", "effective_dimension", "spatial_contrast", "linear_probe")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("images", type=Path, help="folder of images, or of a folder for each class")
parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", help="name, or saved model")
parser.add_argument("--layers", type=int, nargs="+", help="0 is what enters the LLM (default: all)")
parser.add_argument("--limit", type=int, default=256, help="use at most so many images")
parser.add_argument("--plot", type=Path, default=Path("layers.png"), help="picture to write")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto").to(device)
processor = AutoProcessor.from_pretrained(args.model)
samples = load_samples(model, processor, args.images, limit=args.limit)
report = LayerReport()
with Reader(model, args.layers) as reader:
    for _ in measure(reader, samples, report, device=device):
        pass

rows = report.rows()
print(f"{report.images} images, {report.tokens} visual tokens")
print("layer", *(f"{name:>20}" for name in METRICS))
for row in rows:
    cells = ("-" if row[name] is None else f"{row[name]:.4f}" for name in METRICS)
    print(f"{row['layer']:5}", *(f"{cell:>20}" for cell in cells))

figure = Figure(figsize=(4 * len(METRICS), 3), layout="constrained")
for axes, name in zip(figure.subplots(1, len(METRICS)), METRICS, strict=True):
    axes.plot([row["layer"] for row in rows], [row[name] for row in rows])
    axes.set(title=name, xlabel="layer")
figure.savefig(args.plot, dpi=120)
