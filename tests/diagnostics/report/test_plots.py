import base64
import io
import math

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imsave

from pre_kernels.diagnostics.report import plots
from pre_kernels.diagnostics.report.columns import COLUMNS, by_layer, measured_columns


def run(values, column="linear_probe", layers=(0, 4, 8)):
    return [{"layer": layer, column: value} for layer, value in zip(layers, values, strict=True)]


def lines(axes, name=None):
    """(x, y) of the curves with a name, or of all curves."""
    found = [line for line in axes.get_lines() if name is None or line.get_label() == name]
    return [tuple(map(list, line.get_data())) for line in found]


def legend_of(place):
    holder = place.legends[0] if hasattr(place, "legends") else place.get_legend()
    return [text.get_text() for text in holder.get_texts()]


def png(height=8, width=12):
    buffer = io.BytesIO()
    imsave(buffer, [[[0.5, 0.2, 0.1]] * width] * height, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def heat_map(**changes):
    values = {"before": [[0.1 * n for n in range(6)]] * 2, "after": [[-0.5] + [0.2] * 5] * 2}
    found = {
        "image": "a.jpg",
        "picture": png(),
        "grid": [2, 3],
        "patch": [1, 2],
        "layers": [0, 7],
        "similarity": values,
    }
    return found | changes


def test_every_column_that_is_shown_is_one_of_a_report():
    import torch

    from pre_kernels.diagnostics import LayerReport

    report = LayerReport()
    report.update({0: torch.randn(4, 3)}, torch.randn(4, 3))
    assert set(COLUMNS) <= set(report.rows()[0])


def test_values_by_layer_leave_out_what_was_not_measured():
    runs = [
        [{"layer": 8, "x": 1.0}, {"layer": 0, "x": None}],
        [{"layer": 8, "x": 3}, {"layer": 4}],
        [],
    ]
    assert by_layer(runs, "x") == {8: [1.0, 3]}
    assert by_layer([[{"layer": 0, "x": math.nan}, {"layer": 2, "x": 0.5}]], "x") == {2: [0.5]}
    assert by_layer(runs, "y") == {}


def test_a_panel_for_each_metric_that_some_model_has():
    models = [
        {"name": "a", "runs": [run([1.0, 0.5, None])]},
        {"name": "b", "runs": [run([2.0, 3.0, 4.0], "effective_dimension")]},
    ]
    figure = plots.depth(models, marked=[4])
    assert [axes.get_title() for axes in figure.axes] == [
        "Linear probe ↑",
        "Effective dimension ↑",
    ]
    probe, dimension = figure.axes
    assert lines(probe, "a") == [([0, 4], [1.0, 0.5])]
    assert lines(probe, "b") == []
    assert lines(dimension, "b") == [([0, 4, 8], [2.0, 3.0, 4.0])]
    assert ([4, 4], [0, 1]) in lines(probe)
    assert (probe.get_ylabel(), probe.get_xlabel()) == ("test accuracy", "LLM layer")
    assert legend_of(figure) == ["a", "b"]
    chosen = plots.depth(models, [COLUMNS["linear_probe"]._replace(title="digits")])
    assert [axes.get_title() for axes in chosen.axes] == ["digits ↑"]


def test_several_runs_are_thin_lines_and_a_band_around_their_mean():
    models = [{"name": "a", "runs": [run([0.5, 0.4, 0.1]), run([0.7, 0.8, None])]}]
    [axes] = plots.depth(models).axes
    [(layers, mean)] = lines(axes, "a")
    assert layers == [0, 4, 8]
    assert mean == pytest.approx([0.6, 0.6, 0.1])
    assert ([0, 4, 8], [0.5, 0.4, 0.1]) in lines(axes)
    assert ([0, 4], [0.7, 0.8]) in lines(axes)
    corners = {(x, round(y, 6)) for x, y in axes.collections[0].get_paths()[0].vertices.tolist()}
    half = [0.2 / math.sqrt(2), 0.4 / math.sqrt(2), 0]  # standard deviation of two values
    expected = [
        (x, m + sign * h) for sign in (-1, 1) for x, m, h in zip(layers, mean, half, strict=True)
    ]
    assert {(x, round(y, 6)) for x, y in expected} <= corners


def test_one_run_has_no_band():
    [axes] = plots.depth([{"name": "a", "runs": [run([0.5, 0.4, 0.1])]}]).axes
    assert not axes.collections
    assert len(lines(axes)) == 1


def test_models_differ_in_colour_and_dash_unless_they_say_otherwise():
    models = [{"name": str(n)} for n in range(6)]
    assert len({style["color"] for style in plots.styles(models)}) == 6
    assert plots.styles(models)[0]["linestyle"] != plots.styles(models)[1]["linestyle"]
    mine = {"name": "a", "runs": [run([1, 0, 0])], "style": {"color": "0.5", "marker": ""}}
    [axes] = plots.depth([mine]).axes
    assert (axes.get_lines()[0].get_color(), axes.get_lines()[0].get_marker()) == ("0.5", "")


def test_nothing_measured_is_an_error():
    models = [{"name": "a", "runs": [run([None, None, None])]}]
    assert measured_columns(models) == []
    with pytest.raises(ValueError, match="models: got no value of any metric"):
        plots.depth(models)


@pytest.mark.parametrize("name", ["_private", "a $x^$ b", "$\\frac{1}$", "<b> & 'c'"])
def test_names_are_drawn_as_they_are(name):
    figure = plots.depth([{"name": name, "runs": [run([1, 0, 0])]}])
    assert legend_of(figure) == [name]
    assert "<b>" not in plots.svg(figure)
    plots.svg(plots.heat_maps(heat_map(similarity={name: [[0.0] * 6] * 2})))
    trace = {
        "name": name,
        "steps": [1],
        "probe": [0.5],
        "score": [0.5],
        "probe_name": name,
        "score_name": name,
    }
    plots.svg(plots.trajectory([trace]))
    figure, [axes] = plots.grid(1)
    plots.steps(axes, [{"name": name, "values": [1, 2]}], name)
    plots.svg(figure)


def test_pictures_are_reproducible_and_their_text_is_text():
    models = [{"name": "a model", "runs": [run([1, 0, 0])]}]
    pictures = [plots.svg(plots.depth(models)) for _ in range(2)]
    assert pictures[0] == pictures[1]
    assert ">a model</text>" in pictures[0]
    assert "<script" not in pictures[0]


def test_values_over_steps():
    _, [axes] = plots.grid(1)
    curves = [
        {"name": "a", "values": [3.0, None, 1.0], "marked": [2]},
        {"name": "b", "values": [1.0, 2.0], "steps": [10, 20]},
    ]
    plots.steps(axes, curves, "L_PRe")
    [(at, values)] = lines(axes, "a")
    assert at == [1, 2, 3]
    assert (values[0], values[2]) == (3.0, 1.0)
    assert math.isnan(values[1])
    assert lines(axes, "b") == [([10, 20], [1.0, 2.0])]
    assert ([2, 2], [0, 1]) in lines(axes)
    assert legend_of(axes) == ["a", "b"]
    assert (axes.get_title(), axes.get_xlabel()) == ("L_PRe", "training step")


def test_trajectory_joins_the_points_that_have_both_in_the_order_of_steps():
    trace = {
        "name": "a",
        "steps": [20, 0, 10, 30],
        "probe": [0.7, 0.9, 0.8, None],
        "score": [0.3, 0.1, 0.2, 0.4],
    }
    figure = plots.trajectory([trace | {"probe_name": "probe, layer 4", "score_name": "VQA"}])
    score, both, probe = figure.axes[:3]
    assert (score.get_ylabel(), probe.get_ylabel()) == ("VQA", "probe, layer 4")
    assert (both.get_xlabel(), both.get_ylabel()) == ("probe, layer 4", "VQA")
    assert lines(score) == [([0, 10, 20, 30], [0.1, 0.2, 0.3, 0.4])]
    assert lines(both) == [([0.9, 0.8, 0.7], [0.1, 0.2, 0.3])]
    points = both.collections[0]
    assert points.get_array().tolist() == [0, 10, 20]
    assert points.get_offsets().tolist() == [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]
    assert legend_of(figure) == ["a"]


@pytest.mark.parametrize(
    ("traces", "message"),
    [
        ([], "got none"),
        ([{"name": "a", "steps": [1, 2], "probe": [0.1], "score": [0.2, 0.3]}], "lists of lengths"),
    ],
)
def test_trajectory_rejects(traces, message):
    with pytest.raises(ValueError, match=message):
        plots.trajectory(traces)


def test_heat_maps_share_a_scale_and_outline_the_patch():
    figure = plots.heat_maps(heat_map())
    *panels, bar = figure.axes
    assert len(panels) == 2 * 3
    assert [axes.get_title() for axes in panels] == ["", "layer 0", "layer 7", "", "", ""]
    assert [axes.get_ylabel() for axes in panels[::3]] == ["before", "after"]
    shown = [axes.images[0] for axes in panels if axes not in panels[::3]]
    assert {image.get_clim() for image in shown} == {(-0.5, 1.0)}
    assert shown[0].get_array().flatten().tolist() == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    for axes in panels:  # 12 × 8 pixels on a grid of 2 × 3: patches of 4 × 4
        corner = axes.patches[-1].get_xy()
        size = (axes.patches[-1].get_width(), axes.patches[-1].get_height())
        assert (corner, size) == ((8.0, 4.0), (4.0, 4.0))
        assert axes.images[0].get_extent() == [0, 12, 8, 0]
    assert bar.get_ylabel() == "cosine similarity"


@pytest.mark.parametrize("similarity", [{"a": [[0.0] * 6]}, {"a": [[0.0] * 5] * 2}])
def test_heat_maps_of_another_size_are_an_error(similarity):
    with pytest.raises(ValueError, match="similarity: got"):
        plots.heat_maps(heat_map(similarity=similarity))


def test_axes_of_a_share_end_at_0_and_1():
    for values in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.5]):
        [axes] = plots.depth([{"name": "a", "runs": [run(values)]}]).axes
        assert -0.02 <= axes.get_ylim()[0] < axes.get_ylim()[1] <= 1.02
    [axes] = plots.depth([{"name": "a", "runs": [run([1.0, 3.0, 2.0], "contrast")]}]).axes
    assert axes.get_ylim()[1] > 3


def ticks(axes, name):
    """The numbers and labels of the ticks that can be seen."""
    axes.figure.canvas.draw()
    low, high = getattr(axes, f"get_{name}lim")()
    axis = getattr(axes, f"{name}axis")
    shown = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return {round(place, 9): label.get_text() for place, label in shown if low <= place <= high}


def test_the_axis_of_a_probe_does_not_enlarge_noise():
    for values in ([0.5, 0.51, 0.5], [1.0, 1.0, 0.99], [0.0, 0.01, 0.0]):
        [axes] = plots.depth([{"name": "a", "runs": [run(values)]}]).axes
        low, high = axes.get_ylim()
        assert high - low > 0.19
        assert low < min(values) < max(values) < high
        assert all(0 <= place <= 1 for place in ticks(axes, "y"))
    [axes] = plots.depth([{"name": "a", "runs": [run([0.5, 0.51, 0.5], "correlation")]}]).axes
    assert axes.get_ylim()[1] - axes.get_ylim()[0] < 0.1


@pytest.mark.parametrize("layers", [(0, 1, 2), (0, 16, 32), (0, 40, 80)])
def test_layers_are_whole_numbers_on_the_axis(layers):
    [axes] = plots.depth([{"name": "a", "runs": [run([0.5, 0.4, 0.1], layers=layers)]}]).axes
    labels = ticks(axes, "x")
    assert len(labels) >= 3
    assert all(label == f"{place:.0f}" for place, label in labels.items())


@pytest.mark.parametrize("values", [(11.0, 12.0, 13.0), (0.5, 3.0, 700.0), (1.0, 900.0, 2e5)])
def test_a_logarithmic_axis_has_plain_numbers(values):
    [axes] = plots.depth([{"name": "a", "runs": [run(values, "norm_mean")]}]).axes
    labels = ticks(axes, "y")
    assert len(labels) >= 2
    assert all(float(label.replace(",", "")) == place for place, label in labels.items())


def test_the_accuracy_of_a_guess_is_drawn_where_it_is_in_sight():
    def probe(values, chance):
        rows = [row | {"probe_chance": chance} for row in run(values)]
        [axes] = plots.depth([{"name": "a", "runs": [rows]}]).axes
        return [text.get_text() for text in axes.texts], lines(axes)

    texts, drawn = probe([0.9, 0.3, 0.1], 0.25)
    assert texts == ["chance"]
    assert any(set(y) == {0.25} for _, y in drawn)
    assert probe([0.9, 0.8, 0.9], 0.25)[0] == []


def test_pictures_follow_the_dark_scheme_of_the_page():
    text = plots.svg(plots.depth([{"name": "a", "runs": [run([1, 0, 0])]}]))
    assert "@media (prefers-color-scheme: dark)" in text
    style = text.index("</style>", text.index("@media"))
    for light, dark in plots.DARK.items():
        assert dark in text[:style]
        assert f": {light}" not in text[style:]
    assert "fill: #ffffff" not in text


def test_the_first_model_is_orange_and_the_second_blue():
    first, second = (style["color"] for style in plots.styles([{"name": "a"}, {"name": "b"}]))
    assert (first, second) == ("#D55E00", "#0072B2")
