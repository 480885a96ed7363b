"""What each command of `rlhf-kernels` does with its parsed arguments; cli.py says which there are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rlhf_kernels.engine import campaign, select, show, store, table, tune
from rlhf_kernels.engine import doctor as examination
from rlhf_kernels.engine.clock import Limits
from rlhf_kernels.engine.conditions import WorkerError, running
from rlhf_kernels.engine.fingerprint import fingerprint
from rlhf_kernels.engine.implementations import names
from rlhf_kernels.engine.row import Row, dtype_name
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.spec import Case, OpSpec, load_specs
from rlhf_kernels.runtime.dispatch import BACKENDS

OK, REGRESSION, INCORRECT, ENVIRONMENT, USAGE, SOFTWARE, INTERRUPTED = 0, 1, 2, 3, 64, 70, 130


def _specs(args: argparse.Namespace) -> list[OpSpec]:
    return select.select_ops(load_specs(args.specs), [*args.ops, *getattr(args, "more_ops", [])])


def _device(args: argparse.Namespace) -> str:
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = args.device or here
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: expected cpu or cuda")
    if device == "cuda" and here == "cpu":
        raise UsageError("there is no GPU here: torch.cuda.is_available() is False (rlhf-kernels doctor)")
    return device


def _place(args: argparse.Namespace, seconds: float, threads: int) -> campaign.Place:
    limits = Limits(seconds=args.seconds or seconds, precision=args.precision)
    return campaign.Place(_device(args), args.threads or threads, limits, args.specs)


def _first_dtype(device: str) -> Callable[[Case], Sequence[torch.dtype]]:
    """What is timed by default: float32 on the CPU, bfloat16 on a GPU, where the case has it."""
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    return lambda case: (usual,) if usual in case.dtypes else case.dtypes[:1]


def print_json(value: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(value, indent=1, allow_nan=False))


def _write(args: argparse.Namespace, run: store.Run) -> None:
    if args.out:
        store.append(args.out, run)
        print(f"{len(run.rows) + len(run.outcomes)} rows appended to {args.out}", file=sys.stderr)


def _out(args: argparse.Namespace) -> None:
    if args.out and args.out.is_dir():
        raise UsageError(f"--out {args.out} is a directory: expected a file such as results.jsonl")


def doctor(args: argparse.Namespace) -> int:
    """Show what runs here and what does not, with the reason and the remedy.

    Backends per device, the choice for every op, versions, compilers, the native build, the tuned table,
    peers and the conditions of a timing.
    """
    findings = examination.findings()
    if args.json:
        print_json([dataclasses.asdict(one) for one in findings])
    else:
        show.doctor(findings)
    return OK


def list_ops(args: argparse.Namespace) -> int:
    """List the ops, or the cases of those that are named."""
    specs = _specs(args)
    if args.json:
        print_json([_described(spec) for spec in specs])
    elif args.ops:
        for spec in specs:
            show.cases(spec)
    else:
        show.ops(specs)
    return OK


def _described(spec: OpSpec) -> dict[str, Any]:
    cases = [dataclasses.asdict(c) | {"dtypes": [dtype_name(d) for d in c.dtypes]} for c in spec.cases]
    return {
        "op": spec.name, "family": spec.family, "summary": spec.summary, "backends": spec.op.declared(),
        "directions": spec.directions, "implementations": names(spec), "cases": cases,
    }  # fmt: skip


def check(args: argparse.Namespace) -> int:
    """Hold every backend against its definition in float64, forward and every gradient.

    An error may be twice that of plain PyTorch at the same dtype. Memory is filled with NaN before, inputs
    are compared after, and a second run must give the same bits. TRITON_INTERPRET=1 checks Triton kernels
    without a GPU. Exits with 2 where something is incorrect.
    """
    _out(args)
    specs, device = _specs(args), _device(args)
    backends = select.known("backend", args.backend, BACKENDS)
    tiers = args.tier or ("smoke", "typical", "awkward")
    chosen = select.measurements(specs, args.case, args.dtype, tiers)
    run = store.Run(args.line, fingerprint(device))
    place = campaign.Place(device, package=args.specs)
    with table.progress(args.quiet) as tell, _Keeping(run) as kept:
        run.rows.extend(campaign.check(chosen, backends, place, tell))
    _write(args, run)
    if args.json:
        print_json(run.to_json())
    else:
        show.check(run.rows, args.verbose)
    return kept.code or _code(run.rows)


def bench(args: argparse.Namespace) -> int:
    """Check, then time every implementation side by side: eager, torch.compile, backends, installed peers.

    Runs in processes of their own under fixed conditions. A time without a passed check is not shown. The
    interpreter is never timed. Exits with 2 where one of our own implementations is incorrect.
    """
    _out(args)
    specs = _specs(args)
    place = _place(args, seconds=2.0, threads=1)
    known = dict.fromkeys(name for spec in specs for name in names(spec))
    wanted = select.known("implementation", args.backend, known)
    (baseline,) = select.known("implementation", [args.baseline], known)
    tiers = args.tier or ("smoke", "typical")
    chosen = select.measurements(specs, args.case, args.dtype, tiers, _first_dtype(place.device))
    chosen = [m for m in chosen if m.case.tier != "awkward"]
    if not chosen:
        raise UsageError("awkward cases are checked, not timed: rlhf-kernels check")
    run = store.Run(args.line, fingerprint(place.device, place.threads))
    rows: dict[tuple[str, ...], list[Row]] = {}
    with table.progress(args.quiet) as tell, _Keeping(run) as kept:
        campaign.bench(chosen, wanted, place, tell, args.processes, baseline, rows)
    run.rows = campaign.gather(rows)
    _write(args, run)
    if args.json:
        print_json(run.to_json())
    else:
        show.bench(run.rows, load_specs(args.specs))
        table.print_notes([*show.how_timed(run.rows), *_noise(place), f"Again: {args.line}"])
    return kept.code or _code(run.rows)


def _noise(place: campaign.Place) -> list[str]:
    """A warning where more ran than what was timed."""
    others = running() - place.threads
    return [f"Careful: {others:.0f} other processes were running on this machine."] if others > 0.5 else []


def tune_ops(args: argparse.Namespace) -> int:
    """Find the best values of the knobs that ops declare, and store them for this machine.

    Every value is checked before it may win and is timed beside the default, which always competes. The table
    is read back at run time: rlhf-kernels doctor says how many of its entries apply.
    """
    _out(args)
    specs = _specs(args)
    place = _place(args, seconds=1.0, threads=torch.get_num_threads())
    backends = select.known("backend", args.backend, BACKENDS) or list(BACKENDS)
    able = [spec for spec in specs if set(tune.tunable(spec, place.device)) & set(backends)]
    if not able:
        asked = ", ".join(spec.name for spec in specs)
        raise UsageError(f"nothing to tune on {place.device}: no knob of {asked} for these backends")
    tiers = args.tier or ("smoke", "typical")
    chosen = select.measurements(able, args.case, args.dtype, tiers, _first_dtype(place.device))
    outcomes: list[tune.Outcome] = []
    path, run = None, store.Run(args.line, fingerprint(place.device, place.threads))
    with table.progress(args.quiet) as tell, _Keeping(run) as kept:
        for outcome in campaign.tune(chosen, backends, place, tell):
            outcomes.append(outcome)
            if outcome.timings_us:
                path = tune.store(outcome.entry(place.device, place.threads))
    run.outcomes = [dataclasses.asdict(one) for one in outcomes]
    _write(args, run)
    if args.json:
        print_json(run.to_json() | {"table": str(path) if path else None})
    else:
        show.tune(outcomes)
        table.print_notes([f"Stored in {path}. Again: {args.line}"] if path else ["Nothing was stored."])
    return kept.code or (INCORRECT if any(one.refused for one in outcomes) else OK)


def budget(args: argparse.Namespace) -> int:
    """Compile every kernel for every target and compare the result with committed budgets.

    Registers, spills, shared memory, matrix instructions, and instruction counts of the CPU kernels. Needs no
    GPU. Exits with 1 where a budget is exceeded, with 2 where a kernel does not compile and with 3 where the
    budgets were recorded with other compilers.
    """
    from rlhf_kernels.engine import budget as guards

    try:
        rows = guards.run(args.ops, args.target, args.kind, args.update, args.reason, package=args.specs)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json(rows)
    else:
        show.budget(rows, args.verbose)
    return guards.exit_code(rows)


class _Keeping:
    """Ends a measurement where it is interrupted or its process dies, and keeps what there is."""

    def __init__(self, run: store.Run) -> None:
        self.run = run
        self.code = OK

    def __enter__(self) -> _Keeping:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if kind not in (KeyboardInterrupt, WorkerError):
            return False
        self.run.complete = False
        self.code = INTERRUPTED if kind is KeyboardInterrupt else SOFTWARE
        table.complain(f"{error or 'interrupted'}: what follows is what was measured so far")
        return True


def _code(rows: Iterable[Row]) -> int:
    """The exit code of rows; what is wrong with a peer or with torch.compile is not our failure."""
    wrong = any(row.status in ("incorrect", "error") and row.impl in BACKENDS for row in rows)
    return INCORRECT if wrong else OK
