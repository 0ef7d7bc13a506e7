"""How the launcher follows a script into the Python processes that it starts.

`trl sft`, `accelerate launch`, `torchrun`, `deepspeed` and similar commands train in other
processes. They start those by `subprocess.Popen`, or replace themselves by `os.exec*`. In such a
command, for example `python train.py`, the launcher is put in front of the script, with the same
settings.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LAUNCHER = "pre_kernels.integrations.launch"
PYTHON = re.compile(r"pythonw?[\d.]*(\.exe)?")
FRAMEWORKS = {"torch", "transformers", "accelerate"}
# Programs that run the rest of their command line as a command.
WRAPPERS = {
    "numactl",
    "taskset",
    "nice",
    "nohup",
    "env",
    "time",
    "stdbuf",
    "mpirun",
    "mpiexec",
    "nsys",
    "ncu",
}
# A line with one of these characters needs a shell; splitting it into words is not enough.
SHELL = re.compile(r"[|&;<>()$`*?!#~\n]")
# Flags of python that do not change where it finds this package.
FLAGS = re.compile(r"-[uOBbdqvP]+|-[XW].+")


def put(undo: contextlib.ExitStack, owner: Any, name: str, made: Callable[[Any], Any]) -> None:
    """Replace `owner.name` by `made(owner.name)` until `undo` closes. If someone else has replaced
    it since, closing leaves theirs in place."""
    own = vars(owner).get(name)
    before = getattr(owner, name)
    new = functools.wraps(before)(made(before))
    setattr(owner, name, new)

    def back() -> None:
        if vars(owner).get(name) is not new:
            return
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    undo.callback(back)


class Following:
    """A context manager: Python processes that this one starts inside it run under the launcher.

    Args:
        settings: the arguments of the launcher.

    Attributes:
        followed: how many processes run under the launcher.
        lost: the commands that start Python in a way that cannot be changed.
    """

    def __init__(self, settings: Sequence[str]) -> None:
        self.launcher = ["-m", LAUNCHER, *settings]
        self.followed = 0
        self.lost: list[str] = []
        self._undo = contextlib.ExitStack()
        self._active = False

    def __enter__(self) -> Following:
        self._active = True
        put(self._undo, subprocess.Popen, "__init__", self._popen)
        put(self._undo, os, "execv", self._execv)
        put(self._undo, os, "execve", self._execve)
        put(self._undo, os, "system", self._system)
        return self

    def __exit__(self, *exception: object) -> None:
        self._active = False
        self._undo.close()

    def _popen(self, start: Callable[..., None]) -> Any:
        signature = inspect.signature(start)

        def __init__(process: Any, *args: Any, **kwargs: Any) -> None:
            try:
                bound = signature.bind(process, *args, **kwargs)
            except TypeError:
                # The arguments are wrong; Popen itself reports that.
                return start(process, *args, **kwargs)
            arguments = bound.arguments
            if arguments.get("executable") is not None:
                return start(process, *args, **kwargs)
            command = arguments.get("args")
            changed = self.changed(
                command, arguments.get("cwd"), arguments.get("env"), bool(arguments.get("shell"))
            )
            arguments["args"] = changed
            start(*bound.args, **bound.kwargs)
            if changed is not command:
                process.args = command  # the caller sees its own command
            return None

        return __init__

    def _execv(self, become: Callable[..., Any]) -> Any:
        return lambda path, argv: become(*self._instead(path, argv))

    def _execve(self, become: Callable[..., Any]) -> Any:
        return lambda path, argv, env: become(*self._instead(path, argv, env), env)

    def _instead(self, path: Any, argv: Any, env: Any = None) -> tuple[Any, Any]:
        """The program and the arguments that replace this process. Paths that do not exist pass
        through unchanged, because `execvp` tries one path after another."""
        if argv and os.path.isfile(path):
            command = [os.fsdecode(path), *argv[1:]]
            launched = self.changed(command, env=env, replaces=True)
            if launched is not command:
                return launched[0], launched
        return path, argv

    def _system(self, start: Callable[..., int]) -> Any:
        return lambda command: start(self.changed(command, line=True))

    def changed(
        self,
        command: Any,
        cwd: Any = None,
        env: Any = None,
        line: bool = False,
        replaces: bool = False,
    ) -> Any:
        """`command` with the launcher in it, or `command` itself if there is nothing to follow.

        Args:
            command: in a form that `Popen` takes.
            cwd: the working directory of the command.
            env: the environment of the command.
            line: `command` is a line for a shell. A line can be followed if it only names a program
                and its arguments.
            replaces: the command replaces this process, so no other process will report.
        """
        text = command if line and isinstance(command, str) else None
        if not self._active or (text is None and (line or isinstance(command, (str, bytes)))):
            return command
        try:
            words = [os.fspath(word) for word in command] if text is None else shlex.split(text)
        except (TypeError, ValueError):
            return command
        if not words or not all(isinstance(word, str) for word in words):
            return command
        if LAUNCHER in words:
            self.followed += 1
            return command
        env = os.environ if env is None else env
        plain = text is None or not SHELL.search(text)
        launched = self._launched(words, os.fsdecode(cwd or ""), env, replaces) if plain else None
        if launched is not None:
            self.followed += 1
            return launched if text is None else shlex.join(launched)
        if _names_python(words) and not (plain and _program(words[0], env)):
            self.lost.append(shlex.join(words) if text is None else text)
        return command

    def _launched(
        self, words: list[str], cwd: str, env: Mapping[str, str], replaces: bool
    ) -> list[str] | None:
        start = 0
        if os.path.basename(words[0]) in WRAPPERS:
            start = next((i for i, word in enumerate(words) if _program(word, env)), len(words))
        if start == len(words):
            return None
        before = words[:start]
        program = words[start]
        rest = words[start + 1 :]
        launcher = [w for w in self.launcher if not (replaces and w.startswith("--followed"))]
        if not _is_ours(program, env):
            target = console(program, env)
            return (
                None
                if target is None
                else [*before, sys.executable, *launcher, "--", target, *rest]
            )
        cut = python_flags(rest)
        if cut is None or not _may_train(rest[cut:], cwd):
            return None
        return [*before, program, *rest[:cut], *launcher, "--", *rest[cut:]]


def python_flags(words: Sequence[str]) -> int | None:
    """The number of python's own arguments before `-m module …` or `script …`; None if python runs
    neither."""
    at = 0
    while at < len(words) and words[at].startswith("-") and words[at] != "-m":
        if words[at] in ("-X", "-W"):
            at += 2
        elif FLAGS.fullmatch(words[at]):
            at += 1
        else:
            return None
    return at if at + (words[at : at + 1] == ["-m"]) < len(words) else None


def console(word: str, env: Mapping[str, str] | None = None) -> str | None:
    """The launcher's target for the program `word`, if that is an installed Python command that may
    train.

    Returns:
        The name of a console command, or the path of a script whose first line names this python.
        None for any other program.
    """
    env = os.environ if env is None else env
    folder, name = os.path.split(word)
    module = _module_of(name) if not folder or _same(folder) else None
    if module is not None:
        return name if _builds_on_torch(module) else None
    path = shutil.which(word, path=env.get("PATH"))
    first = ""
    with contextlib.suppress(OSError):  # an executable file may be unreadable
        if path is not None:
            with open(path, "rb") as file:
                first = file.readline(500).decode(errors="replace")
    named = first.removeprefix("#!").replace("/usr/bin/env ", "").split()
    return path if first.startswith("#!") and named and _is_ours(named[0], env) else None


def is_python(word: str) -> bool:
    """Whether the name of a program is that of a Python interpreter."""
    return PYTHON.fullmatch(os.path.basename(word).lower()) is not None


def _program(word: str, env: Mapping[str, str]) -> bool:
    return _is_ours(word, env) or console(word, env) is not None


def _is_ours(word: str, env: Mapping[str, str]) -> bool:
    """Whether `word` is the Python interpreter of this environment."""
    if word == sys.executable:
        return True
    path = shutil.which(word, path=env.get("PATH")) if is_python(word) else None
    return path is not None and _same(os.path.dirname(path))


def _same(folder: str) -> bool:
    return os.path.abspath(folder) == os.path.dirname(os.path.abspath(sys.executable))


def _names_python(words: Sequence[str]) -> bool:
    return any(is_python(word) or word.endswith((".py", ".sh")) for word in words)


@functools.cache
def _module_of(name: str) -> str | None:
    """The module of the installed console command `name`; None if there is no such command."""
    return next(
        (e.module for e in importlib.metadata.entry_points(group="console_scripts", name=name)),
        None,
    )


def _may_train(target: Sequence[str], cwd: str) -> bool:
    if target[0] == "-m":
        return _builds_on_torch(target[1])
    path = Path(cwd, target[0])
    if not path.is_file():
        return False
    parts = path.absolute().with_suffix("").parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return _builds_on_torch(".".join(parts[parts.index(folder) + 1 :]))
    return True


@functools.cache
def _builds_on_torch(module: str) -> bool:
    """Whether a module may train a model. A module of the user may; an installed one may if its
    package requires torch."""
    package = module.partition(".")[0]
    if package == "torch":  # torch also starts compile workers, which do not train
        return module.startswith("torch.distributed.")
    if package in sys.stdlib_module_names:
        return False
    names = importlib.metadata.packages_distributions().get(package, [])
    needed = [
        r for name in names for r in importlib.metadata.requires(name) or [] if "extra ==" not in r
    ]
    return not names or any(
        re.split(r"[^\w.-]", r, maxsplit=1)[0].lower() in FRAMEWORKS for r in needed
    )
