"""One thread for each process of the demo, and no chatter."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import transformers
from threadpoolctl import threadpool_limits


def quiet() -> Callable[[], None]:
    """Set one thread and no chatter in this process, and return a function that undoes both."""
    log: Any = transformers.logging
    threads = torch.get_num_threads()
    # Loggers of any library, and the bars of saving a model, would get between the demo's own.
    logging.disable(logging.WARNING)
    log.disable_progress_bar()
    # More threads do not help at this width, and take several times as long on a busy machine.
    torch.set_num_threads(1)
    # The thread pools of numpy and scipy get the same limit.
    limits = threadpool_limits(1)

    def restore() -> None:
        limits.unregister()
        torch.set_num_threads(threads)
        log.enable_progress_bar()
        logging.disable(logging.NOTSET)

    return restore
