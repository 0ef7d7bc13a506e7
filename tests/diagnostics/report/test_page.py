import csv
import io
import json
import re
from html.parser import HTMLParser

import pytest

from verify import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from pre_kernels.diagnostics.report import page as report
from pre_kernels.diagnostics.report.columns import COLUMNS
from pre_kernels.diagnostics.report.statistics import effect, spread

EVIL = "<script>alert('&')</script>"
PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR42mOMqjjBwMDAxMDAwMDAAAAS9AGepVZD1AAA"
    "AABJRU5ErkJggg=="
)
VOID = {"meta", "img", "path", "br", "link"}


class Page(HTMLParser):
    """A parser that collects what the tests need of a page. Tags have to close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.sources, self.alts, self.text = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        self.alts += [attributes["alt"]] if tag == "img" else []

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def rows(probe, **columns):
    columns = {"linear_probe": probe} | columns
    return [
        {"layer": 4 * n} | {name: values[n] for name, values in columns.items()}
        for n in range(len(probe))
    ]


def document(*models, **more):
    return {
        "title": "a title",
        "models": [{"name": n, "depth": 8, "runs": runs} for n, runs in models],
    } | more


def full():
    before = rows(
        [0.9, 0.5, 0.6],
        contrast=[2.0, 1.5, 1.0],
        lens_tokens=[[1, 2], [3], None],
        notes=["", "few", "few"],
    )
    similarity = {"before": [[0.5] * 4], "after": [[0.25] * 4]}
    heat_map = {
        "image": EVIL,
        "picture": PICTURE,
        "grid": [2, 2],
        "patch": [0, 1],
        "layers": [4],
        "similarity": similarity,
    }
    after = rows([0.9, 0.8, 0.85], contrast=[2.0, 1.75, 1.25])
    return document(
        (f"before{EVIL}", [before]),
        ("after", [after]),
        marked=[4],
        maps=[heat_map],
        curves=[{"name": EVIL, "label": f"L_PRe{EVIL}", "values": [0.0, -0.5]}],
        findings=[f"It was {EVIL}."],
        notes=["How."],
        command=f"pre-kernels diagnose {EVIL}",
        date="2026-01-02",
        device="CPU",
        versions={"torch": "2.13"},
        data={
            "images": 1,
            "labelled": 1,
            "classes": [EVIL, *map(str, range(40))],
            "masks": None,
            "folder": EVIL,
        },
    )


def test_a_page_needs_nothing_and_runs_nothing():
    text = report.html(full())
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "//" not in re.sub(r"data:[^\"]*", "", text)
    assert "url(" not in text
    assert len(page.ids) == len(set(page.ids))


def test_names_are_escaped():
    text = report.html(full())
    assert EVIL not in text
    assert "<script" not in text
    said = "".join(Page(text).text)
    for place in (
        f"before{EVIL}",
        f"It was {EVIL}.",
        f"diagnose {EVIL}",
        f"L_PRe{EVIL}",
        f"{EVIL}, 0, 1, 2",
    ):
        assert place in said


def test_a_page_shows_everything_it_was_given():
    page = Page(report.html(full()))
    said = " ".join(" ".join(page.text).split())
    for text in (
        "a title",
        "2026-01-02 · 1 image (1 with a class) · CPU",
        "layer 4: where PRe reads",
        "How.",
        "torch 2.13",
    ):
        assert text in said
    assert "Classes (41)" in said
    assert "and 11 more" in said
    assert f"before{EVIL}, layers 4, 8: few" in said
    assert page.tags.count("table") == 2
    assert page.tags.count("tr") == 2 * (1 + 3)
    assert "1 2" in page.text
    assert len(page.alts) == 2 + 1 + 1  # two metrics, a curve, an image
    assert "Linear probe over depth." in page.alts[0]
    assert "0.500 at layer 4 (the minimum)" in page.alts[0]


def test_the_least_document_has_a_page():
    for runs in ([rows([0.9, 0.5, 0.6])], [rows([None, None, None])], [[]], []):
        said = "".join(Page(report.html(document(("a", runs)))).text)
        assert "a title" in said
        assert "Semantic contrast ratio: needs masks, the patches of each object." in said
    optional = (
        "verdict",
        "about",
        "warning",
        "scene",
        "unit",
        "marked",
        "maps",
        "curves",
        "findings",
        "notes",
        "command",
        "date",
        "device",
        "versions",
        "data",
    )
    nothing = dict.fromkeys(optional)
    assert report.html(document(("a", []), **nothing)) == report.html(document(("a", [])))


def test_a_model_says_where_it_starts_is_least_and_ends():
    findings = report.findings(document(("a", [rows([0.9, 0.5, 0.6])])))
    assert findings["Linear probe"] == [
        "a: 0.900 at layer 0, 0.500 at layer 4 (the minimum), 0.600 at layer 8; -0.300 from first "
        "to last."
    ]
    findings = report.findings(document(("a", [rows([0.5, 0.7, None])])))
    assert findings["Linear probe"] == [
        "a: 0.500 at layer 0 (the minimum), 0.700 at layer 4; +0.200 from first to last."
    ]
    findings = report.findings(document(("a", [rows([None, 0.7, None])])))
    assert findings["Linear probe"] == ["a: 0.700 at layer 4, the only layer measured."]
    findings = report.findings(document(("a", [rows([0.9, 0.5, 0.6]), rows([0.7, 0.7, 0.2])])))
    assert findings["Linear probe"] == [
        "a: 0.800 ± 0.141 at layer 0, 0.400 ± 0.283 at layer 8 (the minimum); -0.400 ± 0.141 from "
        "first to last."
    ]


def test_two_models_differ_in_the_deep_half_and_at_the_last_layer():
    findings = report.findings(
        document(("a", [rows([0.9, 0.5, 0.6])]), ("b", [rows([0.9, 0.8, 0.85])]))
    )
    assert findings["Linear probe"][2:] == [
        "mean of layers 4, 8: 0.550 (a), 0.825 (b), difference +0.275.",
        "layer 8: 0.600 (a), 0.850 (b), difference +0.250.",
    ]
    assert "Noise between seeds: needs several runs of each model." in findings["Not measured"]
    last = report.findings(
        document(("a", [rows([0.9, None, 0.6])]), ("b", [rows([0.9, None, 0.85])]))
    )
    assert last["Linear probe"][2:] == ["layer 8: 0.600 (a), 0.850 (b), difference +0.250."]
    none = report.findings(document(("a", [rows([0.9, 0.5, 0.6])]), ("b", [rows([None] * 3)])))
    assert none["Linear probe"][1:] == ["b: not measured."]


def test_several_runs_are_paired():
    a, b = [rows([1, x, x]) for x in (0.5, 0.6, 0.4)], [rows([1, x, x]) for x in (0.6, 0.5, 0.9)]
    found = report.findings(document(("a", a), ("b", b)))
    assert found["Linear probe"][3].startswith(
        "layer 8: 0.500 (a), 0.667 (b), difference +0.167 ± 0.306; positive in 2 of 3 seeds, within"
    )
    assert not any("Noise" in text for text in found["Not measured"])
    uneven = report.findings(document(("a", a), ("b", b[:2])))["Linear probe"][3]
    assert "difference of the means +0.050; 3 and 2 runs cannot be paired" in uneven


def test_models_of_other_depths_are_compared_in_their_own_deep_halves():
    models = [
        {"name": "a", "depth": 4, "runs": [[{"layer": n, "cosine": 0.5} for n in range(5)]]},
        {"name": "b", "depth": 8, "runs": [[{"layer": n, "cosine": 0.75} for n in range(9)]]},
    ]
    found = report.findings({"title": "", "models": models})["Cosine with the anchor"]
    assert (
        found[2]
        == "mean of layers 2 to 4 and layers 4 to 8: 0.500 (a), 0.750 (b), difference +0.250."
    )
    assert found[3] == "layer 4 and layer 8: 0.500 (a), 0.750 (b), difference +0.250."


def test_without_masks_spatial_contrast_stands_in():
    found = report.findings(
        document(("a", [rows([0.9, 0.5, 0.6], spatial_contrast=[1.5, 1.25, 1.0])]))
    )
    assert "Semantic contrast ratio" not in found
    assert found["Spatial contrast"][0].startswith("a: 1.500 at layer 0")
    assert (
        "Semantic contrast ratio: needs masks, the patches of each object." in found["Not measured"]
    )
    with_masks = rows([0.9, 0.5, 0.6], spatial_contrast=[1.5, 1.25, 1.0], contrast=[2.0, 1.5, 1.0])
    assert "Spatial contrast" not in report.findings(document(("a", [with_masks])))


def test_csv_has_a_line_for_each_model_run_and_layer():
    a = [rows([0.9, None, 0.6], lens_tokens=[[1, 2], [3], None]), rows([0.8, 0.7, 0.6])]
    text = report.csv_text(
        document(("a, b\n", a), ("c", [rows([0.5] * 3, cosine=[1.0, 0.5, 0.1])]))
    )
    lines = list(csv.DictReader(io.StringIO(text)))
    assert [(line["model"], line["run"], line["layer"]) for line in lines] == [
        (model, run, layer)
        for model, run in (("a, b\n", "0"), ("a, b\n", "1"), ("c", "0"))
        for layer in "048"
    ]
    assert [line["linear_probe"] for line in lines[:3]] == ["0.9", "", "0.6"]
    assert lines[0]["lens_tokens"] == "1 2"
    assert [line["cosine"] for line in lines[5:]] == ["", "1.0", "0.5", "0.1"]
    assert report.csv_text(document(("a", []))) == "model,run\n"


def test_the_document_is_json():
    assert report.html(json.loads(json.dumps(full()))) == report.html(full())


def test_sentences_of_a_difference_follow_the_numbers():
    steady = effect("x", [0.5, 0.6, 0.4], [0.6, 0.7, 0.501])
    assert "difference +0.100 ± 0.001; positive in 3 of 3 seeds, clear of the noise" in steady
    noisy = effect("x", [0.5, 0.6, 0.4], [0.9, 0.3, 0.5])
    assert "positive in 2 of 3 seeds, within the noise" in noisy
    two = effect("x", [0.5, 0.6], [0.9, 0.3])
    assert two.endswith(
        "; positive in 1 of 2 seeds, too few to tell it from the noise between seeds (3 or more)."
    )
    assert effect("x", [0.5], [0.6]) == "x: 0.500 without, 0.600 with PRe, difference +0.100."
    assert (
        effect("x", [5.0], [6.0], ("(a)", "(b)"), digits=1)
        == "x: 5.0 (a), 6.0 (b), difference +1.0."
    )
    assert (spread(None), spread([0.5]), spread([0.5, 0.7], "+")) == (
        "–",
        "0.500",
        "+0.600 ± 0.141",
    )


def test_the_interval_is_the_paired_t_test():
    from scipy.stats import ttest_rel

    without, with_ = [0.5, 0.6, 0.4], [0.62, 0.65, 0.55]
    low, high = ttest_rel(with_, without).confidence_interval(0.95)
    assert f"{low:+.3f} to {high:+.3f}" in effect("x", without, with_)


def test_verdict_and_main_curves_stand_before_everything_that_is_folded():
    text = report.html(full())
    folded = text.index("<details")
    head = text[:folded]
    assert text.index("its visual tokens lose some information") < text.index("Linear probe ↑")
    assert "Semantic contrast ratio ↑" in head
    assert text.count("<img") == 4
    assert head.count("<img") == 3  # two main measures and the curve of the training
    assert "<table" not in head
    assert "deep half" not in head
    assert text.count("<details") == text.count("</details>") == 4


def test_a_warning_stands_first_and_draws_no_verdict():
    text = report.html(full() | {"warning": "A smoke test.", "about": "PRe is this."})
    assert text.index("A smoke test.") < text.index("PRe is this.") < text.index("Linear probe ↑")
    assert "lose" not in "".join(Page(text).text)
    own = report.html(full() | {"verdict": ["Mine: it works.", "No colon."], "unit": "digits"})
    assert "<li>No colon.</li>" in own
    assert "Share of test digits whose class" in own
    assert "<strong>Mine: </strong>it works." in own
    assert "lose" not in "".join(Page(own).text)


def test_an_option_in_a_verdict_does_not_break_and_the_rest_is_escaped():
    text = report.html(full() | {"verdict": [f"Few: use --seeds 5, not a--b{EVIL}."]})
    assert "use <code>--seeds</code> 5, not a--b" in text
    assert EVIL not in text


def test_a_scene_has_its_picture_and_caption():
    text = report.html(full() | {"scene": {"picture": PICTURE, "caption": f"Which digit?{EVIL}"}})
    assert f"data:image/png;base64,{PICTURE}" in text
    assert EVIL not in text


def test_images_that_were_left_out_are_counted():
    data = {
        "images": 7,
        "listed": 10,
        "left_out": {"images that could not be read": ["a", "b"], "too small": 1},
    }
    page = Page(report.html(document(("a", []), data=data)))
    said = " ".join(" ".join(page.text).split())
    assert "7 images (3 left out)" in said
    assert "2 images that could not be read (a, b); 1 too small" in said


def test_a_probe_says_on_how_many_images_it_was_tested():
    few = rows([0.9, 0.5, 0.6], probe_test=[24] * 3, probe_chance=[0.25] * 3)
    text = " ".join("".join(Page(report.html(document(("a", [few])))).text).split())
    assert "Tested on 24 images: standard error up to 0.09, chance 0.25. Too few" in text
    many = rows([0.9, 0.5, 0.6], probe_test=[2400] * 3, probe_chance=[0.25] * 3)
    text = " ".join("".join(Page(report.html(document(("a", [many])))).text).split())
    assert "Tested on 2,400 images" in text
    assert "Too few" not in text


def test_every_measure_says_which_values_are_better():
    directions = {"higher is better", "lower is better", "neither higher nor lower is better"}
    assert {column.direction for column in COLUMNS.values()} == directions
    table = (ROOT / "docs" / "diagnostics.md").read_text()
    rows = re.findall(r"^\| \[.*\| (`[a-z_*0-9`, ]+`) \|.*\| ([a-z –]+) \|$", table, re.M)
    assert len(rows) == 9
    for names, better in rows:
        for name in re.findall(r"`(\w+)`", names):
            if name in COLUMNS and name not in ("cohesion", "coupling"):
                assert better.split()[0] == (COLUMNS[name].better or "neither"), name


def test_the_template_is_installed_with_the_package():
    settings = (ROOT / "pyproject.toml").read_text()
    assert report.TEMPLATE in settings
