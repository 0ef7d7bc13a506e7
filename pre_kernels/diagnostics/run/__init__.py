"""`pre-kernels diagnose`: from a folder of images to a report on the visual tokens of a
vision-language model."""

# Options of `pre-kernels trace` that --loss does not take, with their defaults.
TRACE_DEFAULTS = {"layer": None, "metric": "linear_probe", "score": "score", "scores": None}
