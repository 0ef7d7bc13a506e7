"""Result files as plots: bars beside eager and the floor, and curves over N, intensity and
workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pre_kernels.diagnostics.report.plots import COLOURS as CYCLE

from . import shapes
from .tables import groups, ratios

Record = dict[str, Any]
# Fewest tokens of a shape in the bars. In smaller shapes calls cost more than matmuls.
LEAST = 1000
# Eager has the colour of a model without PRe, and ours that of one with PRe, as in all pages.
COLOURS = {
    **dict(
        zip(("eager", "ours-torch", "compile", "compile-max", "liger", "viral"), CYCLE, strict=True)
    ),
    "ours-blas": "#003B5C",
    "ours-triton": "#6A51A3",
    "ours-fp8": "#00A3A3",
    "addmm-activation": "#8C564B",
    "quack": "#BCBD22",
    "floor": "black",
}


def bars(records: Iterable[Record], path: Path, note: str = "") -> None:
    """Draw for each shape of at least LEAST tokens: time ÷ that of the six bare matmuls in the same
    run, and peak memory ÷ eager's. `note` is a line below."""
    pyplot = _pyplot()
    runs = [
        run
        for run in groups(
            entry for entry in records if entry["kind"] == "loss" and entry["n"] >= LEAST
        )
        if "floor" in run and "eager" in run
    ]
    if not runs:
        raise ValueError(
            f"plot: got no run of the loss with eager and the floor in it, want one for {path}"
        )
    timed = dict.fromkeys(
        name for run in runs for name, entry in run.items() if "median_ms" in entry
    )
    names = [name for name in timed if name != "floor"]
    plot, axes = pyplot.subplots(
        1, 2, figsize=(12, 1.2 + 0.5 * len(runs)), sharey=True, layout="constrained"
    )
    for axis, key, title in zip(
        axes, ("floor", "peak"), ("time ÷ the six bare matmuls", "peak memory ÷ eager"), strict=True
    ):
        for offset, name in enumerate(names):
            values = [ratios(run, name)[key] or 0 for run in runs]
            centers = [
                row + 0.8 * (offset - (len(names) - 1) / 2) / len(names) for row in range(len(runs))
            ]
            axis.barh(centers, values, height=0.8 / len(names), color=_color(name), label=name)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(title)
    ticks = []
    for run in runs:
        entry = next(iter(run.values()))
        widths = "→".join(str(entry[name]) for name in ("d", "m", "z"))
        ticks.append(
            f"{entry['n']:,} tokens, {widths}\n"
            f"{entry['dtype']}, rows by {entry.get('selection', 'mask')}"
        )
    axes[0].set_yticks(range(len(runs)), ticks)
    axes[0].invert_yaxis()
    plot.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    plot.suptitle("; ".join(dict.fromkeys(next(iter(run.values()))["device"] for run in runs)))
    _note(plot, note)
    plot.savefig(path, dpi=150)
    pyplot.close(plot)


def _note(plot: Any, text: str) -> None:
    if text:
        plot.supxlabel(text, fontsize="small", color="0.4")


def curves(records: Iterable[Record], path: Path) -> list[str]:
    """Draw the panels that have data, of one device, in one picture. Return their titles."""
    records = list(records)
    device = next((entry["device"] for entry in reversed(records) if entry.get("capability")), None)
    device = device or next((entry["device"] for entry in records), None)
    records = [entry for entry in records if entry["device"] == device]
    panels = {panel: data for panel, select in PANELS.items() if (data := select(records))}
    if not panels:
        return []
    pyplot = _pyplot()
    wide = min(2, len(panels))
    high = (len(panels) + 1) // 2
    plot, grid = pyplot.subplots(
        high, wide, figsize=(5.5 * wide + 1.5, 4.2 * high), squeeze=False, layout="constrained"
    )
    axes = list(grid.flat)
    handles: dict[str, Any] = {}
    for axis in axes[len(panels) :]:
        axis.remove()
    for axis, (panel, data) in zip(axes, panels.items(), strict=False):
        panel(axis, data)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.set_minor_formatter("")
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    plot.legend(handles.values(), handles.keys(), loc="outside right upper")
    plot.suptitle(f"{device}, bf16")
    plot.savefig(path, dpi=150)
    pyplot.close(plot)
    return [axis.get_title() for axis in axes[: len(panels)]]


def workspaces(records: Iterable[Record], path: Path, note: str = "") -> list[str]:
    """Draw time and memory over the workspace of the CPU that was swept last, with a row for each
    dtype. Return the titles."""
    swept = [
        entry
        for entry in records
        if entry["kind"] == "workspace" and not entry.get("capability") and "over_floor" in entry
    ]
    swept = [
        entry
        for entry in swept
        if all(entry.get(name) == swept[-1].get(name) for name in ("device", "threads", "shape"))
    ]
    if not swept:
        return []
    pyplot = _pyplot()
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in swept))
    plot, grid = pyplot.subplots(
        len(dtypes), 2, figsize=(12.5, 4.0 * len(dtypes)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for dtype, row in zip(dtypes, grid, strict=True):
        for axis, panel in zip(row, (workspace, workspace_memory), strict=True):
            panel(axis, [entry for entry in swept if entry["dtype"] == dtype])
            axis.set_title(f"{dtype}: {axis.get_title()}")
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_formatter("{x:,.0f}")
            handles |= {
                label: handle
                for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
            }
    plot.legend(handles.values(), handles.keys(), loc="outside right upper")
    plot.suptitle(
        f"{swept[-1]['device']}, {swept[-1].get('threads')} threads, {swept[-1]['shape']}"
    )
    _note(plot, note)
    plot.savefig(path, dpi=150)
    pyplot.close(plot)
    return [axis.get_title() for axis in grid.flat]


def over_n(axis: Any, runs: list[dict[str, Record]]) -> None:
    """Draw the sweep at d = m = z as lines, and the real shapes as crosses."""
    axis.set(title="time ÷ the six bare matmuls", xlabel="N", xscale="log")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _lines(axis, runs, lambda run, name: ratios(run, name)["floor"])


def memory_over_n(axis: Any, runs: list[dict[str, Record]]) -> None:
    axis.set(title="peak MiB beyond the gradients", xlabel="N", xscale="log", yscale="log")
    _lines(axis, runs, _extra)
    formula = sorted(
        {
            (entry["n"], entry["formula_mib"])
            for run in runs
            for name, entry in run.items()
            if entry["kind"] == "sweep"
            and name in ("ours-blas", "ours-triton")
            and "formula_mib" in entry
        }
    )
    if formula:
        axis.plot(
            *zip(*formula, strict=True),
            color="black",
            linestyle="--",
            label="4·m·(d+z) + dH + workspace",
        )


def roofline(axis: Any, runs: list[dict[str, Record]]) -> None:
    axis.set(
        title="TFLOP/s over FLOP per byte of minimal traffic", xlabel="FLOP / byte", xscale="log"
    )
    for name in _names(runs):
        points = [
            (intensity(run[name]), run[name]["tflops"])
            for run in runs
            if "tflops" in run.get(name, {})
        ]
        axis.scatter(*zip(*points, strict=True), marker="x", color=_color(name), label=name)
    floor = [(intensity(run["floor"]), run["floor"]["tflops"]) for run in runs]
    axis.scatter(*zip(*floor, strict=True), marker="_", s=120, color="black", label="floor")


def workspace(axis: Any, records: list[Record]) -> None:
    axis.set(
        title="time ÷ floor over the workspace", xlabel="MiB of workspace", ylabel="time ÷ floor"
    )
    _over_workspace(axis, records, lambda entry: entry["over_floor"])
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":", label="floor")


def workspace_memory(axis: Any, records: list[Record]) -> None:
    axis.set(
        title="extra peak over the workspace",
        xlabel="MiB of workspace",
        ylabel="peak MiB beyond the gradients",
    )
    known = [entry for entry in records if "peak_mib" in entry]
    _over_workspace(axis, known, lambda entry: entry["peak_mib"] - entry["returned_mib"])
    axis.set_ylim(bottom=0)


def _over_workspace(axis: Any, records: list[Record], value: Callable[[Record], float]) -> None:
    """Draw a curve for each baseline that takes a workspace, and a horizontal line for each that
    takes none."""
    axis.set_xscale("log", base=2)
    for entry in records:
        if "item" not in entry and entry["peer"] != "floor":
            axis.axhline(
                value(entry), color=_color(entry["peer"]), linestyle="--", label=entry["peer"]
            )
    curves = [entry for entry in records if "item" in entry]
    for name in dict.fromkeys(entry["peer"] for entry in curves):
        points = sorted((entry["item"], value(entry)) for entry in curves if entry["peer"] == name)
        axis.plot(*zip(*points, strict=True), marker="o", color=_color(name), label=name)
    axis.set_xticks(sorted({entry["item"] for entry in curves}))
    axis.minorticks_off()


def intensity(entry: Record) -> float:
    """Return the FLOP of the six matmuls ÷ the bytes that any implementation reads and writes at
    least once."""
    n, d, m, z = (entry[name] for name in "ndmz")
    # hidden and anchor; weights and their gradients; dH
    elements = n * (d + z) + 2 * m * (d + z) + n * d
    return 6 * n * m * (d + z) / (elements * shapes.DTYPES[entry["dtype"]].itemsize)


def _timed(records: list[Record]) -> list[dict[str, Record]]:
    """Return the runs with a floor: the real shapes and, of the sweep, the widest predictor."""
    kept = [
        entry
        for entry in records
        if entry["kind"] in ("loss", "sweep")
        and entry["dtype"] == "bf16"
        and entry.get("selection", "mask") == "index"
        and (entry["kind"] == "loss" or entry["m"] == entry["d"])
        and "median_ms" in entry
    ]
    return [run for run in groups(kept) if "floor" in run]


def _with_memory(records: list[Record]) -> list[dict[str, Record]]:
    return [run for run in _timed(records) if any("peak_mib" in entry for entry in run.values())]


def _workspaces(records: list[Record]) -> list[Record]:
    return [
        entry
        for entry in records
        if entry["kind"] == "workspace" and "over_floor" in entry and entry["dtype"] == "bf16"
    ]


PANELS: dict[Callable[[Any, Any], None], Callable[[list[Record]], list[Any]]] = {
    over_n: _timed,
    memory_over_n: _with_memory,
    roofline: _timed,
    workspace: _workspaces,
}


def _extra(run: dict[str, Record], name: str) -> float | None:
    entry = run[name]
    return entry["peak_mib"] - entry["returned_mib"] if "peak_mib" in entry else None


def _lines(
    axis: Any,
    runs: list[dict[str, Record]],
    value: Callable[[dict[str, Record], str], float | None],
) -> None:
    """Draw for each baseline a line through the sweep and crosses for the other shapes."""
    for name in _names(runs):
        for kind, style in (("sweep", {"marker": "o"}), ("loss", {"marker": "x", "linestyle": ""})):
            of_kind = [run for run in runs if name in run and run[name]["kind"] == kind]
            points = sorted(
                (run[name]["n"], y) for run in of_kind if (y := value(run, name)) is not None
            )
            if points:
                axis.plot(*zip(*points, strict=True), color=_color(name), label=name, **style)


def _names(runs: list[dict[str, Record]]) -> list[str]:
    return [name for name in dict.fromkeys(name for run in runs for name in run) if name != "floor"]


def _color(name: str) -> str:
    """Return the color of a baseline, which is the same in every panel and in the bars."""
    return COLOURS.get(name, "0.5")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
