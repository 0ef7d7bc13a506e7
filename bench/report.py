"""Result files as the README's tables and as plots.

    python -m bench.report                             every committed result, as markdown
    python -m bench.report bench/results/cpu.jsonl     one file
    python -m bench.report --readme README.md          replace what stands between the README's
                                                       markers
    python -m bench.report --plot bench/results/speed.png
                                                       time ÷ floor and peak memory ÷ eager, as bars
    python -m bench.report --curves bench/results/curves.png
                                                       over N, over intensity and over the workspace
    python -m bench.report --workspace bench/results/workspace.png
                                                       the same over a CPU's workspace
    python -m bench.report --kind tile                 the sweep of tiles (other kinds: sweep, sync,
                                                       kernel)

The markers are `<!-- bench:begin -->` and `<!-- bench:end -->`, each on a line of its own, for the
table of the loss, and the same with `goals` for the goals on a GPU, `cpu-goals` for those on a CPU,
`fuzz` for errors beside eager's, `mutation` for the errors that tests have to see.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cpu_goals, diagnostics, fuzz_table, gpu_goals, mutation_table, plots, record
from .tables import loss_table, markdown, plain_table, provenance


def page(records: list[dict[str, Any]]) -> str:
    """The README's section: a table of the loss for each device, and where its numbers
    come from."""
    timed = [entry for entry in records if entry["kind"] == "loss"]
    parts = []
    for device in dict.fromkeys(entry["device"] for entry in timed):
        here = [entry for entry in timed if entry["device"] == device]
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

    files = arguments.files or sorted(record.RESULTS.glob("*.jsonl"))
    records = [entry for entry in record.latest(record.load(files)) if not entry.get("dry_run")]
    if arguments.kind:
        chosen = [entry for entry in records if entry["kind"] == arguments.kind]
        print(markdown(plain_table(chosen)) if chosen else f"no record of kind {arguments.kind!r}")
        return
    goal_tables = {
        "goals": markdown(gpu_goals.table(records)),
        "cpu-goals": markdown(cpu_goals.table(records)),
    }
    if arguments.readme:
        texts = {"bench": page(records), **goal_tables, "diagnostics": diagnostics.page(records)}
        texts |= {"fuzz": fuzz_table.page(records), "mutation": mutation_table.page(records)}
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
