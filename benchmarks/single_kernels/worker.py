"""The process that compares and times kernels; bench_kernels.py watches over it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import torch

import harness
from pruned_ops.ops.registry import BACKENDS
from single_kernels.cases import Place
from single_kernels.journal import Facts, GpuLost, Journal
from single_kernels.right import check_all
from single_kernels.sweep import Sweep, in_order

DTYPES = {"cuda": (torch.float16, torch.bfloat16), "cpu": (torch.float32,)}


def check_and_time(
    arguments: Namespace, path: Path, end: float, tell: Callable[[Facts], None], done: Collection[Facts]
) -> None:
    """Make every attempt that no earlier process made. arguments: bench_kernels.py's. path, end, tell, done:
    as of a Journal. Errors: GpuLost."""
    tiny = arguments.device == "cpu"
    torch.manual_seed(0)
    with Journal(path, end, done, tell, harness.gpu_is_lost) as journal, torch.inference_mode():
        if not done:
            journal.write({"verdict": "stamp", **harness.stamp()})
            gpu = "none" if tiny else torch.cuda.get_device_name()
            backends = {name: backend.missing or "ready" for name, backend in BACKENDS.items()}
            journal.note("runs on", gpu=gpu, torch=torch.__version__, **backends)
        places = [Place(dtype, arguments.device) for dtype in DTYPES[arguments.device]]
        sweep = Sweep(journal, places[0], tiny)
        sections = [partial(section, sweep) for section in in_order(arguments.only_times)]
        if not arguments.only_times:
            sections = [*(partial(check_all, journal, place, tiny) for place in places), *sections]
        for section in sections:
            try:
                section()
            except GpuLost:
                raise
            except Exception as error:  # the next section may run
                journal.failed(error, section=section.func.__name__)
