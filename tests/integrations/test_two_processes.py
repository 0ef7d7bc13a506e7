"""Two processes: DDP through the Trainer, and FSDP2."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import torch
from pre_kernels.integrations import apply_pre
from tiny_models import batch, build
from tiny_training import UNEQUAL_IMAGES, assert_head, by_hand

WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, {here!r})
import test_two_processes as t
from tiny_training import UNEQUAL_IMAGES, train
for family in {families}:
    options = dict(per_device_train_batch_size=1, ddp_backend="gloo", ddp_find_unused_parameters=True)
    found, _, _ = train(family, UNEQUAL_IMAGES, Path({folder!r}), 2, patched=True, **options)
    if torch.distributed.get_rank() == 0:
        torch.save(found, {folder!r} + "/" + family)
t.check_fsdp()
# left to the interpreter's exit, gloo's threads may be ended while they run: the process aborts
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def check_fsdp() -> None:
    """Attached before sharding, the head under the root or a group of its own: gradients are the ranks' mean."""
    from torch.distributed.fsdp import fully_shard

    data = batch("llava", seed=torch.distributed.get_rank())
    for own in (False, True):
        model = build("llava")
        apply_pre(model)
        twin = copy.deepcopy(model)
        for layer in model.model.language_model.layers:
            fully_shard(layer)
        if own:
            fully_shard(model.pre_head)
        fully_shard(model)
        for which in (model, twin):
            which(**data.inputs).loss.backward()
        for (name, sharded), whole in zip(model.named_parameters(), twin.parameters(), strict=True):
            if whole.grad is not None:
                torch.distributed.all_reduce(whole.grad)
                wanted = whole.grad / 2
                torch.testing.assert_close(sharded.grad.full_tensor(), wanted, msg=lambda m, n=name: f"{n}: {m}")


def test_two_processes(tmp_path: Path) -> None:
    """The step's tokens are counted over both processes, one of which has a micro-batch without images; and FSDP2."""
    families = ["llava", "qwen2_5_vl"]
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(here=str(Path(__file__).parent), families=families, folder=str(tmp_path)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for family in families:
        tokens = sum(int(batch(family, [s]).visual.sum()) for s in UNEQUAL_IMAGES)
        wanted = by_hand(family, UNEQUAL_IMAGES, apply_pre(build(family)), [1 / tokens] * 4, "sum")
        assert_head(torch.load(tmp_path / family), wanted)
