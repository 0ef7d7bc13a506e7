"""The plots of records."""

import pytest

from bench import baselines, plots

from .support import cpu_results, gpu_results, results


def test_curves_over_the_workspace_of_a_cpu(tmp_path):
    picture = tmp_path / "workspace.png"
    assert plots.workspaces(gpu_results(), picture) == []
    assert not picture.exists()
    titles = plots.workspaces([*cpu_results(), *gpu_results()], picture)
    assert [title.partition(":")[0] for title in titles] == ["bf16", "bf16", "fp32", "fp32"]
    assert picture.stat().st_size > 10_000
    without = [line for line in cpu_results() if line["dtype"] == "bf16"]
    for line in without:
        # as on a system that does not say it
        line.pop("peak_mib", None)
    assert len(plots.workspaces(without, picture)) == 2
    swept = [line for line in cpu_results() if line["kind"] == "workspace"]
    assert plots.curves(swept, tmp_path / "curves.png") == ["time ÷ floor over the workspace"]


def test_curves(tmp_path):
    picture = tmp_path / "curves.png"
    assert plots.curves([], picture) == []
    assert not picture.exists()
    assert len(plots.curves(gpu_results() + results(), picture)) == len(plots.PANELS)
    assert picture.stat().st_size > 10_000
    without = [one for one in gpu_results() if one["kind"] != "workspace"]
    assert "time ÷ floor over the workspace" not in plots.curves(without, picture)
    square = {"n": 1 << 40, "d": 4096, "m": 4096, "z": 4096, "dtype": "bf16"}
    assert plots.intensity(square) == pytest.approx(12 * 4096**2 / (3 * 4096 * 2))


def test_every_baseline_has_a_colour_of_its_own():
    assert plots.COLOURS.keys() == baselines.BY_NAME.keys()
    assert len(set(plots.COLOURS.values())) == len(plots.COLOURS)
