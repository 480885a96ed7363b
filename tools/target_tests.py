"""The stacks' own tests that touch what `rlhf_kernels.patch` replaces, run as they are and under the patch.

    python tools/target_tests.py                             # of all stacks whose package brings its tests
    python tools/target_tests.py trl --tests ../trl/tests    # from a checkout of the installed version
    python tools/target_tests.py trl --tests ../trl/tests --origin "TRL at f2cd577" --select test_utils.py \\
        --absent trl.trainer.utils:patch_chunked_lm_head     # from one of another version
    python tools/target_tests.py verl --json --out outcomes.jsonl

A test file is taken where it names a replaced function, its class or its module. Both runs are fresh
processes with the same options, offline; the second has RLHF_KERNELS_PATCH set, as a worker would. What a
test cannot have (models and data of a hub, absent packages, names that another version has) fails in both.
Exit codes: 0 every test ends as it does without the patch, 2 one does not, 3 there is nothing to run, 64
usage. Needs the peers; another TRL is put before them by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_kernels.stacks import activate, patching, search_paths
from rlhf_kernels.stacks.rebind import Target
from rlhf_kernels.stacks.workers import VARIABLE

ROOT = Path(__file__).parents[1]
# What a stack without tests in its package has elsewhere.
ELSEWHERE = {
    "trl": "its repository has them (tests/): give --tests",
    "transformers": "its source distribution has some: see tools/transformers_families.py, and give --tests",
    "palm_rlhf_pytorch": "its repository has none either",
}
# Runs pytest, then says what was replaced and which of our operators ran.
CHILD = """
import importlib, json, sys
import pytest, rlhf_kernels
from rlhf_kernels.runtime.dispatch import OPS
from rlhf_kernels.stacks import patching
def stand_in(name):
    if attribute.startswith("is_"):  # asked while the tests are read
        return lambda: False
    def absent(*args, **kwargs):
        raise NotImplementedError(f"the installed version has no {name}")
    return absent
for name in json.loads(sys.argv[1]):
    module, _, attribute = name.partition(":")
    module = importlib.import_module(module)
    if hasattr(module, attribute):
        raise SystemExit(f"--absent {name}: it is there")
    setattr(module, attribute, stand_in(name))
pytest.main(sys.argv[2:])
replaced = sorted({one.name for patched in patching.active() for one in patched.replaced})
print()
versions = {patched.version for patched in patching.active()}
ran = sorted(name for name, op in OPS.items() if op._chosen)
print(json.dumps({"version": "".join(versions), "replaced": replaced, "ran": ran}))
"""


def shipped(target: Target) -> list[Path]:
    """The test files that the installed package brings along."""
    path = [*map(str, search_paths()), *sys.path]
    for found in importlib.metadata.Distribution.discover(name=target.package, path=path):
        files = [Path(found.locate_file(file)) for file in found.files or ()]
        return [file for file in files if re.match(r"test_.*\.py$", file.name) and file.is_file()]
    return []


def touching(target: Target, files: list[Path]) -> list[Path]:
    """Those that name a replaced function, the class that has it, or its module."""
    names = set()
    for rebinding in target.rebindings:
        module, _, attribute = rebinding.place.partition(":")
        names |= {module, attribute.split(".")[0]}
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
    return sorted(file for file in files if pattern.search(file.read_text(encoding="utf-8")))


class Choice(NamedTuple):
    """Which tests, and what they have to do without.

    `match` is pytest's -k. `absent` are "module:name" that the tests import and this version lacks; whoever
    calls one is told so.
    """

    files: list[Path]
    origin: str
    match: str = ""
    absent: Sequence[str] = ()


def run(choice: Choice, patched: str | None) -> tuple[dict[str, str], dict[str, Any]]:
    """Outcome by test (a file that cannot be collected is one), and what the process says of itself."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    folders = [*filter(None, given), str(ROOT), *map(str, search_paths())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}
    environment.pop(VARIABLE, None)
    if patched:
        environment[VARIABLE] = patched
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        # No configuration but pytest's own: that of this project would be found above the peers.
        options = ["-c", os.devnull, "--rootdir", os.path.commonpath([file.parent for file in choice.files])]
        options += [
            "-k",
            choice.match,
            "-p",
            "no:cacheprovider",
            "--continue-on-collection-errors",
            "--junitxml",
            report,
        ]
        arguments = [json.dumps(list(choice.absent)), *map(str, [*options, *choice.files])]
        command = [sys.executable, "-W", "ignore", "-c", CHILD, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=folder, check=False
        )
        if not report.is_file():
            raise SystemExit(f"pytest did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        outcomes = {
            f"{case.get('classname')}::{case.get('name')}".strip(":"): _outcome(case)
            for case in ElementTree.parse(report).iter("testcase")
        }
    return outcomes, json.loads(done.stdout.splitlines()[-1])


def _outcome(case: ElementTree.Element) -> str:
    for child in case:
        if child.tag in ("failure", "error", "skipped"):
            kind = {"failure": "failed", "error": "error", "skipped": "skipped"}[child.tag]
            said = (child.text or child.get("message") or "").strip().splitlines()
            raised = [line[1:].strip() for line in said if line.startswith("E ")]
            return f"{kind}: {(raised or said or [''])[-1][:120]}"
    return "passed"


def _kind(outcome: str | None) -> str:
    return (outcome or "").partition(":")[0]


def compare(target: Target, choice: Choice) -> dict[str, Any]:
    """A row: both runs, and what differs."""
    before, _ = run(choice, None)
    after, says = run(choice, target.name)
    differing = {
        name: [before.get(name, "absent"), after.get(name, "absent")]
        for name in sorted(before.keys() | after.keys())
        if _kind(before.get(name)) != _kind(after.get(name))
    }
    kinds = Counter(map(_kind, before.values()))
    return {
        "target": target.name,
        "tests": choice.origin,
        "match": choice.match,
        "absent": list(choice.absent),
        "files": [file.name for file in choice.files],
        "before": dict(kinds),
        "differing": differing,
        "not_passed": {name: outcome for name, outcome in before.items() if outcome != "passed"},
        **says,
        "version": says["version"] or patching.version_of(target, True),
    }


def main() -> int:
    """Prints a paragraph for each stack, or rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    activate()
    known = patching.targets()
    parser.add_argument("targets", nargs="*", help=f"stacks: {', '.join(known)}; all by default")
    parser.add_argument("--tests", type=Path, help="a folder of tests, where the package brings none")
    parser.add_argument("--origin", help="what those tests are of, for the row (default: the folder)")
    parser.add_argument("--select", nargs="+", metavar="FILE", help="only files of these names")
    parser.add_argument("--match", default="", help="only tests that pytest's -k finds by this")
    parser.add_argument(
        "--absent", nargs="+", default=[], metavar="MODULE:NAME",
        help="names that the tests import and this version lacks: what calls one fails, in both runs; "
        "is_...() gives False",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="a JSON row each, in place of paragraphs")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    try:
        wanted = [patching.find(name) for name in options.targets or known]
    except ValueError as error:
        return _usage(error)
    if options.tests and (len(options.targets) != 1 or not options.tests.is_dir()):
        return _usage(f"--tests needs one stack and a folder, got {options.targets} and {options.tests}")
    code = 3
    for target in wanted:
        files = sorted(options.tests.rglob("test_*.py")) if options.tests else shipped(target)
        files = touching(target, [one for one in files if not options.select or one.name in options.select])
        if not files:
            place = "the folder has" if options.tests else "the package brings"
            hint = "" if options.tests else f"; {ELSEWHERE.get(target.name, 'give --tests')}"
            print(f"{target.name}: {place} no tests of what is replaced{hint}", file=sys.stderr)
            continue
        origin = options.origin or str(options.tests or "its package")
        row = compare(target, Choice(files, origin, options.match, options.absent))
        code = 2 if row["differing"] or code == 2 else 0
        print(json.dumps(row) if options.json else _text(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return code


def _usage(message: object) -> int:
    print(message, file=sys.stderr)
    return 64


def _text(row: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(row["before"].items()))
    lines = [f"{row['target']} {row['version']}, {len(row['files'])} files of {row['tests']}: {counts}"]
    replaced, ran = (", ".join(row[name]) or "nothing" for name in ("replaced", "ran"))
    lines.append(f"  replaced: {replaced}; ran: {ran}")
    for name, (before, after) in row["differing"].items():
        lines.append(f"  DIFFERS {name}: {before} -> {after}")
    if not row["differing"]:
        lines.append("  under the patch every test ends the same")
    lines += [f"  in both runs {outcome}: {name}" for name, outcome in row["not_passed"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
