"""The table of the real parts shows what its records contain."""

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("scipy")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from bench import evidence, evidence_real, pages, pictures, real_plots, record
from bench.evidence_real import ARMS, CHOSEN, CONFIRM, PAPER, SEARCH, WITHOUT, base, table
from pre_kernels import sources
from pre_kernels.check.device import Cpu


def records(seeds, arms, probe=0.0, contrast=0.0, bf16=True):
    """Return one for each arm and seed. Arms with PRe have `probe` and `contrast` more."""
    lines = []
    for arm in arms:
        for seed in seeds:
            more = ARMS[arm].options is not None if arm in ARMS else False
            metrics = {
                "layers": [0, 15, 30],
                "accuracy": 0.5,
                "identity": [0.9, 0.6 + 0.01 * seed + probe * more, 0.5 + probe * more],
                "probe": [0.8, 0.6 + 0.01 * seed + probe * more, 0.5 + probe * more],
                "contrast": [2.0, 1.2 + contrast * more * (seed % 2), 1.2],
                "cosine": [1.0, 0.2, 0.1],
                "effective_dimension": [20.0, 10.0, 10.0],
                "lens_share": [0.1, 0.2, 0.3],
                "words": [["a"], ["b"], [" one", "\n"]],
                "settings": {"llm": "smollm2", "bf16": bf16},
            }
            line = {"kind": "real", "item": f"{arm}, seed {seed}", "arm": arm, "seed": seed}
            lines.append(line | metrics | record.stamp(Cpu()))
    return lines


def line(text, beginning):
    return next(line for line in text.splitlines() if line.startswith(beginning))


def test_arms_are_compared_with_their_own_training_without_pre():
    assert base(PAPER) == base(WITHOUT) == WITHOUT
    assert base("LoRA, centred") == "LoRA, without PRe"
    assert base("centred, both stages") == WITHOUT
    for name, arm in ARMS.items():
        other = ARMS[base(name)]
        assert other.options is None
        assert (other.trained, other.rate, other.longer) == (arm.trained, arm.rate, arm.longer)


def test_rows_are_means_and_differences():
    text = table(records(SEARCH, ("before", WITHOUT, PAPER), probe=0.02))
    cells = [cell.strip() for cell in line(text, f"| {PAPER} ").split("|")]
    assert cells[2] == "0, 1"
    # The mean of 0.6 and 0.5, half a hundredth more for seed 1, and 0.02.
    assert cells[3] == "0.573 ± 0.004 (+0.020 ± 0.000; 2/2)"
    assert "(" not in line(text, f"| {WITHOUT} ")
    assert "(" not in line(text, "| before visual training ")
    assert "Confirmation" not in text


def test_the_course_over_depth_and_the_words():
    text = table(records(SEARCH, ("before", WITHOUT, PAPER), probe=0.02))
    row = line(text, "| SmolLM2-135M-Instruct | before visual training |")
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[3:5] == ["0.900 → 0.600 → 0.500", "0.800 → 0.600 → 0.500"]
    assert cells[5:7] == ["2.00 → 1.20 → 1.20", "0.10 → 0.20 → 0.30"]
    assert cells[7] == "`' one'`, `'\\n'`"


def test_a_seed_without_its_base_has_no_difference():
    entries = records(SEARCH, (WITHOUT, PAPER), probe=0.02)
    entries = [e for e in entries if (e["arm"], e["seed"]) != (WITHOUT, 1)]
    assert "(+0.020; 1/1)" in line(table(entries), f"| {PAPER} ")


def test_what_is_confirmed_has_an_interval():
    arms = (WITHOUT, PAPER)
    text = table([*records(SEARCH, arms), *records(CONFIRM, arms, probe=0.02, contrast=0.1)])
    assert line(text, f"- {PAPER} raises the identity: reproduced (+0.020 ± 0.000")
    assert line(text, f"- {PAPER} raises the contrast ratio: not shown, within the noise")
    assert line(text, f"- {PAPER} lowers the right answers by no more than 0.02: shown")
    assert text.index("Search, in bfloat16") < text.index("Confirmation, in bfloat16")
    fewer = [*records(SEARCH, arms), *records(CONFIRM[:4], arms, probe=0.02)]
    assert "reproduced" not in table(fewer)


def test_precisions_are_not_mixed():
    own = [*records((0,), (WITHOUT,)), *records((0,), (PAPER,), probe=0.02, bf16=False)]
    text = table(own)
    assert "(" not in line(text, f"| {PAPER} ")
    assert text.index("Search, in bfloat16") < text.index("Search, in float32")


def test_pictures_show_the_confirmation_once_it_is_there(tmp_path):
    arms = ("before", WITHOUT, PAPER, CHOSEN)
    search = records(SEARCH, arms)
    confirmed = records(CONFIRM[:3], arms, probe=0.02)
    assert "50% without PRe, 50% with the paper's settings, and 50%" in real_plots.caption(search)
    said = real_plots.caption([*search, *confirmed])
    assert "50% without PRe, 52% with the paper's settings, and 52%" in said
    assert "mean of 3 seeds" in said
    path = tmp_path / "real.png"
    names = real_plots.depth([*search, *confirmed], path)
    assert names == [
        "before visual training",
        "without PRe",
        "PRe, the paper's settings",
        f"PRe, {CHOSEN}",
    ]
    first = path.read_bytes()
    real_plots.depth(search, path)
    assert path.read_bytes() != first
    real_plots.probe(search, path)
    assert path.read_bytes() != first


def test_only_what_is_shown_makes_a_picture_old():
    arms = ("before", WITHOUT, PAPER, CHOSEN)
    new = [
        {**entry, "measured": sources.digest("real"), "commit": "b", "date": "2026-01-03"}
        for entry in records(CONFIRM, arms)
    ]
    old = [
        {**entry, "measured": "another", "commit": "a", "date": "2026-01-02"}
        for entry in [*records(SEARCH, arms), *records(CONFIRM, ("mse",))]
    ]
    found = pictures.results("real.png", [*old, *new])
    assert found == new
    assert pictures.note("real.png", found) == ""
    assert "has changed" not in pages.probe([*old, *new])
    new[0]["measured"] = "another"
    assert "has changed" in pages.probe([*old, *new])


def test_a_wrong_arm_and_missing_parts_are_said(capsys, tmp_path):
    with pytest.raises(SystemExit):
        evidence.main(["--real", "--arms", "nothing", "--results", str(tmp_path)])
    assert "--arms: got nothing, want some of: without PRe; PRe;" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evidence.main(["--real", "--parts", str(tmp_path), "--results", str(tmp_path)])
    assert "the real parts are not all in" in capsys.readouterr().err


def test_the_search_records_what_it_measures(tmp_path, monkeypatch):
    asked = []

    def measure(arms, wanted, settings, pieces, device, work, keep, bar, jobs):
        asked.append(wanted)
        for arm, seed in wanted:
            keep(arm, seed, {"layers": [0]}, 1.5)

    monkeypatch.setattr(evidence_real, "measure", measure)
    monkeypatch.setattr(evidence_real, "prepare", lambda *arguments: None)
    command = ["--seeds", "0", "--arms", PAPER, "--results", str(tmp_path)]
    assert evidence_real.main(command) == 0
    assert asked == [[("before", 0), ("aligned", 0), (PAPER, 0)]]
    (_, _, last) = record.load([tmp_path / "evidence_real.jsonl"])
    assert last["options"]["options"] == {}
    assert last["seconds"] == 1.5
    assert last["command"] == "python -m bench.evidence --real --seeds 0 --arms PRe"
    assert evidence_real.main(command) == 0
    assert asked[1] == []
    path = tmp_path / "evidence_real.jsonl"
    path.write_text(path.read_text().replace(last["measured"], "other code"))
    assert evidence_real.main(command) == 0
    assert asked.pop() == asked[0]
    assert evidence_real.main([*command, "--llm", "gemma3"]) == 0
    assert len(asked[2]) == 3
    (*_, last) = record.load([tmp_path / "evidence_real.jsonl"])
    assert last["command"].endswith("--seeds 0 --arms PRe --llm gemma3")
    with pytest.raises(SystemExit):
        evidence_real.main(["--llm", "gemma3", "--arms", "layer L", "--results", str(tmp_path)])
