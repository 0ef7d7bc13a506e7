"""The real demo's stand-ins, imported late because they need more packages than other tests."""

import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with drawings of 12 things of each category."""
    from .stand_ins import draw

    root = tmp_path_factory.mktemp("parts")
    draw(root)
    return root


@pytest.fixture
def tiny(monkeypatch, folder):
    """Replace the LLM and the encoder, and return the parts."""
    from pre_kernels.demo.real.pieces import Pieces

    from .stand_ins import replace_parts

    replace_parts(monkeypatch)
    return Pieces(folder)
