"""Builds the files of a release, an sdist and a wheel, and fails unless a second build from a copy
in another place and with other times has the same hashes.

    python -m verify.dist       writes dist/*.tar.gz and dist/*.whl and prints their hashes

The wheel is built from the sdist and must contain the package with its integrations and nothing
else. So must the wheel of a tree without symbolic links. Files get the time SOURCE_DATE_EPOCH (else
that of the last commit, else the earliest that a zip file can hold) and the permissions of a
checkout under umask 022, because both kinds of archives store them. The versions of the build's
own tools are those of build-constraints.txt.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from . import ROOT

# What the sdist has beside the package; setup.py reads some of it.
FILES = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
)
FOLDERS = ("pre_kernels", "integrations")
CONSTRAINTS = Path(__file__).with_name("build-constraints.txt")
EARLIEST = "315532800"  # 1980-01-01


def git(*arguments: str) -> str | None:
    """What git prints; None without git, or if the repository's root is not ROOT."""
    try:
        top, said = (
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout
            for command in (("rev-parse", "--show-toplevel"), arguments)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return said if Path(top.strip()) == ROOT else None


def uncommitted() -> str | None:
    """An error if there are files that no commit has, None if there are none, or no git."""
    names = (*FILES, *FOLDERS, "hub", "verify")
    lines = (git("status", "--porcelain", "--", *names) or "").splitlines()
    if not lines:
        return None
    found = ", ".join(line[3:] for line in lines[:5]) + ", …" * (len(lines) > 5)
    return f"sources: got files that are not committed, {found}; want a clean tree or --allow-dirty"


def epoch() -> str:
    """The time that every file gets."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    return (git("log", "-1", "--format=%ct") or EARLIEST).strip()


def copy(folder: Path, time: float, linked: bool = True) -> None:
    """Copy the sources to `folder`, with this modification time. `pre_kernels/integrations` stays a
    link if `linked`, else it becomes the file that a zip archive and git on Windows make of it."""
    folder.mkdir(parents=True)
    for name in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    if not linked:
        link = folder / "pre_kernels" / "integrations"
        text = os.readlink(link)
        link.unlink()
        link.write_text(text)
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (time, time))


def build(source: Path, out: Path, kind: str, more: list[str]) -> Path:
    """Build the wheel ("wheel") or the sdist ("sdist") of `source` in `out`; returns its path."""
    environment = {
        **os.environ,
        "SOURCE_DATE_EPOCH": epoch(),
        # pip splits a path at spaces.
        "PIP_CONSTRAINT": CONSTRAINTS.as_uri(),
    }
    command = [sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), *more, str(source)]
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        umask=0o022,
    )
    if done.returncode:
        sys.exit(done.stdout)
    (built,) = out.iterdir()
    if kind == "sdist":
        settle(built)
    return built


def settle(sdist: Path) -> None:
    """Rewrite an sdist, in which setuptools stores the builder's name and the time of the build."""
    time = int(epoch())
    packed = io.BytesIO()
    with (
        tarfile.open(sdist) as old,
        gzip.GzipFile(fileobj=packed, mode="wb", filename="", mtime=time) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old, key=lambda member: member.name):
            member.mtime = time
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mode = 0o755 if member.isdir() else 0o644
            member.pax_headers = {}
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    sdist.write_bytes(packed.getvalue())


def unpacked(sdist: Path, folder: Path) -> Path:
    """The one folder in an sdist, in `folder`."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def wrong(names: set[str]) -> list[str]:
    """The files that a wheel of these files lacks, and those that it should not have."""
    tops = {name.partition("/")[0] for name in names}
    others = sorted(top for top in tops if not top.endswith(".dist-info") and top != "pre_kernels")
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pre_kernels").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # rglob does not follow the link.
    files |= {
        f"pre_kernels/integrations/{path.relative_to(ROOT / 'integrations').as_posix()}"
        for path in (ROOT / "integrations").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    return [
        *(f"installs more than pre_kernels: {top}" for top in others),
        *(f"lacks {name}" for name in sorted(files - names)),
    ]


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a command that builds a release, which ends if files are not committed."""
    parser.add_argument(
        "--allow-dirty", action="store_true", help="build from files that are not committed"
    )
    options = parser.parse_args()
    if not options.allow_dirty and (problem := uncommitted()):
        parser.error(problem)
    return options


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "dist",
        help="replaced; may hold nothing but such files (default: dist)",
    )
    parser.add_argument(
        "--no-isolation", action="store_true", help="build with the setuptools of this environment"
    )
    options = parsed(parser)
    more = ["--no-isolation"] if options.no_isolation else []
    if options.out.is_dir():
        built = (*options.out.glob("*.tar.gz"), *options.out.glob("*.whl"))
        if others := sorted({*options.out.iterdir()} - {*built}):
            parser.error(f"--out: got a folder that also has {others[0].name}, want another folder")
        shutil.rmtree(options.out)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pairs = []
        for number, (place, time) in enumerate([("a", 10**9), ("somewhere/else b", 1.5 * 10**9)]):
            copy(folder / place, time)
            sdist = build(folder / place, folder / f"sdist{number}", "sdist", more)
            source = unpacked(sdist, folder / f"unpacked{number}")
            pairs.append((sdist, build(source, folder / f"wheel{number}", "wheel", more)))
        for first, second in zip(*pairs, strict=True):
            if digest(first) != digest(second):
                print(
                    f"two builds of {first.name} have different hashes: {digest(first)}, "
                    f"{digest(second)}",
                    file=sys.stderr,
                )
                return 1
        copy(folder / "no-links", 10**9, linked=False)
        unlinked = build(folder / "no-links", folder / "wheel-unlinked", "wheel", more)
        for wheel in (pairs[0][1], unlinked):
            if faults := wrong(contents(wheel)):
                print(f"{wheel.parent.name}/{wheel.name}:", *faults, sep="\n  ", file=sys.stderr)
                return 1
        options.out.mkdir(parents=True)
        for path in pairs[0]:
            shutil.copy(path, options.out)
            print(f"{digest(path)}  {options.out / path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
