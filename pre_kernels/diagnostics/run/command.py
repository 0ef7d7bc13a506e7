"""`pre-kernels diagnose` and `pre-kernels trace`, once their arguments are parsed."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch

from pre_kernels import screen

from . import TRACE_DEFAULTS


def diagnose(options: argparse.Namespace, arguments: list[str]) -> None:
    """Run `pre-kernels diagnose`. ValueError and OSError say what is wrong."""
    with screen.starting():
        from rich.console import Console

        from .loading import SPREAD
        from .run import FILES, Settings, diagnose
        from .samples import PROMPT

    console = Console(highlight=False, soft_wrap=True)
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != SPREAD:
        check_device(device)
    settings = Settings(
        models=(options.model, *options.compare),
        images=options.images,
        masks=options.masks,
        labels=options.labels,
        background=options.background,
        layers=options.layers,
        metrics=options.metrics,
        lens=not options.no_lens,
        limit=options.limit,
        maps=options.maps,
        prompt=PROMPT if options.prompt is None else options.prompt,
        dtype=options.dtype,
        device=device,
        seed=options.seed,
        trust_remote_code=options.trust_remote_code,
    )
    document = diagnose(settings, options.out, console, shlex.join(["pre-kernels", *arguments]))

    from ..report.terminal import show

    console.print()
    show(document, console)
    console.print()
    for name, what in FILES.items():
        console.print(f"{what}: {options.out / name}")


def check_device(name: str) -> None:
    """ValueError unless torch can use the device."""
    try:
        # The value is read back because the device "meta" has tensors but no values.
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"--device: got {name!r}, which torch cannot use: {str(error).splitlines()[0]}; want "
            "auto, cpu, cuda, cuda:1 or spread"
        ) from error


def trace(options: argparse.Namespace) -> None:
    """Run `pre-kernels trace`. ValueError and OSError say what is wrong."""
    from .trace import draw, draw_losses

    out = options.out or Path("loss.png" if options.loss else "trace.png")
    if options.loss:
        for name, default in TRACE_DEFAULTS.items():
            value = getattr(options, name)
            if value != default:
                raise ValueError(
                    f"--{name}: got {value!r} with --loss, want none, as only the loss is drawn"
                )
        print(draw_losses(options.logs, out))
    else:
        print(draw(options.logs, options.layer, options.metric, options.score, options.scores, out))
    print(f"the plot: {out}")
