"""What all commands do in the same way: text that every terminal can show, one clear line where a
command is stopped, its output is closed or a disk is full, and files that are whole or absent."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import shutil
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

# For an encoding that lacks the character. Letters with accents lose them, and others become "?".
ASCII = {
    "λ": "lambda",
    "Σ": "sum",
    "√": "sqrt",
    "×": "x",
    "÷": "/",
    "·": "*",
    "•": "-",
    "±": "+/-",
    "–": "-",
    "—": "-",
    "−": "-",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "≠": "!=",
    "≈": "~",
    "²": "^2",
    "½": "1/2",
    "→": "->",
    "←": "<-",
    "↑": "^",
    "↓": "v",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    "─": "-",
    "━": "-",
    "│": "|",
    "█": "#",
    "✓": "ok",
}
# The kinds of OSError that say that a disk does not take any more, by what mends them.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS,)
# The exit statuses that a shell gives to a program which the signal has ended.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
CLOSED = 128 + 13  # SIGPIPE, which Windows does not have
# The suffix of a file while it is being written.
PARTIAL = ".partial"


class Terminated(KeyboardInterrupt):
    """SIGTERM, as `stoppable` raises it."""


def run(command: Callable[[], int]) -> int:
    """Call a command and return its exit status.

    One line on stderr says that it was stopped by ^C (status 130) or SIGTERM (143), or that a disk
    is full or read-only (1). A command adds what it has kept as the text of the exception:
    `raise type(stop)("the same command resumes") from None`. If nobody reads its output any more,
    as after `| head`, it ends without a line (141).
    """
    prepare()
    try:
        with stoppable():
            try:
                return command()
            finally:
                print(end="", flush=True)
    except KeyboardInterrupt as stop:
        say(ending(stop))
        return stopped(stop)
    except BrokenPipeError:
        # Other pipes break too, as that of a worker that has died.
        if not [stream for stream in (sys.stdout, sys.stderr) if stream and closed(stream)]:
            raise
        return CLOSED
    except SystemExit as end:
        # rich ends the program with status 1 if nobody reads its output any more.
        if isinstance(end.__context__, BrokenPipeError):
            return CLOSED
        raise
    except OSError as error:
        if not is_disk(error):
            raise
        say(f"error: {why(error)}")
        return 1


def prepare() -> None:
    """Make stdout and stderr write readable ASCII for each character that their encoding lacks."""
    codecs.register_error("readable", _readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def readable(text: str) -> str:
    """Return the text in ASCII."""
    characters = []
    for character in text:
        # In this form an accent is a character of its own, which is dropped.
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        characters.append(ASCII.get(character, plain or "?"))
    return "".join(characters)


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return readable(error.object[error.start : error.end]), error.end


def stoppable() -> contextlib.AbstractContextManager[None]:
    """Let SIGTERM raise `Terminated`, a KeyboardInterrupt, so that it saves and cleans up as ^C
    does. A handler that the program has set itself is kept. Other threads than the main one cannot
    set any, and there nothing changes."""
    return _handled((signal.SIGTERM,), _terminate)


def starting(kept: str = "") -> contextlib.AbstractContextManager[None]:
    """Let ^C and SIGTERM end the process at once, with a line, while modules are imported.
    Extension modules swallow a KeyboardInterrupt, or fail because of it with errors of their own.

    Args:
        kept: what the line says after its first word.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        stop = Terminated(kept) if number == signal.SIGTERM else KeyboardInterrupt(kept)
        # The signal may have come while something was printed.
        with contextlib.suppress(Exception):
            print(end="", flush=True)
        with contextlib.suppress(Exception):
            say(ending(stop))
        os._exit(stopped(stop))

    return _handled((signal.SIGINT, signal.SIGTERM), leave)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextlib.contextmanager
def _handled(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    ours = (signal.SIG_DFL, signal.default_int_handler, _terminate)
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):
        for number in numbers:
            current = signal.getsignal(number)
            if current in ours:
                signal.signal(number, handler)
                before[number] = current
    try:
        yield
    finally:
        for number, current in before.items():
            # A module that was imported meanwhile may have set a handler of its own.
            if signal.getsignal(number) is handler:
                signal.signal(number, current)


def ending(stop: KeyboardInterrupt) -> str:
    """Return the line that says how a command ended, and what it has kept."""
    ended = "terminated" if isinstance(stop, Terminated) else "interrupted"
    return f"{ended}: {stop}" if str(stop) else ended


def stopped(stop: KeyboardInterrupt) -> int:
    """Return the exit status after ^C, or after SIGTERM."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def is_disk(error: OSError) -> bool:
    """Whether a disk is full or read-only, which is a fault neither of the command nor of its
    arguments."""
    return error.errno in (*FULL, *READ_ONLY)


def why(error: OSError, path: str | Path | None = None) -> str:
    """Say in one line which file the system refused, why, and what to do about it.

    Args:
        error: its own path counts; an error of `write` has none.
        path: where the error has no path.
    """
    name = error.filename if error.filename is not None else path
    reason = error.strerror or str(error)
    if error.errno in FULL:
        what = "the output" if name is None else name
        return f"cannot write {what}: {reason}; free space there, or choose another folder"
    if error.errno in READ_ONLY:
        what = "the output" if name is None else name
        return f"cannot write {what}: {reason}; choose a folder that can be written"
    return reason if name is None else f"{name}: {reason}"


def write(path: Path, text: str) -> None:
    """Write the file whole or not at all. OSError names the file."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        # What is there of it takes space on a full disk.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def plural(number: int, one: str, more: str = "") -> str:
    """Return a number with its noun, such as "1 seed" or "2 processes".

    Args:
        one: the noun for 1.
        more: the noun for other numbers; empty for `one` with an s.
    """
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def hanging(begin: str, text: str) -> str:
    """Return a line of a table whose last cell is wrapped into its column on a terminal. Elsewhere
    it stays one line, for grep."""
    columns = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or columns < len(begin) + 20:
        return begin + text
    lines = textwrap.wrap(text, columns - len(begin), break_on_hyphens=False)
    return begin + f"\n{' ' * len(begin)}".join(lines)


def say(line: str) -> None:
    """Print a line of pre-kernels on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(f"pre-kernels: {line}", file=sys.stderr, flush=True)


def closed(stream: TextIO) -> bool:
    """Whether the reader of the stream has gone. If so, what is left to write is dropped, since
    Python would complain about it when it ends."""
    try:
        number = stream.fileno()
    except OSError:
        return False  # a stream in memory
    poll = select.poll()
    poll.register(number, 0)
    if not poll.poll(0):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return True
