"""The demo: a tiny LLaVA on scenes of real handwritten digits, trained without and with PRe."""

import logging

# At its import bitsandbytes warns, in every process, about a kernel that the demo does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
