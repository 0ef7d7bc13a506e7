"""The pictures of docs/diagnostics.md: one for each measure, drawn from the committed diagnosis."""

import json
import re

import pytest
from PIL import Image

from bench import measure_plots, record
from pre_kernels.diagnostics.report.columns import COLUMNS
from verify import ROOT

PAGE = ROOT / "docs" / "diagnostics.md"
SHOWN = {f"measure_{name}.png" for name in (*measure_plots.PICTURES, measure_plots.MAPS)}


@pytest.fixture(scope="module")
def document():
    return json.loads((record.RESULTS / "diagnosis.json").read_text(encoding="utf-8"))


def test_every_measure_has_a_picture_and_the_page_shows_it():
    drawn = [column.name for columns in measure_plots.PICTURES.values() for column in columns]
    assert len(drawn) == len(set(drawn))
    assert set(drawn) >= COLUMNS.keys()
    named = re.findall(r"!\[[^\]]+\]\(pictures/(measure_\w+\.png)\)", PAGE.read_text("utf-8"))
    assert sorted(named) == sorted(SHOWN)
    for name in SHOWN:
        path = PAGE.parent / "pictures" / name
        assert 5_000 < path.stat().st_size < 60_000, name


def test_pictures_of_the_committed_diagnosis(tmp_path, capsys, document):
    for model in document["models"]:
        for row in model["runs"][0]:
            assert all(
                row[column.name] is not None
                for columns in measure_plots.PICTURES.values()
                for column in columns
            )
    marked, names = [], []
    real = measure_plots.draw

    def watched(document, folder, layers=()):
        names.extend(model["name"] for model in document["models"])
        names.extend(document["maps"][0]["similarity"])
        marked.extend(layers)
        return real(document, tmp_path / "new", layers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_plots, "draw", watched)
        assert measure_plots.main([]) == 0
    assert names == ["without PRe", "with PRe"] * 2
    assert marked == [4]
    files = capsys.readouterr().out.split()
    assert {path.name for path in (tmp_path / "new").iterdir()} == SHOWN
    assert len(files) == len(SHOWN)
    for name in SHOWN:
        with (
            Image.open(tmp_path / "new" / name) as new,
            Image.open(PAGE.parent / "pictures" / name) as old,
        ):
            # Another matplotlib draws other pixels, but not other panels.
            assert new.width == pytest.approx(old.width, rel=0.1), name
            assert new.height == pytest.approx(old.height, rel=0.1), name


def test_what_was_not_measured_is_left_out(tmp_path, document):
    kept = ("layer", "linear_probe", "cosine")
    models = [
        model
        | {"runs": [[{key: row[key] for key in kept} for row in run] for run in model["runs"]]}
        for model in document["models"]
    ]
    path = tmp_path / "diagnosis.json"
    path.write_text(json.dumps({"models": models, "maps": []}), encoding="utf-8")
    assert measure_plots.main([str(path), str(tmp_path / "out")]) == 0
    drawn = {file.name: file for file in (tmp_path / "out").iterdir()}
    assert drawn.keys() == {"measure_probes.png", "measure_likeness.png"}
    with Image.open(drawn["measure_probes.png"]) as image:
        # One panel is left of two.
        assert image.width == pytest.approx(4.3 * measure_plots.DPI, abs=2)
