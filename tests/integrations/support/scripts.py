"""Training scripts for the launcher: their first lines, and the function that runs one in a
test."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from pre_kernels.integrations import launch
from verify import ROOT

START = f"""
import json, sys
from pathlib import Path
import torch
sys.path.append({str(ROOT)!r})
from tests.integrations.support.tiny.models import build
from tests.integrations.support.tiny.training import *
out = Path(sys.argv[1])
def trainer(model, samples=UNEQUAL_IMAGES, steps=1, size=2, **more):
    given = {{k: more.pop(k) for k in ("optimizers", "model_init") if k in more}}
    return InOrder(
        model=model, args=arguments(out, 2, size, max_steps=steps, **more),
        train_dataset=Samples(samples), data_collator=collate("llava", samples),
        callbacks=[recorder], **given)
recorder = Recorder()
"""

TRAIN = """
model = build("llava")
t = trainer(model)
t.train()
torch.save((recorder.steps[0], t.state.log_history), out / "found")
"""


def under_the_launcher(folder: Path) -> Callable[..., None]:
    """A function that runs a script under the launcher in this process.

    The script gets START as its first lines and is written into `folder`. Its first argument is the
    folder `out` there.
    """

    def run(body: str, *options: str) -> None:
        script = folder / "train.py"
        script.write_text(START + textwrap.dedent(body))
        launch.main([*options, "--", str(script), str(folder / "out")])

    return run
