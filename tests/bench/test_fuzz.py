"""The table of a fuzz campaign shows its outcomes."""

import pytest

pytest.importorskip("rich", reason="rich is not installed")

from bench import fuzz, fuzz_table, record
from pre_kernels.check.device import Cpu
from verify import ROOT


def case(*outcomes, seed=0, **group):
    about = {"impl": "torch", "dtype": "float32", "loss": "mse", "activation": "gelu"}
    return {**about, **group, "spec": {"impl": "torch", "seed": seed}, "outcomes": outcomes}


CASES = [
    case(
        ("loss", "within", 1.0, 1.0, 0.1, False, ""),
        ("w1", "within", 2.0, 4.0, 1.0, True, ""),
        seed=1,
    ),
    case(
        ("loss", "within", 3.0, 1.0, 6.0, False, ""),
        ("w1", "luck", 3.0, 2.0, 0.1, False, "w1: rms"),
        seed=2,
    ),
    case(
        ("loss", "within", 0.0, 0.0, 0.0, False, ""),
        ("w1", "overflow", None, None, None, False, "w1: not finite"),
        seed=3,
    ),
    case(("w1", "violation", 9.0, 2.0, 0.1, False, "w1: worse"), activation="relu", seed=4),
    case(("call", "violation", None, None, None, False, "TypeError: x"), loss="cosine", seed=5),
]


def lines():
    stamp = {"kind": "fuzz", "seed": 6, **record.stamp(Cpu())}
    return [{**stamp, **line} for line in fuzz_table.aggregate(CASES)]


def test_ratios_and_counts():
    cosine, gelu, relu = fuzz_table.aggregate(CASES)
    assert gelu["cases"] == 3
    assert gelu["tensors"]["loss"] == {
        "cases": 3, "median": 2.0, "largest": 3.0, "largest_bounded": 1.0,
        "within": 3, "overflow": 0, "luck": 0, "violation": 0, "turned": 0,
    }  # fmt: skip
    assert (
        gelu["tensors"]["dW1"]["turned"]
        == gelu["tensors"]["dW1"]["luck"]
        == gelu["tensors"]["dW1"]["overflow"]
        == 1
    )
    assert set(gelu["tensors"]) == {"loss", "dW1"}
    assert relu["violations"] == [
        {"tensor": "w1", "message": "w1: worse", "spec": {"impl": "torch", "seed": 4}}
    ]
    assert cosine["tensors"] == {}
    assert cosine["violations"][0]["message"] == "TypeError: x"


def test_page():
    old = [{**entry, "seed": 5, "date": "2026-01-01"} for entry in lines()]
    text = fuzz_table.page(lines() + old)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| torch")
    ]
    assert rows == [
        ["torch", "float32", "cosine", "1", "", ""],
        ["torch", "float32", "mse", "4", "2.00 · 1.00", "1.88 · 4.50"],
        ["torch", "float32", "cosine", "gelu", "1", "", ""],
        ["torch", "float32", "mse", "gelu", "3", "2.00 · 1.00", "1.00 · 1.50"],
        ["torch", "float32", "mse", "relu", "1", "", "4.50 · 4.50"],
    ]
    # A tensor that no case of the campaign has gets no column.
    assert "| loss | dW1 |" in " ".join(text.split())
    assert (
        "of seed 6 had 5 distinct cases with 7 tensors. 4 tensors are within the rule. In 1 eager"
        in text
    )
    assert "eager overflows or is" in text
    assert "In 1 eager's own error is small by luck" in text
    assert "2 violate the rule" in text
    assert "eager is outside the rule in 1." in text
    assert fuzz_table.page([]) == "No results yet."


def test_blocks_are_what_was_asked_for_and_their_cases_can_be_drawn_again():
    wanted = fuzz.blocks(1000)
    assert sum(fuzz.BLOCK[impl] for impl, _ in wanted) >= 1000
    assert {impl for impl, _ in wanted} == set(fuzz.FRACTIONS)
    assert len(fuzz.distinct([*CASES, *CASES])) == len(CASES)


def test_other_rules_keep_their_blocks_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    for name in fuzz.RULES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((ROOT / name).read_bytes())
    before = fuzz._kept(1)
    assert fuzz._kept(1) == before
    path.write_text("edited")
    assert fuzz._kept(1) != before


def test_a_campaign_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    monkeypatch.setattr(fuzz, "BLOCK", {"torch": 3, "blas": 1, "triton": 1})
    path = tmp_path / "kept.jsonl"
    fuzz.campaign([("torch", 0)], 1, 1, path)
    first = path.read_text()
    fuzz.campaign([("torch", 0), ("torch", 1)], 1, 1, path)
    assert path.read_text().startswith(first)
    blocks = record.load([path])
    assert [entry["block"] for entry in blocks] == [["torch", 0], ["torch", 1]]
    assert blocks[0]["cases"] != blocks[1]["cases"]
    from verify.fuzz.specs import Spec

    again = fuzz.run_case(Spec.of(blocks[1]["cases"][-1]["spec"]))
    assert record.json.loads(record.json.dumps(again)) == blocks[1]["cases"][-1]
