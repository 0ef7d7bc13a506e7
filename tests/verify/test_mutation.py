"""The mutator on small sources. `make mutate` tells whether tests kill the mutants of the real
ones."""

import os
import signal

import pytest

from verify.mutation import mutants as module
from verify.mutation import runner
from verify.mutation.mutants import (
    FILES,
    OPERATORS,
    PACKAGE,
    every_mutant,
    mutants,
    named,
    stale,
)


def changes(body: str, optional=None) -> dict[str, list[str]]:
    """The last line of a function in each of its mutants, by operator."""
    source = f"def f(x, n, stride_xm, stride_xk):\n    é = 'two bytes'\n    {body}\n"
    found: dict[str, list[str]] = {}
    for mutant in mutants("f.py", source, optional or {}):
        assert mutant.apply(source).splitlines()[:2] == source.splitlines()[:2]
        assert mutant.before == " ".join(body.split())
        found.setdefault(mutant.operator, []).append(mutant.apply(source).splitlines()[2].strip())
    return found


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("y = x - n", {"sign": ["y = x + n"]}),
        ("return -x", {"sign": ["return x"]}),
        ("y = 0.5", {"sign": ["y = (-0.5)"], "scale": ["y = 1.0"]}),
        ("y = x != n", {"sign": ["y = x == n"]}),
        ("y = x < n", {"sign": ["y = x > n"], "mask": ["y = x <= n"]}),
        ("y = x[3]", {"index": ["y = x[4]"]}),
        ("y = x[n:]", {"index": ["y = x[n + 1:]"]}),
        ("y = x[:, None]", {"index": ["y = x[None, :]"]}),
        ("y = n // 2", {"scale": ["y = n"], "index": ["y = n % 2", "y = n // 3"]}),
        ("y = stride_xm", {"index": ["y = stride_xk"]}),
        ("f(*x.stride())", {"chunk": ["pass"], "index": ["f(*x.stride()[::-1])"]}),
        ("y = x.to(tl.int64)", {"index": ["y = x"]}),
        ("y = min(x, n)", {"index": ["y = max(x, n)"]}),
        ("y = cdiv(x, n)", {"index": ["y = (x // n)"]}),
        ("y = tl.arange(0, n)", {"index": ["y = (tl.arange(0, n) + 1)"]}),
        ("y = tl.load(x, mask=n, other=x)", {
            "index": ["y = tl.load(x + 1, mask=n, other=x)"],
            "mask": ["y = tl.load(x)", "y = tl.load(x, mask=~(n), other=x)"],
        }),
        ("tl.store(x, n)", {
            "chunk": ["pass"], "index": ["tl.store(x + 1, n)"], "sign": ["tl.store(x, -n)"],
        }),
        ("y = tl.where(x, n, (n))", {"mask": ["y = (n)", "y = (n)"]}),
        ("y = x & n", {"mask": ["y = x", "y = n"]}),
        ("y = x and n or x", {
            "mask": ["y = (n) or x", "y = (x) or x", "y = (x)", "y = ((x and n))"],
        }),
        ("y = not x", {"mask": ["y = x"]}),
        ("if x: y = n", {"mask": ["if not x: y = n"]}),
        ("y = x if f else n", {"mask": ["y = x", "y = n"]}),
        ("y = g(x, n=n)", {"mask": ["y = g(x, )"]}),
        ("y = x * n", {"scale": ["y = x", "y = n"]}),
        ("y = (x + n) / n", {
            "scale": ["y = (x + n)", "y = (x + n) * n"], "sign": ["y = (x - n) / n"],
        }),
        ("y = float('nan')", {"scale": ["y = 0.0"]}),
        ("x *= n", {"scale": ["x = n"]}),
        ("x += n", {"chunk": ["x = n"], "sign": ["x -= n"]}),
        ("y = dot(x, x, n, 'ieee')", {"chunk": ["y = dot(x, x, n * 0.0, 'ieee')"]}),
        ("for i in range(n): g", {
            "chunk": ["for i in range(1, n): g", "for i in range(n - 1): g"],
        }),
        ("for i in range(x, n, x): g", {
            "chunk": ["for i in range(x + x, n, x): g", "for i in range(x, n - x, x): g"],
        }),
        ("for i in x: g", {"chunk": ["for i in list(x)[1:]: g", "for i in list(x)[:-1]: g"]}),
    ],
)  # fmt: skip
def test_mutants_of_a_line(body, want):
    found = changes(body, {"g": {"n"}})
    assert {operator: sorted(lines) for operator, lines in found.items()} == {
        operator: sorted(lines) for operator, lines in want.items()
    }


@pytest.mark.parametrize(
    "body",
    [
        "'text'",
        "y: 'x - n'",
        "assert x < n",
        "raise ValueError(f'{x - n}')",
        "k(x, num_warps=8)[x]",
        "k(**{'num_warps': 8})",
        "if INTERPRET: x = x - n",
    ],
)
def test_what_changes_no_result_is_left_out(body):
    assert "sign" not in changes(body)
    assert "index" not in changes(body)


def test_lines_that_read_the_same_have_keys_of_their_own():
    found = mutants("f.py", "def f(x):\n    x += y\n    x += y\n    return -x\n", {})
    assert len({one.key for one in found}) == len(found) == 5
    moved = mutants("f.py", "\n\ndef f(x):\n    x += y\n    x += y  # why\n    return -x\n", {})
    assert [one.key for one in moved] == [one.key for one in found]


def test_every_mutant_is_another_program():
    found = every_mutant()
    sources = {file: (PACKAGE / file).read_text() for file in FILES}
    assert {one.file for one in found} == set(FILES)
    assert {one.operator for one in found} == set(OPERATORS)
    for one in found:
        mutated = one.apply(sources[one.file])
        assert mutated != sources[one.file]
        compile(mutated, one.file, "exec")


SURVIVORS = """# why

equivalent: as zero is
  f.py f: x += y → x -= y

gap: seen only on a GPU
  f.py f: return -x → return x
  f.py f: return 2 * x → return x
"""


def test_the_reasons_of_survivors(tmp_path, monkeypatch):
    """They are found by the text of a line. A line that has changed is reported as stale, and does
    not take the reason of another."""
    path = tmp_path / "survivors.txt"
    path.write_text(SURVIVORS, encoding="utf-8")
    monkeypatch.setattr(module, "SURVIVORS", path)
    assert named() == {
        "equivalent": {"f.py f: x += y → x -= y": "as zero is"},
        "gap": {
            "f.py f: return -x → return x": "seen only on a GPU",
            "f.py f: return 2 * x → return x": "seen only on a GPU",
        },
    }
    mutations = mutants("f.py", "def f(x):\n    x += y\n    return -x\n", {})
    assert stale(mutations) == ["f.py f: return 2 * x → return x"]


def test_each_survivor_has_one_reason():
    reasons = named()
    assert reasons["equivalent"].keys().isdisjoint(reasons["gap"])
    assert all(reason for each in reasons.values() for reason in each.values())


def test_an_interrupt_ends_the_fork(monkeypatch):
    forks = []
    fork = os.fork

    def noted():
        forks.append(fork())
        return forks[-1]

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fork", noted)
    monkeypatch.setattr(runner.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        runner.forked(signal.pause, 60)
    assert os.waitstatus_to_exitcode(os.waitpid(forks[0], 0)[1]) == -signal.SIGKILL
