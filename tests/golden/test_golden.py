"""The flags declared in rlhf_kernels/stacks describe what the stacks were recorded to do.

The definitions here are the plainest that have all the flags. Ours are checked by the rooms' tests.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_kernels.stacks import peers
from tests.golden.load import golden, names

SEMANTICS = {(p.package, p.op): dict(p.semantics) for p in peers() if p.op in ("masked_normalize", "gae")}


def normalize(
    x: Tensor,
    mask: Tensor,
    *,
    dim=None,
    eps=1e-5,
    eps_mode="clamp",
    unbiased=False,
    center=True,
    zero_masked=False,
) -> Tensor:
    dims = tuple(range(x.dim())) if dim is None else dim
    n = mask.sum(dims, keepdim=True)
    mean = torch.where(mask, x, 0.0).sum(dims, keepdim=True) / n.clamp(min=1)
    squares = torch.where(mask, x - mean, 0.0).square().sum(dims, keepdim=True)
    var = squares / (n - 1 if unbiased else n.clamp(min=1))
    out = (x - mean) * ((var + eps) if eps_mode == "add" else var.clamp(min=eps)).rsqrt()
    out = out if center else out + mean
    return torch.where(mask, out, 0.0) if zero_masked else out


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, mask_mode: str):
    if mask_mode == "zero":
        rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    counts = mask if mask_mode == "carry" else torch.ones_like(mask)
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantage = torch.where(counts[:, t], step, advantage)
        next_value = torch.where(counts[:, t], values[:, t], next_value)
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, advantages + values


def flags(record) -> dict:
    """The declared semantics, with the keywords that this record was called with."""
    kwargs = dict(record["kwargs"])
    found = SEMANTICS[record["package"], "masked_normalize"]
    if kwargs.pop("whole_batch_of_experiences", False):
        found = found | {"dim": None, "zero_masked": False}
    if "shift_mean" in kwargs:
        kwargs["center"] = kwargs.pop("shift_mean")
    return found | kwargs


def told(record):
    return lambda text: f"{record['function']} {record['case']} {record['kwargs']}: {text}"


def compared(record) -> bool:
    """Records that show the flags: not those where a stack raises or spreads NaN out of masked slots."""
    spreads = record["package"] in ("trl", "openrlhf") and "nan_pads" in record["case"]
    return record["error"] is None and not spreads


@pytest.mark.parametrize("package", ["palm-rlhf-pytorch", "verl", "trl", "openrlhf"])
def test_masked_normalize_flags(package):
    records = [r for r in golden("masked_normalize", package) if compared(r)]
    assert len(records) > 70
    for record in records:
        x = record["inputs"]["x"].double().requires_grad_()
        mask = record["inputs"].get("mask", torch.ones_like(x, dtype=torch.bool))
        if not mask.any() and "whole_batch_of_experiences" in record["kwargs"]:
            continue  # 0 / 0 there, without an error
        out, expected = normalize(x, mask, **flags(record)), record["outputs"]["out"]
        # The recorded float32 computation loses digits of x - mean where the mean is large.
        slack = 1e-3 if "offset" in record["case"] else 2e-5
        scale = expected.abs().nan_to_num(0.0).max().item()
        slack *= max(scale, 1.0)
        torch.testing.assert_close(
            out, expected.double(), atol=slack, rtol=0, equal_nan=True, msg=told(record)
        )
        if out.isfinite().all() and "offset" not in record["case"]:
            (grad,) = torch.autograd.grad(out, x, record["inputs"]["grad_out"].double())
            scale = max(grad.abs().max().item(), 1.0)
            torch.testing.assert_close(grad, record["grads"]["x"].double(), atol=2e-5 * scale, rtol=0)


@pytest.mark.parametrize("package", ["verl", "openrlhf", "trl"])
def test_gae_mask_modes(package):
    mode = SEMANTICS[package, "gae"]["mask_mode"]
    records = [r for r in golden("gae", package) if r["error"] is None and "nan_pads" not in r["case"]]
    assert len(records) > 40
    for record in records:
        inputs, outputs = record["inputs"], record["outputs"]
        arguments = (inputs["rewards"], inputs["values"], inputs["mask"])
        advantages, returns = gae(*arguments, **record["kwargs"], mask_mode=mode)
        torch.testing.assert_close(outputs["returns"], returns, atol=2e-4, rtol=1e-5)
        if "advantages" in outputs:
            torch.testing.assert_close(outputs["advantages"], advantages, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", names())
def test_records_say_where_they_come_from(name):
    for record in golden(name):
        assert record["package"]
        assert record["version"]
        assert record["function"]
        assert bool(record["outputs"]) != bool(record["error"])
