"""The commands that judge a change: compare, regress."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rlhf_kernels.engine import baselines, show_compare, table
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.commands import device_of, first_dtype, specs_of
from rlhf_kernels.engine.compare import Gate, Report, Unlike, wrong
from rlhf_kernels.engine.compare import compare as compared
from rlhf_kernels.engine.keeping import (
    AGAIN,
    ENVIRONMENT,
    INCORRECT,
    OK,
    REGRESSION,
    Keeping,
    check_out,
    print_json,
    write,
)
from rlhf_kernels.engine.regress import Regression, targets_of, top_for
from rlhf_kernels.engine.revisions import commit_of, git
from rlhf_kernels.engine.select import UsageError, known, measurements
from rlhf_kernels.engine.store import Run
from rlhf_kernels.runtime.dispatch import BACKENDS
from rlhf_kernels.runtime.files import write_aside


def compare(args: argparse.Namespace) -> int:
    """Compare two stored results row by row: faster, slower, same, inconclusive or missing.

    A change is called where statistics, the noise floor of the row and an absolute floor agree. The floor
    comes from repeated runs of base: bench --save-baseline NAME --runs 5. Results of unlike machines or
    versions are refused (exit code 3). Exits with 1 where a row is slower or missing, with 2 where one became
    incorrect.
    """
    base, notes = baselines.load(args.base)
    head = base
    if args.head:
        head, more = baselines.load(args.head)
        notes += more
    elif not any(run.side == "head" for run in base):
        raise UsageError(f"{args.base} holds no run of regress: name the result to compare it with")
    base = [run for run in base if run.side != "head"] or base
    head = [run for run in head if run.side != "base"] or head
    known("op", args.op, dict.fromkeys(row.op for run in base for row in run.rows))
    known("implementation", args.impl, dict.fromkeys(row.impl for run in base for row in run.rows))
    try:
        report = compared(base, head, Gate(least=args.least), impls=args.impl, ops=args.op, force=args.force)
    except Unlike as error:
        table.complain(f"rlhf-kernels: {error}")
        return ENVIRONMENT
    if not report.rows:
        raise UsageError(
            f"{args.base} has no result to compare: no backend of these ops has a time or figures"
        )
    report.notes[:0] = notes
    if args.inconclusive == "rerun" and report.counts["inconclusive"]:
        report.notes.append(measure_again(head, report))
    return finish(args, report, base, head)


def regress(args: argparse.Namespace) -> int:
    """Build two revisions, measure them by turns, and give every row a verdict.

    Each revision is checked out in a worktree and runs in processes of its own; two processes, one a side,
    take their samples in turn, so that what else the machine does falls on both. Uncommitted changes are not
    seen. Exits as compare does.
    """
    check_out(args)
    specs, device = specs_of(args), device_of(args)
    impls = known("backend", args.backend, BACKENDS)
    tiers = args.tier or ("smoke", "typical")
    chosen = measurements(specs, args.case, args.dtype, tiers, first_dtype(device))
    chosen = [one for one in chosen if one.case.tier != "awkward"]
    repository = top_for(args.specs, args.repository)
    commits = (commit_of(repository, args.base), commit_of(repository, args.head))
    found = Regression(
        repository, commits, Place(device, args.threads or 1, package=args.specs),
        targets_of(chosen, impls, device), args.pairs, args.seconds or 0.3, Gate(least=args.least),
        args.inconclusive == "rerun", args.build, args.line,
    )  # fmt: skip
    noted = Run(args.line, {})
    with table.progress(args.quiet) as tell, Keeping(noted) as kept:
        found.measure(tell)
    runs = found.runs()
    if not runs:
        table.complain("rlhf-kernels: nothing was measured")
        return kept.code
    report = found.report()
    if git(repository, "status", "--porcelain", "--untracked-files=no"):
        report.notes.append(f"Uncommitted changes in {repository} were not measured.")
    try:
        code = finish(args, report, runs[:1], runs[1:])
    finally:
        write(args, *runs)
    return kept.code or code


def finish(args: argparse.Namespace, report: Report, base: Sequence[Run], head: Sequence[Run]) -> int:
    """Shows and writes a report; the exit code that it deserves."""
    title = f"{_called(base, 'base')} -> {_called(head, 'head')}"
    code = exit_code(report, args.inconclusive)
    if args.markdown:
        try:
            write_aside(args.markdown, show_compare.pull_request(report, f"rlhf-kernels: {title}", args.line))
        except OSError as error:
            raise UsageError(f"--markdown {args.markdown} cannot be written: {error.strerror}") from None
    if args.json:
        sides = {"base": base[-1].header(), "head": head[-1].header()}
        print_json({"exit_code": code, **sides, **report.to_json()})
    else:
        show_compare.compare(report, title)
    return code


def exit_code(report: Report, inconclusive: str) -> int:
    """2 where a row became incorrect, 1 where one is slower or missing, 75 where more must be measured."""
    counts = report.counts
    if wrong(report.rows):
        return INCORRECT
    if counts["slower"] or counts["missing"] or (counts["inconclusive"] and inconclusive == "fail"):
        return REGRESSION
    return AGAIN if counts["inconclusive"] and inconclusive == "rerun" else OK


def measure_again(head: Sequence[Run], report: Report) -> str:
    """How to learn more about the rows without a verdict."""
    open_rows = [row for row in report.rows if row.verdict == "inconclusive"]
    ops = " ".join(dict.fromkeys(row.op for row in open_rows))
    cases = ",".join(dict.fromkeys(row.case for row in open_rows))
    return (
        f"Measure again, with more processes: rlhf-kernels bench {ops} --case '{cases}' --processes 12 "
        f"--out AGAIN.jsonl (head was: {head[-1].command})"
    )


def _called(runs: Sequence[Run], side: str) -> str:
    found = runs[-1].fingerprint
    commit = (found.get("revision") or found.get("commit") or "")[:10]
    return f"{commit or side}{' (changed)' if found.get('dirty') else ''}"
