"""The kernel for the Kernel Hub: `kernels` loads it from its folder, beside the installed package.

Each script runs in a process of its own, since operators stay registered, with the package
`kernels` of .deps/kernels.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verify import ROOT, hub

KERNELS = ROOT / ".deps" / "kernels"
REPO = "pre-kernels/pre-kernels"
# `case` makes the arguments of the loss, and `step` returns loss and gradients.
HEADER = """
import sys
from pathlib import Path
import torch
import kernels

def load(path):
    return kernels.get_local_kernel(Path(path))

def case(seed=0, dim=16, out=24):
    torch.manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, requires_grad=True)
    rows = torch.rand(3, 7) < 0.5
    inputs = randn(3, 7, dim), torch.randn(3, 7, out), randn(20, dim), randn(20), randn(out, 20)
    return *inputs, randn(out), rows

def step(function, *arguments, **options):
    loss = function(*arguments, **options)
    inputs = [x for x in arguments if x is not None and x.requires_grad]
    return loss, *torch.autograd.grad(0.5 * loss, inputs)

def same(left, right):
    assert len(left) == len(right) == 6
    assert all(map(torch.equal, left, right)), (left, right)
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "pre-kernels"
    hub.build(folder)
    return folder


@pytest.fixture(scope="module")
def _kernels() -> None:
    if not KERNELS.is_dir() and importlib.util.find_spec("kernels") is None:
        pytest.skip("needs the package kernels: make .deps/kernels")


def run(script: str, *arguments: object, **environment: str) -> str:
    """Run a script with `kernels`, without a network. Returns what it prints."""
    paths = (str(KERNELS), str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", HEADER + script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_it_has_only_the_core(kernel: Path) -> None:
    tops = {path.name for path in (kernel / "torch-ext" / hub.MODULE).iterdir()}
    assert tops == {"__init__.py", "layers.py", *hub.CORE}
    # The builder refuses to replace a file, and takes this name for an older layout.
    assert not (kernel / "torch-ext" / hub.MODULE / hub.MODULE).exists()
    assert {path.name for path in (kernel / "build" / "torch-cpu").iterdir()} == {
        *tops,
        "_ops.py",
        "metadata.json",
    }
    assert {path.suffix for path in (kernel / "build").rglob("*") if path.is_file()} == {
        ".py",
        ".json",
        ".md",
    }


def test_imports_are_relative_or_allowed(kernel: Path) -> None:
    """The Hub allows the standard library, torch and the kernel itself; the builder's own examples
    import triton."""
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    found = set()
    for path in (kernel / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
            if isinstance(node, ast.ImportFrom) and node.level:
                depth = len(path.relative_to(kernel / "build" / "torch-cuda").parts)
                assert node.level <= depth, f"{path} imports from outside the kernel"
    assert found <= allowed, found - allowed


def test_a_build_can_be_repeated_and_its_namespace_is_its_content(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = hub.build(tmp_path / "again")
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in (kernel, tmp_path / "again")
    ]
    assert files[0] == files[1]
    assert len(set(names.values())) == len(names)
    for backend, name in names.items():
        assert re.fullmatch(rf"_pre_kernels_{backend}_[0-9a-f]{{12}}", name)
    changed = {**hub.sources(), "loss.py": hub.sources()["loss.py"] + b"# changed\n"}
    monkeypatch.setattr(hub, "sources", lambda: changed)
    assert not {*hub.build(tmp_path / "other").values()} & {*names.values()}


def test_the_builder_is_pinned() -> None:
    flake = (ROOT / "hub" / "flake.nix").read_text(encoding="utf-8")
    assert re.findall(r'url = "([^"]*)"', flake)
    for url in re.findall(r'url = "([^"]*)"', flake):
        assert re.fullmatch(r"github:huggingface/kernels/[0-9a-f]{40}", url)


def test_card_and_benchmark_name_repository_and_version() -> None:
    text = (ROOT / "hub" / "build.toml").read_text(encoding="utf-8")
    version = re.search(r"^version = (\d+)$", text, re.MULTILINE)[1]
    assert f'repo-id = "{REPO}"' in text
    card = (ROOT / "hub" / "CARD.md").read_text(encoding="utf-8")
    benchmark = (ROOT / "hub" / "benchmarks" / "benchmark.py").read_text(encoding="utf-8")
    assert f'get_kernel("{REPO}", version={version}' in card
    for page in (card, benchmark):
        assert f"kernels benchmark {REPO} --version {version}" in page
    for name in ("fused_pre_loss", "PreHead", "reference", "PreLoss"):
        assert f"- `{name}`: " in card


@pytest.mark.usefixtures("_kernels")
def test_kernels_reads_configuration_metadata_and_digests(kernel: Path) -> None:
    run(
        """
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
folder = Path(sys.argv[1])
backends = {str(backend) for backend in Build.open(folder).general.backends}
assert backends == {"cpu", "cuda", "rocm"}, backends
for backend in backends:
    variant = folder / "build" / f"torch-{backend}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert str(metadata.name) == "pre-kernels" and metadata.name.python_name == "pre_kernels"
    assert str(metadata.backend.backend_type) == backend and metadata.license == "Apache-2.0"
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
""",
        kernel,
    )


@pytest.mark.usefixtures("_kernels")
def test_it_computes_beside_the_installed_package(kernel: Path) -> None:
    """Loss and gradients have the same bits, with operators of their own, in PyTorch, in
    interpreted Triton kernels, and under torch.compile."""
    run(
        """
import pre_kernels
pre = load(sys.argv[1])
namespace = pre.__name__
assert pre.__all__ == ["PreHead", "fused_pre_loss", "layers", "reference"]
assert pre.fused_pre_loss is not pre_kernels.fused_pre_loss
for impl in ("torch", "triton"):
    for options in ({}, {"reduction": "sum"}, {"loss": "mse", "activation": "silu"}):
        same(
            step(pre.fused_pre_loss, *case(), impl=impl, **options),
            step(pre_kernels.fused_pre_loss, *case(), impl=impl, **options),
        )
same(
    step(pre.reference.pre_loss, *case()),
    step(pre_kernels.reference.pre_loss, *case()),
)
compiled = torch.compile(pre.fused_pre_loss, fullgraph=True, backend="aot_eager")
with torch.profiler.profile() as profile:
    same(step(compiled, *case(), impl="torch"), step(pre.fused_pre_loss, *case(), impl="torch"))
operators = {event.key for event in profile.key_averages() if "pre_kernels" in event.key}
assert operators and all(name.startswith(f"{namespace}::") for name in operators), operators
head = pre.PreHead(16, 20, 24)
torch.nn.ModuleList([head]).requires_grad_()
head(*case()[:2]).backward()
assert all(parameter.grad is not None for parameter in head.parameters())
""",
        kernel,
        TRITON_INTERPRET="1",
    )


@pytest.mark.usefixtures("_kernels")
def test_two_builds_in_one_process(
    kernel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have operators of their own, and are not confused: one returns another loss."""
    text = hub.sources()["loss.py"].decode()
    changed = re.sub(r"\n    return pre_loss\((.*)\)\n$", r"\n    return 3 * pre_loss(\1)\n", text)
    assert changed != text
    other = {**hub.sources(), "loss.py": changed.encode()}
    with monkeypatch.context() as patch:
        patch.setattr(hub, "sources", lambda: other)
        hub.build(tmp_path / "other")
    # The same build at another place shares the operators of the first.
    shutil.copytree(kernel, tmp_path / "copy")
    run(
        """
pre, other = map(load, sys.argv[1:3])
assert pre.__name__ != other.__name__
# Every operator: the gradients of "none" are computed again, those of a retained graph are copies.
losses = pre.fused_pre_loss(*case(), reduction="none")
losses.sum().backward(retain_graph=True)
losses.sum().backward()
assert not hasattr(torch.ops.pre_kernels, "loss")
left, right = (step(module.fused_pre_loss, *case()) for module in (pre, other))
for x, y in zip(left, right):
    torch.testing.assert_close(3 * x, y)
copy = load(sys.argv[3])
same(left, step(copy.fused_pre_loss, *case()))
same(left, step(pre.fused_pre_loss, *case()))
""",
        kernel,
        tmp_path / "other",
        tmp_path / "copy",
    )


@pytest.mark.usefixtures("_kernels")
def test_kernelize_replaces_the_forward_of_a_module(kernel: Path) -> None:
    run(
        """
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_forward_from_hub
from kernels import use_kernel_mapping
pre = load(sys.argv[1])

@use_kernel_forward_from_hub("PreLoss")
class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, _, *parameters, _ = case()
        self.w1, self.b1, self.w2, self.b2 = map(torch.nn.Parameter, parameters)
        self.loss, self.activation = "mse", "silu"
        self.calls = 0

    def forward(self, hidden, anchor, rows=None):
        self.calls += 1
        return pre.reference.pre_loss(
            hidden, anchor, self.w1, self.b1, self.w2, self.b2, rows,
            loss=self.loss, activation=self.activation,
        )

head = Head()
hidden, anchor, *_, rows = case()
before = head(hidden, anchor, rows)
layer = LocalLayerRepository(Path(sys.argv[1]), layer_name="PreLoss")
with use_kernel_mapping({"PreLoss": {"cpu": layer}}):
    kernelize(head, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
after = head(hidden, anchor, rows)
assert head.calls == 1
torch.testing.assert_close(after, before)
(0.5 * after).backward()
parameters = [head.w1, head.b1, head.w2, head.b2]
wanted = step(
    pre.fused_pre_loss, hidden, anchor, *parameters, rows, loss="mse", activation="silu"
)
same((after, hidden.grad, *(x.grad for x in parameters)), wanted)
""",
        kernel,
    )


@pytest.mark.usefixtures("_kernels")
def test_without_triton(kernel: Path) -> None:
    """It loads and computes in PyTorch; what needs triton says so."""
    run(
        """
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
sys.meta_path.insert(0, Missing())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
pre = load(sys.argv[1])
loss, *_ = step(pre.fused_pre_loss, *case())
torch.testing.assert_close(loss, pre.reference.pre_loss(*case()))
try:
    pre.fused_pre_loss(*case(), impl="triton")
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("no error")
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"]
""",
        kernel,
    )


@pytest.mark.usefixtures("_kernels")
def test_the_examples_of_the_card(kernel: Path) -> None:
    card = (kernel / "CARD.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    run(
        f"""
{first}
assert hidden.grad.abs().sum() > 0 and head.w1.grad is not None

def local(repo, *, layer_name, version, trust_remote_code):
    assert (repo, version, trust_remote_code) == ({REPO!r}, 0, True)
    return kernels.LocalLayerRepository(Path({str(kernel)!r}), layer_name=layer_name)

# `LayerRepository` asks the Hub which commit a version is.
kernels.LayerRepository = local
{second}
assert type(own).forward is not own.forward.__func__
torch.testing.assert_close(fused, type(own).forward(own, hidden, anchor, visual))
""",
        LOCAL_KERNELS=f"{REPO}={kernel}",
    )


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="the benchmark runs on the device that torch was built for",
)
@pytest.mark.usefixtures("_kernels")
def test_the_benchmark_runs_and_verifies(kernel: Path, tmp_path: Path) -> None:
    out = tmp_path / "benchmark.json"
    run(
        """
from kernels.cli import main
sys.argv = ["kernels", "benchmark", sys.argv[1], "--iterations", "1", "--warmup", "0",
            "--output", sys.argv[2]]
main()
""",
        kernel,
        out,
    )
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert {result["workload"]: result["verified"] for result in results} == {
        "PreLossBenchmark.small_float32": True,
        "PreLossBenchmark.llava_bfloat16": True,
    }
