"""Where the packages are, and the page for the package index; the rest is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).resolve().parent


def page() -> str:
    """README.md, with links that work outside the repository: to its files as of this release."""
    text, project, package = (
        (FOLDER / name).read_text(encoding="utf-8")
        for name in ("README.md", "pyproject.toml", "pre_kernels/__init__.py")
    )
    address = re.search(r'^Repository = "(.*)"$', project, re.MULTILINE).group(1)
    version = re.search(r'^__version__ = "(.*)"$', package, re.MULTILINE).group(1)
    for begin, kind in (("![", "raw"), ("[", "blob")):
        link = rf"(?<!\!)({re.escape(begin)}[^\]]*\]\()(?!https?:|#)"
        text = re.sub(link, rf"\g<1>{address}/{kind}/v{version}/", text)
    return text


# `pre_kernels/integrations` is a link to the folder at the top. Zip archives of the repository and
# git on Windows make a file of it, and then the folder is named instead. With the link an editable
# install is a path, which editors and type checkers follow.
linked = (FOLDER / "pre_kernels" / "integrations").is_dir()
packages = find_packages(str(FOLDER), include=["pre_kernels*"])
folders = {"": "."}
if not linked:
    packages.append("pre_kernels.integrations")
    folders["pre_kernels.integrations"] = "integrations"
setup(
    packages=packages,
    package_dir=folders,
    long_description=page(),
    long_description_content_type="text/markdown",
)
