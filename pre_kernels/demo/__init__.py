"""The demo: a tiny LLaVA on scenes of real handwritten digits, trained without and with PRe."""

import logging

# When it is imported, in every process, it warns about a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
