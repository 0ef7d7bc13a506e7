"""Peak memory of one step on the CPU, in a process of its own:
`python -m bench.peak_memory SHAPE DTYPE PEER ROWS [MIB]`.

It prints {"peak_mib", "returned_mib"}. The first is the rise of the process's resident memory
during the second of two steps, above its value before that step. So it excludes the inputs, the
code and what the first step left cached, and includes the returned gradients and the scratch memory
of libraries. The second is the size of those gradients. Large blocks are mapped one by one
(MALLOC_MMAP_THRESHOLD_), so that only memory in use counts: by default glibc keeps some free
blocks, a seventh more or less from run to run. MIB is the workspace, for those of ours that take
one.
"""

from __future__ import annotations

import json
from functools import partial

import torch

from pre_kernels.check.memory import fresh, second

from . import ROOT, baselines, shapes, where


def peak(
    shape: str, dtype: str, name: str, rows: str, workspace: int | None = None
) -> tuple[float, float]:
    """Return (peak, returned) in MiB of a baseline, with that many MiB of workspace, measured in a
    fresh process."""
    given = [] if workspace is None else [str(workspace)]
    result = fresh("bench.peak_memory", shape, dtype, name, rows, *given, folder=ROOT)
    return result["peak_mib"], result["returned_mib"]


def main() -> None:
    parser = where.parser(__doc__)
    add = parser.add_argument
    for name in ("shape", "dtype", "peer", "rows"):
        add(name)
    add("workspace", nargs="?", type=int, metavar="MIB")
    arguments = parser.parse_args()

    shape = shapes.BY_NAME[arguments.shape]
    dtype = shapes.DTYPES[arguments.dtype]
    baseline = baselines.BY_NAME[arguments.peer]
    case = shapes.case(shape, dtype, torch.device("cpu"), arguments.rows)
    case = baselines.own_case(baseline, case)
    options = {} if arguments.workspace is None else {"workspace": arguments.workspace << 20}
    step = (
        baselines.step(partial(baseline.build(), **options), case)
        if baseline.build
        else baselines.floor(case)
    )
    rise, returned = second(step)
    print(json.dumps({"peak_mib": rise, "returned_mib": sum(x.nbytes for x in returned) / 2**20}))


if __name__ == "__main__":
    main()
