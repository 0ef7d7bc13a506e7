"""The stages of the real demo's bars.

The seconds of a step are those of one thread of an AMD EPYC without AVX-512.
"""

from __future__ import annotations

from ..stages import Stage

LOAD = Stage("loading", 40.0)
ALIGN = Stage("alignment", 2.9)
TUNE = Stage("instruction tuning", 3.8)
# A step is a scene.
MEASURE = Stage("measuring", 0.45)
