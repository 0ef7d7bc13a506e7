"""The summary of a GPU run: every section from records, each rule of what to try next, never more
than 40 lines."""

import json

import pytest

from bench import gpu_goals, record, summary

from .support import gpu_results

STAMP = {
    "device": "G",
    "torch": "2",
    "triton": "3",
    "commit": "c",
    "run": "now",
    "capability": "9.0",
}


def tile(role, tile, ms, in_use=False):
    about = {
        "kind": "tile",
        "role": role,
        "kernel": "descriptor",
        "tile": tile,
        "item": f"{role} {tile}",
    }
    return {**about, **STAMP, "median_ms": ms, "over_blas": ms / 0.4, "in_use": in_use}


def part(name, outcome="exit 0", seconds=9.0):
    return {"kind": "part", "item": name, "outcome": outcome, "seconds": seconds, **STAMP}


def told(*more):
    """Return the summary of a run that met all goals, and of added records."""
    records = [{**one, **STAMP} for one in gpu_results()]
    return summary.lines(record.latest([*records, part("blas"), *more]), {})


def changed(change, **fields):
    """Return the records of the run that have these fields, changed. They replace the earlier
    ones."""
    return [{**one, **STAMP, **change} for one in gpu_results() if fields.items() <= one.items()]


def hints(text):
    return text[text.index("what to try next:") + 1 :]


def test_a_run_that_met_its_goals():
    text = told()
    assert text[0].startswith("device G, torch 2, triton 3")
    row = next(line for line in text if f"{gpu_goals.MAIN} index ours-blas" in line)
    assert row.split()[3:] == ["2.100", "1.050", "0.525", "0.952"]
    assert "guarantees: 3 of 3 kept" in text
    assert (
        "workspace of ours-blas, ÷ floor: 32 MiB 1.200, 64 MiB 1.100, 512 MiB 1.010; best 512"
        in text
    )
    assert hints(text) == ["  nothing: no rule applies"]


CHECKED = [
    {"impl": "blas", "check": "error", "outcome": "pass", "says": "fine"},
    {"impl": "blas", "check": "time", "outcome": "fail", "says": "slow"},
]
MAIN = {"kind": "loss", "shape": gpu_goals.MAIN, "selection": "index"}
RULES = {
    "slow blas": (
        [
            *changed({"median_ms": 2.4}, **MAIN, peer="ours-blas"),
            *(
                {"kind": "kernel", "peer": "ours-blas", "item": name, "us": us, **STAMP}
                for name, us in {
                    "nvjet_hsh": 400.0, "a_kernel": 90.0, "b": 80.0, "c": 70.0, "d": 10.0,
                }.items()
            ),
        ],
        f"ours-blas at {gpu_goals.MAIN}, index: 1.20 × the floor > 1.1; "
        "the slowest passes: a_kernel 90 µs, b 80 µs, c 70 µs",
    ),
    "slow triton": (
        changed({"median_ms": 2.6}, **MAIN, peer="ours-triton"),
        f"ours-triton at {gpu_goals.MAIN}, index: 1.30 × the floor > 1.25; "
        "the slowest passes: not known",
    ),
    "a better tile": (
        [tile("project", [128, 256], 0.50, True), tile("project", [256, 128], 0.45)],
        "put project [256, 128] into the table of tiles: 10% less time than the shipped one",
    ),
    "no tile": (
        [tile("project", [128, 256], 0.50, True)],
        "project: no candidate is near cuBLAS (1.25 × its time)",
    ),
    "compile": (
        changed({"median_ms": 2.05}, **MAIN, peer="compile"),
        f"compile is faster than ours at {gpu_goals.MAIN}: compare their kernels",
    ),
    "the host": (
        changed({"enqueue_us": 2000.0}, **MAIN, peer="ours-blas"),
        f"ours-blas at {gpu_goals.MAIN}, index: the host needs 2000 µs a step",
    ),
    "memory": (
        changed({"peak_mib": 400.0}, **MAIN, peer="ours-blas"),
        f"ours-blas at {gpu_goals.MAIN}, index: 1.43 × the formula's memory",
    ),
    "workspace": (
        changed({"over_floor": 0.9}, kind="workspace", item=64),
        "ours-blas: 64 MiB of workspace by default, 11% less time than 512",
    ),
    "fp8": (
        changed({"median_ms": 2.2}, **MAIN, peer="ours-fp8"),
        "fp8 gains nothing: 1.10 against 1.05 × the floor",
    ),
    "a wrong result": (
        changed({"failed": "w1"}, **MAIN, peer="ours-fp8"),
        f"fix ours-fp8 at {gpu_goals.MAIN}, index: w1",
    ),
    "a failed test": (
        [
            {
                "kind": "test", "item": "tests/test_a.py::b", "outcome": "failed",
                "message": "x\nE  boom", **STAMP,
            },
        ],
        "fix tests/test_a.py::b and 0 more",
    ),
    "a broken guarantee": (
        changed({"outcome": "waits"}, kind="sync"),
        "fix sync, ours-triton, mask, leading anchor: waits",
    ),
    "a slow part": ([part("tiles", "ended at its limit", 24.0)], "tiles took more than its 24 s"),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_what_to_try_next(name):
    more, wanted = RULES[name]
    assert any(line.strip().startswith(wanted) for line in hints(told(*more))), hints(told(*more))


def test_everything_at_once_is_40_lines(tmp_path):
    more = [line for rule, _ in RULES.values() for line in rule]
    more += [
        {"kind": "test", "item": f"t{i}", "outcome": "failed", "message": "E no\n", **STAMP}
        for i in range(99)
    ]
    more += [
        {"kind": "sync", "shape": "s", "peer": "ours-blas", "item": str(i), "outcome": "x", **STAMP}
        for i in range(99)
    ]
    more += [
        {**line, "shape": f"{line['shape']}{i}", "group": f"g{i}"}
        for i in range(9)
        for line in changed({}, **MAIN)
    ]
    more += [
        {"kind": "ceiling", "item": item, unit: 4321.0, **STAMP}
        for item, unit in (("copy", "gb_per_s"), ("product", "tflops"))
    ]
    more += [
        tile("weight_grad", [128, 256], 0.5, True),
        *(part(f"p{i}", "exit 1") for i in range(20)),
    ]
    text = told(*more)
    # and one line with the seconds
    assert len(text) <= 39
    assert max(map(len, text)) <= 320
    assert "ceilings: copy 4,321 GB/s, product 4,321 TFLOP/s" in text


def test_what_failed_and_what_is_missing_is_told():
    more = [
        {"kind": "ceiling", "item": "launch", "failed": "no C compiler"},
        {"kind": "tile", "role": "project", "item": "project (1, 2)", "failed": "relative error 1"},
        {"kind": "workspace", "peer": "ours-blas", "item": 64, "unavailable": "too large"},
        {"kind": "loss", "shape": "s", "peer": "viral", "unavailable": "not installed"},
    ]
    records = record.latest([{**line, **STAMP, "group": "g"} for line in more])
    ended = {"finished": False, "settings": {"impl": ["blas", "fp8"]}, "results": CHECKED}
    text = summary.lines(records, ended)
    assert "not measured: 3" in text
    assert "  ceiling launch: no C compiler" in text
    assert "  check blas: 1 passed, 1 failed, ended before its end; time: slow" in text
    assert "  check fp8: 0 passed, 0 failed, ended before its end" in text
    assert hints(text) == ["  fix blas, which failed the check: time: slow"]


def test_the_last_run_of_a_folder_and_its_check(tmp_path):
    for run, outcome in (
        ("2026-01-02T00:00:00Z", "exit 1"),
        ("2026-01-03T00:00:00Z", "exit 0"),
        (None, "exit 9"),
    ):
        entry = {**part("blas", outcome), "run": run}
        record.append(
            tmp_path / "gpu.jsonl", {name: value for name, value in entry.items() if value}
        )
    line = "  check blas: 1 passed, 1 failed; time: slow"
    for date, is_told in (
        ("2026-01-03T00:00:00+00:00", True),
        ("2026-01-02T23:59:59+00:00", False),
    ):
        (tmp_path / "check.json").write_text(
            json.dumps({"date": date, "results": CHECKED, "finished": True})
        )
        text = summary.of_folder(tmp_path)
        assert "parts: 1 of 1 passed" in text
        assert (line in text) == is_told
    assert summary.of_folder(tmp_path / "nowhere") == ["no records"]
