"""bench/README.md names all files that are there, and no others."""

import re

from verify import ROOT

BENCH = ROOT / "bench"
TEXT = (BENCH / "README.md").read_text(encoding="utf-8")


def test_every_module_is_in_the_table_and_every_name_is_a_file():
    named = set(re.findall(r"`([a-z_]+\.(?:py|jsonl|json|png))`", TEXT))
    modules = {path.name for path in BENCH.glob("*.py")}
    results = {path.name for path in (BENCH / "results").iterdir()}
    assert modules - {"__init__.py"} <= named
    assert named <= modules | results


def test_every_command_is_a_module_with_a_main():
    commands = set(re.findall(r"python -m bench\.([a-z_]+)", TEXT))
    runnable = {
        path.stem
        for path in BENCH.glob("*.py")
        if '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    assert commands == runnable


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
