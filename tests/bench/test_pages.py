"""Each generated table shows the committed results, and says so if they are older than the code.
The same for pictures."""

import json
from typing import NamedTuple

import pytest

from bench import pages, pictures, record, report, speed_table
from pre_kernels import sources
from verify import ROOT

from .support import cpu_results

COMMAND = f"run: {pages.COMMAND}"


@pytest.fixture(scope="module")
def committed():
    return pages.committed()


@pytest.mark.parametrize("name", pages.TABLES)
def test_a_page_has_the_table_of_the_committed_results(name, committed):
    if name in ("demo", "evidence", "evidence-real", "probe"):
        pytest.importorskip("scipy")
        pytest.importorskip("rich")
    page = pages.TABLES[name].page
    new = pages.TABLES[name].text(committed)
    assert pages.written(name) == new, f"{page} has an older table {name!r}; {COMMAND}"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_shows_the_committed_results(name, committed):
    pytest.importorskip("PIL")
    path = pictures.FOLDER / name
    new = pictures.digest(name, committed)
    assert pictures.drawn_from(path) == new, f"{path} shows older results; {COMMAND}"


def test_every_marker_of_a_page_has_a_table():
    paths = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}
    found = {
        (page, line.removeprefix("<!-- ").removesuffix(":begin -->"))
        for page, text in texts.items()
        for line in text.splitlines()
        if line.startswith("<!-- ") and line.endswith(":begin -->")
    }
    # This table is written by hand.
    by_hand = {("docs/models.md", "versions")}
    assert found - by_hand == {(table.page, name) for name, table in pages.TABLES.items()}


class Site(NamedTuple):
    root: object
    table: str


@pytest.fixture
def site(tmp_path):
    """Return a page with the markers of a table."""
    (tmp_path / "docs").mkdir()
    path = tmp_path / pages.TABLES["bench"].page
    path.write_text("before\n<!-- bench:begin -->\nolder\n<!-- bench:end -->\nafter\n")
    return Site(tmp_path, "bench")


def test_a_table_goes_between_its_markers(site):
    pages.write([site.table], fresh(), site.root)
    text = (site.root / "docs" / "benchmarks.md").read_text()
    assert text.startswith("before\n<!-- bench:begin -->\n| shape")
    assert text.endswith("\n<!-- bench:end -->\nafter\n")
    assert pages.written(site.table, site.root) == pages.loss(fresh())


def test_a_page_without_markers_is_an_error(site):
    (site.root / "docs" / "benchmarks.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"page: .* lacks the lines <!-- bench:begin"):
        pages.write([site.table], fresh(), site.root)


def test_the_report_writes_the_tables_that_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(pages, "write", lambda names, records: asked.append(list(names)))
    monkeypatch.setattr(pictures, "draw", lambda names, records: asked.append(list(names)))
    monkeypatch.setattr(pages, "adopt_demo", lambda: None)
    report.main(["--pages", "goals", "fuzz"])
    report.main(["--pages"])
    assert asked == [["goals", "fuzz"], list(pages.TABLES), list(pictures.PICTURES)]
    with pytest.raises(SystemExit):
        report.main(["--pages", "nothing"])


def fresh():
    """Return records of this code."""
    return [{**entry, "measured": sources.digest(entry["kind"])} for entry in cpu_results()]


def test_a_table_of_older_code_says_so():
    said = "\n\nThe code has changed since: measured at commit c, on 2026-01-02."
    old = [{**entry, "measured": "another"} for entry in fresh()]
    without = [{k: v for k, v in entry.items() if k != "measured"} for entry in fresh()]
    for table in (pages.loss, pages.goals_on_a_cpu):
        assert "has changed" not in table(fresh())
        assert table(old).endswith(said)
        assert table(without).endswith(said)
    # A record of another kind does not make the records of the loss older.
    half = [entry for entry in fresh() if entry["kind"] == "loss"]
    half += [entry for entry in old if entry["kind"] != "loss"]
    assert "has changed" not in pages.loss(half)
    assert pages.goals_on_a_cpu(half).endswith(said)


@pytest.mark.parametrize("kind", [pages.DEMO, pages.REAL])
def test_a_demo_and_its_pictures_of_older_code_say_so(monkeypatch, tmp_path, kind):
    pytest.importorskip("scipy")
    found = pages.run_of(kind)
    monkeypatch.setattr(pages, "run_of", lambda _: found)
    found["measured"] = sources.digest(kind)
    own = [name for name, picture in pictures.PICTURES.items() if picture.run == kind]
    new = {name: pictures.digest(name, []) for name in own}
    text = {"demo": pages.demo, "real": pages.real_demo}[kind]
    assert "has changed" not in text([])
    assert pictures.note(own[0], found) == ""
    found["measured"] = "another"
    old = f"The code has changed since: measured at commit {found['commit']}, on {found['date']}."
    assert text([]).endswith(old)
    assert pictures.note(own[0], found) == old
    assert all(pictures.digest(name, []) != digest for name, digest in new.items())
    pictures.draw(new, [], tmp_path)
    for name in new:
        assert pictures.drawn_from(tmp_path / name) == pictures.digest(name, [])


def test_what_the_demo_left_is_taken_over_if_it_is_the_demo_of_this_code(monkeypatch, tmp_path):
    found = {**pages.run_of(pages.DEMO), "measured": sources.digest("demo"), "date": "2026-01-02"}
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    path = tmp_path / "demo.json"
    record.RESULTS.mkdir()
    kept = record.RESULTS / "demo.json"
    kept.write_text("{}")
    assert pages.adopt_demo(tmp_path) is None
    quick = {**found, "settings": {**found["settings"], "tune_steps": 1}}
    for other in (quick, {**found, "measured": "another"}):
        path.write_text(json.dumps(other))
        assert pages.adopt_demo(tmp_path) is None
        assert kept.read_text() == "{}"
    path.write_text(json.dumps(found))
    assert pages.adopt_demo(tmp_path) == path
    assert pages.run_of(pages.DEMO) == found
    assert pages.adopt_demo(tmp_path) is None


def test_a_record_keeps_a_digest_of_what_its_kind_depends_on(tmp_path):
    path = tmp_path / "a.jsonl"
    for kind in ("loss", "training", "another"):
        assert record.append(path, {"kind": kind})["measured"] == sources.digest(kind)
    assert [line["measured"] for line in map(json.loads, path.read_text().splitlines())] == [
        sources.digest("loss"),
        sources.digest("training"),
        sources.digest("loss"),
    ]


def test_the_readme_shows_times_of_this_code_only():
    rows = speed_table.page(fresh()).splitlines()
    assert rows[2].startswith("| 12,288 tokens, 1024 → 1024 → 1024, bfloat16 ")
    assert rows[-1].endswith("2026-01-02, commit c.")
    old = [{**entry, "measured": "another"} for entry in fresh()]
    assert speed_table.page(old) == speed_table.NOTHING
    assert "docs/benchmarks.md" in speed_table.NOTHING


def test_the_device_that_was_measured_last_comes_first():
    later = {"device": "D", "date": "2026-01-03", "commit": "d"}
    both = [
        *fresh(),
        *({**entry, **later, "group": f"D {entry.get('group')}"} for entry in fresh()),
    ]
    origins = [line for line in pages.loss(both).splitlines() if line.startswith("- ")]
    assert [line[:3] for line in origins] == ["- D", "- C"]
    assert speed_table.page(both).endswith("2026-01-03, commit d.")
    assert speed_table.page(both).count("12,288 tokens") == 2
    two = {**later, "threads": 4}
    again = [
        *both,
        *({**entry, **two, "date": "2026-01-04"} for entry in both if entry["device"] == "D"),
    ]
    assert "4 threads" in speed_table.page(again)
    assert speed_table.page(again).count("12,288 tokens") == 2
    old = [{**entry, "measured": "another"} if entry["device"] == "D" else entry for entry in both]
    assert speed_table.page(old).endswith("2026-01-02, commit c.")
