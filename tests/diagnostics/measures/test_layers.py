import csv
import io
import json
import math
import pickle
from collections import Counter

import pytest
import torch

from pre_kernels.diagnostics import (
    LayerReport,
    LogitLens,
    Spectrum,
    cknna,
    contrast_ratio,
    knn_probe,
    linear_cka,
    linear_probe,
    mean_cosine,
    spatial_contrast,
)
from pre_kernels.diagnostics.measures.reservoir import Reservoir

from .support import ANCHOR, GRID, LAYERS, WIDTH, assert_rows_equal, data, logits, report


def test_every_metric_is_its_functions():
    images = data()
    rows = report(images).rows()
    assert [row["layer"] for row in rows] == [0, 2, 5]
    anchor = torch.cat([image["anchor"] for image in images])
    labels = torch.tensor([image["label"] for image in images])
    masks = torch.stack([image["masks"] for image in images])
    for row in rows:
        hidden = torch.stack([image["hidden"][row["layer"]] for image in images])
        tokens = hidden.flatten(0, 1)
        spectrum = Spectrum()
        lens = LogitLens()
        spectrum.update(tokens)
        lens.update(tokens, logits)
        cohesion, coupling, contrast = contrast_ratio(hidden, masks)
        near, far, spatial = spatial_contrast(hidden, GRID)
        means = hidden.double().mean(1).float()
        expected = {
            "layer": row["layer"], "images": 12, "tokens": 240,
            "cohesion": cohesion, "coupling": coupling, "contrast": contrast,
            "near": near, "far": far, "spatial_contrast": spatial,
            "cosine": mean_cosine(tokens, anchor),
            **spectrum.result()._asdict(),
            "cka": linear_cka(tokens, anchor),
            "cka_debiased": linear_cka(tokens, anchor, debiased=True),
            "cknna": cknna(tokens, anchor),
            "lens_share": lens.result().share, "lens_tokens": lens.result().tokens,
            "linear_probe": linear_probe(means, labels), "knn_probe": knn_probe(means, labels),
            "probe_test": 3, "probe_chance": 1 / 3, "notes": "",
        }  # fmt: skip
        assert_rows_equal([row], [expected])
    assert rows[0]["cosine"] == rows[0]["cka"] == pytest.approx(1)


def test_rows_are_ready_for_json_and_csv():
    rows = report(data(2), metrics=("structure",)).rows()
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert len(text.getvalue().splitlines()) == 4
    assert (
        rows[1]["cka"]
        is rows[1]["effective_dimension"]
        is rows[1]["linear_probe"]
        is rows[1]["cosine"]
        is None
    )
    assert rows[1]["contrast"] > 0


def test_merging_is_as_one_stream():
    images = data()
    whole = report(images)
    parts = [report(images[:5]), LayerReport(), report(images[5:], seed=1)]
    empty = LayerReport()
    for part in parts:
        empty.merge(part)
    assert_rows_equal(empty.rows(), whole.rows())  # so few rows that the samples hold all of them
    kept = parts[0].rows()
    assert kept[0]["images"] == 5
    assert_rows_equal(pickle.loads(pickle.dumps(whole)).rows(), whole.rows())


def numbers(value):
    """How many numbers an object keeps in memory. A view of a tensor keeps the whole tensor."""
    if torch.is_tensor(value):
        return value.untyped_storage().nbytes() // value.itemsize
    if isinstance(value, dict):
        return sum(numbers(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(numbers(item) for item in value)
    return numbers(vars(value)) if hasattr(value, "__dict__") else 1


def test_memory_is_flat_in_the_number_of_images():
    # An image has 20 tokens, so the samples of 15 tokens and of 3 labels are full after 3 images.
    seen = report(data(3), tokens=15, labelled=3)
    before = numbers(seen)
    for image in data(40, seed=1):
        seen.update(**image, grid=GRID, logits=logits)
    assert numbers(seen) == before


def test_without_masks_labels_grid_and_logits_the_rest_is_measured():
    found = LayerReport()
    for image in data():
        found.update(image["hidden"], image["anchor"][:, :4])
    for row in found.rows():
        missing = {name for name, value in row.items() if value is None}
        assert missing == {
            "cohesion", "coupling", "contrast", "near", "far", "spatial_contrast", "cosine",
            "lens_share", "lens_tokens", "linear_probe", "knn_probe", "probe_test", "probe_chance",
        }  # fmt: skip
        assert row["notes"] == ""


def test_what_cannot_be_measured_is_noted_and_costs_no_other_metric():
    one_class = [image | {"label": 4} for image in data()]
    rows = report(one_class, neighbours=300).rows()
    for row in rows:
        assert row["linear_probe"] is row["knn_probe"] is row["cknna"] is None
        assert "labels: got a single class" in row["notes"]
        assert "neighbours: got 300, want fewer than the 240 rows" in row["notes"]
        assert row["contrast"] is not None
    one_each = [image | {"label": number} for number, image in enumerate(data())]
    assert "labels: got a class with a single row" in report(one_each).rows()[0]["notes"]
    single_object = [image | {"masks": image["masks"][:1]} for image in data()]
    (row, *_) = report(single_object).rows()
    assert row["cohesion"] is not None
    assert row["coupling"] is row["contrast"] is None


def good():
    return data(1)[0] | {"grid": GRID, "logits": logits}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.ones(3, 20, WIDTH)},
            TypeError,
            "hidden: got Tensor, want tensors by layer number",
        ),
        ({"hidden": {}}, TypeError, r"hidden: got \[\]"),
        ({"hidden": {"layer 1": torch.ones(20, WIDTH)}}, TypeError, r"hidden: got \['layer 1'\]"),
        (
            {"hidden": {0: torch.ones(20, WIDTH)}},
            ValueError,
            "hidden, anchor: got layers of widths {0: 6, 'anchor': 6}",
        ),
        (
            {"hidden": dict.fromkeys(LAYERS, torch.ones(20, 3))},
            ValueError,
            "hidden, anchor: got layers of widths {0: 3",
        ),
        (
            {"hidden": dict.fromkeys(LAYERS, torch.ones(19, WIDTH))},
            ValueError,
            r"hidden\[0\]: got 19 rows",
        ),
        (
            {"hidden": dict.fromkeys(LAYERS, torch.full((20, WIDTH), math.nan))},
            ValueError,
            r"hidden\[0\]: got nan",
        ),
        (
            {"anchor": torch.ones(0, ANCHOR)},
            ValueError,
            r"anchor: got shape \(0, 6\), want \(patches, width\)",
        ),
        (
            {"masks": torch.ones(2, 7, dtype=torch.bool)},
            ValueError,
            r"masks: got shape \(1, 2, 7\)",
        ),
        ({"masks": torch.ones(2, 20)}, TypeError, "masks: got torch.float32"),
        ({"grid": (2, 2)}, ValueError, r"grid: got \(2, 2\)"),
        ({"label": "cat"}, TypeError, "label: got str, want an integer class"),
        ({"logits": lambda h: h[:, 0]}, ValueError, "logits: returned"),
        (
            {"logits": lambda h: h},
            ValueError,
            "logits: got a vocabulary of 6, want 40, as before",
        ),
    ],
)
def test_a_bad_image_names_the_argument_and_changes_nothing(change, error, message):
    seen = report(data(4))
    expected = seen.rows()
    with pytest.raises(error, match=message):
        seen.update(**(good() | change))
    assert seen.rows() == expected


def test_bad_settings():
    for options, message in (
        ({"metrics": "cka"}, "metrics: got 'cka', want some of structure"),
        ({"metrics": ["cka", "ckb"]}, "metrics: got"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"neighbours": -1}, "neighbours: got -1"),
        ({"labelled": 1.5}, r"labelled: got 1\.5"),
        ({"top": 0}, "top: got 0"),
        ({"radius": 0}, "radius: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerReport(**options)
    with pytest.raises(ValueError, match="images: got none so far"):
        LayerReport().rows()
    seen = report(data(2))
    with pytest.raises(ValueError, match="other: got settings"):
        seen.merge(LayerReport(radius=3))
    other = LayerReport()
    other.update({0: torch.ones(5, 3)}, torch.ones(5, 3))
    with pytest.raises(ValueError, match="other: got layers of widths"):
        seen.merge(other)
    assert seen.images == 2


def test_a_reservoir_is_a_uniform_sample_however_the_stream_is_cut():
    def sample(cuts, seed):
        kept = Reservoir(3, seed)
        start = 0
        for count in cuts:
            kept.offer(count, lambda chosen, start=start: [start + place for place in chosen])
            start += count
        return kept

    times = Counter(item for seed in range(3000) for item in sample([10], seed).items())
    assert len(times) == 10
    assert all(count == pytest.approx(900, abs=120) for count in times.values())
    for seed in range(20):
        assert (
            sample([10], seed).items()
            == sample([1] * 10, seed).items()
            == sample([2, 7, 1], seed).items()
        )
    merged = Counter()
    for seed in range(3000):
        reservoir, other = sample([6], seed), sample([4], seed + 10_000)
        reservoir.merge(other)
        merged.update(reservoir.items())
    # Items 0..3 came in both halves. The sample keeps 3 of the 10 offers, each equally likely.
    assert sum(merged.values()) == 9000
    assert merged[4] == pytest.approx(900, abs=120)
    assert merged[0] == pytest.approx(1800, abs=160)
    assert sample([2], 0).items() == [0, 1]
