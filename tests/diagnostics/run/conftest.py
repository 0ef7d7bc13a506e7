"""A model and images on disk."""

import pytest


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with models a and b, 20 images in classes, and masks."""
    from pre_kernels.demo.export import save_model, save_scenes
    from pre_kernels.demo.scenes import split_digits

    from .support import EACH, tiny

    folder = tmp_path_factory.mktemp("with spaces é")
    for seed, name in enumerate("ab"):
        save_model(tiny(seed), folder / name)
    save_scenes(split_digits(0)[2], EACH, 0, folder)
    return folder
