"""What the paper measures on hidden states of visual tokens, as pure functions of tensors (arXiv
2603.20808)."""

from .contrast import Contrast, ContrastRatio, contrast_ratio
from .fidelity import cka_of_moments, cknna, linear_cka, mean_cosine
from .layers import METRICS, LayerReport
from .lens import LensSummary, LogitLens
from .moments import Moments
from .probe import knn_probe, linear_probe
from .spatial import Spatial, SpatialContrast, similarity_map, spatial_contrast
from .spectrum import Spectrum, SpectrumSummary

__all__ = [
    "METRICS",
    "Contrast",
    "ContrastRatio",
    "LayerReport",
    "LensSummary",
    "LogitLens",
    "Moments",
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
    "mean_cosine",
    "similarity_map",
    "spatial_contrast",
]
