"""The scripts and the notebook of examples/ run, on tiny random models and without a network."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from verify import ROOT

pytest.importorskip("sklearn")

from safetensors import safe_open

from pre_kernels.demo.export import save_scenes
from pre_kernels.demo.scenes import split_digits

from .support.tiny import saved

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
LISTED = (".py", ".ipynb")
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
# in the place of the notebook's sizes
TINY = """settings = Settings(
    width=32, vision_steps=10, text_steps=10, text_bytes=20_000, train_scenes=100, test_scenes=60
)
STEPS, RATE, WEIGHT = 12, 3e-3, 0.5"""


def run(script: str, *arguments: object, folder: Path) -> str:
    """What the script printed; it runs in `folder`, offline."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PRe: " not in done.stderr, done.stderr[-3000:]
    return done.stdout


def keys(folder: Path, name: str = "model.safetensors") -> set[str]:
    with safe_open(folder / name, "pt") as file:
        return set(file.keys())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes in a folder for each of ten digits."""
    folder = tmp_path_factory.mktemp("scenes")
    save_scenes(split_digits(0)[0], 3, 0, folder)
    return folder / "images"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved.llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved.llava_next(tmp_path_factory.mktemp("llava_next"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved.qwen2_5_vl(tmp_path_factory.mktemp("qwen"))


def losses(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w*loss) (\S+)", line)}


@pytest.mark.parametrize(("family", "rate"), [("llava", 3e-3), ("llava_next", 1e-2)])
def test_own_loop(
    family: str, rate: float, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(family)
    numbers = range(30)
    captions = {f"{n:02}": f"The middle is {n // 3}." for n in numbers}
    captioned(images, tmp_path / "data", captions)
    printed = run("own_loop.py", "data", "out", "--model", model, "--lr", rate, folder=tmp_path)
    steps = [losses(line) for line in printed.splitlines() if line.startswith("step ")]
    assert len(steps) == math.ceil(30 / 4)
    for step in steps:
        assert step["loss"] == pytest.approx(step["task_loss"] + 0.5 * step["pre_loss"], abs=2e-4)
    for name in ("task_loss", "pre_loss"):
        assert steps[-1][name] < steps[0][name] - 0.1, name
    assert keys(tmp_path / "out", "pre_head.safetensors")
    assert keys(tmp_path / "out") == keys(model)
    head = json.loads((tmp_path / "out" / "pre_head.json").read_text(encoding="utf-8"))
    assert head["layers"] == [saved.DEPTH // 2]


def parts_with_loss(batch: dict[str, torch.Tensor], tokenizer: Any) -> list[str]:
    """What of each row has a label, decoded; a label is its own token."""
    labelled = batch["labels"] != -100
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    assert batch["attention_mask"].bool()[labelled].all()
    return [
        tokenizer.decode(row[mask].tolist())
        for row, mask in zip(batch["input_ids"], labelled, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_own_loop_trains_on_captions(
    side: str, llava: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = captioned(images, tmp_path / "data", {"a": "One.", "b": "One, or two."})
    arguments = ["own_loop.py", str(data), str(tmp_path / "out"), "--model", str(llava)]
    monkeypatch.setattr(sys, "argv", arguments)
    names = runpy.run_path(str(EXAMPLES / "own_loop.py"))
    assert not hasattr(names["model"], "pre_head")
    tokenizer = names["processor"].tokenizer
    tokenizer.padding_side = side
    batch = names["collate"](names["files"])
    padded = (batch["attention_mask"] == 0).nonzero()
    assert set(padded[:, 0].tolist()) == {0}
    assert (0 in padded[:, 1]) == (side == "left")
    assert parts_with_loss(batch, tokenizer) == [" One.<s>", " One, or two.<s>"]


@pytest.mark.slow
def test_qwen_trainer(qwen: Path, images: Path, tmp_path: Path) -> None:
    conversations(images, images.parent / "data.json")
    printed = run(
        "qwen_trainer.py", images.parent / "data.json", "--model", qwen,
        "--output-dir", "out", "--learning-rate", 3e-3, "--lr-scheduler-type", "constant",
        "--logging-steps", 1, "--max-steps", 10, "--per-device-train-batch-size", 2,
        "--gradient-accumulation-steps", 2, "--report-to", "none", "--disable-tqdm", "True",
        "--gradient-checkpointing", "True",
        folder=tmp_path,
    )  # fmt: skip
    assert "'pre_loss'" in printed
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    log = [entry for entry in state["log_history"] if "pre_loss" in entry]
    assert len(log) == 10
    for entry in log:
        want = entry["task_loss"] + 0.5 * entry["pre_loss"]
        assert entry["loss"] == pytest.approx(want, abs=1e-3)
        assert entry["pre_head_grad_norm"] > 0
    for name in ("task_loss", "pre_loss"):
        assert log[-1][name] < log[0][name] - 0.1, name
    for folder in (checkpoint, tmp_path / "out"):
        assert keys(folder, "pre_head.safetensors")
        assert keys(folder) == keys(qwen)


def test_qwen_trainer_trains_on_answers(
    qwen: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images.parent / "few.json"
    conversations(images, data)
    entries = json.loads(data.read_text(encoding="utf-8"))[2:4]
    entries[0]["conversations"] = entries[0]["conversations"][:2]
    data.write_text(json.dumps(entries), encoding="utf-8")
    options = ["--output-dir", str(tmp_path), "--max-steps", "1", "--report-to", "none"]
    arguments = ["qwen_trainer.py", str(data), "--model", str(qwen), "--use-cpu", "True"]
    monkeypatch.setattr(sys, "argv", [*arguments, *options])
    try:
        names = runpy.run_path(str(EXAMPLES / "qwen_trainer.py"))
    finally:
        vars(hf.Trainer)["_pre_patch"].remove()
    batch = names["collate"](entries)
    tokenizer = names["tokenizer"]
    end = "<|im_end|>\n"
    assert parts_with_loss(batch, tokenizer) == [f"A 0.{end}", f"A 1.{end}yes{end}"]
    shown = names["vision"].merge_size ** 2 * (batch["mm_token_type_ids"] == 1).sum(-1)
    assert torch.equal(shown, batch["image_grid_thw"].prod(-1))
    # What Qwen's template makes of the second conversation, less its default system prompt.
    said = [
        {"role": role, "content": content}
        for role, content in (
            ("system", "You are a helpful assistant."),
            ("user", "<|vision_start|><|image_pad|><|vision_end|>\nWhich digit?"),
            ("assistant", "A 1."),
            ("user", "Is it odd?"),
            ("assistant", "yes"),
        )
    ]
    whole = tokenizer.apply_chat_template(said, tokenize=False)
    found = tokenizer.decode(batch["input_ids"][1].tolist())
    assert re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", found) == whole


def test_diagnose_in_python(llava: Path, images: Path, tmp_path: Path) -> None:
    printed = run("diagnose_in_python.py", images, "--model", llava, folder=tmp_path)
    total, header, *rows = printed.splitlines()
    assert total == "30 images, 1080 visual tokens"
    assert [int(row.split()[0]) for row in rows] == list(range(saved.DEPTH + 1))
    table = [dict(zip(header.split()[1:], row.split()[1:], strict=True)) for row in rows]
    assert float(table[0]["cosine"]) == 1
    assert all(0 < float(row["linear_probe"]) <= 1 for row in table)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_diagnose_in_python_without_classes(llava: Path, images: Path, tmp_path: Path) -> None:
    options = ("--layers", 0, 3, "--plot", "drawn.png", "--limit", 2)
    printed = run(
        "diagnose_in_python.py", images / "7", "--model", llava, *options, folder=tmp_path
    )
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["0", "3"]
    assert all(line.split()[-1] == "-" for line in printed.splitlines()[2:])
    assert (tmp_path / "drawn.png").exists()


def captioned(images: Path, data: Path, captions: dict[str, str]) -> Path:
    """`data`, with an image by each name and its caption beside it."""
    data.mkdir()
    for file, (name, caption) in zip(sorted(images.rglob("*.png")), captions.items(), strict=False):
        shutil.copy(file, data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return data


def conversations(images: Path, file: Path) -> None:
    """Two questions and answers about each scene, in LLaVA's form."""
    entries: list[Any] = []
    for image in sorted(images.rglob("*.png")):
        digit = int(image.parent.name)
        turns = [
            ("human", "<image>\nWhich digit?"),
            ("gpt", f"A {digit}."),
            ("human", "Is it odd?"),
            ("gpt", "yes" if digit % 2 else "no"),
        ]
        said = [{"from": who, "value": value} for who, value in turns]
        entries.append({"image": str(image.relative_to(file.parent)), "conversations": said})
    file.write_text(json.dumps(entries), encoding="utf-8")


def printed_by(notebook: Any) -> str:
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


def pictures(notebook: Any) -> int:
    outputs = (output for cell in notebook["cells"] for output in cell.get("outputs", []))
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture(scope="module")
def notebook() -> Any:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def test_the_notebook_runs(notebook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    from verify.notebook import executed

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    (sizes,) = (
        number
        for number, cell in enumerate(notebook["cells"])
        if "parameters" in cell["metadata"].get("tags", [])
    )
    ran = executed(NOTEBOOK, {sizes: TINY}, timeout=120)
    assert pictures(ran) == pictures(notebook) == 3
    falls = re.findall(r"(\w+) (-?[\d.]+) → (-?[\d.]+)", printed_by(ran))
    assert [name for name, *_ in falls] == ["task_loss", "task_loss", "pre_loss"]
    for name, first, last in falls:
        assert float(last) < float(first) - 0.3, name
    # Both trainings begin at the same loss.
    assert falls[0][1] == falls[1][1]
    assert "without it, as at the start: True" in printed_by(ran)


def test_the_notebooks_outputs_are_those_of_a_run_and_of_no_machine(notebook: Any) -> None:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] is None for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    words = json.dumps([cell["source"] for cell in notebook["cells"]]) + printed_by(notebook)
    assert not re.search(r"/(tmp|home|root|work|Users)/|0x[0-9a-f]{6}", words)
    assert NOTEBOOK.stat().st_size < 200_000
    falls = re.findall(r"(\w+) (-?[\d.]+) → (-?[\d.]+)", printed_by(notebook))
    assert len(falls) == 3
    assert all(float(last) < float(first) for _, first, last in falls)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_short_and_explains_itself(script: Path, tmp_path: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    printed = " ".join(run(script.name, "--help", folder=tmp_path).split())
    for word in ast.get_docstring(ast.parse(text)).split():
        assert word in printed
    assert "/" in re.search(r'"--model", default="(\S+)"', text)[1]
    assert re.search(r"^Run: .*Not run: .*a GPU\.$", text, re.MULTILINE)


def test_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w.]+)\]\(\1\) \|", text, re.MULTILINE)
    assert sorted(listed) == sorted(f.name for f in EXAMPLES.iterdir() if f.suffix in LISTED)
