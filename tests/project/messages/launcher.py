"""Mistakes on the command line of the launcher of training scripts.

They are made in the folder of `commands.make`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .mistakes import Mistake

GIVEN: dict[str, Callable[[], Any]] = {}
LAUNCH = "$ python -m pre_kernels.integrations.launch "
MISTAKES = [
    Mistake(
        "the launcher without a script",
        LAUNCH + "--layer 2",
        "nothing to run: want `-- script.py …`, `-- -m module …` or `-- command …` at the end",
        LAUNCH + "--layer 2 -- train.py",
    ),
    Mistake(
        "the launcher without --",
        LAUNCH + "--layer 2 train.py",
        "got no -- before 'train.py', want it there: `python -m pre_kernels.integrations.launch "
        "--layer 2 -- train.py`",
        LAUNCH + "--layer 2 -- train.py",
    ),
    Mistake(
        "a mistyped option of the launcher",
        LAUNCH + "--lyer 2 -- train.py",
        "unrecognized arguments: --lyer; did you mean --layer?",
        LAUNCH + "--layer 2 -- train.py",
    ),
    Mistake(
        "a setting as an option of the launcher",
        LAUNCH + "--loss mse -- train.py",
        "unrecognized arguments: --loss; want `--set loss=…` for a setting of apply_pre",
        LAUNCH + "--set loss=mse -- train.py",
    ),
    Mistake(
        "a layer in words for the launcher",
        LAUNCH + "--layer middle -- train.py",
        "layer: got 'middle', want an int of at least 1, the first decoder layer, or a list of "
        "them, such as [8,16]",
        LAUNCH + "--layer [8,16] -- train.py",
    ),
    Mistake(
        "a file of settings that is not there",
        LAUNCH + "--config nope.yaml -- train.py",
        "--config: got 'nope.yaml' (No such file or directory), want a YAML file of settings, such "
        "as a line `layer: 16`",
        LAUNCH + "--config layer.yaml -- train.py",
    ),
    Mistake(
        "a mistyped script",
        LAUNCH + "-- trian.py",
        "script: 'trian.py' is neither a file nor an installed console command…",
        LAUNCH + "-- train.py",
    ),
    Mistake(
        "a mistyped setting",
        LAUNCH + "--set lyer=2 -- train.py",
        "--set: unknown setting 'lyer'; did you mean layer or layers?",
        LAUNCH + "--set layer=2 -- train.py",
    ),
    Mistake(
        "a setting without a value",
        LAUNCH + "--set layer -- train.py",
        "--set: got 'layer', want key=value, such as --set layer=16",
        LAUNCH + "--set layer=16 -- train.py",
    ),
    Mistake(
        "a mistyped setting in a file",
        LAUNCH + "--config typo.yaml -- train.py",
        "--config typo.yaml: unknown setting 'wieght'; did you mean weight or weighting?",
        LAUNCH + "--set weight=1 -- train.py",
    ),
    Mistake(
        "a file of settings that is a list",
        LAUNCH + "--config list.yaml -- train.py",
        "--config: 'list.yaml' holds list, want a mapping of settings, such as a line `layer: 16`",
        LAUNCH + "--config layer.yaml -- train.py",
    ),
    Mistake(
        "a loss that the launcher does not know",
        LAUNCH + "--set loss=l1 -- train.py",
        "loss: got 'l1', want one of 'cosine', 'mse', 'smooth_l1', 'gram'",
        LAUNCH + "--set loss=smooth_l1 -- train.py",
    ),
    Mistake(
        "an anchor in a module that is not there",
        LAUNCH + "--set anchor=my:dino -- train.py",
        "anchor: cannot import 'my:dino': No module named 'my'; want module:name of a module in "
        "this folder or on PYTHONPATH",
        LAUNCH + "--set anchor=anchors:dino -- train.py",
    ),
    Mistake(
        "a head from a folder that has none",
        LAUNCH + "--head plain -- train.py",
        "--head: 'plain/pre_head.json' is missing; want a folder that handle.save() wrote",
        LAUNCH + "-- train.py",
    ),
    Mistake(
        "the launcher in front of a shell",
        LAUNCH + "-- bash train.sh",
        "script: 'bash' is a shell or a shell script, which cannot be followed; write `python -m "
        "pre_kernels.integrations.launch … -- train.py` into the shell script where it starts "
        "python",
        LAUNCH + "-- train.py",
    ),
    Mistake(
        "the launcher in front of a scheduler",
        LAUNCH + "-- sbatch train.sh",
        "script: 'sbatch' runs its command elsewhere, where it cannot be followed; make that "
        "command `python -m pre_kernels.integrations.launch … -- train.py`",
        LAUNCH + "-- train.py",
    ),
]
