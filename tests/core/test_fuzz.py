"""A part of the fuzz campaign (`python -m bench.fuzz`), with other cases in each run, or the same
ones where CI is set. A failure prints its `Spec`."""

import pytest

pytest.importorskip(
    "hypothesis", reason="hypothesis is not installed; test_fuzz_regressions.py runs without it"
)

from hypothesis import HealthCheck, Phase, given, settings

from verify.fuzz.draw import specs
from verify.fuzz.verdicts import VIOLATION, run


@pytest.mark.parametrize(("impl", "examples"), [("torch", 100), ("blas", 10), ("triton", 10)])
def test_drawn_cases_are_within_the_rule(impl, examples, device):
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        print_blob=True,
        # A smaller case has less to average, so luck would judge it rather than the code.
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(specs(impl))
    def each(spec):
        failed = [outcome.message for outcome in run(spec, device) if outcome.verdict == VIOLATION]
        assert not failed, "; ".join(failed)

    each()
