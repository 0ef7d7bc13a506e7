"""Result files that earlier versions wrote are read by today's code, or named as what is not used.

Heads, checkpoints and states of reports are in `tests/integrations/test_upgrades.py` and
`tests/diagnostics/measures/test_state.py`. `tests/data/README.md` says what each folder is.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pre_kernels.fused.kernels import tiles
from verify import ROOT

from ..demo.support import TINY, screen

DATA = ROOT / "tests" / "data"


def kept(kind: str) -> list[Any]:
    return [pytest.param(path, id=path.name) for path in sorted(DATA.glob(f"{kind}-*"))]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_the_readme_names_every_folder() -> None:
    text = (DATA / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in DATA.iterdir() if path.is_dir()} == {
        *re.findall(r"^\| `([^`]+)/` \|", text, re.MULTILINE)
    }


def test_samples_are_small() -> None:
    for path in DATA.rglob("*"):
        assert path.is_dir() or "theirs" in path.parts or path.stat().st_size < 16_000, path


# Tuned tiles


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The folder of tuned tiles, on a machine with the triton of the kept file."""
    monkeypatch.setenv("PRE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(tiles.triton, "__version__", "3.9.0")
    tiles.remembered.cache_clear()
    yield tmp_path
    tiles.remembered.cache_clear()


@pytest.mark.parametrize("folder", kept("tiles"))
def test_tuned_tiles_are_taken(folder: Path, cache: Path) -> None:
    shutil.copy(folder / "tiles.json", cache)
    weight = torch.empty(64, 64, dtype=torch.bfloat16)

    def best(role: str, rows: int) -> tiles.Tile:
        return tiles.best("descriptor", role, rows, 64, weight)

    assert best("rows", 100) == tiles.Tile(128, 128, 64, 8, 4, 1)
    assert best("rows", 2000) == tiles.Tile(128, 128, 64, 4, 3, 2)
    assert best("rows", 9000) == tiles.Tile(128, 128, 64, 8, 4, 1)
    assert best("weight", 64) == tiles.Tile(256, 128, 64, 8, 4, 1)
    assert tiles.best("descriptor", "rows", 2000, 128, weight) != best("rows", 2000)


@pytest.mark.parametrize("more", [{"rows": [128, 128, 64, 8, 4, 1, 2]}, {"format": 2}])
def test_tiles_of_a_newer_form_are_named_and_not_used(more: dict[str, Any], cache: Path) -> None:
    content = read(DATA / "tiles-0.2.0" / "tiles.json") | more
    (cache / "tiles.json").write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=r"tiles\.json is ignored, because it cannot be read"):
        assert tiles.remembered() == {}


# Diagnoses


@pytest.mark.parametrize("folder", kept("diagnosis"))
def test_a_diagnosis_is_shown_again(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench import measure_plots
    from pre_kernels.diagnostics.report import page, terminal

    document = read(folder / "diagnosis.json")
    rows = list(csv.DictReader(io.StringIO(page.csv_text(document))))
    before = list(csv.DictReader((folder / "layers.csv").open(encoding="utf-8")))
    assert [row["layer"] for row in before] == ["0", "2"]
    # A later version may have more columns.
    assert [{name: row[name] for name in before[0]} for row in rows] == before
    assert float(before[0]["contrast"]) == document["models"][0]["runs"][0][0]["contrast"]

    console = screen()
    terminal.show(document, console)
    assert re.search(r"  a +0\.60 +0\.60  \(0\) +0\.88", console.file.getvalue())
    assert "<html" in page.html(document)
    assert {path.name for path in measure_plots.draw(document, tmp_path)} >= {
        "measure_contrast.png",
        "measure_norms.png",
        "measure_maps.png",
    }


@pytest.mark.parametrize("folder", kept("diagnosis"))
def test_the_parts_of_a_diagnosis_by_another_version_are_named(folder: Path) -> None:
    """The name of a part depends on the version, so today's run measures again."""
    from pre_kernels.diagnostics.run.parts import Part, strangers

    (path,) = (folder / "parts").iterdir()
    line = strangers(folder / "parts", [])
    assert line is not None
    assert f"{path.name}, measured with other settings, images, models or versions" in line
    assert line.endswith("not used here")
    result = Part(path).result()
    assert result is not None
    assert result["rows"] == read(folder / "diagnosis.json")["models"][0]["runs"][0]


# The log of a training


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        # This version did not log the task loss.
        ("trainer-0.1.0", "loss 4.3225 → 4.2680; this curve contains λ·L_PRe"),
        ("trainer-0.2.0", "task loss 4.2706 → 4.2574"),
    ],
)
def test_trace_draws_the_losses_of_kept_logs(folder: str, says: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pre_kernels.diagnostics.run import trace

    said = trace.draw_losses([DATA / folder], tmp_path / "loss.png")
    assert f"steps 1 to 2, 2 logged, {says}" in said
    assert (tmp_path / "loss.png").exists()
    with pytest.raises(ValueError, match=r"log: .* has no metric .* a training with LayerCallback"):
        trace.draw([DATA / folder], None, "linear_probe", "score", None, tmp_path / "a.png")


@pytest.mark.parametrize("folder", kept("trace"))
def test_trace_draws_the_layers_of_kept_logs(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from pre_kernels.diagnostics.run import trace

    log = read(folder / "trainer_state.json")["log_history"]
    values = [entry["layer_2/cosine"] for entry in log if "layer_2/cosine" in entry]
    said = trace.draw([folder], 2, "cosine", "score", None, tmp_path / "trace.png")
    assert len(values) == 3
    assert f"3 steps, cosine, layer 2 {values[0]:.3f} → {values[-1]:.3f}" in said
    assert "score 0.500 → 0.500" in said


# Demos


@pytest.mark.parametrize("folder", kept("demo"))
def test_the_results_of_a_demo_are_shown_again(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    from pre_kernels.demo import results

    found = read(folder / "demo.json")
    rows = {name: (without, with_) for name, without, with_ in results.table_rows(found)}
    for side, arm in enumerate(("without", "with")):
        wanted = [seed[arm]["probe"][2] for seed in found["seeds"]]
        assert rows["linear probe, layer 2"][side] == wanted
    assert len(found["seeds"]) == 2
    assert "| linear probe, layer 2 |" in results.markdown(found)
    assert "| contrast ratio, input" in results.story(found)
    assert results.document(found)["models"][2]["runs"][1][0]["linear_probe"] is not None


def test_an_older_demo_is_not_taken_for_that_of_this_code() -> None:
    from bench import pages

    for folder in DATA.glob("demo-*"):
        assert pages.adopt_demo(folder) is None


@pytest.mark.parametrize("folder", [path for path in kept("demo") if "0.1.0" not in path.id])
def test_parts_of_a_demo_by_another_version_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sklearn")
    from pre_kernels.demo import parts, run

    shutil.copytree(folder / "parts", tmp_path / "parts")
    (tmp_path / "models" / "with").mkdir(parents=True)
    (tmp_path / "models" / "with" / "config.json").write_text("{}")
    there = parts.Parts(TINY, "cpu", tmp_path)
    assert not there.done
    assert there.others == ["seed-0.json", "seed-1.json"]

    # The same run by the version that wrote them resumes from them.
    part = read(folder / "parts" / "seed-1.json")
    assert part["versions"]["pre_kernels"] == folder.name.removeprefix("demo-")
    monkeypatch.setattr(parts, "versions", lambda: part["versions"])
    monkeypatch.setattr(parts.sources, "digest", lambda _: part["measured"])
    same = parts.Parts(TINY, "cpu", tmp_path)
    assert same.others == []
    seeds = read(folder / "demo.json")["seeds"]
    assert [same.done[seed]["metrics"] for seed in (0, 1)] == seeds
    monkeypatch.undo()

    class Stop(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Stop

    monkeypatch.setattr(run, "compare", stop)
    console = screen(width=400)
    with pytest.raises(Stop):
        run.run(TINY, "cpu", tmp_path, console)
    printed = " ".join(console.file.getvalue().split())
    assert f"{tmp_path / 'parts'} also has seed-0.json, seed-1.json, measured with other" in printed
    assert "versions, or not complete: not used here" in printed
    assert "Resuming" not in printed


# The check and the benchmark


@pytest.mark.parametrize("folder", kept("check"))
def test_a_check_is_summed_up(folder: Path) -> None:
    from bench import summary

    checked = read(folder / "check.json")
    ran = {"kind": "part", "item": "check", "outcome": "exit 0"}
    assert "  check torch: 4 passed, 0 failed" in summary.lines([ran], checked)
    bad = checked | {"results": [*checked["results"], {**checked["results"][0], "outcome": "fail"}]}
    assert "fix torch, which failed the check: error, small case" in " ".join(
        summary.lines([ran], bad)
    )


@pytest.mark.parametrize("folder", kept("bench"))
def test_records_of_the_benchmark_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bench import record, report, tables

    path = folder / "cpu.jsonl"
    records = {entry["peer"]: entry for entry in record.latest(record.load([path]))}
    assert len(records) == len(path.read_text().splitlines())
    ours = records["ours-torch"]["median_ms"]
    ratios = tables.ratios(records, "ours-torch")
    assert ratios["eager"] == pytest.approx(ours / records["eager"]["median_ms"])
    assert ratios["floor"] == pytest.approx(ours / records["floor"]["median_ms"])
    # Its code is not today's.
    assert record.changed(records.values()) == [*records.values()]
    report.main([str(path)])
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "| ours-torch" in line]
    assert f"{ours:.0f} (" in row
    assert f"{ratios['eager']:.2f}" in row
