"""Time and memory of the loss, forward and backward, each after a check against float64 in the same
run."""

import pytest

from . import baselines


class Samples:
    """A clock that advances by the next sample at each call of `tick`, so that pytest-benchmark's
    table shows our samples."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ahead = iter(())

    def __call__(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += next(self.ahead)


CLOCK = Samples()


@pytest.mark.benchmark(timer=CLOCK)
def test_loss(shape, dtype, rows, peer, measured, request):
    result = measured(shape, dtype, rows)[peer]
    if "unavailable" in result:
        pytest.skip(result["unavailable"])
    if "failed" in result:
        if baselines.BY_NAME[peer].ours:
            pytest.fail(f"not timed: {result['failed']}")
        pytest.skip(f"not timed, its own check failed: {result['failed']}")
    samples = result["all_ms"]
    # It warns if it is asked for and not used.
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{shape.name} {dtype} {rows}: {shape.size}"
    CLOCK.ahead = iter(x / 1e3 for x in samples)
    benchmark.extra_info.update({key: value for key, value in result.items() if key != "all_ms"})
    benchmark.pedantic(CLOCK.tick, rounds=len(samples))
