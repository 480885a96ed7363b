"""What first calls do, done before training begins."""

from __future__ import annotations

import torch

from rlhf_kernels.engine import select
from rlhf_kernels.engine.bench import BOTH, FORWARD, call_of
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.implementations import Implementation
from rlhf_kernels.engine.spec import OpSpec, load_specs
from rlhf_kernels.runtime.dispatch import Choice, explain


def warm_up(
    *ops: str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    tier: str = "smoke",
) -> list[Choice]:
    """Chooses backends, reads the tuned table, loads libraries and compiles kernels now, by calling each op.

    Nothing tunes itself while a program runs: that is `rlhf-kernels tune`, a command. What a first call does
    take is loading on a CPU (tens of milliseconds) and compilation of Triton kernels on a GPU (seconds, once
    on a disk). A head size or an option that no case of the tier has is compiled when it is first met: a step
    on data of your own warms that up. Set the number of threads before, since choices stay as they are made.

    Args:
        ops: names of functions; none means all.
        device: where the calls are made.
        dtype: of the inputs; ops without a case in this dtype are left out.
        tier: whose cases are called, forward and backward: "smoke" (small), "typical" or "large".

    Returns:
        What was chosen for each op that was called.

    Raises:
        ValueError: no such op or tier.
    """
    select.known("tier", [tier], select.TIERS)
    called = [
        spec.op.name
        for spec in select.select_ops(load_specs(), ops)
        if _called(spec, torch.device(device), dtype, tier)
    ]
    return [explain(name, device=device, dtype=dtype) for name in dict.fromkeys(called)]


def _called(spec: OpSpec, device: torch.device, dtype: torch.dtype, tier: str) -> bool:
    cases = [case for case in spec.cases if case.tier == tier and dtype in case.dtypes]
    for case in cases:
        judge = Judge(spec, case, dtype, device)
        direction = BOTH if judge.differentiable else FORWARD
        call_of(Implementation("", spec.function), judge, direction)()
    return bool(cases)
