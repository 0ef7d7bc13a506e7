"""What the demo says: on the screen, in Markdown and on the page, from numbers that are made up."""

import io
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from pre_kernels import cli
from pre_kernels.demo import progress, results, run, stages, words
from pre_kernels.demo.settings import QUICK, Settings
from verify import ROOT

from .support import committed, screen

PATHS = [Path(f"demo.{ending}") for ending in ("json", "md", "png", "html")]


def made_up(without, with_, accuracy=(0.9, 0.9), contrast=(1.2, 1.3), **settings):
    """Return measurements in which the probe falls in a line. `without` and `with_` have its first
    and last accuracy for each seed."""

    def arm(ends, accuracy, contrast):
        first, last = ends
        probe = [first + (last - first) * n / 8 for n in range(9)]
        return {
            "accuracy": accuracy,
            "pre_loss": -0.9,
            "pre_loss_constant": -0.5,
            "train_pre_loss": [0.0, -0.9],
            "probe": probe,
            "contrast": [contrast] * 9,
        }

    seeds = [
        {
            "seed": number,
            "before": arm(a, 0.0, 1.0),
            "without": arm(a, accuracy[0], contrast[0]),
            "with": arm(b, accuracy[1], contrast[1]),
        }
        for number, (a, b) in enumerate(zip(without, with_, strict=True))
    ]
    sizes = vars(Settings()) | {"layer": 4, "seeds": len(seeds)} | settings
    return {
        "settings": sizes,
        "seeds": seeds,
        "device": "a CPU, 2 cores, 2 processes",
        "versions": {},
        "date": "2026-01-02",
        "seconds": 200.0,
    }


FALLS = [(0.98, 0.86), (0.98, 0.80)]
KEPT = [(0.98, 0.95), (0.98, 0.94)]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (made_up(FALLS, KEPT), "Without PRe the LLM loses part of what its image tokens show"),
        (made_up(FALLS, KEPT), "98 % accuracy at the input, 83 % after the last layer"),
        (made_up(FALLS, KEPT), "With PRe it keeps more: 98 % and 94 %."),
        (made_up(KEPT, FALLS), "With PRe it keeps less"),
        (made_up(FALLS, [FALLS[0], KEPT[1]]), "With PRe there is no clear difference"),
        (made_up(FALLS, FALLS), "With PRe there is no clear difference"),
        (made_up(FALLS, [(0.98, 0.87), (0.98, 0.81)]), "With PRe there is no clear difference"),
        (made_up([(0.98, 0.97)], KEPT[:1]), "Without PRe the LLM keeps nearly all of what"),
        (made_up(FALLS, KEPT), "is learned equally well"),
        (made_up(FALLS, KEPT, accuracy=(0.95, 0.945)), "is learned equally well"),
        (made_up(FALLS, KEPT, accuracy=(0.9, 0.95)), "is learned better with PRe"),
        (made_up(FALLS, KEPT, accuracy=(0.9, 0.8)), "is learned worse with PRe"),
        (
            made_up(FALLS, KEPT, contrast=(1.2, 1.1)),
            "Worse with PRe, unlike in the paper: contrast ratio 1.10, without 1.20.",
        ),
        (made_up(FALLS, KEPT), "Two seeds cannot rule out chance: use --seeds 5."),
        (made_up(FALLS[:1], KEPT[:1]), "One seed cannot rule out chance"),
    ],
)
def test_the_verdict_follows_the_numbers(found, said):
    assert said in " ".join(words.verdict(found))


def test_the_verdict_says_nothing_without_need():
    said = " ".join(words.verdict(made_up(FALLS + FALLS[:1], KEPT + KEPT[:1])))
    assert "contrast" not in said
    assert "chance" not in said


def shown(found, width=80, **options):
    console = screen(width, **options)
    run.show(found, PATHS, Path("out"), console)
    return console.file.getvalue()


def test_the_first_screen_has_everything():
    found = made_up(FALLS, KEPT, contrast=(1.2, 1.1))
    lines = shown(found).splitlines()
    # The last line is the command, of two lines on the screen. Then comes the prompt.
    assert len(lines) + 2 <= 24
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[0].startswith("Without PRe the LLM loses")
    assert lines[-2] == "Files in out: demo.html, .png, .md, .json. Layer by layer:"
    (row,) = [line for line in lines if line.startswith("linear probe, last layer ↑")]
    assert row.split("  ")[-1].strip() == "2 of 2 seeds"
    assert any(line.startswith("L_PRe ↓") and line.endswith("0 of 2 seeds") for line in lines)


def test_a_narrow_screen_has_means_only():
    lines = shown(made_up(FALLS, KEPT), 60).splitlines()
    assert all(len(line) <= 60 for line in lines if "diagnose" not in line and "Files" not in line)
    assert "±" not in "".join(lines)
    assert any(line.endswith("2 of 2 seeds") for line in lines)
    assert [line.split()[5:7] for line in lines if "probe, last" in line] == [["0.830", "0.945"]]


def test_a_screen_without_unicode_can_be_read():
    from pre_kernels import screen as shared

    shared.prepare()
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="readable")
    console = run.Console(file=file, width=80)
    run.show(made_up(FALLS, KEPT), PATHS, Path("out"), console)
    file.flush()
    said = file.buffer.getvalue().decode()
    assert "linear probe, last layer ^" in said
    assert "?" not in said


def test_a_smoke_test_says_so_and_claims_nothing():
    found = made_up(FALLS, KEPT, tune_steps=QUICK.tune_steps)
    printed = shown(found)
    page = results.page.html(results.document(found))
    for text in (printed, results.story(found), page):
        text = " ".join(text.split())
        assert words.SMOKE in text
        assert "better with PRe" not in text
        assert "keeps more" not in text
    assert results.SMOKE_TITLE in printed
    assert results.story(found).startswith(f"# {results.SMOKE_TITLE}")
    assert not words.verdict(found)


def test_the_page_and_the_text_begin_with_the_verdict():
    found = made_up(FALLS, KEPT)
    document = results.document(found)
    assert document["verdict"] == words.verdict(found)
    page = results.page.html(document)
    places = [page.index(text) for text in ("keeps more", "a small head", "<img", "<table")]
    assert places == sorted(places)
    text = results.story(found)
    places = [text.index(part) for part in ("keeps more", "| task accuracy ↑ |", "<details>")]
    assert places == sorted(places)
    assert text.index("contrast ratio, layer 7") > places[-1]
    assert "Measured in 3 minutes on a CPU, 2 cores, 2 processes." in text


def test_the_scene_shows_the_question_and_its_answer():
    scene = results.scene()
    assert "middle odd" in scene["caption"]
    assert scene["caption"].count(": no.") + scene["caption"].count(": yes.") == 1


@pytest.mark.parametrize(
    ("started", "on_path", "printed"),
    [
        ("{bin}/pre-kernels", True, "pre-kernels"),
        ("{bin}/pre-kernels", False, "bin/pre-kernels"),
        ("bin/pre-kernels", False, "bin/pre-kernels"),
        ("/nowhere/pytest", False, "bin/pre-kernels"),
        ("/nowhere/pre-kernels", False, "pre-kernels"),
    ],
)
def test_the_next_command_names_the_program_as_it_can_be_typed(
    started, on_path, printed, tmp_path, monkeypatch
):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "pre-kernels").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(folder) if on_path else os.devnull)
    monkeypatch.setattr(sys, "argv", [started.format(bin=folder)])
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    assert run.next_command(Path("a b")).startswith(f"{printed} diagnose 'a b/models/without' ")


def test_pages_state_the_time_of_the_committed_runs(capsys):
    took, real = (results.minutes(committed(kind)["seconds"]) for kind in ("demo", "real"))
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{took} on a CPU with 2 cores" in said
    assert f"{real} a seed on 2 cores" in said
    assert f"{took} on 2 cores" in (ROOT / "README.md").read_text()
    assert f"It took {took} on 2 CPU cores" in (ROOT / "docs" / "evidence.md").read_text()


def test_minutes():
    assert [results.minutes(s) for s in (5.4, 60, 212.3)] == ["5 s", "1 minute", "4 minutes"]


def test_the_estimate_starts_from_expectation_and_ends_with_what_was_measured():
    now = [0.0]
    stage = stages.Stage("slow", 10.0)
    estimate = progress.Estimate(1000.0, jobs=2, clock=lambda: now[0])
    assert str(estimate) == "about 8 min left"
    for _ in range(50):
        # Each step takes 20 s: two at a time are four times as slow as expected.
        estimate.advance(stage)
        now[0] += 20
    assert str(estimate) == "about 16 min left"
    for _ in range(50):
        estimate.advance(stage)
    assert str(estimate) == "less than a minute left"


def test_the_expected_time_is_that_of_the_committed_run():
    expected = stages.seconds(Settings())
    assert expected == pytest.approx(committed()["seconds"], rel=0.3)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = screen()
    with progress.bars(console, 4 * stages.READ.seconds) as bar, bar(stages.READ, "read", 4) as on:
        for _ in range(4):
            now[0] += 0.6 * progress.QUIET
            on(1.5)
    lines = console.file.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        " 50%  read: step 2 of 4",
        "100%  read: step 4 of 4",
        "100%  read: 4 steps, loss 1.500, 72 s",
    ]


def test_progress_of_work_whose_time_is_not_known():
    """As in `python -m bench.evidence`."""
    console = screen(80, force_terminal=False)
    with progress.bars(console) as bar, bar(stages.READ, "read", 2) as advance:
        advance(1.0)
    assert console.file.getvalue() == "read: 2 steps, loss 1.000, 0 s\n"


@pytest.mark.parametrize("width", [60, 80])
def test_progress_on_a_terminal_fits(width):
    console = screen(width, force_terminal=True, color_system=None)
    name = "seed 0: instruction tuning without PRe"
    with progress.bars(console, 10.0) as bar, bar(stages.TUNE, name, 2) as advance:
        advance(1.234)
        rows = [row for row in console.file.getvalue().replace("\r", "\n").splitlines() if row]
    from rich.text import Text

    plain = [Text.from_ansi(row).plain for row in rows]
    assert all(len(row) <= width for row in plain)
