"""Result files as the README's tables and as pictures.

    python -m bench.report                                    every committed result, as markdown
    python -m bench.report bench/results/cpu.jsonl            one file
    python -m bench.report --readme README.md                 replace what stands between the README's markers
    python -m bench.report --plot bench/results/speed.png     time ÷ floor and peak memory ÷ eager, as bars
    python -m bench.report --curves bench/results/curves.png  over N, over intensity and over the workspace
    python -m bench.report --workspace bench/results/workspace.png  the same over a CPU's workspace
    python -m bench.report --kind tile                        the sweep of tiles (other kinds: sweep, sync, kernel)

The markers are `<!-- bench:begin -->` and `<!-- bench:end -->`, each on a line of its own, for the
table of the loss, and the same with `goals` for the goals on a GPU, `cpu-goals` for those on a CPU,
`fuzz` for errors beside eager's, `mutation` for the errors that tests have to see.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import record

HEAD = (
    "shape", "N · d→m→z", "dtype", "rows", "peer", "ms (quartiles)", "TFLOP/s", "÷ eager", "÷ floor", "peak MiB",
    "÷ eager", "less gradients, ÷ eager", "error ÷ eager",
)  # fmt: skip


def groups(records: Iterable[dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Records by peer, for each run of a shape."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for one in records:
        runs.setdefault(one["group"], {})[one["peer"]] = one
    return list(runs.values())


def over_floor(run: dict[str, dict[str, Any]], peer: str) -> float | None:
    """A peer's time over that of the floor that was sampled beside it."""
    one = run.get(peer, {})
    floor = one.get("floor_ms", run.get("floor", {}).get("median_ms"))
    return one["median_ms"] / floor if floor and "median_ms" in one else None


def ratios(run: dict[str, dict[str, Any]], peer: str) -> dict[str, float | None]:
    """Of a peer: its time over eager's and the floor's, its peak memory over eager's, with and
    without gradients. Times of different processes are compared by the floor beside each."""
    over, eager = over_floor(run, peer), over_floor(run, "eager")

    def of(name: str, *fields: str) -> float | None:
        values = [run.get(name, {}).get(field) for field in fields]
        if any(value is None for value in values):
            return None
        return values[0] - sum(values[1:])

    def ratio(other: str, *fields: str) -> float | None:
        ours, theirs = of(peer, *fields), of(other, *fields)
        return ours / theirs if ours is not None and theirs else None

    return {
        "eager": over / eager if over and eager else ratio("eager", "median_ms"),
        "floor": over,
        "peak": ratio("eager", "peak_mib"),
        "extra": ratio("eager", "peak_mib", "returned_mib"),
    }


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def loss_table(records: Iterable[dict[str, Any]]) -> list[Sequence[str]]:
    """Header and rows; a peer without figures is left out (see `refusals`)."""
    table: list[Sequence[str]] = [HEAD]
    for run in groups(records):
        for name, one in run.items():
            if "median_ms" not in one:
                continue
            ratio = ratios(run, name)
            digits = 3 if one["median_ms"] < 100 else 0
            time = [_number(one[key], digits) for key in ("median_ms", "q1_ms", "q3_ms")]
            table.append(
                (
                    one["shape"],
                    f"{one['n']:,} · {one['d']}→{one['m']}→{one['z']}",
                    one["dtype"],
                    one.get("selection", "mask"),
                    name,
                    f"{time[0]} ({time[1]}–{time[2]})",
                    _number(one["tflops"], 1 if one["tflops"] >= 10 else 2),
                    _number(ratio["eager"]),
                    _number(ratio["floor"]),
                    _number(one.get("peak_mib"), 0),
                    _number(ratio["peak"]),
                    _number(ratio["extra"]),
                    _number(one.get("error_ratio")) + _rule(one),
                )
            )
    return table


def _rule(one: dict[str, Any]) -> str:
    if one.get("own_rule"):
        return ", own rule"
    return ", outside the rule" if one.get("outside_rule") else ""


def refusals(records: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each figure that was not taken, with the reason."""
    lines = []
    for one in records:
        for what in ("failed", "unavailable", "memory_unavailable", "outside_rule"):
            if one.get(what):
                lines.append(
                    f"{one['shape']} {one['dtype']} {one['peer']}: {what.replace('_', ' ')}: {one[what]}"
                )
    return lines


def plain_table(records: list[dict[str, Any]]) -> list[Sequence[str]]:
    """Records of any other kind: a column for each field that is not the same in all, but no lists
    and no stamp."""
    hidden = {
        "kind",
        "group",
        "date",
        "commit",
        "source",
        "power.draw",
        "temperature.gpu",
        "clocks.sm",
    }
    names = dict.fromkeys(
        name for one in records for name, value in one.items() if not isinstance(value, list | dict)
    )
    shown = [
        name
        for name in names
        if name not in hidden and len({str(one.get(name)) for one in records}) > 1
    ]

    def text(value: Any) -> str:
        return (
            _number(value, 3) if isinstance(value, float) else "" if value is None else str(value)
        )

    return [shown, *([text(one.get(name)) for name in shown] for one in records)]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A markdown table whose source lines up too."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def provenance(records: Iterable[dict[str, Any]]) -> list[str]:
    """A line for each device, version and commit that the figures come from."""
    lines = {}
    for one in records:
        extras = [f"driver {one['driver_version']}"] if one.get("driver_version") else []
        extras += [f"{one['threads']} threads"] if one.get("threads") else []
        parts = [one["device"], *extras, f"torch {one['torch']}", f"triton {one['triton']}"]
        lines[", ".join([*parts, one["date"][:10], f"commit {one['commit']}"])] = None
    return list(lines)


def page(records: list[dict[str, Any]]) -> str:
    """The README's section: a table of the loss for each device, and where its figures come
    from."""
    timed = [one for one in records if one["kind"] == "loss"]
    parts = []
    for device in dict.fromkeys(one["device"] for one in timed):
        here = [one for one in timed if one["device"] == device]
        parts += [markdown(loss_table(here)), "", *(f"- {line}" for line in provenance(here)), ""]
    return "\n".join(parts[:-1]) if parts else "No results yet."


def into_readme(path: Path, texts: Mapping[str, str]) -> None:
    """Replace what stands between the markers of each name."""
    text = path.read_text()
    for name, new in texts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ValueError(
                f"readme: {path} lacks the lines {begin} and {end}, once each and in this order"
            )
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{new}\n{end}{rest.partition(end)[2]}"
    path.write_text(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files; else all of bench/results"
    )
    parser.add_argument("--readme", type=Path, help="write the tables between this file's markers")
    parser.add_argument("--plot", type=Path, help="write the bars there")
    parser.add_argument(
        "--curves", type=Path, help="write the curves there, if there is data for any"
    )
    parser.add_argument(
        "--workspace",
        type=Path,
        help="write a CPU's curves over the workspace there, if there are any",
    )
    parser.add_argument("--kind", help="print the records of this kind instead of the loss")
    arguments = parser.parse_args(argv)

    from . import diagnostics, goals, mutation, numerics, plots  # which build on this module

    files = arguments.files or sorted(record.RESULTS.glob("*.jsonl"))
    records = [one for one in record.latest(record.load(files)) if not one.get("dry_run")]
    if arguments.kind:
        chosen = [one for one in records if one["kind"] == arguments.kind]
        print(markdown(plain_table(chosen)) if chosen else f"no record of kind {arguments.kind!r}")
        return
    goal_tables = {
        "goals": markdown(goals.table(records)),
        "cpu-goals": markdown(goals.cpu_table(records)),
    }
    if arguments.readme:
        texts = {"bench": page(records), **goal_tables, "diagnostics": diagnostics.page(records)}
        texts["fuzz"], texts["mutation"] = numerics.page(records), mutation.page(records)
        into_readme(arguments.readme, texts)
    if arguments.plot:
        plots.bars(records, arguments.plot)
    if arguments.curves:
        plots.curves(records, arguments.curves)
    if arguments.workspace:
        plots.workspaces(records, arguments.workspace)
    if not (arguments.readme or arguments.plot or arguments.curves or arguments.workspace):
        print(page(records), *goal_tables.values(), sep="\n\n")


if __name__ == "__main__":
    main()
