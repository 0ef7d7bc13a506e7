"""Mutation testing, a task before a release: it puts each small error into a copy of the sources,
and runs the tests until one of them fails.

    python -m bench.mutate
        every mutant (hours): a line for each file of the sources into bench-out/mutation.jsonl,
        with --record into bench/results
    python -m bench.mutate --sample 300 --seed 1
        some, drawn over all files
    python -m bench.mutate --again --sample 24
        some of those in the committed results, each only with the test that killed it
    python -m bench.mutate --only row_loss
        those whose key contains this text; the screen shows the survivors
    python -m bench.mutate --only row_loss --list
        print the changes and run nothing
    python -m bench.mutate --stale
        print the keys in verify/mutation/survivors.txt whose mutant no longer exists, run nothing

`verify/mutation/rules.py` says what is changed and what stays as it is. A mutant meets the tests
that reach its statement (traced once, in minutes): those of single kernels first, as many as
--budget allows. A mutant that is named as equivalent meets none. Every outcome is kept in
build/mutation as it comes, so the same command resumes where it was stopped. Survivors meet the
tests again when these have changed. Kernels are interpreted.

A mutant is identified by the text of its line. When that line changes, its key in survivors.txt is
stale; each run first prints such keys, on stderr. The exit status is 1 if a mutant survived that
survivors.txt does not name, or with --stale if there are stale keys.

mutmut and cosmic-ray would start Python and import torch for each mutant, and mutmut's trampolines
hide functions from `triton.jit`, which reads their source.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from verify.mutation.mutants import FILES, PACKAGE, SURVIVORS, Mutant, every_mutant, named, stale
from verify.mutation.runner import (
    GENERAL,
    ROOT,
    TESTS,
    Reach,
    copy,
    forked,
    prepare,
    pytest_in,
    run,
)

from . import where

KEPT = ROOT / "build" / "mutation"
COMMITTED = where.RESULTS / "mutation.jsonl"
NAMED = named()
KILLED = ("killed", "timeout", "crash", "invalid")
# what the tests judge by, besides themselves
JUDGES = (
    ROOT / "pre_kernels/check/rule.py",
    ROOT / "tests/conftest.py",
    ROOT / "tests/core/support.py",
    *(ROOT / f"verify/{name}.py" for name in ("oracle", "oracle_wide", "fences")),
    *(ROOT / "verify/fuzz").glob("*.py"),
)


def digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def reach(folder: Path) -> dict[str, Any]:
    """Return the seconds of each test, and the tests of each line of the package: traced, or kept
    from the last time."""
    source = digest(PACKAGE.rglob("*.py"))
    known: dict[str, Any] = {
        "seconds": {},
        "lines": defaultdict(lambda: defaultdict(list)),
        "hash": {},
    }
    for name in (f"tests/core/test_{entry}.py" for entry in TESTS):
        known["hash"][name] = digest([ROOT / name, *JUDGES])
        path = KEPT / f"reach-{source}-{Path(name).stem}-{known['hash'][name]}.json"
        if not path.exists():
            print(f"tracing which lines {name} reaches", file=sys.stderr)

            def trace(name: str = name) -> Any:
                plugin = Reach(folder / "pre_kernels")
                status = pytest_in(folder, plugin, [name])
                return {
                    "status": status,
                    "failed": plugin.failed,
                    "seconds": plugin.took,
                    "lines": plugin.lines(),
                }

            reached, status = forked(trace, 3600)
            if not reached or reached["status"]:
                failed = reached and reached["failed"]
                raise SystemExit(f"{name} fails on unchanged sources: {failed}, status {status}")
            path.write_text(json.dumps(reached))
        entry = json.loads(path.read_text())
        known["seconds"].update(entry["seconds"])
        for file, lines in entry["lines"].items():
            for line, tests in lines.items():
                known["lines"][file][int(line)] += tests
    return known


def reaching(mutant: Mutant, known: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of the tests that reach a mutant's statement. Tests of single kernels come
    first, the cheapest of them first. Then comes the longest of each test function, another of
    each, and so on. All tests of a file reach what runs on import."""
    lines = known["lines"].get(mutant.file, {})
    seconds = known["seconds"]
    wanted = range(mutant.lines[0], mutant.lines[1] + 1)
    imported = mutant.function == "module"
    names = {name for line, tests in lines.items() if imported or line in wanted for name in tests}
    of_kernels = tuple(f"tests/core/test_{name}.py" for name in GENERAL[:3])
    order = {}
    cases = Counter[str]()
    for name in sorted(names, key=lambda name: (-seconds[name], name)):
        function = name.partition("[")[0]
        order[name] = (0 if name.startswith(of_kernels) else 1 + cases[function], seconds[name])
        cases[function] += 1
    return {name: seconds[name] for name in sorted(order, key=lambda name: order[name])}


def affordable(seconds: dict[str, float], first: Iterable[str], budget: float) -> dict[str, float]:
    """Return the tests whose seconds add up to at most the budget. `first` come first, which does
    not change the outcome."""
    total = 0.0
    chosen: dict[str, float] = {}
    for name, each in seconds.items():
        if (total := total + each) > budget and chosen:
            break
        chosen[name] = each
    return {**{name: chosen[name] for name in first if name in chosen}, **chosen}


def campaign(
    wanted: Sequence[Mutant], path: Path, budget: float, folder: Path
) -> dict[str, dict[str, Any]]:
    """Return the outcome of each mutant by its key: those that are kept in `path`, and those that
    are run now."""
    kept = (
        {entry["key"]: entry for entry in map(json.loads, path.read_text().splitlines())}
        if path.exists()
        else {}
    )
    known = reach(folder)
    now = digest([*(ROOT / name for name in known["hash"]), *JUDGES])
    killers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    done = Counter[str]()
    start = time.monotonic()
    for number, mutant in enumerate(wanted, 1):
        last = kept.get(mutant.key)
        often = killers[mutant.file, mutant.function]
        if not last or (
            last["outcome"] not in KILLED and (last["tests"], last["budget"]) != (now, budget)
        ):
            begin = time.monotonic()
            outcome = "unreached"
            test = None
            if mutant.key in NAMED["equivalent"]:
                outcome = "survived"
            elif seconds := reaching(mutant, known):
                first = [name for name, _ in often.most_common(3)]
                outcome, test = run(mutant, folder, affordable(seconds, first, budget))
            took = round(time.monotonic() - begin, 2)
            last = kept[mutant.key] = {
                **{name: getattr(mutant, name) for name in ("key", "short", "file", "operator")},
                **{
                    "outcome": outcome,
                    "test": test,
                    "seconds": took,
                    "tests": now,
                    "budget": budget,
                },
            }
            with path.open("a") as out:
                out.write(json.dumps(last) + "\n")
            done[outcome] += 1
            if outcome not in KILLED and not any(
                mutant.key in reasons for reasons in NAMED.values()
            ):
                print(f"{outcome}: {mutant.key}", flush=True)
        often.update([last["test"]] if last["test"] else [])
        if number % 20 == 0:
            print(
                f"{number}/{len(wanted)} {time.monotonic() - start:.0f} s {dict(done)}",
                file=sys.stderr,
                flush=True,
            )
    return {mutant.key: kept[mutant.key] for mutant in wanted}


def recorded() -> dict[str, str]:
    """Return the test that killed a mutant, by `Mutant.short`, as the committed results name it."""
    lines = map(json.loads, COMMITTED.read_text().splitlines() if COMMITTED.exists() else ())
    return {key: test for line in lines for test, keys in line["killers"].items() for key in keys}


def again(
    wanted: Sequence[Mutant], folder: Path, killers: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Return the same, with one test for each mutant. A mutant that no result has meets the tests
    of `GENERAL`. So does one that is not killed again, since a value that nobody stored depends on
    the versions."""
    outcomes = {}
    for mutant in wanted:
        test = killers.get(mutant.short)
        if not any(mutant.key in reasons for reasons in NAMED.values()):
            outcome, _ = run(mutant, folder, {test: 1.0} if test else None)
            if outcome not in KILLED and test:
                outcome, _ = run(mutant, folder, None)
            outcomes[mutant.key] = {"outcome": outcome}
            if outcome not in KILLED:
                print(f"{outcome}: {mutant.key}, formerly killed by {test}")
    return outcomes


def write(outcomes: Sequence[dict[str, Any]], about: dict[str, Any], path: Path) -> None:
    """Append a line for each file of the sources to the results."""
    # These import the package, which the process that forks the mutants must not have imported.
    from pre_kernels.check.device import current

    from . import mutation_table, record

    stamp = record.stamp(current())
    for line in mutation_table.aggregate(outcomes, NAMED):
        record.append(path, {"kind": "mutation", **about, **line, **stamp})


def terminate(number: int, frame: object) -> None:
    """Let SIGTERM end the run as ^C does. `pre_kernels.screen` would import the package here."""
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> int:
    parser = where.parser(__doc__)
    add = parser.add_argument
    add("--sample", type=int, help="number of mutants to draw (default: all)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the draw and of the order (default: %(default)s)",
    )
    add(
        "--only",
        default="",
        help="only mutants whose key (file function: before → after) contains this text",
    )
    add(
        "--budget",
        type=float,
        default=60,
        help="seconds of tests for a mutant (default: %(default)s)",
    )
    add(
        "--again",
        action="store_true",
        help="run only the test that killed each, and ignore kept outcomes",
    )
    add("--list", action="store_true", help="print the mutants, run nothing")
    add(
        "--stale",
        action="store_true",
        help="print the named survivors whose mutant no longer exists, run nothing",
    )
    where.add_options(add)
    options = parser.parse_args(argv)
    every = every_mutant()
    stale_keys = stale(every)
    if stale_keys:
        print(f"{len(stale_keys)} stale in {SURVIVORS.name}:", file=sys.stderr)
        print(*(f"  {key}" for key in stale_keys), sep="\n", file=sys.stderr)
    if options.stale:
        return int(bool(stale_keys))
    wanted = [mutant for mutant in every if options.only in mutant.key]
    random.Random(options.seed).shuffle(wanted)  # so that a run that is cut short is a sample too
    killers = recorded() if options.again else {}
    if options.again and options.sample:
        wanted = [mutant for mutant in wanted if mutant.short in killers]
    wanted = wanted[: options.sample]
    if not wanted:
        parser.error(f"--only {options.only!r}: no mutant has this text")
    if options.list:
        for mutant in wanted:
            print(f"{mutant.operator:5} {mutant.key}")
        return 0
    results = where.file(options, "mutation.jsonl", parser.error)
    prepare()
    signal.signal(signal.SIGTERM, terminate)
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{digest(PACKAGE / file for file in FILES)}.jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy(folder)
        try:
            outcomes = (
                again(wanted, folder, killers)
                if options.again
                else campaign(wanted, path, options.budget, folder)
            )
        except KeyboardInterrupt as stop:
            print(f"stopped; the outcomes so far are in {path}, and the same command resumes")
            return 128 + (signal.SIGTERM if stop.args else signal.SIGINT)
    if not (options.again or options.only):
        about = {"seed": options.seed, "drawn": options.sample}
        write(list(outcomes.values()), about, results)
        print(where.told(results))
    print(
        f"{len(outcomes)} mutants: {dict(Counter(entry['outcome'] for entry in outcomes.values()))}"
    )
    expected = NAMED["equivalent"].keys() | NAMED["gap"].keys()
    return int(
        any(
            entry["outcome"] not in KILLED and key not in expected
            for key, entry in outcomes.items()
        )
    )


if __name__ == "__main__":
    sys.exit(main())
