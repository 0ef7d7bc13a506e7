"""The demo: a tiny LLaVA on scenes of real handwritten digits, trained without and with PRe."""

import logging


class Unsaved(OSError):
    """Files that could not be written, and why."""


# At its import bitsandbytes warns, in every process, about a kernel that the demo does not use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
