"""The measures of arXiv 2603.20808 on hidden states of visual tokens, as pure functions of tensors.
They know no model. Importing this package imports no torch."""

METRICS = ("structure", "cosine", "spectrum", "cka", "cknna", "probe")
"""The groups of metrics that a `LayerReport` can measure."""
