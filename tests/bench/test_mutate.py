"""The mutator by itself, a mutant of a real kernel from end to end, and a slice of all of them."""

import subprocess
import sys

import pytest

from bench import mutation_table, record
from pre_kernels.check.device import Cpu
from verify import ROOT
from verify.mutation.mutants import FILES, OPERATORS, PACKAGE, every_mutant, mutants, named


def changes(body: str, optional=None) -> dict[str, list[str]]:
    """By operator, the last line of a function after each of its mutants."""
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


def test_named_mutants_exist():
    """By their text: a line that was changed takes its reason with it."""
    keys = {one.key for one in every_mutant()}
    known = [key for reasons in named().values() for key in reasons]
    assert [key for key in known if key not in keys] == []
    assert len(known) == len(set(known))
    assert all(reason for reasons in named().values() for reason in reasons.values())


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
    assert "equivalent: as zero is\n\n```text\nb\n```" in text
    assert "survived\n\n```text\nd\n```" in text


def mutate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.mutate", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_mutant_of_a_kernel_is_killed():
    done = mutate(
        "--again", "--only", "kernels/activation.py activate: y = x * sigmoid(x, DTYPE) → y = (x)"
    )
    assert done.returncode == 2, "no such mutant is an error"
    done = mutate(
        "--again", "--only", "kernels/activation.py activate: y = x * sigmoid(x, DTYPE) → y = x"
    )
    assert "1 mutants: {'killed': 1}" in done.stdout, done.stdout + done.stderr


def test_a_slice_is_killed_again():
    done = mutate("--again", "--sample", "10", "--seed", "0")
    assert done.returncode == 0, done.stdout + done.stderr
