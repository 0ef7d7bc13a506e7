"""The generated tables and their pages.

A table is between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, each on a line of its own.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pre_kernels import sources

from . import (
    ROOT,
    cpu_goals,
    diagnostics,
    fuzz_table,
    gpu_goals,
    mutation_table,
    record,
    scale_tables,
    speed_table,
)
from .tables import below, loss_table, markdown, outdated

Records = Sequence[dict[str, Any]]
COMMAND = "make bench-report"
# The demos, each with a committed run.
DEMO = "demo"
REAL = "real"


def loss(records: Records) -> str:
    """Return a table of the loss for each device, the last measured first, and where its numbers
    come from."""
    devices: dict[str, list[dict[str, Any]]] = {}
    for entry in records:
        if entry["kind"] == "loss":
            devices.setdefault(entry["device"], []).append(entry)
    parts = []
    for here in sorted(devices.values(), key=lambda here: max(e["date"] for e in here))[::-1]:
        parts += [markdown(loss_table(here)), "", below(here), ""]
    return "\n".join(parts[:-1]) if parts else "No results yet."


def goals(records: Records) -> str:
    kept = [entry for entry in records if entry.get("capability")]
    return _goals(gpu_goals.table(records), kept)


def goals_on_a_cpu(records: Records) -> str:
    on_cpus = [entry for entry in records if not entry.get("capability")]
    kept = [entry for entry in on_cpus if entry["kind"] in cpu_goals.KINDS]
    return _goals(cpu_goals.table(records), kept)


def _goals(rows: list[Sequence[str]], records: Records) -> str:
    line = outdated(records)
    return "\n".join([markdown(rows), *(("", line) if line else ())])


def evidence(records: Records) -> str:
    from .evidence import table

    kept = [entry for entry in records if entry["kind"] == "evidence"]
    return table(kept) if kept else "No results yet."


def evidence_real(records: Records) -> str:
    from .evidence_real import table

    kept = [entry for entry in records if entry["kind"] == REAL]
    return table(kept) if kept else "No results yet."


def demo(_: Records) -> str:
    from pre_kernels.demo import results

    found = run_of(DEMO)
    return "\n".join([results.markdown(found), *_of_run(DEMO, found)])


def real_demo(_: Records) -> str:
    from pre_kernels.demo.real import results

    found = run_of(REAL)
    said = [f"- {sentence}" for sentence in results.verdict(found)]
    return "\n".join([*said, "", *_of_run(REAL, found)])


def _of_run(kind: str, found: Mapping[str, Any]) -> list[str]:
    """Return lines that say where the results of a demo's run come from."""
    names = ("torch", "transformers", "python")
    versions = [f"{name} {found['versions'][name]}" for name in names]
    where = ", ".join([found["device"], *versions, found["date"], f"commit {found['commit']}"])
    line = outdated([{**found, "kind": kind}])
    return [f"- {where}", *(("", line) if line else ())]


def probe(records: Records) -> str:
    """Return what the picture of README shows, in words."""
    from .real_plots import caption, shown

    kept = shown([entry for entry in records if entry["kind"] == REAL])
    line = outdated(kept)
    return f"{caption(kept)} {line}" if line else caption(kept)


def models(_: Records) -> str:
    from pre_kernels.integrations import family_table

    return str(family_table.markdown())


def computed(table: Callable[[], str]) -> Callable[[Records], str]:
    """Return the text of a table that is computed, not measured."""
    return lambda _: table()


class Table(NamedTuple):
    page: str
    text: Callable[[Records], str]


TABLES = {
    "probe": Table("README.md", probe),
    "speed": Table("README.md", speed_table.page),
    "bench": Table("docs/benchmarks.md", loss),
    "cpu-goals": Table("docs/benchmarks.md", goals_on_a_cpu),
    "goals": Table("docs/benchmarks.md", goals),
    "diagnostics": Table("docs/diagnostics.md", diagnostics.page),
    "fuzz": Table("docs/generated/fuzz.md", fuzz_table.page),
    "mutation": Table("docs/generated/mutation.md", mutation_table.page),
    "demo": Table("docs/evidence.md", demo),
    "evidence": Table("docs/evidence.md", evidence),
    "real-demo": Table("docs/evidence.md", real_demo),
    "evidence-real": Table("docs/evidence.md", evidence_real),
    "models": Table("docs/models.md", models),
    "scale-ranks": Table("docs/scale.md", computed(scale_tables.ranks_table)),
    "scale-work": Table("docs/scale.md", computed(scale_tables.work)),
    "scale-memory": Table("docs/scale.md", computed(scale_tables.memory_table)),
    "scale-messages": Table("docs/scale.md", computed(scale_tables.messages_table)),
    "scale-small": Table("docs/scale.md", computed(scale_tables.small_table)),
}


def committed() -> Records:
    """Return the last record of each key in bench/results."""
    return known(sorted(record.RESULTS.glob("*.jsonl")))


def known(paths: Iterable[Path]) -> Records:
    """Return the last record of each key in some files, without trial runs."""
    return [entry for entry in record.latest(record.load(paths)) if not entry.get("dry_run")]


def run_of(kind: str) -> dict[str, Any]:
    """Return the results of the committed run of one of the demos, `DEMO` or `REAL`."""
    path = record.RESULTS / f"{kind}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def adopt_demo(folder: Path = ROOT / "demo-out") -> Path | None:
    """Copy the results that `make demo` left to bench/results, if they have the default settings
    and belong to the code that is here. Return the path if they were copied."""
    from pre_kernels.demo.settings import Settings

    path = folder / "demo.json"
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    settings = Settings(seeds=found["settings"]["seeds"])
    if found["settings"] != {**dataclasses.asdict(settings), "layer": settings.pre_layer}:
        return None
    if found == run_of(DEMO) or found.get("measured") != sources.digest(DEMO):
        return None
    shutil.copyfile(path, record.RESULTS / "demo.json")
    return path


def write(names: Iterable[str], records: Records, root: Path = ROOT) -> None:
    """Replace these tables on their pages."""
    for name in names:
        path = root / TABLES[name].page
        before, _, after = _parts(path, name)
        path.write_text(f"{before}\n{TABLES[name].text(records)}\n{after}", encoding="utf-8")


def written(name: str, root: Path = ROOT) -> str:
    """Return the table that is on its page."""
    return _parts(root / TABLES[name].page, name)[1].strip("\n")


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    """Return a page up to the first marker, between the two, and from the second."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(
            f"page: {path} lacks the lines {begin} and {end}, once each and in this order"
        )
    first, last = text.index(begin) + len(begin), text.index(end)
    return text[:first], text[first:last], text[last:]
