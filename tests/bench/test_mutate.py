"""The table of mutation testing, and the command's message about stale reasons."""

from bench import mutate, mutation_table, record
from pre_kernels.check.device import Cpu
from verify.mutation import mutants


def test_the_table_says_what_the_outcomes_are():
    outcomes = [
        {
            "key": key,
            "short": key,
            "file": file,
            "operator": operator,
            "outcome": outcome,
            "test": test,
        }
        for key, file, operator, outcome, test in (
            ("a", "f.py", "sign", "killed", "t::a"),
            ("b", "f.py", "sign", "survived", None),
            ("c", "f.py", "mask", "timeout", None),
            ("d", "g.py", "mask", "survived", None),
            ("e", "g.py", "chunk", "unreached", None),
        )
    ]
    lines = mutation_table.aggregate(
        outcomes, {"equivalent": {"b": "as zero is"}, "gap": {"e": "a GPU"}}
    )
    assert [line["killers"] for line in lines] == [{"t::a": ["a"]}, {}]
    stamp = record.stamp(Cpu())
    text = mutation_table.page(
        [{"kind": "mutation", "seed": 3, "drawn": 5, **line, **stamp} for line in lines]
    )
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert rows[2:] == [
        ["f.py", "3", "1/2", "", "1/1", "", "", "1", "1", "0"],
        ["g.py", "2", "", "", "0/1", "", "0/1", "0", "0", "2"],
        ["all", "5", "1/2", "", "1/2", "", "0/1", "1", "1", "2"],
    ]
    assert (
        "5 mutants (a sample of seed 3): 2 killed (1 by a timeout), 40.0 %; 50.0 % of those" in text
    )
    assert "equivalent: as zero is\n\n    b\n" in text
    assert text.endswith("survived\n\n    d")


def test_stale_reasons_are_told_and_fail_only_when_asked(tmp_path, monkeypatch, capsys):
    path = tmp_path / "survivors.txt"
    monkeypatch.setattr(mutants, "SURVIVORS", path)
    monkeypatch.setattr(mutate, "SURVIVORS", path)
    path.write_text("gap: a reason\n  f.py f: a line → of old\n", encoding="utf-8")
    assert mutate.main(["--list", "--only", "kernels/activation.py"]) == 0
    assert "f.py f: a line → of old" in capsys.readouterr().err
    assert mutate.main(["--stale"]) == 1
    path.write_text("", encoding="utf-8")
    assert mutate.main(["--stale"]) == 0
    assert capsys.readouterr().out == ""


def test_survivors_meet_the_tests_again_when_what_judges_has_changed(tmp_path, monkeypatch):
    rule = tmp_path / "rule.py"
    ran = []
    mutant = next(m for m in mutants.every_mutant() if m.key not in mutate.NAMED["equivalent"])
    monkeypatch.setattr(mutate, "JUDGES", (rule,))
    monkeypatch.setattr(mutate, "reach", lambda folder: {"hash": {}})
    monkeypatch.setattr(mutate, "reaching", lambda mutant, known: {"a test": 1.0})
    monkeypatch.setattr(mutate, "run", lambda *arguments: ran.append(1) or ("survived", None))
    for text, runs in (("a rule", 1), ("a rule", 1), ("another", 2)):
        rule.write_text(text)
        mutate.campaign([mutant], tmp_path / "kept.jsonl", 60.0, tmp_path)
        assert len(ran) == runs
