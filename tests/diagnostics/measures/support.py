"""Reports on random images, and a comparison of the rows of two reports."""

import pytest
import torch

from pre_kernels.diagnostics import LayerReport

GRID = (4, 5)
WIDTH = 6
ANCHOR = 6
LAYERS = (0, 2, 5)
CLASSES = 3


def data(images=12, seed=0):
    """Arguments for `update`: images with four objects each, and a class."""
    g = torch.Generator().manual_seed(seed)
    mix = {layer: torch.randn(WIDTH, WIDTH, generator=g) for layer in LAYERS}
    samples = []
    for image in range(images):
        label = image % CLASSES
        anchor = torch.randn(20, ANCHOR, generator=g) + label
        hidden = {
            layer: anchor @ mix[layer] + torch.randn(20, WIDTH, generator=g) for layer in LAYERS[1:]
        }
        masks = torch.zeros(4, 20, dtype=torch.bool)
        masks[torch.randint(4, (20,), generator=g), torch.arange(20)] = True
        masks[:, torch.rand(20, generator=g) < 0.2] = False
        samples.append(
            {"hidden": {0: anchor, **hidden}, "anchor": anchor, "masks": masks, "label": label}
        )
    return samples


def logits(h):
    return h @ torch.randn(WIDTH, 40, generator=torch.Generator().manual_seed(9))


def report(images, **options):
    found = LayerReport(**options)
    for image in images:
        found.update(**image, grid=GRID, logits=logits)
    return found


def assert_rows_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one == {
            k: pytest.approx(v, rel=1e-9) if isinstance(v, float) else v for k, v in other.items()
        }
