import math

import pytest

from pre_kernels.diagnostics.report.statistics import standard_error
from pre_kernels.diagnostics.report.verdict import about, probe_part, probe_size, steepest, verdict

LAYERS = (0, 4, 8, 12)


def run(values, column="linear_probe", test=None, chance=0.25):
    return [
        {"layer": layer, column: value, "probe_test": test, "probe_chance": test and chance}
        for layer, value in zip(LAYERS, values, strict=True)
    ]


def document(*models, **more):
    return {
        "title": "",
        "models": [{"name": name, "depth": 12, "runs": runs} for name, runs in models],
    } | more


def test_a_fall_is_named_with_its_layers():
    said = verdict(document(("a", [run([0.85, 0.8, 0.45, 0.6], test=400)])))
    assert said == [
        "a: its visual tokens lose much information. The linear probe falls from 0.85 at layer 0 "
        "to 0.45 at layer 8, most of it between layers 4 and 8; at the last layer, 12, it is 0.60.",
        "How sure: 400 test images: an accuracy is known to ± 0.05.",
    ]


@pytest.mark.parametrize(("lowest", "amount"), [(0.825, "little"), (0.75, "some"), (0.45, "much")])
def test_the_amount_is_the_share_of_what_was_above_chance(lowest, amount):
    said = verdict(document(("a", [run([0.85, 0.85, 0.85, lowest], test=40_000)])))
    assert f"its visual tokens lose {amount} information" in said[0]


def test_a_fall_within_the_noise_is_not_called_a_loss():
    values = [0.85, 0.84, 0.80, 0.83]
    few = verdict(document(("a", [run(values, test=24)])))
    assert few[0].startswith("a: a loss cannot be told from noise. The linear probe is 0.85")
    assert "24 test images, too few (100 or more are needed)" in few[1]
    some = verdict(document(("a", [run(values, test=400)])))
    assert some[0] == (
        "a: no loss of information is seen. The linear probe is 0.85 at layer 0 and 0.80 at layer "
        "8, its lowest; differences up to 0.05 are within the noise of 400 test images."
    )
    many = verdict(document(("a", [run(values, test=4000)])))
    assert "its visual tokens lose some information" in many[0]


def test_a_probe_that_rises_loses_nothing():
    said = verdict(document(("a", [run([0.5, 0.6, 0.7, 0.8], test=400)])))
    assert "no loss of information is seen" in said[0]
    assert "0.50 at layer 0 and never lower, 0.80 at layer 12" in said[0]


def test_a_probe_at_chance_tells_nothing():
    said = verdict(document(("a", [run([0.3, 0.1, 0.2, 0.2], test=40)])))
    assert said[0].startswith(
        "a: nothing can be told. The linear probe is at chance from the start"
    )


def test_two_models_are_compared_in_the_deep_half():
    before, after = [0.9, 0.8, 0.5, 0.5], [0.9, 0.8, 0.75, 0.75]
    models = ("a", [run(before, test=400)]), ("b", [run(after, test=400)])
    assert verdict(document(*models))[2:] == [
        "“b” keeps more than “a”: its linear probe is 0.75 instead of 0.50 over layers 8, 12 "
        "(+0.25 ± 0.06).",
        "How sure: 400 test images: an accuracy is known to ± 0.05. One run of each cannot show "
        "what other seeds give; 3 or more can.",
    ]
    assert "“a” keeps less than “b”" in verdict(document(*models[::-1]))[2]
    same = verdict(document(models[0], ("b", [run([0.9, 0.8, 0.51, 0.53], test=400)])))
    assert same[2].startswith(
        "No difference is clear between “a” and “b”: the linear probe is 0.50"
    )


def test_a_further_measure_is_named_if_it_differs():
    def both(probe, contrast):
        return [
            row | {"contrast": value}
            for row, value in zip(run(probe, test=4000), contrast, strict=True)
        ]

    one = both([0.9, 0.8, 0.5, 0.5], [1.5, 1.4, 1.4, 1.4])
    other = both([0.9, 0.8, 0.7, 0.7], [1.5, 1.2, 1.1, 1.1])
    said = verdict(document(("a", [one]), ("b", [other])))
    assert said[3] == (
        "But the semantic contrast ratio of “b” is worse: 1.10 instead of 1.40 over layers 8, 12 "
        "(-0.30)."
    )
    assert verdict(document(("b", [other]), ("a", [one])))[3].startswith(
        "But the semantic contrast"
    )
    both_worse = both([0.9, 0.8, 0.3, 0.3], [1.5, 1.2, 1.1, 1.1])
    assert verdict(document(("a", [one]), ("b", [both_worse])))[3].startswith(
        "Also the semantic contrast ratio of “b” is worse: 1.10 instead of 1.40"
    )


def test_with_three_runs_the_noise_is_that_between_them():
    a = [run([0.9, 0.8, value, value]) for value in (0.5, 0.6, 0.7)]
    b = [run([0.9, 0.8, value, value]) for value in (0.6, 0.7, 0.81)]
    said = verdict(document(("a", a), ("b", b)))
    assert said[2].startswith("“b” keeps more than “a”")
    assert said[3] == "How sure: 3 runs of each model; ± is half a 95 % interval over them."
    noisy = [run([0.9, 0.8, value, value]) for value in (0.9, 0.5, 0.75)]
    assert verdict(document(("a", a), ("b", noisy)))[2].startswith("No difference is clear")


def test_two_runs_that_disagree_show_no_difference():
    a = [run([0.9, 0.8, value, value], test=10_000) for value in (0.5, 0.6)]
    b = [run([0.9, 0.8, value, value], test=10_000) for value in (0.8, 0.55)]
    said = verdict(document(("a", a), ("b", b)))
    assert said[2].startswith("No difference is clear")
    assert "2 runs of each cannot show" in said[3]
    assert "20,000 test images" in said[3]


def test_without_classes_the_structure_is_described():
    masks = verdict(document(("a", [run([1.5, 1.4, 1.1, 1.1], "contrast")])))
    assert "its patches lose much contrast between objects" in masks[0]
    grid = verdict(document(("a", [run([1.5, 1.5, 1.5, 1.5], "spatial_contrast")])))
    assert grid[0].startswith("a: no loss of spatial structure is seen")
    assert grid[-1] == (
        "To tell more: give labels (a class for each image) or masks (the patches of each object)."
    )
    other = verdict(document(("a", [run([1.0, 0.5, 0.4, 0.3], "cosine")])))
    assert "cannot be told from these measures" in other[0]
    assert "cosine with the anchor: a 1.00 at layer 0 and 0.30 at layer 12" in other[0]
    assert verdict(document(("a", [])))[0].endswith("nothing was measured.")


def test_odd_documents_have_a_verdict_too():
    one = [{"layer": 3, "linear_probe": 0.5}]
    assert "the only layer measured" in verdict(document(("a", [one])))[0]
    missing = document(("a", [run([0.9, 0.5, 0.5, 0.5])]), ("b", [[]]))
    assert verdict(missing)[1] == "b: Linear probe was not measured."
    assert verdict(document(("a", [run([0.9, 0.5, 0.5, 0.5])]), warning="a smoke test")) == []


def test_the_steepest_span_is_the_shortest_with_most_of_the_fall():
    assert steepest({0: 1.0, 4: 0.9, 8: 0.5, 12: 0.4}, 12) == (4, 8)
    assert steepest({0: 1.0, 4: 0.8, 8: 0.6, 12: 0.4}, 12) == (0, 8)
    assert steepest({0: 1.0, 4: 0.2, 8: 0.9}, 4) == (0, 4)


def test_the_size_of_the_test_part_is_a_sum_over_runs():
    model = {"name": "a", "runs": [run([0.5] * 4, test=30), run([0.5] * 4, test=20)]}
    assert probe_part(model) == (50, 0.25)
    assert probe_part({"name": "a", "runs": [run([0.5] * 4)]}) is None
    text = probe_size(document(("a", model["runs"]), unit="digits"))
    assert text.startswith("Tested on 50 digits: standard error up to 0.07, chance 0.25. Too few")
    assert probe_size(document(("a", []))) == ""


def test_the_standard_error_is_never_nothing():
    assert standard_error(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert standard_error(1.0, 20) == pytest.approx(standard_error(0.0, 20))
    assert standard_error(1.0, 20) > 0.04
    assert math.isfinite(standard_error(1.0, 0))


def test_the_measures_of_the_verdict_are_explained():
    probe = document(("a", [run([0.9, 0.5, 0.5, 0.5])]), unit="digits")
    assert about(probe) == (
        "The linear probe is the share of test digits whose class can be read from the visual "
        "tokens of a layer. Layer 0 is the input of the LLM."
    )
    assert about(probe | {"about": "Mine."}) == "Mine."
    assert about(document(("a", []))) == ""


def test_a_small_change_of_unknown_noise_is_not_called_one():
    a = run([1.5, 1.2, 1.1, 1.1], "contrast")
    b = run([1.5, 1.2, 1.14, 1.14], "contrast")
    assert verdict(document(("a", [a]), ("b", [b])))[2].startswith("No difference is clear")
    c = run([1.5, 1.2, 1.2, 1.2], "contrast")
    assert verdict(document(("a", [a]), ("c", [c])))[2].startswith("“c” keeps more than “a”")
