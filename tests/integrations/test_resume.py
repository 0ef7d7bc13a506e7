"""transformers.Trainer: the head and the model after resuming from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pre_kernels.integrations import apply_pre, patch_trainer

from .support.tiny.models import build
from .support.tiny.training import EQUAL, InOrder, Samples, Starts, arguments, collate, train


def test_resume_restores_the_head(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    _, handle, _ = train("llava", EQUAL, tmp_path, 2, patched=True, **saving)
    saved = handle.head.w1.detach().clone()
    folder = tmp_path / "checkpoint-2"
    assert (folder / "pre_head.safetensors").exists()

    model = build("llava")
    starts = Starts()
    torch.manual_seed(99)
    apply_pre(model)
    assert not torch.equal(model.pre_head.w1, saved)
    with patch_trainer():
        trainer = InOrder(
            model=model,
            args=arguments(tmp_path, 2, 2, **(saving | {"max_steps": 4})),
            train_dataset=Samples(EQUAL),
            data_collator=collate("llava", EQUAL),
            callbacks=[starts],
        )
        trainer.train(resume_from_checkpoint=str(folder))
    assert starts.step == 2
    assert torch.equal(starts.w1, saved)

    (folder / "pre_head.safetensors").unlink()
    with patch_trainer(), pytest.raises(ValueError, match=r"of a save that was interrupted"):
        trainer.train(resume_from_checkpoint=str(folder))
    (folder / "pre_head.json").unlink()
    with patch_trainer(), pytest.warns(UserWarning, match=r"holds no head"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_best_model_comes_with_its_head(tmp_path: Path) -> None:
    model = build("llava")
    handle = apply_pre(model)
    heads = []
    with patch_trainer():
        trainer = InOrder(
            model=model,
            args=arguments(
                tmp_path,
                2,
                2,
                max_steps=3,
                # This makes the model of the first step the best one.
                learning_rate=30.0,
                save_strategy="steps",
                save_steps=1,
                eval_strategy="steps",
                eval_steps=1,
                load_best_model_at_end=True,
            ),
            train_dataset=Samples(EQUAL),
            eval_dataset=Samples(EQUAL),
            data_collator=collate("llava", EQUAL),
        )
        trainer.train()
        last = handle.head.w1.detach().clone()
        for step in (1, 2, 3):
            handle.load(tmp_path / f"checkpoint-{step}")
            heads.append(handle.head.w1.detach().clone())
    best = int(str(trainer.state.best_model_checkpoint).split("-")[-1])
    assert [torch.equal(last, head) for head in heads] == [step == best for step in (1, 2, 3)]
    wanted = type(model).from_pretrained(tmp_path / f"checkpoint-{best}").state_dict()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in wanted.items())


def resumable(
    model: Any, folder: Path, steps: int, trainer_class: type = InOrder, **more: Any
) -> Any:
    return trainer_class(
        model=model,
        args=arguments(
            folder,
            1,
            1,
            save_strategy="steps",
            save_steps=1,
            max_steps=steps,
            learning_rate=0.0,
            **more,
        ),
        train_dataset=Samples(EQUAL),
        data_collator=collate("llava", EQUAL),
    )


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("pre_head")}


class SavesTheProjector(InOrder):
    """Saves only the trained parameters."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        found = self.model.state_dict()
        super()._save(
            output_dir,
            {n: t for n, t in found.items() if "multi_modal_projector" in n or "extra" in n},
        )


@pytest.mark.parametrize("extra", [False, True])
def test_resume_leaves_weights_alone_that_the_checkpoint_lacks(extra: bool, tmp_path: Path) -> None:
    saved = []
    for seed, resume in ((0, None), (7, str(tmp_path / "checkpoint-1"))):
        model = build("llava", seed)
        if extra:
            model.extra = torch.nn.Linear(2, 2)
        before = tensors(model)
        apply_pre(model)
        with patch_trainer():
            resumable(model, tmp_path, 1 if resume is None else 2, SavesTheProjector).train(
                resume_from_checkpoint=resume
            )
        saved.append(tensors(model))
    here = {n for n in before if "multi_modal_projector" in n or "extra" in n}
    assert len(here) == 4 + 2 * extra
    for name, tensor in saved[1].items():
        assert torch.equal(tensor, saved[0][name] if name in here else before[name]), name


def test_resume_with_a_module_of_the_users(tmp_path: Path) -> None:
    saved = []
    for seed, resume in ((0, None), (7, str(tmp_path / "checkpoint-1"))):
        model = build("llava", seed)
        model.extra = torch.nn.Linear(2, 2)
        apply_pre(model)
        with patch_trainer():
            resumable(model, tmp_path, 1 if resume is None else 2).train(
                resume_from_checkpoint=resume
            )
        saved.append(tensors(model))
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in saved[1].items())


def test_resume_of_another_model_is_an_error(tmp_path: Path) -> None:
    """The names of the wrapped layer in the file were changed, so neither route loads it."""
    for resume in (None, str(tmp_path / "checkpoint-1")):
        model = build("llava")
        attention = model.model.language_model.layers[0].self_attn
        attention.q_proj = torch.nn.Sequential(attention.q_proj)
        apply_pre(model)
        with patch_trainer():
            trainer = resumable(model, tmp_path, 1 if resume is None else 2)
            if resume is None:
                trainer.train()
                continue
            with pytest.raises(
                RuntimeError,
                match=r"not loaded into this model: .*layers\.0\.self_attn\.q_proj\.0\.weight",
            ):
                trainer.train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("names", ["saved", "own", "more"])
def test_resume_from_pickled_weights(names: str, sharded: bool, tmp_path: Path) -> None:
    """The Trainer must load these parameters: an error if it would continue without them, none if
    it loads them."""
    model = build("llava")
    apply_pre(model)
    folder = tmp_path / "checkpoint-1"
    with patch_trainer():
        resumable(model, tmp_path, 1).train()
    weights = folder / "model.safetensors"
    state_dict = load_file(weights) if names == "saved" else tensors(model)
    # Old checkpoints have such buffers, which newer models lack.
    if names == "more":
        state_dict["model.language_model.rotary_emb.inv_freq"] = torch.ones(2)
    weights.unlink()
    if sharded:
        index = {}
        for number, name in enumerate(state_dict):
            index[name] = f"pytorch_model-{number % 2}.bin"
        for file in set(index.values()):
            torch.save({n: t for n, t in state_dict.items() if index[n] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
    else:
        torch.save(state_dict, folder / "pytorch_model.bin")

    other = build("llava", 7)
    apply_pre(other)
    with patch_trainer():
        trainer = resumable(other, tmp_path, 2)
        if names == "saved":
            with pytest.raises(RuntimeError, match=r"checkpoint-1 has no model.safetensors"):
                trainer.train(resume_from_checkpoint=str(folder))
            # The message recommends this line.
            type(other).from_pretrained(folder).save_pretrained(folder)
        trainer.train(resume_from_checkpoint=str(folder))
    saved = tensors(model)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in tensors(other).items())
