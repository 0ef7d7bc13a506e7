"""Run arms of the real comparison in several processes, and `pre-kernels demo --real`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from pre_kernels import sources
from pre_kernels.demo import Unsaved
from pre_kernels.demo.parts import commit, machine, versions
from pre_kernels.demo.progress import Estimate, bars
from pre_kernels.demo.stages import Bar
from pre_kernels.demo.threads import quiet
from pre_kernels.demo.workers import each_seed
from pre_kernels.screen import plural

from . import photographs
from .arm import Arm, Metrics, Seed
from .llms import LLMS
from .pieces import Pieces
from .results import picture, save, show
from .scenes import Scenes
from .settings import Settings
from .stages import ALIGN, LOAD, MEASURE, TUNE
from .work import GIGABYTES, check_room, fingerprint, full_disk

BEFORE = "before"
ALIGNED = "aligned"
WITHOUT = "without"
WITH = "with"
# What both arms of a seed start from.
START = (BEFORE, ALIGNED)
# This function takes an arm's name, its seed, its metrics and the seconds that they took.
Keep = Callable[[str, int, Metrics, float], None]
# The last seed that this process ran.
_SEEDS: dict[int, Seed] = {}


def measure(
    arms: Mapping[str, Arm],
    wanted: Sequence[tuple[str, int]],
    settings: Settings,
    pieces: Pieces,
    device: str,
    work: Path,
    keep: Keep,
    bar: Bar,
    jobs: int,
    traced: bool = False,
) -> None:
    """Measure each wanted (arm, seed), `jobs` at a time.

    Args:
        arms: by name. `BEFORE` and `ALIGNED` are not among them: they are what the arms of a seed
            start from, and run before these.
        work: a folder for what is finished and for checkpoints. What these settings, photographs,
            device, code and versions have left there is not run again.
        keep: called in this process as soon as an arm is measured.
        traced: as in `Seed.run`.

    Raises:
        Unavailable: memory or disk is too small.
    """
    work /= fingerprint(
        {
            "settings": dataclasses.asdict(settings),
            "photographs": pieces.listing(),
            "device": device,
            "traced": traced,
            "measured": sources.digest("real"),
            "versions": versions(),
        }
    )
    if wanted:
        name = LLMS[settings.llm].name
        check_room(name, GIGABYTES[settings.llm], min(jobs, len(wanted)), work)
    # Two arms of a seed would otherwise train its first stage at the same time.
    starts = sorted({seed for _, seed in wanted})
    trained = [(arm, seed) for arm, seed in wanted if arm not in START]
    for part in ([(ALIGNED, seed) for seed in starts], trained):
        if not part:
            continue
        at_once = min(jobs, len(part))
        threads = max((os.cpu_count() or 1) // at_once, 1)
        fixed = (part, arms, settings, pieces, device, work, traced, threads)

        def done(number: int, result: Any) -> None:
            for arm, seed, metrics, seconds in result:
                if (arm, seed) in wanted:
                    keep(arm, seed, metrics, seconds)

        try:
            each_seed(_job, len(part), fixed, bar, at_once, done)
        finally:
            # With one job the last model is in this process.
            _SEEDS.clear()


def _job(
    number: int,
    part: Sequence[tuple[str, int]],
    arms: Mapping[str, Arm],
    settings: Settings,
    pieces: Pieces,
    device: str,
    work: Path,
    traced: bool,
    threads: int,
    bar: Bar,
) -> list[tuple[str, int, Metrics, float]]:
    name, number = part[number]
    torch.set_num_threads(threads)
    begin = time.monotonic()
    if number not in _SEEDS:
        # The models of several seeds would fill the memory.
        _SEEDS.clear()
        # transformers has a bar of its own for the tensors of a GGUF file.
        with contextlib.redirect_stderr(io.StringIO()):
            _SEEDS[number] = Seed(number, settings, pieces, device, work, bar)
    seed = _SEEDS[number]
    seed.bar = bar
    with full_disk(work):
        if name == ALIGNED:
            found = {BEFORE: seed.before(), ALIGNED: seed.aligned()[1]}
        else:
            found = {name: seed.run(name, arms[name], traced)}
    seconds = round(time.monotonic() - begin, 1)
    return [(arm, number, metrics, seconds) for arm, metrics in found.items()]


def run(
    settings: Settings,
    arm: Arm,
    seeds: int,
    pieces: Pieces,
    device: str,
    out: Path,
    console: Console | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Compare training without PRe and with it (`arm`) on seeds 0 .. seeds - 1, write the files
    into `out`, print what they show, and return the measurements.

    Raises:
        Unavailable: parts are missing, or memory or disk is too small.
        KeyboardInterrupt: its text says what is kept.
        Unsaved: files could not be written. What was measured has been printed.
    """
    console = Console() if console is None else console
    jobs = min(jobs, 2 * seeds)
    found = prepare(settings, pieces, console)
    arms = {WITHOUT: Arm(None), WITH: arm}
    experiment: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "arms": {name: dataclasses.asdict(own) for name, own in arms.items()},
        "device": device,
        "measured": sources.digest("real"),
        "versions": versions(),
        "photographs": len(found),
    }
    # Arms of the same name with other options have another folder.
    work = out / "work" / fingerprint(experiment["arms"])
    wanted = [(name, seed) for seed in range(seeds) for name in (*START, *arms)]
    total = seeds * seconds_of_a_seed(settings)
    console.print(f"{plural(seeds, 'seed')}, {jobs} arms at a time: {Estimate(total, jobs)}")
    measured: dict[int, dict[str, Any]] = {seed: {"seed": seed} for seed in range(seeds)}

    def keep(name: str, seed: int, metrics: Metrics, seconds: float) -> None:
        measured[seed][name] = metrics

    begin = time.monotonic()
    restore = quiet()
    try:
        with bars(console, total, jobs) as bar:
            measure(arms, wanted, settings, pieces, device, work, keep, bar, jobs, traced=True)
    except KeyboardInterrupt as stop:
        raise type(stop)(
            f"finished arms and checkpoints are in {work}; the same command resumes from there"
        ) from None
    finally:
        restore()
    results = {
        **experiment,
        "device": machine(device, jobs),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "seconds": round(time.monotonic() - begin, 1),
        "seeds": list(measured.values()),
    }
    unseen = photographs.split(found, seed=0)[-1]
    paths, problems = save(results, out, picture(Scenes(unseen, 1, seed=0)[0]))
    show(results, paths, out, console)
    if problems:
        problem = "; ".join(problems)
        raise Unsaved(problem)
    shutil.rmtree(work, ignore_errors=True)
    # Arms with other options may have been stopped.
    with contextlib.suppress(OSError):
        work.parent.rmdir()
    return results


def prepare(settings: Settings, pieces: Pieces, console: Console) -> list[photographs.Photograph]:
    """Check the parts, print what will be used, and return the photographs.

    Raises:
        Unavailable: parts are missing.
        photographs.Unreadable: too many photographs cannot be read.
    """
    llm = LLMS[settings.llm]
    pieces.check(llm)
    found, broken = photographs.load(pieces.photographs)
    for path in broken:
        console.print(f"left out, cannot be read: {path}", highlight=False, markup=False)
    console.print(f"{llm.name}, {len(found)} photographs from {pieces.folder}", highlight=False)
    return found


def seconds_of_a_seed(settings: Settings) -> float:
    """Return the expected seconds of a seed's two traced arms and of what they start from."""
    scenes = 2 * settings.test_scenes
    looks = settings.tune_steps // settings.traced_every + 1
    traced = looks * 3 * settings.traced_scenes
    start = LOAD.seconds + settings.align_steps * ALIGN.seconds + 2 * scenes * MEASURE.seconds
    arm = LOAD.seconds + settings.tune_steps * TUNE.seconds + (scenes + traced) * MEASURE.seconds
    return start + 2 * arm
