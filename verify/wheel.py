"""Builds the wheel twice, from copies in different places with different times, and fails unless
both have the same hash. The wheel must contain the package with its integrations and nothing else,
and so must a wheel that is built from an sdist.

    python -m verify.wheel       writes dist/*.whl and prints its hash

Its files get the time SOURCE_DATE_EPOCH (else that of the last commit, else the earliest that a
zip file can hold) and the permissions of a checkout under umask 022, because a wheel stores both.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from . import ROOT

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "pre_kernels", "integrations")
EARLIEST = "315532800"  # 1980-01-01


def epoch() -> str:
    """The time that every file in the wheel gets."""
    if given := os.environ.get("SOURCE_DATE_EPOCH"):
        return given
    command = ["git", "log", "-1", "--format=%ct"]
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return EARLIEST


def copy(folder: Path, time: float, linked: bool = True) -> None:
    """Copy the sources to `folder`, with this modification time. `pre_kernels/integrations` stays a
    link if `linked`, else it becomes the file that a zip archive and git on Windows make of it."""
    folder.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
            )
        else:
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
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch()}
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
    return built


def wheel_by_sdist(source: Path, folder: Path, more: list[str]) -> Path:
    """The wheel that pip builds from an sdist, as it does if no wheel is available."""
    with tarfile.open(build(source, folder / "sdist", "sdist", more)) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return build(unpacked, folder / "by-sdist", "wheel", more)


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


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--no-isolation", action="store_true", help="build with the setuptools of this environment"
    )
    options = parser.parse_args()
    more = ["--no-isolation"] if options.no_isolation else []
    shutil.rmtree(options.out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheels = []
        for number, (place, time) in enumerate([("a", 10**9), ("somewhere/else b", 1.5 * 10**9)]):
            copy(folder / place, time)
            wheels.append(build(folder / place, folder / f"out{number}", "wheel", more))
        hashes = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
        if len(set(hashes)) > 1:
            print(
                f"two builds of {wheels[0].name} have different hashes: {hashes}", file=sys.stderr
            )
            return 1
        by_sdist = wheel_by_sdist(folder / "a", folder, more)
        copy(folder / "no-links", 10**9, linked=False)
        unlinked = build(folder / "no-links", folder / "out-unlinked", "wheel", more)
        for wheel in (wheels[0], by_sdist, unlinked):
            if faults := wrong(contents(wheel)):
                print(f"{wheel.parent.name}/{wheel.name}:", *faults, sep="\n  ", file=sys.stderr)
                return 1
        options.out.mkdir(parents=True)
        shutil.copy(wheels[0], options.out)
    print(f"{hashes[0]}  {options.out / wheels[0].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
