"""The demo: a tiny LLaVA on scenes of real handwritten digits, trained without and with PRe."""

import logging

# it warns at its import, in every process, of a kernel that nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
