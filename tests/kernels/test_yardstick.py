"""The plain PyTorch forms are the definitions.

`check` grants twice the error of the plain form, so nothing else would notice if that itself were wrong.
"""

import pytest
import torch

from rlhf_kernels.engine.check import run
from rlhf_kernels.engine.spec import as_outputs, load_specs

CASES = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in load_specs().values()
    for case in spec.cases
    if case.tier in ("smoke", "awkward")
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_plain_form_is_the_definition_in_float64(spec, case):
    inputs = spec.make(case, torch.float64, torch.Generator().manual_seed(0), torch.device("cpu"))
    upstream = ()
    if inputs.wrt:
        upstream = tuple(torch.randn_like(out) for out in as_outputs(spec.torch_form(**inputs.args)))
    got, want = (run(function, inputs, upstream) for function in (spec.torch_form, spec.reference))
    for direction in spec.directions:
        for (name, a), (_, b) in zip(got.named(direction), want.named(direction)):
            scale = b.abs().nan_to_num(posinf=0).max().item() if b.numel() else 0.0
            told = f"{name} differs by %s".__mod__
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, scale), equal_nan=True, msg=told)
