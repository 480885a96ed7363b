"""The command `rlhf-kernels`: doctor, list, check, bench, compare, regress, tune, budget, report,
history, patch.

Every command works without a GPU, takes --json, and writes tables for people: rich on a terminal, Markdown in
a pipe. What it measured so far is kept when it is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import rlhf_kernels
from rlhf_kernels.engine import commands, gate, keeping, reading, select, table
from rlhf_kernels.engine.conditions import WorkerError
from rlhf_kernels.engine.history import METRICS
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.spec import SpecError

_EPILOG = """\
examples:
  rlhf-kernels doctor                          what runs here, what does not, and how to mend it
  rlhf-kernels check gae --dtype float32       hold every backend against the float64 definition
  rlhf-kernels bench attention                 time it against eager, torch.compile and installed peers
  rlhf-kernels bench --tier smoke --json       every op on small shapes, for a machine to read
  rlhf-kernels compare main head.jsonl         a verdict on every row, and an exit code for a CI
  rlhf-kernels regress gae --base main         build main and HEAD, measure them by turns
  rlhf-kernels tune swiglu                     find the best grain here; read back at run time
  rlhf-kernels check my_package.specs          a kernel of your own (examples/own_kernel.py)
  rlhf-kernels report results.jsonl            one HTML page of what bench --out has stored
  rlhf-kernels patch verl --check              a patched stack against itself: differences, time, memory

exit codes: 0 fine, 1 regression, 2 incorrect, 3 environments differ or a backend is not here, 64 usage,
            70 it could not be done: a full disk, a process that died, a defect of ours,
            75 measure again (--inconclusive=rerun), 130 interrupted
environment: RLHF_KERNELS_BACKEND, RLHF_KERNELS_STRICT, RLHF_KERNELS_TUNED, RLHF_KERNELS_CACHE,
  RLHF_KERNELS_PATCH, NO_COLOR
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence; `main` gives it its exit code."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError instead of printing the usage."""
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # `timeout` ends a command as Ctrl-C does: what was measured so far is kept.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        args = _parser().parse_args(_known_command(argv))
        if getattr(args, "ops", None):
            args.ops = [name for one in args.ops for name in _words(one)]
            args.specs, args.ops = select.specs_named(args.ops, args.specs)
        args.line = shlex.join(["rlhf-kernels", *argv])
        code = args.run(args)
        sys.stdout.flush()  # what cannot be written is said here, not by Python as it ends
        return code
    except (UsageError, SpecError) as error:
        table.complain(f"rlhf-kernels: {error}")
        return keeping.USAGE
    except WorkerError as error:
        table.complain(f"rlhf-kernels: {error}")
        return keeping.SOFTWARE
    except KeyboardInterrupt:
        table.complain("rlhf-kernels: interrupted")
        return keeping.INTERRUPTED
    except BrokenPipeError:
        _leave_output()  # a reader such as `head` has left: nothing more to say
        return keeping.OK
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        table.complain(f"rlhf-kernels: {error.strerror or error}{where}")
        _leave_output()
        return keeping.SOFTWARE
    except Exception:  # a defect; 1 would say that something got slower
        traceback.print_exc()
        return keeping.SOFTWARE
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave_output() -> None:
    """What is left in the buffer of standard output goes nowhere: Python would complain of it as it ends."""
    with contextlib.suppress(OSError, ValueError):  # where it is a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _known_command(argv: list[str]) -> list[str]:
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None:
        select.known("command", [first], COMMANDS)
    return argv or ["--help"]


def _parser() -> Parser:
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("rlhf-kernels", description=_summary(__doc__), epilog=_EPILOG, formatter_class=form)
    parser.add_argument("--version", action="version", version=rlhf_kernels.__version__)
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=Parser)
    for name, (run, add) in COMMANDS.items():
        text = run.__doc__ or ""
        one = commands.add_parser(
            name, help=_summary(text).rstrip("."), description=text, formatter_class=form, allow_abbrev=False
        )
        one.add_argument("--json", action="store_true", help="print one JSON value instead of tables")
        one.add_argument("--quiet", action="store_true", help="no progress on standard error")
        one.add_argument("--specs", default="rlhf_kernels.ops", help=argparse.SUPPRESS)
        add(one)
        one.set_defaults(run=run)
    return parser


def _summary(text: str) -> str:
    return text.partition("\n\n")[0].strip()


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above zero, got {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _ops(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="op",
        help="names of ops, also with commas; none means all. my_package.specs or file.py: yours",
    )


def _selection(parser: argparse.ArgumentParser) -> None:
    _ops(parser)
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("--op", dest="more_ops", metavar="NAME,..", help="the same as naming it", **many)
    parser.add_argument("--case", metavar="NAME,..", help="names or patterns such as 'palm*'", **many)
    parser.add_argument("--dtype", metavar="NAME,..", help="float32, bfloat16, ... or all", **many)
    parser.add_argument("--tier", metavar="NAME,..", help=", ".join(select.TIERS), **many)
    parser.add_argument(
        "--backend", "--impl", metavar="NAME,..", help="backends; for bench also peers, by label", **many
    )
    parser.add_argument("--device", help="cpu or cuda; the GPU where there is one")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the results to this file")


def _timing(parser: argparse.ArgumentParser) -> None:
    _selection(parser)
    parser.add_argument("--threads", type=_positive(int), help="threads of the CPU")
    parser.add_argument("--seconds", type=_positive(float), help="for the rounds of a case and direction")
    parser.add_argument("--precision", type=_positive(float), default=0.01, help="stop at this half width")


def _bench_options(parser: argparse.ArgumentParser) -> None:
    _timing(parser)
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("--without", metavar="NAME,..", help="all but these, torch.compile for one", **many)
    parser.add_argument("--baseline", default="torch", metavar="NAME", help="what speed-ups are over")
    parser.add_argument(
        "--processes", type=_positive(int), help="the median of so many; 1, or 5 of a baseline"
    )
    parser.add_argument("--runs", type=_positive(int), default=1, help="so often: their spread is the noise")
    parser.add_argument("--save-baseline", metavar="NAME", help="keep the runs for `compare NAME`")


def _check_options(parser: argparse.ArgumentParser) -> None:
    _selection(parser)
    parser.add_argument("--verbose", action="store_true", help="show every row, not only what failed")


def _budget_options(parser: argparse.ArgumentParser) -> None:
    _ops(parser)
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("--target", metavar="NAME,..", help="sm_80, sm_90, sm_100, gfx942, v3", **many)
    parser.add_argument("--kind", metavar="NAME,..", help="triton, cuda, host", **many)
    parser.add_argument("--update", action="store_true", help="write new figures down; tightening is free")
    parser.add_argument("--reason", default="", help="why a budget loosens, for CHANGELOG.md")
    parser.add_argument(
        "--changed", action="store_true",
        help="compile only GPU kernels whose source or compiler is not the recorded one, and a sample",
    )  # fmt: skip
    parser.add_argument("--budgets", type=Path, metavar="DIR", help="of kernels of your own: their budgets")
    parser.add_argument("--changelog", type=Path, metavar="FILE", help="where a reason goes")
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append the results to this file")
    parser.add_argument("--verbose", action="store_true", help="show every kernel, not only what is over")


def _gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--inconclusive", choices=("pass", "fail", "rerun"), default="pass",
        help="what a row without a verdict does; rerun measures, or asks to measure, more",
    )  # fmt: skip
    share = {"type": percent, "metavar": "PERCENT"}
    parser.add_argument("--least", help="changes below are never called (2 %%)", default=0.02, **share)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write a comment for a pull request")


def percent(text: str) -> float:
    value = float(text.rstrip("% "))
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(f"expected a percentage between 0 and 100, got {text}")
    return value / 100


def _compare_options(parser: argparse.ArgumentParser) -> None:
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("base", help="a result file, or the name of a baseline")
    parser.add_argument("head", nargs="?", help="the same; none where base is a file of regress")
    parser.add_argument("--op", metavar="NAME,..", help="compare these ops alone", **many)
    parser.add_argument("--impl", metavar="NAME,..", help="implementations; none means the backends", **many)
    parser.add_argument("--force", action="store_true", help="compare unlike machines and versions too")
    _gate_options(parser)


def _regress_options(parser: argparse.ArgumentParser) -> None:
    _selection(parser)
    parser.add_argument("--base", required=True, metavar="REV", help="commit, branch or tag")
    parser.add_argument("--head", default="HEAD", metavar="REV", help="what is judged (HEAD)")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="that of the specs, where not named")
    parser.add_argument("--build", metavar="COMMAND", help="how a revision is built, in its worktree")
    parser.add_argument("--pairs", type=_positive(int), help="of processes; as many as the rank test needs")
    parser.add_argument("--threads", type=_positive(int), help="threads of the CPU")
    parser.add_argument("--seconds", type=_positive(float), help="for a row in one pair of processes (0.3)")
    _gate_options(parser)


def _patch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", nargs="?", help="a stack; none lists those that are known")
    parser.add_argument("--check", action="store_true", help="compare and time what is replaced")
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("--only", metavar="NAME,..", help="names of functions", **many)
    parser.add_argument("--allow-untested", action="store_true", help="a version that was not checked, too")
    parser.add_argument("--threads", type=_positive(int), default=1, help="threads of the CPU")
    parser.add_argument("--seconds", type=_positive(float), default=1.0, help="for the times of a function")


def _report_options(parser: argparse.ArgumentParser) -> None:
    _results(parser)
    parser.add_argument("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="the page")
    parser.add_argument("--title", default="", help="its heading")
    parser.add_argument(
        "--budget", type=Path, action="append", default=[], metavar="FILE.json", help="of budget --json"
    )


def _results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="files of bench --out, or directories",
    )


def _history_options(parser: argparse.ArgumentParser) -> None:
    _results(parser)
    many = {"action": "extend", "type": _words, "default": []}
    parser.add_argument("--op", metavar="NAME,..", help="ops; none means all", **many)
    parser.add_argument("--case", metavar="NAME,..", help="names or patterns such as 'palm*'", **many)
    parser.add_argument("--impl", metavar="NAME,..", help="implementations; none means all", **many)
    parser.add_argument("--metric", choices=tuple(METRICS), default="time", help="what to follow")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw each as an SVG file")


Run = Callable[[argparse.Namespace], int]
COMMANDS: dict[str, tuple[Run, Callable[[argparse.ArgumentParser], None]]] = {
    "doctor": (commands.doctor, lambda parser: None),
    "list": (commands.list_ops, _ops),
    "check": (commands.check, _check_options),
    "bench": (commands.bench, _bench_options),
    "compare": (gate.compare, _compare_options),
    "regress": (gate.regress, _regress_options),
    "tune": (commands.tune_ops, _timing),
    "budget": (commands.budget, _budget_options),
    "report": (reading.report, _report_options),
    "history": (reading.history, _history_options),
    "patch": (commands.patch, _patch_options),
}
