"""What each command of `rlhf-kernels` does with its parsed arguments; cli.py says which there are."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from rlhf_kernels.engine import baselines, campaign, roofs, select, show, store, table, tune
from rlhf_kernels.engine import doctor as examination
from rlhf_kernels.engine.clock import Limits
from rlhf_kernels.engine.conditions import running
from rlhf_kernels.engine.fingerprint import fingerprint, machine_id
from rlhf_kernels.engine.implementations import names
from rlhf_kernels.engine.keeping import (
    ENVIRONMENT,
    INCORRECT,
    OK,
    SOFTWARE,
    Keeping,
    check_out,
    print_json,
    write,
)
from rlhf_kernels.engine.row import Row, dtype_name
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.spec import Case, OpSpec, load_specs
from rlhf_kernels.runtime import tuned
from rlhf_kernels.runtime.dispatch import BACKENDS
from rlhf_kernels.runtime.files import cache_directory

_ABSENT = "does not run here on {}; rlhf-kernels doctor says how to mend it"


def specs_of(args: argparse.Namespace) -> list[OpSpec]:
    """The specs of the named ops; all where none is named."""
    return select.select_ops(load_specs(args.specs), [*args.ops, *getattr(args, "more_ops", [])])


def device_of(args: argparse.Namespace) -> str:
    """The device asked for, or the one there is."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    device = args.device or here
    if device not in ("cpu", "cuda"):
        raise UsageError(f"unknown device {device!r}: expected cpu or cuda")
    if device == "cuda" and here == "cpu":
        raise UsageError("there is no GPU here: torch.cuda.is_available() is False (rlhf-kernels doctor)")
    return device


def _place(args: argparse.Namespace, seconds: float, threads: int) -> campaign.Place:
    limits = Limits(seconds=args.seconds or seconds, precision=args.precision)
    return campaign.Place(device_of(args), args.threads or threads, limits, args.specs)


def first_dtype(device: str) -> Callable[[Case], Sequence[torch.dtype]]:
    """What is timed by default: float32 on the CPU, bfloat16 on a GPU, where the case has it."""
    usual = torch.float32 if device == "cpu" else torch.bfloat16
    return lambda case: (usual,) if usual in case.dtypes else case.dtypes[:1]


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
    specs = specs_of(args)
    if args.json:
        print_json([_described(spec) for spec in specs])
    elif args.ops:
        for spec in specs:
            show.cases(spec)
    else:
        show.ops(specs)
    return OK


def _described(spec: OpSpec) -> dict[str, Any]:
    cases = []
    for case in spec.cases:
        told = {"options": {name: _plain(option) for name, option in case.options.items()}}
        cases.append(dataclasses.asdict(case) | told | {"dtypes": [dtype_name(d) for d in case.dtypes]})
    return {
        "op": spec.name, "family": spec.family, "summary": spec.summary, "backends": spec.op.declared(),
        "directions": spec.directions, "implementations": names(spec), "cases": cases,
    }  # fmt: skip


def _plain(option: Any) -> Any:
    """An option as JSON has it: NaN and infinities as words."""
    return str(option) if isinstance(option, float) and not math.isfinite(option) else option


def check(args: argparse.Namespace) -> int:
    """Hold every backend against its definition in float64, forward and every gradient.

    An error may be twice that of plain PyTorch at the same dtype. Memory is filled with NaN before, inputs
    are compared after, and a second run must give the same bits. TRITON_INTERPRET=1 checks Triton kernels
    without a GPU. Exits with 2 where something is incorrect, with 3 where none of the backends named
    runs here.
    """
    check_out(args)
    specs, device = specs_of(args), device_of(args)
    backends = select.known("backend", args.backend, BACKENDS)
    tiers = args.tier or ("smoke", "typical", "awkward")
    chosen = select.measurements(specs, args.case, args.dtype, tiers)
    run = store.Run(args.line, fingerprint(device))
    place = campaign.Place(device, package=args.specs)
    with table.progress(args.quiet) as tell, Keeping(run) as kept:
        run.rows.extend(campaign.check(chosen, backends, place, tell))
    nothing = not kept.code and backends and all(row.status == "unavailable" for row in run.rows)
    try:
        if args.json:
            print_json(run.to_json())
        else:
            show.check(run.rows, args.verbose)
    finally:
        write(args, run)
    if nothing:
        table.complain(_not_here(specs, backends, device))
        return ENVIRONMENT
    return kept.code or _code(run.rows)


def _not_here(specs: Sequence[OpSpec], backends: Sequence[str], device: str) -> str:
    declared = dict.fromkeys(name for spec in specs for name in spec.op.declared())
    asked = f"rlhf-kernels: nothing was checked: --backend {','.join(backends)}"
    if not set(backends) & set(declared):
        return f"{asked} names none that these ops have: expected some of {', '.join(declared)}"
    return f"{asked} {_ABSENT.format(device)}"


def bench(args: argparse.Namespace) -> int:
    """Check, then time every implementation side by side: eager, torch.compile, backends, installed peers.

    Runs in processes of their own under fixed conditions. A time without a passed check is not shown. The
    interpreter is never timed. Exits with 2 where one of our own implementations is incorrect, with 3 where
    nothing that --impl names runs here: eager PyTorch, the yardstick, is timed all the same.
    """
    check_out(args)
    specs = specs_of(args)
    place = _place(args, seconds=1.0, threads=1)
    known = dict.fromkeys(name for spec in specs for name in names(spec))
    wanted = select.known("implementation", args.backend, known)
    if without := select.known("implementation", args.without, known):
        wanted = [name for name in wanted or known if name not in without]
        if not wanted:
            raise UsageError(f"nothing is left to time without {', '.join(without)}")
    (baseline,) = select.known("implementation", [args.baseline], known)
    tiers = args.tier or ("smoke", "typical")
    chosen = select.measurements(specs, args.case, args.dtype, tiers, first_dtype(place.device))
    chosen = [m for m in chosen if m.case.tier != "awkward"]
    if not chosen:
        raise UsageError("awkward cases are checked, not timed: rlhf-kernels check")
    if args.save_baseline and (reason := store.unwritable(baselines.path_of(args.save_baseline))):
        raise UsageError(f"the baseline {args.save_baseline} cannot be written: {reason}")
    if reason := store.unwritable(cache_directory() / "roofs.json"):
        table.complain(f"what this machine can do is measured anew: the cache cannot be written: {reason}")
    run = store.Run(args.line, fingerprint(place.device, place.threads))
    processes = args.processes or (5 if args.save_baseline else 1)
    gathered: list[dict[tuple[str, ...], list[Row]]] = []
    with table.progress(args.quiet) as tell, Keeping(run) as kept:
        for _ in range(args.runs):
            gathered.append({})
            campaign.bench(chosen, wanted, place, tell, processes, baseline, gathered[-1])
    if known_roofs := roofs.remembered(machine_id(run.fingerprint)):
        run.roofs = dataclasses.asdict(known_roofs)
    runs = _repeated(run, gathered)
    run.rows = merged_rows(runs)
    try:
        if args.json:
            print_json(run.to_json())
        else:
            show.bench(run.rows, load_specs(args.specs))
            table.print_notes([*show.how_timed(run.rows), *_noise(place), f"Again: {args.line}"])
    finally:
        write(args, *runs)
        if args.save_baseline:
            _save(args.save_baseline, runs, whole=not kept.code)
    code = kept.code or _code(run.rows)
    if not code and args.backend and all(r.status == "unavailable" for r in run.rows if r.impl in wanted):
        asked = ",".join(args.backend)
        table.complain(f"rlhf-kernels: nothing was timed: --impl {asked} {_ABSENT.format(place.device)}")
        return ENVIRONMENT
    return code


def _save(name: str, runs: Sequence[store.Run], whole: bool) -> None:
    if not whole:
        table.complain(f"the baseline {name} is as it was: these runs are not complete")
        return
    path = baselines.save(name, runs)
    print(f"baseline {name}: {len(runs)} runs kept in {path}", file=sys.stderr)


def _repeated(run: store.Run, gathered: Sequence[dict[tuple[str, ...], list[Row]]]) -> list[store.Run]:
    """One run a repetition, of one session; only the last of an interrupted command is incomplete."""
    runs = [dataclasses.replace(run, rows=campaign.gather(rows), complete=True) for rows in gathered]
    runs[-1].complete = run.complete
    return runs


def merged_rows(runs: Sequence[store.Run]) -> list[Row]:
    """The rows of repeated runs as one run's."""
    rows: dict[tuple[str, ...], list[Row]] = {}
    for run in runs:
        for row in run.rows:
            rows.setdefault(row.key, []).append(row)
    return campaign.gather(rows)


def _noise(place: campaign.Place) -> list[str]:
    """A warning where more ran than what was timed."""
    others = round(running() - place.threads)
    if others < 1:
        return []
    many = "1 other process was" if others == 1 else f"{others} other processes were"
    return [f"Careful: {many} running on this machine."]


def tune_ops(args: argparse.Namespace) -> int:
    """Find the best values of the knobs that ops declare, and store them for this machine.

    Every value is checked before it may win and is timed beside the default, which always competes. The table
    is read back at run time: rlhf-kernels doctor says how many of its entries apply. Exits with 2 where a
    value is refused, or the inputs of a case cannot be made.
    """
    check_out(args)
    specs = specs_of(args)
    place = _place(args, seconds=1.0, threads=torch.get_num_threads())
    backends = select.known("backend", args.backend, BACKENDS) or list(BACKENDS)
    able = [spec for spec in specs if set(tune.tunable(spec, place.device)) & set(backends)]
    if not able:
        asked = ", ".join(spec.name for spec in specs)
        raise UsageError(f"nothing to tune on {place.device}: no knob of {asked} for these backends")
    tiers = args.tier or ("smoke", "typical")
    chosen = select.measurements(able, args.case, args.dtype, tiers, first_dtype(place.device))
    outcomes: list[tune.Outcome] = []
    path, run = None, store.Run(args.line, fingerprint(place.device, place.threads))
    unstored: dict[str, str] = {}  # entry -> why
    with table.progress(args.quiet) as tell, Keeping(run) as kept:
        for outcome in campaign.tune(chosen, backends, place, tell):
            outcomes.append(outcome)
            if outcome.timings_us:
                entry = outcome.entry(place.device, place.threads)
                try:
                    path = tune.store(entry)
                except OSError as error:
                    unstored[json.dumps(entry)] = f"{error.strerror}: {error.filename}"
    run.outcomes = [dataclasses.asdict(one) for one in outcomes]
    try:
        if args.json:
            told = {"table": str(path) if path else None, "unstored": [*map(json.loads, unstored)]}
            print_json(run.to_json() | told)
        else:
            show.tune(outcomes)
            table.print_notes([f"Stored in {path}. Again: {args.line}"] if path else ["Nothing was stored."])
            table.print_notes([f"Not stored: {entry}" for entry in unstored])
    finally:
        write(args, run)
    for reason in dict.fromkeys(unstored.values()):
        table.complain(
            f"rlhf-kernels: what was found could not be stored in {tuned.table_path()} ({reason}); it is "
            "printed above. Name a folder that can be written in RLHF_KERNELS_CACHE"
        )
    wrong = INCORRECT if any(one.refused for one in outcomes) else OK
    return kept.code or wrong or (SOFTWARE if unstored else OK)


def budget(args: argparse.Namespace) -> int:
    """Compile every kernel for every target and compare the result with committed budgets.

    Registers, spills, shared memory, matrix instructions, and instruction counts of the CPU kernels. Needs no
    GPU. Exits with 1 where a budget is exceeded, with 2 where a kernel does not compile and with 3 where the
    budgets were recorded with other compilers. What --out keeps can be compared: rlhf-kernels compare.
    """
    from rlhf_kernels.engine import budget as guards

    check_out(args)
    where = {"directory": args.budgets} if args.budgets else {}
    where |= {"changelog": args.changelog} if args.changelog else {}
    try:
        rows = guards.run(
            args.ops, args.target, args.kind, args.update, args.reason,
            package=args.specs, changed=args.changed, **where,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    found = fingerprint("cpu") | {"tools": guards.tools()}
    try:
        if args.json:
            print_json(rows)
        else:
            show.budget(rows, args.verbose)
    finally:
        write(args, store.Run(args.line, found, [guards.stored(row) for row in rows]))
    return guards.exit_code(rows)


def patch(args: argparse.Namespace) -> int:
    """List what `rlhf_kernels.patch(TARGET)` replaces here, or hold it against the stack's own with --check.

    Without a target: the stacks that are known. --check compares outputs and every gradient in float32
    (1e-5 relative), then time and memory of forward and backward. Exits with 2 where something differs, with
    3 where the stack is missing or its version was not checked.
    """
    from rlhf_kernels import stacks
    from rlhf_kernels.engine import patched
    from rlhf_kernels.stacks import patching

    stacks.activate()
    known = patching.targets()
    if args.target is not None:
        select.known("target", [args.target], known)
    torch.set_num_threads(args.threads)
    try:
        if args.target is None:
            rows = [patched.summary(target) for target in known.values()]
        else:
            rows = _patch_rows(args, known[args.target])
    except patching.PatchError as error:
        table.complain(f"rlhf-kernels: {error}")
        return ENVIRONMENT
    except ValueError as error:
        raise UsageError(str(error)) from None
    if args.json:
        print_json(rows)
    else:
        (show.targets if args.target is None else show.patch)(rows, args.check)
    return INCORRECT if any(row.get("status") == "incorrect" for row in rows) else OK


def _patch_rows(args: argparse.Namespace, target: Any) -> list[dict[str, Any]]:
    from rlhf_kernels.engine import patched

    with table.progress(args.quiet or not args.check) as tell:
        rows = patched.check(
            target,
            only=args.only or None,
            allow_untested=args.allow_untested,
            seconds=args.seconds if args.check else None,
            progress=tell,
        )
    return [row.as_dict() for row in rows]


def _code(rows: Iterable[Row]) -> int:
    """The exit code of rows; what is wrong with a peer or with torch.compile is not our failure."""
    wrong = any(row.status in ("incorrect", "error") and row.impl in BACKENDS for row in rows)
    return INCORRECT if wrong else OK
