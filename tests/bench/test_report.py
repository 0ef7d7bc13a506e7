"""The report: tables and a plot from result files."""

from bench import pages, plots, record, report, tables

from .support import results


def test_report_and_picture(tmp_path, capsys):
    file, picture = tmp_path / "a.jsonl", tmp_path / "speed.png"
    alone = {**results()[0], "median_ms": 77.0, "group": "later, without eager beside it"}
    for line in [
        {**results()[0], "median_ms": 99.0},
        *results(),
        alone,
        # The later of two lines with the same key counts.
    ]:
        record.append(file, line)
    with file.open("a") as out:
        out.write('{"kind": "loss", "sha')  # cut short by a kill
    report.main([str(file)])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "ours-torch" in line)
    assert [cell.strip() for cell in row.split("|")[8:14]] == [
        "0.50",
        "1.50",
        "30",
        "0.27",
        "0.20",
        "1.00",
    ]
    assert "2026-01-02, commit c" in text
    assert text.count("\n| goal") == 2
    plots.bars([{**entry, "n": plots.LEAST} for entry in results()], picture)
    assert picture.stat().st_size > 10_000


def test_rows_by_index_and_by_mask_are_kept_apart():
    index = results()
    mask = [{**one, "selection": "mask", "group": "m"} for one in index]
    unnamed = [{name: value for name, value in one.items() if name != "selection"} for one in mask]
    assert record.latest([*unnamed, *index, *mask]) == [*mask, *index]
    kinds = [
        row.split("|")[4].strip()
        for row in pages.loss(index + mask).splitlines()
        if "ours-torch" in row
    ]
    assert kinds == ["index", "mask"]


def test_times_of_two_processes_are_compared_by_the_floor_of_each():
    """In the second process the card ran at half its clock."""
    run = {one["peer"]: one for one in results()}
    run["late"] = {**run["ours-torch"], "peer": "late", "median_ms": 3.0, "floor_ms": 2.0}
    assert tables.ratios(run, "late") == tables.ratios(run, "ours-torch")
