"""The measures of arXiv 2603.20808 on hidden states of visual tokens: as pure functions of tensors,
for a model and a folder of images, and along a training.

`measures` knows no model. The names from `run` are imported on first use: `load_samples`, `Sample`,
`measure` and `LayerCallback`. `LayerCallback` needs transformers and is left out of `import *`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .measures.contrast import Contrast, ContrastRatio, contrast_ratio
from .measures.fidelity import cka_of_moments, cknna, linear_cka, mean_cosine
from .measures.layers import METRICS, LayerReport
from .measures.lens import LensSummary, LogitLens
from .measures.moments import Moments
from .measures.probe import knn_probe, linear_probe
from .measures.spatial import Spatial, SpatialContrast, similarity_map, spatial_contrast
from .measures.spectrum import Spectrum, SpectrumSummary

if TYPE_CHECKING:
    from .run.callback import LayerCallback as LayerCallback
    from .run.measure import Sample, measure
    from .run.samples import load_samples

__all__ = [
    "METRICS",
    "Contrast",
    "ContrastRatio",
    "LayerReport",
    "LensSummary",
    "LogitLens",
    "Moments",
    "Sample",
    "Spatial",
    "SpatialContrast",
    "Spectrum",
    "SpectrumSummary",
    "cka_of_moments",
    "cknna",
    "contrast_ratio",
    "knn_probe",
    "linear_cka",
    "linear_probe",
    "load_samples",
    "mean_cosine",
    "measure",
    "similarity_map",
    "spatial_contrast",
]

# For each name that is imported on first use, its module in `run`.
_RUN = {
    "LayerCallback": "callback",
    "Sample": "measure",
    "measure": "measure",
    "load_samples": "samples",
}


# A type checker that saw this function would accept any name as one of the package.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _RUN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".run.{_RUN[name]}", __name__), name)
