"""linear_logprob, forward and backward, beside the four matrix products that it cannot do without.

    python benchmarks/linear_products.py [--rounds 5] [--threads 1] [N E V]

The products are the logits, twice, and the two gradients, each whole and into memory that is there already.
Both sides alternate; the ratio is the median of the rounds' ratios. Memory is the most that a call holds at
once, without its gradients. float32, gradients through both results.
"""

import argparse
import statistics
import time

import torch

import rlhf_kernels as rk
from rlhf_kernels.engine.memory import peak_bytes


def seconds(call):
    """One call's."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Prints one line for each backend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", type=int, metavar="N E V", default=[2048, 512, 50257])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    n, e, v = given.sizes
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, e, generator=generator).requires_grad_()
    weight = (torch.randn(v, e, generator=generator) * 2 / e**0.5).requires_grad_()
    target = torch.randint(0, v, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    rows, table = hidden.detach(), weight.detach()
    logits, grad_hidden, grad_weight = torch.empty(n, v), torch.empty(n, e), torch.empty(v, e)

    def products():
        for _ in range(2):
            torch.mm(rows, table.t(), out=logits)
        torch.mm(logits, table, out=grad_hidden)
        torch.mm(logits.t(), rows, out=grad_weight)

    def fused(name):
        with rk.backend(f"linear_logprob={name}", strict=True):
            torch.autograd.grad(rk.linear_logprob(hidden, weight, target), (hidden, weight), upstream)

    names = ("native", "torch")
    times: dict[str, list[float]] = {"products": [], **{name: [] for name in names}}
    for _ in range(given.rounds + 1):  # the first warms up
        times["products"].append(seconds(products))
        for name in names:
            times[name].append(seconds(lambda name=name: fused(name)))
    base = times["products"][1:]
    print(f"{n}x{e}x{v}, {given.threads} thread(s): four products {statistics.median(base):.2f} s")
    for name in names:
        ratio = statistics.median(a / b for a, b in zip(times[name][1:], base))
        held = peak_bytes(lambda name=name: fused(name), torch.device("cpu"))
        held -= (n * e + v * e) * 4
        median = statistics.median(times[name][1:])
        print(f"{name:8} {median:.2f} s, {ratio:.3f} times the products, {held / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
