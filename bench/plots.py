"""Result files as plots: bars beside eager and the floor, and curves over N, intensity and
workspace."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import baselines, shapes
from .tables import groups, ratios

Record = dict[str, Any]


def bars(records: Iterable[Record], path: Path) -> None:
    """For each shape: time ÷ the six products' in the same run, peak memory ÷ eager's."""
    pyplot = _pyplot()
    runs = [
        run
        for run in groups(one for one in records if one["kind"] == "loss")
        if "floor" in run and "eager" in run
    ]
    if not runs:
        raise ValueError(
            f"plot: got no run of the loss with eager and the floor in it, want one for {path}"
        )
    timed = dict.fromkeys(name for run in runs for name, one in run.items() if "median_ms" in one)
    names = [name for name in timed if name != "floor"]
    plot, axes = pyplot.subplots(
        1, 2, figsize=(12, 1.2 + 0.5 * len(runs)), sharey=True, layout="constrained"
    )
    for axis, key, title in zip(
        axes,
        ("floor", "peak"),
        ("time ÷ the six bare products", "peak memory ÷ eager"),
        strict=True,
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
        one = next(iter(run.values()))
        ticks.append(
            f"{one['shape']} {one['dtype']} {one.get('selection', 'mask')}\n{one['device'][:28]}"
        )
    axes[0].set_yticks(range(len(runs)), ticks)
    axes[0].invert_yaxis()
    plot.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    plot.savefig(path, dpi=150)
    pyplot.close(plot)


def curves(records: Iterable[Record], path: Path) -> list[str]:
    """The panels there is data for, of one device, in one picture; their titles."""
    records = list(records)
    device = next((one["device"] for one in reversed(records) if one.get("capability")), None)
    device = device or next((one["device"] for one in records), None)
    records = [one for one in records if one["device"] == device]
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


def workspaces(records: Iterable[Record], path: Path) -> list[str]:
    """What the workspace buys on a CPU, the last one that was swept: a row for each dtype; the
    titles."""
    swept = [
        one
        for one in records
        if one["kind"] == "workspace" and not one.get("capability") and "over_floor" in one
    ]
    swept = [
        one
        for one in swept
        if all(one.get(name) == swept[-1].get(name) for name in ("device", "threads", "shape"))
    ]
    if not swept:
        return []
    pyplot = _pyplot()
    dtypes = list(dict.fromkeys(one["dtype"] for one in swept))
    plot, grid = pyplot.subplots(
        len(dtypes), 2, figsize=(12.5, 4.0 * len(dtypes)), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for dtype, row in zip(dtypes, grid, strict=True):
        for axis, panel in zip(row, (workspace, workspace_memory), strict=True):
            panel(axis, [one for one in swept if one["dtype"] == dtype])
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
    plot.savefig(path, dpi=150)
    pyplot.close(plot)
    return [axis.get_title() for axis in grid.flat]


def over_n(axis: Any, runs: list[dict[str, Record]]) -> None:
    """Lines: the sweep at d = m = z; crosses: the real shapes."""
    axis.set(title="time ÷ the six bare products", xlabel="N", xscale="log")
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    _lines(axis, runs, lambda run, name: ratios(run, name)["floor"])


def memory_over_n(axis: Any, runs: list[dict[str, Record]]) -> None:
    axis.set(title="peak MiB beyond the gradients", xlabel="N", xscale="log", yscale="log")
    _lines(axis, runs, _extra)
    formula = sorted(
        {
            (one["n"], one["formula_mib"])
            for run in runs
            for name, one in run.items()
            if one["kind"] == "sweep"
            and name in ("ours-blas", "ours-triton")
            and "formula_mib" in one
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
    axis.set(title="TFLOP/s over FLOP a byte of least traffic", xlabel="FLOP / byte", xscale="log")
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
    _over_workspace(axis, records, lambda one: one["over_floor"])
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":", label="floor")


def workspace_memory(axis: Any, records: list[Record]) -> None:
    axis.set(
        title="extra peak over the workspace",
        xlabel="MiB of workspace",
        ylabel="peak MiB beyond the gradients",
    )
    known = [one for one in records if "peak_mib" in one]
    _over_workspace(axis, known, lambda one: one["peak_mib"] - one["returned_mib"])
    axis.set_ylim(bottom=0)


def _over_workspace(axis: Any, records: list[Record], value: Callable[[Record], float]) -> None:
    """Curves of the baselines that take one, lines across for those that take none."""
    axis.set_xscale("log", base=2)
    for one in records:
        if "item" not in one and one["peer"] != "floor":
            axis.axhline(value(one), color=_color(one["peer"]), linestyle="--", label=one["peer"])
    curves = [one for one in records if "item" in one]
    for name in dict.fromkeys(one["peer"] for one in curves):
        points = sorted((one["item"], value(one)) for one in curves if one["peer"] == name)
        axis.plot(*zip(*points, strict=True), marker="o", color=_color(name), label=name)
    axis.set_xticks(sorted({one["item"] for one in curves}))
    axis.minorticks_off()


def intensity(one: Record) -> float:
    """FLOP of the six products ÷ bytes that any implementation reads and writes at least once."""
    n, d, m, z = (one[name] for name in "ndmz")
    # hidden and anchor; weights and their gradients; dH
    elements = n * (d + z) + 2 * m * (d + z) + n * d
    return 6 * n * m * (d + z) / (elements * shapes.DTYPES[one["dtype"]].itemsize)


def _timed(records: list[Record]) -> list[dict[str, Record]]:
    """Runs with a floor: the real shapes and, of the sweep, the widest predictor."""
    kept = [
        one
        for one in records
        if one["kind"] in ("loss", "sweep")
        and one["dtype"] == "bf16"
        and one.get("selection", "mask") == "index"
        and (one["kind"] == "loss" or one["m"] == one["d"])
        and "median_ms" in one
    ]
    return [run for run in groups(kept) if "floor" in run]


def _with_memory(records: list[Record]) -> list[dict[str, Record]]:
    return [run for run in _timed(records) if any("peak_mib" in one for one in run.values())]


def _workspaces(records: list[Record]) -> list[Record]:
    return [
        one
        for one in records
        if one["kind"] == "workspace" and "over_floor" in one and one["dtype"] == "bf16"
    ]


PANELS: dict[Callable[[Any, Any], None], Callable[[list[Record]], list[Any]]] = {
    over_n: _timed,
    memory_over_n: _with_memory,
    roofline: _timed,
    workspace: _workspaces,
}


def _extra(run: dict[str, Record], name: str) -> float | None:
    one = run[name]
    return one["peak_mib"] - one["returned_mib"] if "peak_mib" in one else None


def _lines(
    axis: Any,
    runs: list[dict[str, Record]],
    value: Callable[[dict[str, Record], str], float | None],
) -> None:
    """For each baseline a line through the sweep and crosses for the other shapes."""
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


def _color(name: str) -> Any:
    """The same in every panel and in the bars."""
    order = list(baselines.BY_NAME)
    return _pyplot().get_cmap("tab20")(order.index(name) if name in order else len(order))


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
