"""The commands that CI runs two at a time: all of them run, and one that fails makes CI fail."""

from __future__ import annotations

import re
import subprocess

import pytest

from verify import ROOT

SCRIPT = (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def run(*commands: str) -> subprocess.CompletedProcess[str]:
    function = re.search(r"^two_at_once\(\) \{.*?^\}$", SCRIPT, re.DOTALL | re.MULTILINE)[0]
    text = f'set -euo pipefail\n{function}\ntwo_at_once "$@"\necho the next step'
    return subprocess.run(
        ["bash", "-c", text, "bash", *commands], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("fault", ["false && echo no", "exit 255", "make --no-such-option"])
def test_a_command_that_fails(fault: str) -> None:
    done = run("echo said one", fault, "echo said two >&2", 'echo "said three" && \\\n  true')
    assert done.returncode != 0
    assert "the next step" not in done.stdout
    for said in ("said one", "said two", "said three"):
        assert f"\n{said}\n" in done.stdout


def test_all_succeed() -> None:
    done = run("echo said one", "echo said two")
    assert done.returncode == 0
    assert done.stdout.endswith("the next step\n")
    assert done.stdout.count("status 0)") == 2
