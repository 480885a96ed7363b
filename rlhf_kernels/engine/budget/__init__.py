"""Guards that need no GPU: what compilers and counters say of every kernel, held to committed budgets.

    rows = run(["swiglu"], targets=["sm_90"])        rlhf-kernels budget swiglu --target sm_90

Three kinds of kernels: `triton` (every declared configuration, compiled for every target), `cuda` (every
csrc/*/cuda.cu, by nvcc) and `host` (instructions of the CPU row kernels, by callgrind). A budget may only
tighten; loosening one takes a reason, which goes into the changelog. A spill, a missing matrix instruction or
too much shared memory fails whatever the budget says.

Nothing is timed or run on a GPU: a kernel within its budget may still be slow or wrong.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget import callgrind, cuda, triton_kernels
from rlhf_kernels.engine.budget.ledger import DIRECTORY, EXACT, MOST, Ledger, excess, note_in_changelog
from rlhf_kernels.engine.budget.measured import CSRC, ROOT, Measured, Recorded, owner
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.select import known, select_ops
from rlhf_kernels.engine.spec import TARGETS as GPU_TARGETS
from rlhf_kernels.engine.spec import OpSpec, load_specs

# Each kind is a module with owners, missing, tool and measure.
KINDS = {"triton": triton_kernels, "cuda": cuda, "host": callgrind}
TARGETS = (*GPU_TARGETS, callgrind.LEVEL)


def run(
    ops: Sequence[str] = (),
    targets: Sequence[str] = (),
    kinds: Sequence[str] = (),
    update: bool = False,
    reason: str = "",
    *,
    package: str = "rlhf_kernels.ops",
    directory: Path | None = None,
    changelog: Path | None = None,
    changed: bool = False,
) -> list[dict[str, Any]]:
    """Measures kernels and compares them with their budgets.

    Args:
        ops: names of ops; none means all.
        targets: some of TARGETS; none means all.
        kinds: some of KINDS; none means all.
        update: write the new figures down. Tightening and first budgets are free.
        reason: why budgets are loosened; written to the changelog.
        package: where the specs are.
        directory: where the budgets are; of one's own specs, `budgets/` beside them, where none is given.
        changelog: where a reason goes; CHANGELOG.md beside one's own specs.
        changed: compile only the GPU kernels whose source, declaration or compiler is another than when
            their figures were recorded, and a sample whatever its source: the first Triton kernel of every op
            and target, and the shortest CUDA file for one target.

    Returns:
        One row a kernel, configuration and target: op, impl, case, device, status, reason, the figures with
        their `budget`, and notes. Status is ok, incorrect (over budget, or a fault), unavailable or error.

    Raises:
        ValueError: an unknown op, target or kind; an update that would loosen and has no reason.
    """
    specs = load_specs(package)
    usual = _places(package)
    directory, changelog = directory or usual[0], changelog or usual[1]
    chosen = select_ops(specs, ops)
    targets = known("target", targets, TARGETS) or list(TARGETS)
    kinds = known("kind", kinds, KINDS) or list(KINDS)
    if update and directory == DIRECTORY and not CSRC.is_dir():
        raise ValueError("budgets are updated in a checkout of the sources, and this is an installed package")
    compilers = {kind: tool for kind, tool in tools().items() if kind in kinds}
    ledgers = [Ledger.load(family, directory) for family in sorted({spec.family for spec in chosen})]
    recorded = _recorded(ledgers) if changed else {}
    measured = [one for kind in kinds for one in _measure(kind, chosen, targets, package, recorded)]

    rows: list[dict[str, Any]] = []
    loosened: list[str] = []
    for ledger in ledgers:
        family = ledger.path.stem
        own = sorted((one for one in measured if one.family == family), key=lambda one: one.key)
        # The room's own name stands for its .cu files, unless one of its ops bears it.
        asked = {spec.name for spec in chosen if spec.family == family} | ({family} - set(specs))
        gone = _gone(ledger, own, asked, targets, compilers)
        if update:
            loosened += _update(ledger, own, gone, compilers)
            gone = []
        rows += [_row(one, ledger, compilers) for one in own] + [_gone_row(key, ledger) for key in gone]
    if loosened:
        note_in_changelog(changelog, loosened, reason)
    for ledger in ledgers if update else ():
        ledger.save()
    return rows


def _places(package: str) -> tuple[Path, Path]:
    """Where the budgets of a package of specs are, and the changelog for its reasons."""
    if package.partition(".")[0] == "rlhf_kernels":
        return DIRECTORY, ROOT / "CHANGELOG.md"
    found = package if package.endswith(".py") else importlib.import_module(package).__file__
    beside = Path(found).parent if found else Path.cwd()  # a namespace has no file
    return beside / "budgets", beside / "CHANGELOG.md"


def exit_code(rows: Iterable[dict[str, Any]]) -> int:
    """0 within budget, 1 over it, 2 where a kernel does not compile, 3 where other compilers set the budgets.

    What is unavailable for want of a tool was not judged.
    """
    rows = list(rows)
    statuses = {row["status"] for row in rows}
    if statuses & {"error", "incorrect"}:
        return 2 if "error" in statuses else 1
    return 3 if any("recorded_with" in row for row in rows) else 0


def tools() -> dict[str, str]:
    """The compilers here, by kind of kernel: what figures are compared under."""
    return {kind: one.tool() for kind, one in KINDS.items() if one.missing() is None}


def stored(row: Mapping[str, Any]) -> Row:
    """A row of `run` as results are kept: figures apart from what is shown beside them."""
    names = {"op", "impl", "case", "device", "status", "reason"}
    figures = {name: row[name] for name in (*MOST, *EXACT) if name in row}
    rest = set(row) - names - set(figures)
    return Row(
        **{name: row[name] for name in names}, dtype="", direction="", figures=figures,
        notes={name: row[name] for name in sorted(rest)},
    )  # fmt: skip


def _recorded(ledgers: Iterable[Ledger]) -> Recorded:
    """What need not be compiled again: all but the first Triton kernel of every op and target."""
    found: dict[str, dict[str, Mapping[str, int]]] = {}
    for ledger in ledgers:
        first: dict[tuple[str, str], str] = {}
        for key in sorted(ledger.sources):
            one = owner(key)
            if one.kind != "triton" or first.setdefault((one.op, one.target), key) != key:
                found.setdefault(ledger.sources[key], {})[key] = ledger.budgets[key]
    return found


def _measure(
    kind: str, specs: list[OpSpec], targets: list[str], package: str, recorded: Recorded
) -> list[Measured]:
    """Every kernel of a kind; where that is impossible, one row an op (or family) that says why."""
    status, why = "unavailable", KINDS[kind].missing()
    if why is None:
        try:
            return list(KINDS[kind].measure(specs, targets, package, recorded))
        except RuntimeError as error:
            status, why = "error", str(error)
    owners = KINDS[kind].owners(specs)
    return [Measured(family, op, kind, "all", "all", status=status, reason=why) for family, op in owners]


def _gone(
    ledger: Ledger, measured: list[Measured], ops: set[str], targets: list[str], tools: dict[str, str]
) -> list[str]:
    """Budgets that no kernel answers to any more, among what was asked for and could be measured."""
    keys = {one.key for one in measured}
    failed = {(one.kind, one.op) for one in measured if one.target == "all"}
    owners = {key: owner(key) for key in ledger.budgets if key not in keys}
    return [
        key
        for key, one in owners.items()
        if one.op in ops and one.target in targets and one.kind in tools and (one.kind, one.op) not in failed
    ]


def _update(ledger: Ledger, measured: list[Measured], gone: list[str], tools: dict[str, str]) -> list[str]:
    """Writes figures into the ledger; returns what is loosened by that."""
    fit = [one for one in measured if one.status == "ok" and not one.faults]
    kept = set(ledger.budgets) - {one.key for one in measured} - set(gone)
    own_tools = {one.kind: tools[one.kind] for one in fit}
    for kind, tool in own_tools.items():
        recorded = ledger.tools.get(kind, tool)
        if recorded != tool and any(owner(key).kind == kind for key in kept):
            raise ValueError(
                f"{ledger.path.name} was recorded with {recorded}, this is {tool}: "
                f"update all its {kind} kernels at once, without naming ops or targets"
            )
    return ledger.update(fit, gone, own_tools)


def _row(one: Measured, ledger: Ledger, tools: dict[str, str]) -> dict[str, Any]:
    budget, recorded = ledger.budgets.get(one.key), ledger.tools.get(one.kind)
    status, why, other = one.status, one.reason, {}
    if status == "ok" and one.faults:
        status, why = "incorrect", "; ".join(one.faults)
    elif status == "ok" and budget is None:
        status, why = "incorrect", f"no budget is recorded: rlhf-kernels budget {one.op} --update"
    elif status == "ok" and recorded != tools[one.kind]:
        why = f"the budget is {recorded}'s, and this is {tools[one.kind]}: not compared"
        status, other = "unavailable", {"recorded_with": recorded}
    elif status == "ok" and (broken := excess(one.figures, budget)):
        status, why = "incorrect", "; ".join(broken)
    return _named(one, status, why) | dict(one.figures) | dict(one.notes) | {"budget": budget} | other


def _gone_row(key: str, ledger: Ledger) -> dict[str, Any]:
    why = f"budgeted in {ledger.path.name}, but no longer declared: drop it with --update and a --reason"
    return _named(owner(key), "incorrect", why) | {"budget": ledger.budgets[key]}


def _named(one: Measured, status: str, why: str) -> dict[str, Any]:
    names = {"op": one.op, "impl": one.kind, "case": one.name, "device": one.target}
    return names | {"status": status, "reason": why}
