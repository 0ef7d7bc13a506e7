import io

import pytest

pytest.importorskip("rich")

from rich.console import Console

from pre_kernels.diagnostics.report.terminal import show


def run(values, column="linear_probe", **more):
    return [{"layer": 4 * place, column: value} | more for place, value in enumerate(values)]


def document(*models, **more):
    return {
        "title": "",
        "models": [{"name": name, "depth": 8, "runs": [rows]} for name, rows in models],
    } | more


def shown(document, width=80):
    text = io.StringIO()
    show(document, Console(file=text, width=width, highlight=False))
    return text.getvalue()


def both(name="b"):
    tested = {"probe_test": 40, "probe_chance": 0.1}
    return document(("a", run([0.9, 0.4, 0.5], **tested)), (name, run([0.9, 0.8, 0.75], **tested)))


def test_the_verdict_stands_below_a_table_of_the_main_measures():
    text = shown(both())
    lines = [" ".join(line.split()) for line in text.splitlines()]
    start = lines.index("first layer lowest (layer) last layer")
    end = lines.index("", start)
    assert lines[start + 1 : end] == [
        "Linear probe ↑ (40 test images)",
        "a 0.90 0.40 (4) 0.50",
        "b 0.90 0.75 (8) 0.75",
    ]
    assert lines[end + 1].startswith("a: its visual tokens lose much information.")


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("name", ["b", "an/organisation-with-a-very-long-name-of-a-model-7b-hf"])
def test_every_line_fits_the_terminal(width, name):
    text = shown(both(name), width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text
    # A name gives way to numbers.
    assert "first layer  lowest (layer)  last layer" in text
    assert name in text.replace("\n", "").replace(" ", "").replace("0.900.75(8)0.75", "")


def test_a_warning_takes_the_place_of_the_verdict():
    text = shown(both() | {"warning": "A smoke test.", "about": "PRe is [this]."})
    assert text.startswith("A smoke test.\nPRe is [this].\n")
    assert "lose" not in text
    assert shown(both() | {"verdict": ["Mine."]}).endswith("\n\nMine.\n")


def test_a_model_without_a_measure_has_dashes():
    text = shown(document(("a", run([1.5, 1.2, 1.1], "contrast")), ("b", [])))
    assert ["b", "–", "–", "–"] in [line.split() for line in text.splitlines()]
    assert "nothing was measured" in shown(document(("a", [])))


def test_spatial_contrast_stands_in_for_the_contrast_ratio():
    spatial = run([1.5, 1.2, 1.1], "spatial_contrast")
    assert "\nSpatial contrast ↑ " in shown(document(("a", spatial)))
    text = shown(document(("a", [row | {"contrast": 1.3} for row in spatial])))
    assert "\nSemantic contrast ratio ↑ " in text
    assert "Spatial" not in text


def test_the_beginning_of_a_sentence_is_bold():
    text = io.StringIO()
    said = document(("a", []), verdict=["Mine: it works.", "No colon."])
    console = Console(file=text, width=80, force_terminal=True, color_system="standard")
    show(said, console)
    assert text.getvalue().endswith("\n\x1b[1mMine:\x1b[0m it works.\nNo colon.\n")
