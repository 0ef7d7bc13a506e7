"""What every command does where a terminal lacks characters, where it is stopped, and where nobody
reads its output or nothing can be written."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pre_kernels import screen


def ended(code: str, **how: object) -> subprocess.CompletedProcess[str]:
    """The process in which `screen.run` has called a command with this code."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    program = (
        "import os, signal, sys\nfrom pre_kernels import screen\n"
        f"def command():\n{lines}    return 0\nsys.exit(screen.run(command))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, "-c", program], text=True, check=False, **(pipes | how))


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "λ·L_PRe – 2 × é → ½ 中"),
        ("latin-1", "lambda·L_PRe - 2 × é -> ½ ?"),
        ("ascii", "lambda*L_PRe - 2 x e -> 1/2 ?"),
    ],
)
def test_a_character_that_the_encoding_lacks_is_written_in_ascii(encoding, shown):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = ended("print('λ·L_PRe – 2 × é → ½ 中')", env=environment, encoding=encoding)
    assert (done.stdout, done.stderr) == (shown + "\n", "")


@pytest.mark.parametrize(
    ("signal_name", "line", "status"),
    [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)],
)
def test_a_signal_ends_a_command_in_one_line(signal_name, line, status):
    kill = f"os.kill(os.getpid(), signal.{signal_name})"
    done = ended(f"print('measured')\n{kill}")
    assert (done.stdout, done.stderr) == ("measured\n", f"pre-kernels: {line}\n")
    assert done.returncode == status
    kept = "raise type(stop)('the same command resumes') from None"
    done = ended(f"try:\n    {kill}\nexcept KeyboardInterrupt as stop:\n    {kept}")
    assert done.stderr == f"pre-kernels: {line}: the same command resumes\n"
    assert done.returncode == status


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_ends_a_command_silently(stream):
    reader, writer = os.pipe()
    os.close(reader)
    done = ended(f"print('x' * 100000, file=sys.{stream})", **{stream: writer})
    os.close(writer)
    assert done.stdout in (None, "")
    assert done.stderr in (None, "")
    assert done.returncode == 141


def test_output_of_rich_that_nobody_reads_ends_a_command_silently():
    pytest.importorskip("rich")
    reader, writer = os.pipe()
    os.close(reader)
    done = ended(
        "import rich\nrich.get_console().print('x' * 100000, highlight=False)", stdout=writer
    )
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_pipe_to_something_else_breaks_with_a_traceback():
    done = ended("raise BrokenPipeError('a worker')")
    assert "BrokenPipeError: a worker" in done.stderr
    assert done.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device of a full disk")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = ended("print('measured')", stdout=full)
    assert done.stderr.startswith("pre-kernels: error: cannot write the output: No space left")
    assert done.stderr.count("\n") == done.returncode == 1


def test_a_command_without_stdout():
    done = ended("sys.stdout = None\nprint('measured')")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("number", "name", "path", "said"),
    [
        (errno.ENOSPC, "a.json", "b", "cannot write a.json: No space left on device; free space"),
        (errno.EDQUOT, None, "b", "cannot write b: Disk quota exceeded; free space there"),
        (errno.EROFS, None, None, "cannot write the output: Read-only file system; choose a fo"),
        (errno.ENOENT, "a.json", None, "a.json: No such file or directory"),
        (errno.ENOENT, None, None, "No such file or directory"),
    ],
)
def test_why(number, name, path, said):
    error = OSError(number, os.strerror(number), *([name] if name else []))
    line = screen.why(error, path)
    assert line.startswith(said)
    assert "\n" not in line


def test_an_error_of_the_command_itself_is_raised():
    with pytest.raises(FileNotFoundError):
        screen.run(lambda: len(os.listdir("nowhere")))


def test_a_handler_of_the_program_is_kept():
    def own(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        with screen.stoppable():
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with screen.stoppable():
            with screen.stoppable():
                pass
            with pytest.raises(screen.Terminated):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("signal_name", "line", "status"),
    [("SIGINT", "interrupted", 130), ("SIGTERM", "terminated", 143)],
)
def test_a_signal_during_an_import_ends_the_process(signal_name, line, status):
    """An extension module that swallows KeyboardInterrupt cannot keep it from ending."""
    done = ended(
        f"""print('measured')
with screen.starting('the same command resumes'):
    try:
        os.kill(os.getpid(), signal.{signal_name})
    except BaseException:
        print('swallowed')
print('not reached')"""
    )
    assert done.stdout == "measured\n"
    assert done.stderr == f"pre-kernels: {line}: the same command resumes\n"
    assert done.returncode == status


def test_handlers_are_restored_after_imports():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with screen.starting():
        assert signal.getsignal(signal.SIGINT) is not before[0]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_thread_sets_no_handler():
    entered = []

    def work():
        with screen.stoppable():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered


def test_a_cell_is_wrapped_on_a_terminal_only(monkeypatch):
    text = "one two three four five six seven eight"
    monkeypatch.setenv("COLUMNS", "40")
    assert screen.hanging("begin  ", text) == f"begin  {text}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    first, second = screen.hanging("begin  ", text).splitlines()
    assert first.startswith("begin  one")
    assert second.startswith("       ")
    assert f"{first[7:]} {second[7:]}" == text
    monkeypatch.setenv("COLUMNS", "20")
    assert "\n" not in screen.hanging("begin  ", text)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "λ.json"
    screen.write(path, "λ before")

    def full(partial, file):
        assert Path(partial).read_text(encoding="utf-8") == "after"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError) as error:
        screen.write(path, "after")
    assert screen.why(error.value).startswith(f"cannot write {path}: No space left on device")
    assert [file.read_text(encoding="utf-8") for file in tmp_path.iterdir()] == ["λ before"]


def test_a_number_with_its_noun():
    said = [screen.plural(1, "seed"), screen.plural(0, "seed"), screen.plural(2, "ox", "oxen")]
    assert said == ["1 seed", "0 seeds", "2 oxen"]
