"""The measured training step, with and without PRe, at tiny sizes."""

import json

import pytest
import torch

from bench import goals, record, training
from pre_kernels.check.device import Cpu, Cuda

from .support import STAMP


def test_training_is_tried_where_it_fits(monkeypatch):
    class Card:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Card)
    assert training.lacks(Cuda(), training.LLAVA) == "needs a GPU of 100 GiB, this one has 80"
    Card.total_memory = 140 << 30
    assert training.lacks(Cuda(), training.LLAVA) is None
    assert training.lacks(Cpu(), training.TINY) is None
    assert training.lacks(Cpu(), training.DEFAULT["cpu"]) is None


def test_the_model_that_is_trained_on_a_cpu_is_smolvlm_256m():
    size = training.DEFAULT["cpu"]
    model = training.build(size, torch.device("meta"))
    text = sum(p.numel() for p in model.model.text_model.parameters())
    assert text == pytest.approx(135e6, rel=0.02)
    assert sum(p.numel() for p in model.parameters()) == 256_484_928
    assert all(p.dtype == torch.float32 for p in model.parameters())
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"vision_model"}
    assert training.visual(size) == model.model.image_seq_len == 64
    inputs = training.batch(size, torch.device("cpu"))
    assert (inputs["input_ids"] == training.IMAGE).sum(1).tolist() == [64] * 6
    assert (inputs["labels"] >= 0).sum() == 6 * (96 - 64)


def smolvlm_of_a_few_layers():
    text = training.TINY.text
    vision = {**training.TINY.vision}
    del vision["projection_dim"]
    return training.SMOLVLM._replace(batch=2, tokens=24, text=text, vision=vision, layer=2, scale=2)


@pytest.mark.parametrize(
    "size", [training.TINY, smolvlm_of_a_few_layers()], ids=lambda size: size.name
)
def test_a_training_step_of_every_class_of_models(size):
    step = training.Step(size, Cpu())
    seen = []
    for name, part in step.model.model.named_children():
        if name in training.FROZEN:
            part.register_forward_hook(
                lambda module, inputs, output: seen.append(output[0].requires_grad)
            )
    step()
    # The backward does not go through the frozen encoder.
    assert seen == [False]
    held = step.held_mib()
    head = step.attach().head
    before = [p.detach().clone() for p in head.parameters()]
    step()
    assert step.handle.metrics()["pre_tokens"] == size.batch * training.visual(size)
    # In bfloat16 such a small rate leaves some parameters unchanged.
    assert not all(torch.equal(p, old) for p, old in zip(head.parameters(), before, strict=True))
    # parameters and both moments; AdamW counts steps too
    own = 3 * sum(p.nbytes for p in head.parameters()) / 2**20
    assert step.held_mib() - held == pytest.approx(own, rel=1e-2)


@pytest.mark.slow
def test_training_on_a_cpu_records_both_ratios(tmp_path, capsys):
    assert training.main(["--tiny", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    (line,) = records = record.load([file])
    assert line.keys() >= STAMP | {"with_ms", "without_ms", "samples"}
    assert (line["item"], line["n"]) == ("tiny", 32)
    assert 0 < line["time_ratio_q1"] <= line["time_ratio"] <= line["time_ratio_q3"]
    # The peak contains the whole model, and the head is subtracted.
    assert line["without_mib"] > training.Step(training.TINY, Cpu()).held_mib()
    assert line["memory_ratio"] == (line["with_mib"] - line["head_mib"]) / line["without_mib"]
    assert line["memory_ratio_with_head"] == line["with_mib"] / line["without_mib"]
    for name in ("time_ratio", "memory_ratio"):
        assert goals.field("training", name, records, item="tiny").value == line[name]
    # One more step of each kind is a warm-up.
    assert said.err.count(", with PRe") == said.err.count(", without PRe") == line["samples"] + 1
    assert "memory_ratio_with_head" in said.out


def test_what_the_processes_of_both_peaks_hold(capsys):
    held = {}
    for which in ("with", "without"):
        assert training.main(["--tiny", "--peak", which]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["rise_mib"] >= 0
        held[which] = told["held_mib"]
    assert held["with"] > held["without"]


def test_the_ratio_of_times_is_that_of_neighbours():
    """The medians of both would give 24 / 20."""
    found = training.pairs([11.0, 24.0, 90.0], [10.0, 20.0, 100.0])
    assert found == pytest.approx({"time_ratio": 1.1, "time_ratio_q1": 1.0, "time_ratio_q3": 1.15})
