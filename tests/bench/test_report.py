"""The report: the README's tables and a plot from result files."""

import pytest

from bench import record, report, tables

from .support import results


def markers(name):
    return f"<!-- {name}:begin -->\nstale\n<!-- {name}:end -->"


def test_report_and_picture(tmp_path):
    file, readme, picture = tmp_path / "a.jsonl", tmp_path / "README.md", tmp_path / "speed.png"
    alone = {**results()[0], "median_ms": 77.0, "group": "later, without eager beside it"}
    for line in [
        {**results()[0], "median_ms": 99.0},
        *results(),
        alone,
    ]:  # the later of two lines of a key counts
        record.append(file, line)
    with file.open("a") as out:
        out.write('{"kind": "loss", "sha')  # cut short by a kill
    readme.write_text(
        "before\n"
        + "\nbetween\n".join(map(markers, ("bench", "goals")))
        + "\nafter\n"
        + "\n".join(map(markers, ("diagnostics", "fuzz", "mutation", "cpu-goals")))
        + "\n"
    )
    report.main([str(file), "--readme", str(readme), "--plot", str(picture)])
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n|")
    assert "<!-- bench:end -->\nbetween\n<!-- goals:begin -->\n| goal" in text
    assert "<!-- goals:end -->\nafter\n<!-- diagnostics:begin -->\nNot yet measured." in text
    assert "<!-- cpu-goals:begin -->\n| goal" in text
    assert "stale" not in text
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
    assert picture.stat().st_size > 10_000


def test_rows_by_index_and_by_mask_are_kept_apart():
    index = results()
    mask = [{**one, "selection": "mask", "group": "m"} for one in index]
    unnamed = [{name: value for name, value in one.items() if name != "selection"} for one in mask]
    assert record.latest([*unnamed, *index, *mask]) == [*mask, *index]
    kinds = [
        row.split("|")[4].strip()
        for row in report.page(index + mask).splitlines()
        if "ours-torch" in row
    ]
    assert kinds == ["index", "mask"]


def test_readme_without_markers_is_an_error(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match=r"readme: .* lacks the lines <!-- bench:begin"):
        report.into_readme(readme, {"bench": "text"})


def test_times_of_two_processes_are_compared_by_the_floor_of_each():
    """The second had the card at half its clock."""
    run = {one["peer"]: one for one in results()}
    run["late"] = {**run["ours-torch"], "peer": "late", "median_ms": 3.0, "floor_ms": 2.0}
    assert tables.ratios(run, "late") == tables.ratios(run, "ours-torch")
