"""The demo: a tiny LLaVA on scenes of real handwritten digits, trained without and with PRe."""
