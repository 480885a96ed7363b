"""torch.compile of our functions against their eager calls: a compiled graph must not cost more.

    python benchmarks/compiled.py [--tier smoke] [--seconds 0.3] [op ...]

A graph makes eight calls, each on tensors of its own, as a model's layers would: entering a compiled graph
costs tens of microseconds however little is in it, which is PyTorch's and is not asked here. Both sides run
the same kernels, so what differs is the way to them. One thread, float32, interleaved rounds of the engine's
clock; times are of one call, `over eager` is the eager time over the compiled one.
"""

import argparse
from functools import partial
from types import SimpleNamespace

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
    torch._dynamo.reset()
    eager = partial(several, measured.spec.function, tuple(judge.inputs.args))
    sides = {"eager": eager, "compiled": torch.compile(eager, fullgraph=True)}
    rows = []
    for direction in (FORWARD, BOTH)[: len(judge.directions)]:
        calls = {
            name: call_of(Implementation(name, side), repeated(judge), direction)
            for name, side in sides.items()
        }
        samples = measure([Contender(*item) for item in calls.items()], CpuClock(), limits)
        base, head = samples["eager"], samples["compiled"]
        low, high = stats.ratio_ci(base, head)
        times = (table.duration(stats.median(side) * 1e6 / CALLS) for side in (base, head))
        ratio = stats.median(stats.paired(base, head))
        name = (measured.spec.name, measured.case.name, direction)
        rows.append([*name, *times, f"{ratio:.2f}x", f"{low:.2f} to {high:.2f}"])
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
    columns = ("op", "case", "direction", ">eager", ">compiled", ">over eager", ">95 %")
    table.print_table(columns, found, f"torch {torch.__version__}, one thread, {CALLS} calls in a graph")


if __name__ == "__main__":
    main()
