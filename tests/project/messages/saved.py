"""Mistakes with a head on disk, with an encoder for anchors, and with a `Reader`.

Given are a tiny LLaVA, `model`, and its arguments for two samples, `batch`.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pre_kernels.integrations import EncoderAnchor, Reader, apply_pre
from tests.integrations.support.tiny import models

from .mistakes import Mistake

GIVEN = {
    "nn": lambda: nn,
    "Path": lambda: Path,
    "apply_pre": lambda: apply_pre,
    "EncoderAnchor": lambda: EncoderAnchor,
    "Reader": lambda: Reader,
    "model": lambda: models.build("llava"),
    "batch": lambda: models.batch("llava").inputs,
    "SIZES": lambda: {"size": 8, "anchor_dim": 2},
}
SAVED = 'with apply_pre(model) as handle: handle.save("saved")\n'
MISTAKES = [
    Mistake(
        "a head from a folder that is not there",
        SAVED + 'apply_pre(model).load("savd")',
        "directory: 'savd' is not a directory; want one that handle.save() wrote",
        SAVED + 'apply_pre(model).load("saved")',
    ),
    Mistake(
        "a head from a checkpoint without one",
        SAVED + 'Path("plain").mkdir(exist_ok=True); apply_pre(model).load("plain")',
        "directory: 'plain/pre_head.json' is missing; want both pre_head.json and "
        "pre_head.safetensors",
        SAVED + 'apply_pre(model).load("saved")',
    ),
    Mistake(
        "a saved head with other settings",
        SAVED + 'apply_pre(model, hidden_dim=8).load("saved")',
        "hidden_dim: 'saved/pre_head.json' says 32, this handle has 8; call apply_pre with the "
        "settings of the saved head, on a model of its width",
        SAVED + 'apply_pre(model, hidden_dim=32).load("saved")',
    ),
    Mistake(
        "a saved head of another depth",
        SAVED + 'apply_pre(model, depth=3).load("saved")',
        "depth: 'saved/pre_head.json' says 2, this handle has 3; call apply_pre with the settings "
        "of the saved head, on a model of its width",
        SAVED + 'apply_pre(model, depth=2).load("saved")',
    ),
    Mistake(
        "a saved head without the norm",
        SAVED + 'apply_pre(model, norm="rms").load("saved")',
        "norm: 'saved/pre_head.json' says None, this handle has 'rms'; call apply_pre with the "
        "settings of the saved head, on a model of its width",
        SAVED + 'apply_pre(model, norm=None).load("saved")',
    ),
    Mistake(
        "a saved head that was cut short",
        SAVED + 'Path("saved/pre_head.json").write_text("{")\napply_pre(model).load("saved")',
        "'saved/pre_head.json': not valid JSON: …; copy the file again, or load another checkpoint",
        SAVED + 'apply_pre(model).load("saved")',
    ),
    Mistake(
        "the name of an encoder",
        'EncoderAnchor("facebook/dinov2-base", model, image_mean=None, image_std=None, **SIZES)',
        "encoder: got str, want an nn.Module, such as "
        'AutoModel.from_pretrained("facebook/dinov2-base")',
        "AutoModel = nn.Flatten()\n"
        "EncoderAnchor(AutoModel, model, image_mean=None, image_std=None, **SIZES)",
    ),
    Mistake(
        "an encoder's mean without its deviation",
        "EncoderAnchor(nn.Flatten(), model, image_mean=[1, 1, 1], image_std=None, **SIZES)",
        "image_mean, image_std: got one of them, want both, or None for both; the model's are in "
        "processor.image_processor",
        "EncoderAnchor(nn.Flatten(), model, image_mean=None, image_std=None, **SIZES)",
    ),
    Mistake(
        "layers to read that are not there",
        "Reader(model, layers=[0, 8])",
        "layers: got 8 among them, want integers in 0..4",
        "Reader(model, layers=[0, 4])",
    ),
    Mistake(
        "a reading without images",
        'batch["input_ids"][:] = 5; del batch["pixel_values"]; Reader(model).read(batch)',
        "inputs: got no visual tokens, want at least one image",
        "Reader(model).read(batch)",
    ),
]
