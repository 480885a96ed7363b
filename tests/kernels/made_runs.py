"""Stored results with samples of known truth."""

import itertools
import statistics

from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.store import Run

MACHINE = {"device": "cpu", "processor": "synthetic", "threads": 1, "torch": "2.13"}


def made_row(samples_us, case="case", impl="native", **more):
    times = {"median_us": statistics.median(itertools.chain(*samples_us))} if samples_us else {}
    return Row("op", impl, case, "float32", "forward", "cpu", samples_us=samples_us, **times | more)


def made_run(rows, **more):
    return Run("rlhf-kernels bench op", dict(MACHINE), rows, **more)
