"""The README's table: time and memory of the larger CPU shapes, with eager and torch.compile."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import record
from .cpu_goals import MODES, SHAPES, extra
from .goals import by_device, runs
from .tables import markdown, provenance

OURS = "ours-torch"
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
HEAD = (
    "loss and all gradients, on a CPU",
    "eager",
    "`torch.compile`",
    "pre-kernels",
    "extra memory: eager / compile / ours",
)
NOTHING = (
    "The code has changed since it was last timed. [docs/benchmarks.md](docs/benchmarks.md) has "
    "the numbers measured then."
)


def page(records: Iterable[dict[str, Any]]) -> str:
    """Return the table of the CPU that was measured last, or a link if nothing of this code is
    measured."""
    records = [
        entry for entry in records if entry["kind"] == "loss" and not entry.get("capability")
    ]
    old = {id(entry) for entry in record.changed(records)}
    records = [entry for entry in records if id(entry) not in old]
    if not records:
        return NOTHING
    last = max(records, key=lambda entry: entry["date"])
    records = by_device(records)[last["device"]]
    rows: list[Sequence[str]] = [HEAD]
    shown: list[dict[str, Any]] = []
    for shape in SHAPES:
        for dtype in DTYPES:
            about = {"shape": shape, "dtype": dtype, "selection": "index"}
            for run in runs(records, **about):
                compiled = [run[name] for name in MODES if name in run]
                if {OURS, "eager"} <= run.keys() and compiled:
                    entries = (run["eager"], min(compiled, key=_time), run[OURS])
                    rows.append(_row(*entries))
                    shown += entries
    if not shown:
        return NOTHING
    legend = (
        "“×”: how many times as fast as eager. Extra memory: the peak beyond inputs and gradients."
    )
    return "\n".join([markdown(rows), "", f"{legend} {'; '.join(provenance(shown))}."])


def _row(eager: dict[str, Any], compiled: dict[str, Any], ours: dict[str, Any]) -> Sequence[str]:
    widths = " → ".join(str(ours[name]) for name in ("d", "m", "z"))
    memory = [extra(entry) for entry in (eager, compiled, ours)]
    known = [f"{value:,.0f}" for value in memory if value is not None]
    return (
        f"{ours['n']:,} tokens, {widths}, {DTYPES[ours['dtype']]}",
        f"{_time(eager):,.0f} ms",
        *(
            f"{_time(entry):,.0f} ms, {_time(eager) / _time(entry):.1f} ×"
            for entry in (compiled, ours)
        ),
        f"{' / '.join(known)} MiB" if len(known) == len(memory) else "",
    )


def _time(entry: dict[str, Any]) -> float:
    return float(entry["median_ms"])
