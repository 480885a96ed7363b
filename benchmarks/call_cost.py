"""Host time of an eager call with 16 elements and no gradient, beside ATen operators with as many tensors.

    python benchmarks/call_cost.py

Minimum over short interleaved stretches, so that other processes count little. Arguments of an ATen operator
are chosen so that tensors in and out are as many as ours.
"""

import timeit

import torch

import rlhf_kernels as rk

ROUNDS, CALLS = 400, 100


def pairs():
    """(label, our call, ATen's name, ATen's call)."""
    x, y, z = (torch.randn(2, 8) for _ in range(3))
    mask = torch.ones(2, 8, dtype=torch.bool)
    table = rk.rotary_tables(torch.arange(2), 8).query
    weight, bias = torch.ones(8), torch.zeros(8)
    one, norm = torch.ones(2, 1), torch.ops.aten.native_layer_norm.default
    return [
        ("swiglu, packed", lambda: rk.swiglu(x), "neg", lambda: torch.neg(x)),
        ("swiglu, two tensors", lambda: rk.swiglu(x, y), "mul", lambda: torch.mul(x, y)),
        ("rotary", lambda: rk.rotary(x, table), "addcmul", lambda: torch.addcmul(x, y, z)),
        ("masked_normalize", lambda: rk.masked_normalize(x), "neg", lambda: torch.neg(x)),
        ("masked_normalize, mask", lambda: rk.masked_normalize(x, mask), "mul(float, bool)",
         lambda: torch.mul(x, mask)),
        ("gae", lambda: rk.gae(x, y), "_weight_norm_interface (2 in, 2 out)",
         lambda: torch.ops.aten._weight_norm_interface(x, one, 0)),
        ("gae, mask", lambda: rk.gae(x, y, mask=mask), "native_layer_norm (3 in, 3 out)",
         lambda: norm(x, [8], weight, bias, 1e-5)),
        ("layer_norm", lambda: rk.layer_norm(x, weight), "native_layer_norm (3 in, 3 out)",
         lambda: norm(x, [8], weight, bias, 1e-5)),
        ("rms_norm", lambda: rk.rms_norm(x, weight), "native_layer_norm (3 in, 3 out)",
         lambda: norm(x, [8], weight, bias, 1e-5)),
    ]  # fmt: skip


def main() -> None:
    """Prints a Markdown table."""
    torch.set_num_threads(1)
    print(f"| call, 16 elements (torch {torch.__version__}) | us | ATen | us | more |\n|---|---|---|---|---|")
    with torch.no_grad():
        for label, ours, name, aten in pairs():
            rounds = [
                (timeit.timeit(ours, number=CALLS), timeit.timeit(aten, number=CALLS)) for _ in range(ROUNDS)
            ]
            a, b = (min(column) / CALLS * 1e6 for column in zip(*rounds))
            print(f"| `{label}` | {a:.2f} | `{name}` | {b:.2f} | {a - b:+.2f} |")


if __name__ == "__main__":
    main()
