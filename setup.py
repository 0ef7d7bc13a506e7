"""Where the packages are; the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# `pre_kernels/integrations` is a link to the folder at the top. Zip archives of the repository and
# git on Windows make a file of it, and then the folder is named instead. With the link an editable
# install is a path, which editors and type checkers follow.
FOLDER = Path(__file__).resolve().parent
linked = (FOLDER / "pre_kernels" / "integrations").is_dir()
packages = find_packages(str(FOLDER), include=["pre_kernels*"])
folders = {"": "."}
if not linked:
    packages.append("pre_kernels.integrations")
    folders["pre_kernels.integrations"] = "integrations"
setup(packages=packages, package_dir=folders)
