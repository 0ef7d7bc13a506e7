"""The goals, met and missed, from the records of a GPU and of a CPU."""

import pytest

from bench import cpu_goals, gpu_goals, record

from .support import cpu_results, gpu_results


def goal_row(records, name):
    return next(row for row in gpu_goals.table(records) if row[0].startswith(name))


def test_goals():
    records = gpu_results()
    of_cpu = [
        {name: value for name, value in line.items() if name != "capability"} for line in records
    ]
    assert all(
        row[1:] == (gpu_goals.CARDS, gpu_goals.NO_GPU, "") for row in gpu_goals.table(of_cpu)[1:]
    )
    for row in gpu_goals.table(records)[1:]:
        assert row[1] == "G"
        assert row[2].endswith(", met"), row
        assert "2026-01-02, commit c" in row[3]
    assert goal_row(records, "blas ÷ floor")[1:] == (
        "G",
        "1.05, met",
        "ours-blas; 2026-01-02, commit c",
    )
    assert goal_row(records, "triton ÷ floor")[2] == "1.1, met"
    assert goal_row(records, "time ÷ floor, workspace")[2] == "1.1, met"
    assert goal_row(records, "time ÷ the bf16 floor in fp8")[2] == "0.75, met"
    assert goal_row(records, "speed over VIRAL")[2] == "3.333, met"
    assert goal_row(records, "peak memory ÷ formula, N = 131,072")[2] == "0.9524, met"
    # Each card has its own rows. A card with fewer records says so.
    other = [{**line, "device": "H"} for line in records if line["kind"] == "step"]
    cards = [
        row[1:3] for row in gpu_goals.table([*records, *other]) if row[0].startswith("blas ÷ floor")
    ]
    assert cards == [("G", "1.05, met"), ("H", "not yet measured")] * 2


def test_a_mask_counts_where_it_was_seen_to_need_no_wait():
    records = gpu_results()
    for one in records:
        if one["kind"] == "sync":
            one["outcome"] = "waits"
    assert goal_row(records, "triton ÷ floor")[2] == "not yet measured"


@pytest.mark.parametrize(
    ("kind", "change", "name"),
    [
        ("loss", {"median_ms": 2.4}, "blas ÷ floor"),
        ("loss", {"median_ms": 2.4}, "time ÷ floor, every shape"),
        ("loss", {"peak_mib": 400.0}, "peak memory ÷ formula, N = 9,216"),
        ("sync", {"outcome": "called a synchronizing operation"}, "calls with a host sync"),
        ("step", {"launches": 17.0}, "launches"),
        ("training", {"memory_ratio": 1.006}, "training step of LLaVA-1.5-7B, memory"),
    ],
)
def test_a_goal_that_is_missed(kind, change, name):
    records = gpu_results()
    for one in records:
        if one["kind"] == kind and one.get("peer") in (None, "ours-blas", "ours-triton"):
            one |= change
    assert goal_row(records, name)[2].endswith(", missed")


def test_a_goal_over_every_shape_is_not_met_by_some():
    few = [one for one in gpu_results() if one.get("shape") in (gpu_goals.MAIN, gpu_goals.SMALL)]
    assert goal_row(few, "time ÷ floor, every shape")[2] == "1.05 so far"


def cpu_goal(records, name):
    (row,) = (row for row in cpu_goals.table(records) if row[0].startswith(name))
    return row


def test_goals_on_a_cpu():
    records = cpu_results()
    assert record.latest(records) == records
    for row in cpu_goals.table(records)[1:]:
        assert row[1] == "C"
        assert row[2].endswith(", met"), row
        assert "2026-01-02, commit c" in row[3]
    # The worst of three is divided by the faster mode.
    where = "cpu-16k bf16 mask, beside compile-max, the worst of 3; 2026-01-02, commit c"
    assert cpu_goal(records, "bf16: time ÷ the best of torch.compile")[2:] == ("0.9, met", where)
    assert cpu_goal(records, "fp32: time ÷ eager")[2] == "0.475, met"
    assert cpu_goal(records, "bf16: extra peak ÷ torch.compile")[2] == "0.6, met"
    where = "cpu-16k fp32, 2 MiB: 2.40 × the floor's time; 2026-01-02, commit c"
    assert cpu_goal(records, "fp32: extra peak ÷ eager's, a small")[2:] == ("0.12, met", where)
    assert cpu_goal(records, "fp16")[2] == "0.75, met"
    assert cpu_goal(records, "N = 64")[2] == "1.3, met"
    assert cpu_goal(records, "runs outside")[2] == "0 of 7 runs, met"
    # Records of a GPU or of another number of threads do not count for this CPU.
    fuzzed = {"kind": "fuzz", "device": "C", "threads": 1, "date": "2026-01-03"}
    assert cpu_goals.table([*records, *gpu_results(), fuzzed]) == cpu_goals.table(records)
    older = [
        {**line, "threads": 1, "date": "2026-01-01", "median_ms": 99.0}
        for line in records
        if "median_ms" in line
    ]
    assert cpu_goals.table([*records, *older]) == cpu_goals.table(records)
    assert all(
        row[1:] == (gpu_goals.CARDS, gpu_goals.NO_GPU, "") for row in gpu_goals.table(records)[1:]
    )


def test_goals_that_a_run_says_nothing_of():
    for records in ([], gpu_results()):
        assert all(
            row[1:] == (cpu_goals.A_CPU, "absent", "")
            for row in cpu_goals.table(records, "absent")[1:]
        )
    only = [
        line for line in cpu_results() if line.get("shape") == "cpu-16k" and line["kind"] == "loss"
    ]
    alone = [line for line in only if line["peer"] == "ours-torch"]
    assert cpu_goal(only, "bf16: time ÷ eager")[2] == "0.5625, met"
    assert cpu_goal(only, "training step of SmolVLM-256M, time")[2] == "not yet measured"
    assert cpu_goal(alone, "bf16: time ÷ eager")[2] == "not yet measured"
    assert cpu_goal(alone, "runs outside")[2] == "0 of 4 runs, met"
    # Eager of another run is not compared.
    apart = [
        {**line, "group": f"{line['group']} {line['peer']}"}
        for line in cpu_results()
        if "group" in line
    ]
    assert cpu_goal(apart, "bf16: time ÷ eager")[2] == "not yet measured"
    assert cpu_goal(apart, "bf16: extra peak ÷ eager's, a small")[2] == "not yet measured"


@pytest.mark.parametrize(
    ("kind", "change", "where", "name"),
    [
        ("loss", {"median_ms": 2.4}, {"dtype": "bf16"}, "bf16: time ÷ the best of torch.compile"),
        ("loss", {"median_ms": 2.45}, {"selection": "mask"}, "bf16: time ÷ eager"),
        ("loss", {"median_ms": 2.2}, {"dtype": "fp32"}, "fp32: time ÷ the best of torch.compile"),
        (
            "loss",
            {"peak_mib": 61.0},
            {"shape": "cpu-4k-encoder"},
            "bf16: extra peak ÷ torch.compile's",
        ),
        ("workspace", {"peak_mib": 31.0}, {}, "bf16: extra peak ÷ eager's, a small workspace"),
        ("loss", {"median_ms": 4.1}, {"dtype": "fp16"}, "fp16: time ÷ eager"),
        ("loss", {"median_ms": 6.1}, {"shape": "cpu-small", "dtype": "bf16"}, "N = 64"),
        ("loss", {"outside_rule": "dH: error"}, {"selection": "mask"}, "runs outside"),
        ("loss", {"failed": "error"}, {"selection": "mask"}, "runs outside"),
        ("training", {"time_ratio": 1.03}, {}, "training step of SmolVLM-256M, time"),
        ("training", {"memory_ratio": 1.03}, {}, "training step of SmolVLM-256M, memory"),
    ],
)
def test_a_goal_on_a_cpu_that_is_missed(kind, change, where, name):
    records = cpu_results()
    for one in records:
        about = {"kind": kind, "peer": "ours-torch", **where}
        if one["kind"] == "training" == kind or all(
            one.get(key) == value for key, value in about.items()
        ):
            one |= change
    assert cpu_goal(records, name)[2].endswith(", missed")
