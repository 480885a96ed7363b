"""torch.compile of our functions against their eager calls: a compiled graph must not cost more.

    python benchmarks/compiled.py [--tier smoke] [--seconds 0.3] [op ...]

A graph makes eight calls, each on tensors of its own, as a model's layers would. Both sides run the same
kernels, so what differs is the way to them. Entering a graph costs PyTorch tens of microseconds, however
little is in it, and a call in it some more than an eager one: the last row has that for an operator of
PyTorch's own that its compiler takes as it is. One thread, float32, interleaved rounds of the engine's clock;
times are of one call, `over eager` is the eager time over the compiled one.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from rlhf_kernels.engine import select, stats, table
from rlhf_kernels.engine.bench import BOTH, FORWARD, call_of
from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.clock import Contender, CpuClock, Limits, measure
from rlhf_kernels.engine.implementations import Implementation
from rlhf_kernels.engine.spec import Inputs, as_outputs, load_specs

CALLS = 8


def several(function, names, **given):
    """The outputs of all calls; call i takes the arguments that end in `_i`."""
    return tuple(
        out
        for i in range(CALLS)
        for out in as_outputs(function(**{name: given[f"{name}_{i}"] for name in names}))
    )


def repeated(judge: Judge) -> SimpleNamespace:
    """What `call_of` asks of a judge, for all calls together."""
    copies = [judge.inputs.map(torch.clone).args for _ in range(CALLS)]
    args = {f"{name}_{i}": value for i, one in enumerate(copies) for name, value in one.items()}
    wrt = tuple(f"{name}_{i}" for i in range(CALLS) for name in judge.inputs.wrt)
    return SimpleNamespace(inputs=Inputs(args, wrt), upstream=judge.upstream * CALLS)


def rows_of(measured: select.Measurement, limits: Limits) -> list[list[str]]:
    """One row a direction."""
    judge = Judge(measured.spec, measured.case, measured.dtype)
    eager = partial(several, measured.spec.function, tuple(judge.inputs.args))
    names = (measured.spec.name, measured.case.name)
    return compared(names, eager, repeated(judge), (FORWARD, BOTH)[: len(judge.directions)], limits)


def own_of_pytorch(limits: Limits) -> list[list[str]]:
    """The yardstick, in one direction."""
    copies = {f"input_{i}": torch.randn(4, 16) for i in range(CALLS)}
    given = SimpleNamespace(inputs=Inputs(copies, ()), upstream=())
    return compared(
        ("torch.sort", "4x16"), partial(several, torch.sort, ("input",)), given, (FORWARD,), limits
    )


def compared(
    names: tuple[str, str], eager: Callable[..., Any], given: Any, directions: Sequence[str], limits: Limits
) -> list[list[str]]:
    """Rows of a function and of what torch.compile makes of it."""
    torch._dynamo.reset()
    sides = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True)}
    rows = []
    for direction in directions:
        calls = {name: call_of(Implementation(name, side), given, direction) for name, side in sides.items()}
        samples = measure([Contender(*item) for item in calls.items()], CpuClock(), limits)
        base, head = samples["eager"], samples["compiled"]
        low, high = stats.ratio_ci(base, head)
        times = (table.duration(stats.median(side) * 1e6 / CALLS) for side in (base, head))
        ratio = stats.median(stats.paired(base, head))
        rows.append([*names, direction, *times, f"{ratio:.2f}x", f"{low:.2f} to {high:.2f}"])
    return rows


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help="names of ops; none means all")
    parser.add_argument("--tier", default="smoke", choices=select.TIERS)
    parser.add_argument("--seconds", type=float, default=0.3, help="for a case and direction")
    given = parser.parse_args()
    torch.set_num_threads(1)
    specs = select.select_ops(load_specs(), given.ops)
    chosen = select.measurements(specs, dtypes=["float32"], tiers=[given.tier])
    found = []
    with table.progress(False) as tell:
        for number, one in enumerate(chosen):
            tell(number, len(chosen), " ".join(one.names))
            found += rows_of(one, Limits(seconds=given.seconds))
    found += own_of_pytorch(Limits(seconds=given.seconds))
    columns = ("op", "case", "direction", ">eager", ">compiled", ">over eager", ">95 %")
    table.print_table(columns, found, f"torch {torch.__version__}, one thread, {CALLS} calls in a graph")


if __name__ == "__main__":
    main()
