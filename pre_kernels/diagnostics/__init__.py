"""What the paper measures on hidden states of visual tokens (arXiv 2603.20808): pure functions of
tensors, a model's images through them, along a training too.

`measures` knows no model. What `run` has is imported when it is first asked for: `load_samples`,
`Sample`, `measure` and `LayerCallback`, which needs transformers and is left out of `import *`.
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

# the module in `run` of each name that is imported when it is first asked for
_RUN = {
    "LayerCallback": "callback",
    "Sample": "measure",
    "measure": "measure",
    "load_samples": "samples",
}


if not TYPE_CHECKING:  # a checker would take any name for one of the package

    def __getattr__(name: str) -> Any:
        if name not in _RUN:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f".run.{_RUN[name]}", __name__), name)
