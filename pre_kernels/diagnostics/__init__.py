"""The measures of arXiv 2603.20808 on hidden states of visual tokens: as pure functions of tensors,
for a model and a folder of images, and along a training.

`measures` knows no model. All names are imported on first use. `LayerCallback` needs transformers
and is left out of `import *`.
"""

from typing import TYPE_CHECKING

from pre_kernels._lazy import lazy

from .measures import METRICS

if TYPE_CHECKING:
    from .measures.contrast import Contrast, ContrastRatio, contrast_ratio
    from .measures.fidelity import cka_of_moments, cknna, linear_cka, mean_cosine
    from .measures.layers import LayerReport
    from .measures.lens import LensSummary, LogitLens
    from .measures.moments import Moments
    from .measures.probe import knn_probe, linear_probe
    from .measures.spatial import Spatial, SpatialContrast, similarity_map, spatial_contrast
    from .measures.spectrum import Spectrum, SpectrumSummary
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

# A type checker that saw this would accept any name as one of the package.
if not TYPE_CHECKING:
    __getattr__ = lazy(
        __name__,
        {
            "measures.contrast": ("Contrast", "ContrastRatio", "contrast_ratio"),
            "measures.fidelity": ("cka_of_moments", "cknna", "linear_cka", "mean_cosine"),
            "measures.layers": ("LayerReport",),
            "measures.lens": ("LensSummary", "LogitLens"),
            "measures.moments": ("Moments",),
            "measures.probe": ("knn_probe", "linear_probe"),
            "measures.spatial": (
                "Spatial",
                "SpatialContrast",
                "similarity_map",
                "spatial_contrast",
            ),
            "measures.spectrum": ("Spectrum", "SpectrumSummary"),
            "run.callback": ("LayerCallback",),
            "run.measure": ("Sample", "measure"),
            "run.samples": ("load_samples",),
        },
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
