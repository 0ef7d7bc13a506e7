"""`pre-kernels check` from its arguments to its file, with implementations that are broken, crash
or hang."""

import errno
import json
import os
import signal
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pre_kernels
from pre_kernels import cli, loss
from pre_kernels.check import command, implementation
from pre_kernels.check.device import Cpu

NEEDS_TRITON = pytest.mark.skipif(not loss.HAS_TRITON, reason="triton is not installed")


class Card:
    """A stand-in for a GPU that is only described."""

    kind = "cuda"
    torch_device = torch.device("cuda")


def status(*arguments):
    try:
        return cli.main(["check", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def written(folder):
    def no_json(name):
        raise ValueError(f"{name} is not JSON")

    return json.loads((folder / "check.json").read_text(), parse_constant=no_json)


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Run on a CPU even where there is a GPU; other tests cover that."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def children(monkeypatch):
    """Replace the processes of implementations by scripts, by name, which start at once."""

    def put(**scripts):
        real = command.subprocess.Popen

        def popen(arguments, **options):
            if "pre_kernels.check.implementation" in arguments:  # Other processes stay as they are.
                script = (
                    "import json, os, sys, time\n"
                    "tell = lambda **line: print(json.dumps(line), flush=True)\n"
                ) + textwrap.dedent(scripts[arguments[3]])
                arguments = [sys.executable, "-S", "-c", script]
            return real(arguments, **options)

        monkeypatch.setattr(command.subprocess, "Popen", popen)
        monkeypatch.setattr(
            implementation,
            "unfit",
            lambda impl, *where: None if impl in scripts else "not in this test",
        )

    return put


FINE = """
    tell(begin="error, small case")
    tell(check="error, small case", outcome="pass", says="well")
    tell(done=True)
"""


@NEEDS_TRITON
@pytest.mark.usefixtures("on_a_cpu")
def test_all_of_a_cpu(tmp_path, capsys):
    assert (
        status("--impl", "torch", "blas", "--width", 64, "--rows", 64, "--out", tmp_path / "new")
        == 0
    )
    kept = written(tmp_path / "new")
    lines = capsys.readouterr().out.splitlines()
    assert kept["finished"]
    assert kept["argv"][:2] == ["check", "--impl"]
    assert kept["settings"] == {"impl": ["torch", "blas"], "width": 64, "rows": 64, "dtype": "fp32"}
    assert kept["versions"]["pre-kernels"] == pre_kernels.__version__
    assert kept["versions"]["torch"].startswith(torch.__version__)
    assert kept["device"]["device"] in lines[0]
    assert kept["date"].startswith("20")
    outcomes = {(line["impl"], line["check"]): line["outcome"] for line in kept["results"]}
    small = {"error, small case": "pass", "no host sync": "skip", "CUDA graph, other rows": "skip"}
    small |= {"torch.compile, fullgraph": "pass"}
    assert outcomes.pop(("blas", "real size, memory, time")) == "skip"
    peak = outcomes.pop(("torch", "peak memory"))
    assert peak in ("pass", "skip")  # This depends on whether /proc allows it.
    wanted = {
        (impl, name): outcome for impl in ("torch", "blas") for name, outcome in small.items()
    }
    assert outcomes == wanted | {("torch", "error, real size"): "pass", ("torch", "time"): "info"}
    assert len(lines) == len(kept["results"]) + 2
    assert any(
        line.startswith("PASS  blas    error, small case") and "× the rule" in line
        for line in lines
    )
    assert any("× six bare matmuls" in line and line.startswith(" ") for line in lines)
    assert lines[-1].startswith(f"{5 + (peak == 'pass')} passed, 0 failed, ")
    assert not list((tmp_path / "new").glob("*.partial"))


FAULTS = """
import os, sys
if "pre_kernels.check.implementation" in sys.orig_argv:
    import pre_kernels
    real = pre_kernels.fused_pre_loss

    def faulty(**arguments):
        if arguments["impl"] == "blas":
            print("a last word", file=sys.stderr, flush=True)
            os.abort()
        return real(**arguments) * 1.01

    pre_kernels.fused_pre_loss = faulty
"""


@NEEDS_TRITON
@pytest.mark.usefixtures("on_a_cpu")
def test_what_is_wrong_and_what_crashes(tmp_path, capsys, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FAULTS)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    assert status("--impl", "blas", "triton", "--out", tmp_path) == 1
    printed = capsys.readouterr().out
    kept = written(tmp_path)
    assert "FAIL  blas    error, small case         died of SIGABRT: " in printed
    (crash,) = (line for line in kept["results"] if line["impl"] == "blas")
    assert "a last word" in crash["traceback"]
    wrong, *others = (line for line in kept["results"] if line["impl"] == "triton")
    assert wrong["outcome"] == "fail"
    assert "error" in wrong["says"]
    assert [line["check"] for line in others[-2:]] == [
        "torch.compile, fullgraph",
        "real size, memory, time",
    ]
    assert kept["finished"]


def test_a_hang_at_the_very_end(tmp_path, capsys, monkeypatch, children):
    children(torch=FINE + "    os.close(1); time.sleep(600)")
    monkeypatch.setattr(command, "LIMIT", 1.0)
    assert status("--impl", "torch", "--out", tmp_path) == 1
    assert "no answer for 1 s, ended: nothing on stderr" in capsys.readouterr().out


def test_a_hang_leaves_the_lines_of_the_others(tmp_path, capsys, monkeypatch, children):
    hangs = (
        'tell(begin="no host sync"); sys.stderr.write("busy"); sys.stderr.flush(); time.sleep(600)'
    )
    children(blas=hangs, torch=FINE)
    monkeypatch.setattr(command, "LIMIT", 3.0)
    began = time.monotonic()
    assert status("--impl", "blas", "torch", "--out", tmp_path) == 1
    assert time.monotonic() - began < 60
    printed = capsys.readouterr().out
    assert "FAIL  blas    no host sync              no answer for 3 s, ended: busy" in printed
    assert "PASS  torch   error, small case         well" in printed
    assert "1 passed, 1 failed, 0 left out" in printed


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("sys.exit(3)", "start: exit status 3: nothing on stderr"),
        ("1 / 0", "start: exit status 1: ZeroDivisionError: division by zero"),
        # The process exits before it has reported that it is done.
        ('tell(begin="time"); os._exit(0)', "time: exit status 0: nothing on stderr"),
        (
            'tell(begin="time"); print(\'{"check": "ti\', end=""); sys.exit(4)',
            "time: exit status 4: nothing on stderr",
        ),
        (
            'tell(begin="time"); tell(done=True); sys.exit(5)',
            "time: exit status 5: nothing on stderr",
        ),
    ],
)
def test_an_end_that_is_too_early(tmp_path, children, script, says):
    children(torch=script)
    assert status("--impl", "torch", "--out", tmp_path) == 1
    (line,) = written(tmp_path)["results"]
    assert f"{line['check']}: {line['says']}" == says
    assert line["outcome"] == "fail"


def test_only_one_at_a_time_has_the_device_for_itself(tmp_path, children):
    log = tmp_path / "log"
    script = f"""
        def note(word):
            with open({str(log)!r}, "a") as out:
                out.write(word + "\\n")
        name = {{!r}}
        time.sleep({{}})  # so that one waits for the other
        note("small " + name)
        tell(ready=True)
        sys.stdin.readline()
        note("begin " + name)
        time.sleep(0.3)
        note("end " + name)
        tell(done=True)
    """
    children(blas=script.format("blas", 0.5), torch=script.format("torch", 0), triton="sys.exit(1)")
    assert status("--impl", "blas", "torch", "triton", "--out", tmp_path) == 1
    small, timed = log.read_text().splitlines()[:2], log.read_text().splitlines()[2:]
    assert sorted(small) == ["small blas", "small torch"]
    assert timed == ["begin blas", "end blas", "begin torch", "end torch"]


def test_what_was_found_is_kept_when_the_command_is_ended(tmp_path, children, monkeypatch):
    children(torch=FINE.replace("tell(done=True)", "time.sleep(600)"))
    real = command.Report.add
    started = []

    def add(self, impl, record):
        real(self, impl, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(command.Report, "add", add)
    monkeypatch.setattr(
        command.Child,
        "kill",
        lambda self, kill=command.Child.kill: started.append(self) or kill(self),
    )
    assert status("--impl", "torch", "--out", tmp_path) == 130
    kept = written(tmp_path)
    assert not kept["finished"]
    assert [line["says"] for line in kept["results"]] == ["well"]
    assert started[0].process.wait(30) < 0


def test_a_signal_to_end_leaves_nothing_behind(tmp_path, children):
    """The signal comes before the first line, and the file of an earlier run does not stay."""
    (tmp_path / "check.json").write_text('{"finished": true}')
    file = tmp_path / "pid"
    before = signal.getsignal(signal.SIGTERM)
    stop = (
        "time.sleep(1); os.kill(os.getppid(), 15); time.sleep(600)"  # not while it is being started
    )
    children(torch=f"open({str(file)!r}, 'w').write(str(os.getpid())); {stop}")
    assert status("--impl", "torch", "--out", tmp_path) == 143
    assert gone(int(file.read_text()))
    kept = written(tmp_path)
    assert (kept["finished"], kept["results"]) == (False, [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_process_that_died_has_left_is_ended(tmp_path, children):
    file = tmp_path / "pid"
    children(
        torch=f"""
        import subprocess
        left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdout=2)
        open({str(file)!r}, "w").write(str(left.pid))
        os._exit(3)
    """
    )
    assert status("--impl", "torch", "--out", tmp_path) == 1
    assert gone(int(file.read_text()))


def gone(process):
    state = Path(f"/proc/{process}/stat")
    end = time.monotonic() + 10
    # A zombie counts as dead, because nobody may have reaped it.
    while state.exists() and state.read_text().split()[2] != "Z":
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_numbers_that_json_does_not_know(tmp_path, children):
    values = '{"a": float("nan"), "b": [float("inf"), 1.5]}'
    tells = f'tell(check="time", outcome="fail", says="", values={values})'
    children(torch=f"{tells}; tell(done=True)")
    assert status("--impl", "torch", "--out", tmp_path) == 1
    assert written(tmp_path)["results"][0]["values"] == {"a": None, "b": ["inf", 1.5]}


def test_implementations_given_one_by_one():
    given = cli.parser().parse_args(["check", "--impl", "torch", "--impl", "blas", "triton"])
    assert given.impl == ["torch", "blas", "triton"]


def test_what_cannot_run_is_left_out_with_its_reason(tmp_path, capsys, children):
    children(torch=FINE)
    assert status("--out", tmp_path) == 0
    printed = capsys.readouterr().out
    for impl in ("blas", "triton", "fp8"):
        assert f"-     {impl:<6}  left out                  not in this test" in printed
    assert "1 passed, 0 failed, 3 left out" in printed


def test_nothing_that_could_be_checked_is_no_success(tmp_path, children):
    children(torch=FINE.replace('"pass"', '"skip"'))
    assert status("--out", tmp_path) == 1


def planned(monkeypatch, device, reasons, **given):
    monkeypatch.setattr(implementation, "unfit", lambda impl, *where: reasons.get(impl))
    options = SimpleNamespace(**{"impl": None, "width": None, "rows": None, "dtype": None} | given)
    return command.Plan(options, device)


def test_what_is_checked_where(monkeypatch):
    plan = planned(monkeypatch, Card(), {})
    assert plan.impls == ["blas", "triton", "fp8"]
    assert (plan.width, plan.rows, plan.dtype) == (4096, 9216, "bf16")
    plan = planned(
        monkeypatch, Card(), dict.fromkeys(("blas", "triton", "fp8"), "triton is not installed")
    )
    assert plan.impls == ["torch"]
    assert set(plan.left_out) == {"blas", "triton", "fp8"}
    assert planned(monkeypatch, Card(), {"fp8": "old"}).impls == ["blas", "triton"]
    plan = planned(monkeypatch, Cpu(), {"fp8": "no GPU"}, width=256)
    assert plan.impls == ["torch", "blas", "triton"]
    assert (plan.width, plan.rows, plan.dtype) == (256, 1024, "fp32")
    plan = planned(monkeypatch, Card(), {"fp8": "old"}, impl=["torch", "torch"])
    assert (plan.impls, plan.left_out) == (["torch"], {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--width", "0"), "argument --width: got '0', want a multiple of 16"),
        (("--width", "17"), "argument --width: got '17', want a multiple of 16"),
        (("--rows", "0"), "argument --rows: got '0', want a whole number of at least 64"),
        (("--rows", "-9"), "argument --rows: got '-9'"),
        (("--rows", "many"), "argument --rows: got 'many'"),
        (("--dtype", "fp64"), "argument --dtype: got 'fp64', want one of bf16, fp16, fp32"),
        (("--impl", "cuda"), "argument --impl: got 'cuda', want one of blas, triton"),
        (("--impl", "triton"), "--impl: got triton, which cannot run here: "),
        (("--impl", "torch", "fp8"), "--impl: got fp8, which cannot run here: "),
    ],
)
def test_bad_arguments_say_what_is_wanted(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "current", Cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(command, "Child", lambda *arguments: pytest.fail("started"))
    assert status(*arguments, "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert message in said
    if message.startswith("--impl"):
        assert said.strip().endswith("; want one of torch")
    assert not (tmp_path / "check.json").exists()


def test_a_full_disk_is_said_once_and_the_checks_continue(tmp_path, capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    report = command.Report(tmp_path / "check.json", {})
    monkeypatch.setattr(Path, "write_text", full)
    for check in ("first", "second"):
        report.add("torch", {"check": check, "outcome": "pass", "says": "well"})
    printed = capsys.readouterr()
    assert printed.out.count("well") == 2
    assert printed.err.count("\n") == 1
    assert f"cannot write {tmp_path / 'check.json'}: No space left on device; free" in printed.err
    assert report.lost


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert status("--out", tmp_path / "file") == 2
    assert "--out: cannot write into" in capsys.readouterr().err


def test_the_library_imports_none_of_it_and_it_imports_no_models(tmp_path):
    code = "import sys, pre_kernels; print('pre_kernels.check' in sys.modules)"
    code += "; import pre_kernels.check.implementation, pre_kernels.check.command"
    code += "; print('transformers' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = command.subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == ["False", "False"]
    for path in Path(implementation.__file__).parent.glob("*.py"):
        assert "integrations" not in path.read_text()
