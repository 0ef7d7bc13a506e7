"""Mutants that no test kills: those that change nothing that can be seen, and the gaps. By `Mutant.key`."""

EQUIVALENT: dict[str, str] = {}
GAPS: dict[str, str] = {}
