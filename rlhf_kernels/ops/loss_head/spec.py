"""What the engine and the tests need to know of logprob and linear_logprob."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from rlhf_kernels.engine.spec import (
    FLOAT_DTYPES,
    TARGETS,
    Case,
    Cost,
    Direction,
    HostKernel,
    Inputs,
    KernelBuild,
    Knob,
    OpSpec,
    itemsize,
    randn,
)
from rlhf_kernels.ops.loss_head import (
    kernel_torch,
    linear_kernel_torch,
    linear_logprob,
    linear_reference,
    logprob,
    reference,
)

ALL_DTYPES = (*FLOAT_DTYPES, torch.float64)
# On a CPU a float16 product takes 6 to 60 times a float32 one.
FAST_PRODUCTS = (torch.float32, torch.bfloat16)
IGNORED = -100


def _awkward(name: str, dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES, /, **given: object) -> Case:
    """Capital letters are sizes, the rest are options."""
    sizes = {key: value for key, value in given.items() if key.isupper()}
    options = {key: value for key, value in given.items() if not key.isupper()}
    return Case(f"{name}_{'x'.join(map(str, sizes.values()))}", sizes, options, "awkward", dtypes)


# Rows of a large case that the definition sees: ends of blocks of rows and of shares of threads.
FIRST_AND_LAST = {"rows": (0, 1, 511, 512, 777, 1023)}
# `scale`, `offset`: of the logits, whose largest comes last where they are `rising`; `masked`: every third
# token has a logit of -inf, targets too, or all tokens of the beginning have; `memory`: the layout; `groups`:
# so many of rows, each with one more behind it that is left out, as logits[:, :-1] has them.
LOGPROB_CASES = (
    Case("small_8x2048", {"N": 8, "V": 2048}, tier="smoke"),
    Case("gpt2_128x50257", {"N": 128, "V": 50257}),
    Case("shifted_4x64x50257", {"N": 256, "V": 50257}, {"groups": 4}, dtypes=FLOAT_DTYPES[:2]),
    Case("sampling_temperature_512x8192", {"N": 512, "V": 8192}, {"temperature": 0.7}),
    Case("gpt2_1024x50257", {"N": 1024, "V": 50257}, tier="large", checked=FIRST_AND_LAST),
    Case(
        "qwen_8192x151936",
        {"N": 8192, "V": 151936},
        tier="large",
        dtypes=(torch.bfloat16,),
        checked=FIRST_AND_LAST,
    ),
    _awkward("one_token", ALL_DTYPES, N=1, V=1),
    _awkward("one_row", ALL_DTYPES, N=1, V=4099),
    _awkward("ragged", ALL_DTYPES, N=5, V=1031, temperature=1.7),
    _awkward("batched", N=6, V=130, memory="cube"),
    _awkward("strided", ALL_DTYPES, N=5, V=130, memory="strided"),
    _awkward("transposed", N=5, V=130, memory="transposed"),
    _awkward("misaligned", ALL_DTYPES, N=5, V=131, memory="misaligned"),
    _awkward("masked_vocabulary", ALL_DTYPES, N=6, V=257, masked=True),
    _awkward("masked_beginning", ALL_DTYPES, N=4, V=5000, masked="beginning"),
    _awkward("offset", (torch.float32, torch.float64), N=4, V=3000, offset=1000.0, temperature=0.7),
    _awkward("rising", ALL_DTYPES, N=4, V=5000, scale="rising"),
    _awkward("sharp", N=6, V=300, scale=40.0, temperature=0.5),
    _awkward("flat", N=6, V=300, scale=0.0),
    _awkward("empty", N=0, V=8),
)
# `ignored`: every third row; `bias`, `masked` as above, by a bias of -inf.
LINEAR_CASES = (
    Case("small_32x64x512", {"N": 32, "E": 64, "V": 512}, tier="smoke"),
    Case("palm_1024x256x4096", {"N": 1024, "E": 256, "V": 4096}, dtypes=FAST_PRODUCTS),
    Case(
        "gemma_600x128x2048",
        {"N": 600, "E": 128, "V": 2048},
        {"softcap": 30.0, "temperature": 0.7},
        dtypes=FAST_PRODUCTS,
    ),
    Case(
        "palm_2048x512x50257",
        {"N": 2048, "E": 512, "V": 50257},
        tier="large",
        dtypes=FAST_PRODUCTS,
        checked=FIRST_AND_LAST,
    ),
    Case(
        "gpt2_2048x768x50257",
        {"N": 2048, "E": 768, "V": 50257},
        tier="large",
        dtypes=FAST_PRODUCTS,
        checked=FIRST_AND_LAST,
    ),
    Case(
        "mistral_8192x4096x131072",
        {"N": 8192, "E": 4096, "V": 131072},
        tier="large",
        dtypes=FAST_PRODUCTS[1:],
        checked=FIRST_AND_LAST,
    ),
    Case(
        "qwen_8192x4096x151936",
        {"N": 8192, "E": 4096, "V": 151936},
        tier="large",
        dtypes=FAST_PRODUCTS[1:],
        checked=FIRST_AND_LAST,
    ),
    _awkward("one_of_each", ALL_DTYPES, N=1, E=1, V=1),
    _awkward("ragged", ALL_DTYPES, N=5, E=33, V=131, bias=True, temperature=0.7),
    _awkward("one_row_over", N=513, E=16, V=37),
    _awkward("softcap", ALL_DTYPES, N=7, E=24, V=50, softcap=2.0, bias=True, temperature=1.3),
    _awkward("ignored", ALL_DTYPES, N=9, E=24, V=50, ignored=True, bias=True),
    _awkward("ignored_nan", N=9, E=24, V=50, ignored=True, masked_value=math.nan),
    _awkward("masked_vocabulary", N=9, E=24, V=51, bias=True, masked=True),
    _awkward("strided", ALL_DTYPES, N=9, E=24, V=50, memory="strided"),
    _awkward("transposed", N=9, E=24, V=50, memory="transposed"),
    _awkward("empty", N=0, E=8, V=16, bias=True),
)


def _matrix(
    shape: tuple[int, int], case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> Tensor:
    memory = case.options.get("memory")
    if memory == "misaligned":
        return randn((shape[0] * shape[1] + 1,), dtype, generator, device)[1:].view(shape)
    wide = randn((shape[0], shape[1] + 3 * (memory == "strided")), dtype, generator, device)
    return wide.t().contiguous().t() if memory == "transposed" else wide[:, wide.shape[1] - shape[1] :]


def _make_logprob(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Normal logits; targets at random, also on masked tokens."""
    n, v = case.sizes["N"], case.sizes["V"]
    groups = case.options.get("groups", 0)
    logits = _matrix((n + groups, v), case, dtype, generator, device)
    if case.options.get("scale") == "rising":
        logits = logits + torch.linspace(-30, 30, v, device=device).to(dtype)
    elif "scale" in case.options:
        logits = logits * case.options["scale"]
    if "offset" in case.options:
        logits = logits + case.options["offset"]
    target = torch.randint(0, v, (n,), generator=generator).to(device)
    if case.options.get("masked") == "beginning":
        logits[:, : v // 2] = -math.inf
    elif case.options.get("masked"):
        logits[:, ::3] = -math.inf
        target[::2] -= target[::2] % 3
    if case.options.get("memory") == "cube":
        logits, target = logits.view(2, n // 2, v).transpose(0, 1), target.view(n // 2, 2)
    if groups:
        logits, target = logits.view(groups, -1, v)[:, :-1], target.view(groups, -1)
    return Inputs({"logits": logits, "target": target} | _given(case, "temperature"), wrt=("logits",))


def _make_linear(case: Case, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> Inputs:
    """Hidden states and weights that give logits of about 2."""
    n, e, v = (case.sizes[letter] for letter in "NEV")
    hidden = _matrix((n, e), case, dtype, generator, device)
    weight = _matrix((v, e), case, dtype, generator, device).mul_(2 / math.sqrt(e))
    target = torch.randint(0, v, (n,), generator=generator).to(device)
    if case.options.get("ignored"):
        target[::3] = IGNORED
        hidden[::3] *= case.options.get("masked_value", 1.0)
    args = {"hidden": hidden, "weight": weight, "target": target} | _given(case, "temperature", "softcap")
    wrt = ("hidden", "weight")
    if case.options.get("bias"):
        args["bias"] = randn((v,), dtype, generator, device)
        wrt = (*wrt, "bias")
        if case.options.get("masked"):
            args["bias"][::3] = -math.inf
    return Inputs(args, wrt)


def _given(case: Case, *names: str) -> dict[str, object]:
    return {name: case.options[name] for name in names if name in case.options}


def _narrow(
    inputs: Inputs, checked: Mapping[str, tuple[int, ...]]
) -> tuple[Inputs, Callable[[Tensor], Tensor]]:
    """Some of the rows: they do not depend on one another, and weight and bias belong to all of them."""
    rows = list(checked["rows"])
    by_row = {name: inputs.args[name][rows] for name in ("logits", "hidden", "target") if name in inputs.args}
    return Inputs(inputs.args | by_row, inputs.wrt), lambda x: x[rows]


def _kernels() -> Iterator[KernelBuild]:
    """Both directions in every dtype for every target; float64, whose temperature lies in memory, for one."""
    from rlhf_kernels.ops.loss_head import kernel_triton as k

    for dtype in ("fp32", "bf16", "fp16", "fp64"):
        wide = "*fp64" if dtype == "fp64" else "*fp32"
        by_row = {f"{name}_ptr": wide for name in ("entropy", "peak", "log_total")}
        sizes = dict.fromkeys(("stride", "group", "apart", "size"), "i32")
        sizes["temperature"] = "*fp64" if dtype == "fp64" else "fp32"
        given = {"logits_ptr": f"*{dtype}", "target_ptr": "*i64"}
        forward = given | {"logprob_ptr": wide} | by_row | sizes
        grads = {"grad_logprob_ptr": wide, "grad_entropy_ptr": wide}
        backward = given | by_row | grads | {"out_ptr": f"*{dtype}", "out_stride": "i32"} | sizes
        builds = (("forward", k.forward_kernel, forward), ("backward", k.backward_kernel, backward))
        for direction, kernel, signature in builds:
            aligned = tuple(a for a in signature if a.endswith(("ptr", "stride", "size", "apart")))
            for target in TARGETS if dtype != "fp64" else ("sm_90",):
                yield KernelBuild(
                    f"{direction}/{dtype}", kernel, signature, {"BLOCK": k.BLOCK}, target,
                    num_warps=k.NUM_WARPS, aligned=aligned,
                )  # fmt: skip


def _host_logprob(host, backward: bool):  # noqa: ANN001
    import numpy

    logits = (numpy.arange(8 * 5001, dtype=numpy.float32) * 0.37 % 11).reshape(8, 5001)
    target = numpy.arange(8)
    if not backward:
        return lambda: host.logprob(logits, target)
    one, peak = numpy.ones(8, numpy.float32), logits.max(-1)
    return lambda: host.logprob_backward(one, one, logits, target, 8 * one, peak, 6 * one)


def _cost_logprob(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """Forward reads the logits, backward reads them and writes their gradient; the rest is small."""
    n, v = case.sizes["N"], case.sizes["V"]
    size, accumulated = itemsize(dtype), itemsize(torch.promote_types(dtype, torch.float32))
    if direction == "forward":
        return Cost(flops=6 * n * v, bytes=n * v * size + n * (8 + 2 * accumulated))
    return Cost(flops=7 * n * v, bytes=2 * n * v * size + n * (8 + 4 * accumulated))


def _cost_linear(case: Case, dtype: torch.dtype, direction: Direction) -> Cost:
    """One product forward; backward computes it again and takes two for the gradients."""
    n, e, v = (case.sizes[letter] for letter in "NEV")
    products, passes = (1, 1) if direction == "forward" else (3, 2)
    moved = (n * e + v * e) * passes * itemsize(dtype)
    return Cost(flops=products * 2 * n * e * v, bytes=moved + n * 16)


SPECS = (
    OpSpec(
        name="logprob",
        family="loss_head",
        summary="log-probability of a token and entropy in one pass over the logits",
        function=logprob,
        reference=reference.logprob,
        torch_form=kernel_torch.logprob,
        make=_make_logprob,
        cost=_cost_logprob,
        cases=LOGPROB_CASES,
        outputs=("logprob", "entropy"),
        floor=4.0,
        narrow=_narrow,
        kernels=_kernels,
        host_kernels=(
            HostKernel("logprob", lambda host: _host_logprob(host, False)),
            HostKernel("logprob_backward", lambda host: _host_logprob(host, True)),
        ),
        knobs=(Knob("grain", "native", (32768, 8192, 131072)),),
    ),
    OpSpec(
        name="linear_logprob",
        family="loss_head",
        summary="the same from hidden states, the logits never held",
        function=linear_logprob,
        reference=linear_reference.linear_logprob,
        torch_form=linear_kernel_torch.linear_logprob,
        make=_make_linear,
        cost=_cost_linear,
        cases=LINEAR_CASES,
        outputs=("logprob", "entropy"),
        floor=8.0,
        narrow=_narrow,
    ),
)
