"""The table of a run on the screen."""

import pytest

from bench import shown

from .support import cpu_results, gpu_results, results


@pytest.fixture(params=[60, 80, 200])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


@pytest.mark.parametrize("records", [results, cpu_results, gpu_results])
def test_it_fits_the_screen(records, width):
    entries = [entry for entry in records() if entry["kind"] == "loss"]
    long = "w1: rms error 3.000e-07 > 2.000e-07 (eager 1.000e-07)"
    entries += [{**entries[0], "peer": "addmm-activation", "outside_rule": long, "error_ratio": 9}]
    lines = shown.loss(entries)
    assert max(map(len, lines)) <= min(width, 100)


def test_its_numbers_and_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    title, _, _, _, ours, eager, floor, _, *legend = shown.loss(results())
    assert title == "tiny bf16, rows by index: 200 rows, widths 128→96→64"
    assert ours.split() == ["ours-torch", "1.50", "200%", "0.50", "1.50", "30", "0.27", "1.00"]
    assert eager.split() == ["eager", "3.00", "100%", "1.00", "3.00", "110", "1.00", "1.00"]
    assert floor.split() == ["floor", "1.00", "300%", "0.33", "1.00"]
    text = "\n".join(legend)
    for word in ("peer", "time", "spread", "eager", "floor", "peak", "error"):
        assert f"\n{word}: " in f"\n{text}"
    assert "tiny bf16 index ours-triton: unavailable: no GPU" in text
    assert "A, torch 2, triton 3, 2026-01-02, commit c" in text


def test_a_noisy_machine_is_told():
    quiet = {"shape": "s", "dtype": "bf16", "peer": "eager", "selection": "mask"}
    quiet |= {"median_ms": 10.0, "q1_ms": 9.5, "q3_ms": 10.5}
    assert shown.noise([quiet]) == []
    noisy = quiet | {"peer": "floor", "q3_ms": 12.0}
    worse = quiet | {"peer": "ours-torch", "q3_ms": 13.0}
    (line,) = shown.noise([quiet, noisy, worse])
    assert line.startswith(
        "Too noisy: the quartiles of s bf16 mask ours-torch are 35% of its median apart "
        "(others above 10%: 1); want at most 10%."
    )


def test_marks_are_explained_where_they_are():
    entries = results()
    assert "outside the rule" not in "\n".join(shown.loss(entries))
    entries[0] |= {"outside_rule": "w1: rms"}
    entries[1] |= {"own_rule": "x", "outside_rule": "judged by a rule of its own"}
    text = "\n".join(shown.loss(entries))
    assert " 1.00*\n" in text
    assert " 1.00+\n" in text
    assert "\n*: its errors are outside the rule" in text
    assert "\n+: float8 is judged by a rule of its own" in text


def test_goals_of_the_run():
    assert shown.goals(results()) == []
    head, *lines, rest = shown.goals([e for e in cpu_results() if e["kind"] == "loss"])
    assert head.startswith("Goals that were set before")
    assert any(line.startswith("bf16: time ÷ eager: ≤ 0.6: measured 0.5625, met") for line in lines)
    assert rest.endswith(" other goals need other measurements.")


def test_a_reason_that_several_share_is_told_once():
    lines = [{**results()[3], "peer": name} for name in ("compile", "liger")]
    assert shown.refusals(lines) == ["tiny bf16 index compile, liger: unavailable: no GPU"]
    assert shown.loss(lines)[0] == "Nothing was timed."
