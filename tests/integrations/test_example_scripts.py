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

from pre_kernels.demo.export import processor, save_scenes
from pre_kernels.demo.model import build
from pre_kernels.demo.scenes import split_digits
from pre_kernels.demo.settings import Settings

from .support.tiny.family import text_config
from .support.tiny.grids import MROPE, QWEN_VISION

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))
QWEN_NAMES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen's names of roles and ends, without its default system prompt
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LAYERS = 4
LISTED = (".py", ".ipynb")


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
    """A LLaVA and its processor, whose tokenizer pads and ends, as a real one's does."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    build(Settings(width=32, layers=LAYERS)).save_pretrained(folder)
    saved = processor()
    saved.tokenizer.add_special_tokens({"pad_token": "<s>", "eos_token": "<s>"})
    saved.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL with a tokenizer of bytes and Qwen's special tokens, and an image processor."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = processor().tokenizer
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer.add_special_tokens({"additional_special_tokens": [*QWEN_NAMES], **ends})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    vision = {
        **QWEN_VISION,
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 32,
        "window_size": 8,
        "fullatt_block_indexes": [1],
    }
    text = text_config(rope_scaling=MROPE, vocab_size=len(tokenizer), max_position_embeddings=512)
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    torch.manual_seed(0)
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
    hf.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}
    hf.Qwen2VLImageProcessor(**sizes, min_pixels=16, max_pixels=144).save_pretrained(folder)
    return folder


def losses(line: str) -> dict[str, float]:
    return {name: float(value) for name, value in re.findall(r"(\w*loss) (\S+)", line)}


def test_own_loop(llava: Path, images: Path, tmp_path: Path) -> None:
    numbers = range(30)
    captions = {f"{n:02}": f"The middle is {n // 3}." for n in numbers}
    captioned(images, tmp_path / "data", captions)
    printed = run("own_loop.py", "data", "out", "--model", llava, "--lr", 3e-3, folder=tmp_path)
    steps = [losses(line) for line in printed.splitlines() if line.startswith("step ")]
    assert len(steps) == math.ceil(30 / 4)
    for step in steps:
        assert step["loss"] == pytest.approx(step["task_loss"] + 0.5 * step["pre_loss"], abs=2e-4)
    for name in ("task_loss", "pre_loss"):
        assert steps[-1][name] < steps[0][name] - 0.1, name
    assert keys(tmp_path / "out", "pre_head.safetensors")
    assert keys(tmp_path / "out") == keys(llava)
    head = json.loads((tmp_path / "out" / "pre_head.json").read_text(encoding="utf-8"))
    assert head["layers"] == [LAYERS // 2]


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
    tokenizer = names["processor"].tokenizer
    tokenizer.padding_side = side
    batch = names["collate"](names["files"])
    padded = (batch["attention_mask"] == 0).nonzero()
    assert set(padded[:, 0].tolist()) == {0}
    assert (0 in padded[:, 1]) == (side == "left")
    assert parts_with_loss(batch, tokenizer) == [" One.<s>", " One, or two.<s>"]


def test_qwen_trainer(qwen: Path, images: Path, tmp_path: Path) -> None:
    conversations(images, images.parent / "data.json")
    printed = run(
        "qwen_trainer.py", images.parent / "data.json", "--model", qwen,
        "--output_dir", "out", "--learning_rate", 3e-3, "--lr_scheduler_type", "constant",
        "--logging_steps", 1, "--max_steps", 10, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 2, "--report_to", "none", "--disable_tqdm", "True",
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
    options = ["--output_dir", str(tmp_path), "--max_steps", "1", "--report_to", "none"]
    arguments = ["qwen_trainer.py", str(data), "--model", str(qwen), "--use_cpu", "True"]
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
    assert [int(row.split()[0]) for row in rows] == list(range(LAYERS + 1))
    table = [dict(zip(header.split()[1:], row.split()[1:], strict=True)) for row in rows]
    assert float(table[0]["cosine"]) == 1
    assert all(0 < float(row["linear_probe"]) <= 1 for row in table)
    assert (tmp_path / "layers.png").read_bytes()[:4] == b"\x89PNG"


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
