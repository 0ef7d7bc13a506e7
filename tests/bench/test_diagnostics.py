"""The measurement of the diagnostics, compared with their definition."""

import pytest

from bench import diagnostics, record
from pre_kernels.check import memory as resident

from .support import STAMP


def test_diagnostics_beside_the_definition(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # on a CPU
    size = ["--images", "2", "--patches", "48", "--layers", "3", "--width", "32", "--seconds", "0"]
    assert diagnostics.main([*size, "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    lines = {line["peer"]: line for line in record.load([file])}
    assert set(lines) == {"ours", "matrix", "pairs"}
    for line in lines.values():
        assert line.keys() >= STAMP
        assert line["extrapolated_from"] == "1 image of 1 layer"
        assert line["total_s"] == pytest.approx(line["median_ms"] * 6 / 1e3)
        assert line["largest_error"] < 1e-5
    assert lines["ours"]["peak_mib"] >= 0
    assert "| ours " in capsys.readouterr().out
    page = diagnostics.page(record.load([file])).splitlines()
    (row,) = (line for line in page if "the definition" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells[0] == "2 images × 48 patches × 3 layers × 32 wide"
    assert cells[4] == f"{lines['pairs']['slower_than_ours']:,.1f}"
    assert cells[5] == ""
    assert any("torch " in line for line in page[-1:])
    monkeypatch.setattr(resident, "missing", lambda: "not twice")
    wrong = {**diagnostics.METHODS, "ours": lambda *case: (0.0, 0.0, 0.0, 0.0)}
    monkeypatch.setattr(diagnostics, "METHODS", wrong)
    assert diagnostics.main([*size, "--out", str(tmp_path)]) == 1
    failed = record.load([file])[3]
    assert "a mean is off" in failed["failed"]
    assert "median_ms" not in failed


def test_the_page_shows_the_last_measurement():
    size = {
        "images": 2,
        "patches": 48,
        "layers": 3,
        "width": 32,
        "kind": "diagnostics",
        "torch": "2",
    }
    times = {"median_ms": 1.0, "total_s": 1.0, "slower_than_ours": 1.0, "largest_error": 0.0}
    old = {**size, **times, "all_pairs_mib": 1.0, "peer": "ours", "triton": "3", "commit": "c"}
    old |= {"device": "A", "date": "2026-01-02", "group": "a"}
    new = {**old, "device": "B", "date": "2026-01-03", "group": "b"}
    page = diagnostics.page([new, old])
    assert page.count("`LayerReport`") == 1
    assert "- B, torch 2" in page
    assert "- A" not in page
