"""Models are found, or missed in one line, before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

hub = pytest.importorskip("huggingface_hub")

from pre_kernels.diagnostics.run.loading import check_sources  # noqa: E402


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """The names for which the hub was asked. It has the model "there/it"."""
    names = []

    def model_info(self, name, timeout):
        names.append(name)
        assert timeout <= 10
        if name == "offline/it":
            raise ConnectionError("no route to the hub\nand much advice")
        if name != "there/it":
            missing = hub.errors.RepositoryNotFoundError
            raise missing.__new__(missing)

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: cached(name, tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "with" / "checkpoint-20").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    return names


def cached(name: str, folder: Path) -> str | None:
    return str(folder / "config.json") if name == "cached/it" else None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nope", "model: ./nope is not there, want a folder"),
        ("out/wth", "model: out/wth is not there, want a folder; did you mean out/with?"),
        ("/x/y", "model: /x/y is not there, want a folder"),
        ("~/x", "model: ~/x is not there"),
        ("a/b/c", "model: a/b/c is not there"),
        ("mit Leerzeichen", "model: mit Leerzeichen is not there"),
        ("out/with", "without config.json or adapter_config.json, want one that save_pretrained"),
        ("out/with", "wrote; it has checkpoint-20: give one of them"),
        ("model/config.json", "model: model/config.json is not a folder, want one that save_"),
    ],
)
def test_a_path_is_named_before_the_hub_is_asked(source, said, asked):
    with pytest.raises(ValueError) as caught:
        check_sources(["there/it", source])
    assert said in str(caught.value)
    assert not asked


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nobody/it", "nobody/it is not a folder here, and the hub has no such model, or only for"),
        ("modell", "want a folder or a model's name; did you mean model?"),
        (
            "offline/it",
            "and the hub does not answer (no route to the hub), want a folder, or a con",
        ),
    ],
)
def test_the_hub_is_asked_once_and_its_answer_is_one_line(name, said, asked):
    with pytest.raises(ValueError) as caught:
        check_sources(["model", name])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert asked == [name]


def test_models_that_are_found(asked):
    check_sources(["model", "./model/", "there/it", "cached/it"])
    assert asked == ["there/it"]
