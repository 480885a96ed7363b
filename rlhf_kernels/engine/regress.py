"""Two revisions measured by turns, in environments of their own, with one verdict a row.

found = Regression(repository, base, head, place, targets)
found.measure(tell)
report = found.report()
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_kernels.engine import store
from rlhf_kernels.engine.bench import DIRECTIONS, FORWARD
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.compare import Gate, Report, compare
from rlhf_kernels.engine.revisions import build, checkouts, git, top_of
from rlhf_kernels.engine.select import Measurement, UsageError
from rlhf_kernels.engine.turns import SIDES, Side, Target, Turns, pairs_needed
from rlhf_kernels.runtime.files import ROOT, cache_directory

Tell = Callable[[int, int, str], None]
# How often the processes may be doubled for rows without a verdict.
_DOUBLINGS = 2


def package_directory(package: str) -> Path:
    """The directory that a package of specs is imported from, or that a file of specs is in.

    Raises:
        UsageError: there is no such package.
    """
    if package.endswith(".py"):
        return Path(package).resolve().parent
    top = package.partition(".")[0]
    found = importlib.util.find_spec(top)
    if found is None or not found.origin:
        raise UsageError(f"unknown package {top!r} of specs: is it on PYTHONPATH?")
    origin = Path(found.origin).resolve()
    return origin.parents[1] if origin.name == "__init__.py" else origin.parent


def targets_of(measurements: Sequence[Measurement], impls: Sequence[str], device: str) -> list[Target]:
    """What is measured: every backend for this device but the definition; plain PyTorch where an op has
    nothing else, or where it is named.

    Raises:
        UsageError: nothing is left.
    """
    found = []
    for one in measurements:
        able = [name for name in one.spec.op.backends(device) if name != "reference"]
        fast = [name for name in able if name != "torch"] or able
        op, case, dtype = one.names
        for direction in DIRECTIONS:
            if direction == FORWARD or one.spec.differentiable:
                wanted = [name for name in able if name in impls] if impls else fast
                found += [Target(op, case, dtype, direction, name) for name in wanted]
    if not found:
        raise UsageError(f"nothing to measure on {device}: none of these ops has such a backend")
    return found


@dataclass
class Regression:
    """Two commits of a repository, and what was measured of them so far.

    Args:
        repository: its top.
        commits: full names, base and head.
        place: device, threads and package.
        targets: what is measured.
        pairs: of processes; None means as many as the rank test needs for so many targets.
        seconds: for the rounds of one target in one pair.
        gate: what counts as a change.
        rerun: doubles the pairs for every row without a verdict, twice at most. Else, unless `pairs` says how
            many, only for doubtful ones, whose change more pairs may well call.
        build_command: see `revisions.build`.
    """

    repository: Path
    commits: tuple[str, str]
    place: Place
    targets: Sequence[Target]
    pairs: int | None = None
    seconds: float = 0.3
    gate: Gate = field(default_factory=Gate)
    rerun: bool = False
    build_command: str | None = None
    line: str = "rlhf-kernels regress"
    seed: int = 0
    turns: Turns | None = None
    complete: bool = False

    def measure(self, tell: Tell) -> None:
        """Builds and measures; whatever ends it, the finished pairs are there.

        Raises:
            WorkerError: a build or a measuring process failed.
            UsageError: a worktree's code is not what is imported.
        """
        with checkouts(self.repository, self.commits) as trees:
            for number, (commit, tree) in enumerate(trees.items()):
                tell(number, len(trees), f"building {commit[:10]}")
                build(self.repository, commit, tree, self.build_command)
            sides = {side: self._side(trees[commit]) for side, commit in zip(SIDES, self.commits)}
            self.by_turns(sides, tell, self._from_the_worktrees)

    def by_turns(self, sides: Mapping[str, Side], tell: Tell, verify: Callable[[], None]) -> None:
        """Measures what is built: `pairs` of processes, then as many again for rows that need more.

        Args:
            sides: by SIDES.
            tell: hears of the progress.
            verify: is called after each pair.

        Raises:
            WorkerError: a measuring process failed.
        """
        self.turns = Turns(sides, self.place, self.seconds, seed=self.seed)
        pairs = self.pairs or pairs_needed(len(self.targets), self.gate.level / self.looks)
        self._pairs(range(pairs), self.targets, tell, verify)
        for _ in range(self.looks - 1):
            if not (again := self._undecided()):
                break
            self._pairs(range(pairs, 2 * pairs), again, tell, verify)
            pairs *= 2
        self.complete = True

    @property
    def looks(self) -> int:
        """How often the rows are judged at most; each look gets as much of the level."""
        return 1 + (_DOUBLINGS if self.rerun or not self.pairs else 0)

    def _undecided(self) -> list[Target]:
        """What is measured again."""
        rows = {
            (row.op, row.case, row.dtype, row.direction, row.impl)
            for row in self.report().rows
            if row.doubtful or (self.rerun and row.verdict == "inconclusive")
        }
        return [target for target in self.targets if tuple(target) in rows]

    def _pairs(
        self, numbers: range, targets: Sequence[Target], tell: Tell, verify: Callable[[], None]
    ) -> None:
        total = len(numbers) * len(targets)
        for place, number in enumerate(numbers):
            done = iter(range(place * len(targets), total))
            which = f" (processes {place + 1} of {len(numbers)})"
            self.turns.pair(number, targets, lambda t, d=done, w=which: tell(next(d), total, " ".join(t) + w))
            verify()
        tell(total, total, "done")

    def _side(self, tree: Path) -> Side:
        start = package_directory(self.place.package)
        inside = tree / start.relative_to(self.repository)
        # This package comes along for those who measure kernels of their own.
        paths = (inside,) if start == ROOT else (inside, ROOT)
        package = self.place.package
        if package.endswith(".py"):  # what it imports may lie beside it or at the top
            package, paths = str(inside / Path(package).name), (inside, tree, *paths[1:])
        return Side(tree, paths, {"RLHF_KERNELS_CACHE": str(cache_directory().resolve())}, package)

    def _from_the_worktrees(self) -> None:
        """Refuses what was imported from elsewhere: both sides would then be the same code."""
        tracked = {self.repository / name for name in git(self.repository, "ls-files").splitlines()}
        for side in SIDES:
            tree, files = self.turns.sides[side].directory, self.turns.hello[side]["files"]
            if wrong := sorted(tracked & {Path(file).resolve() for file in files}):
                raise UsageError(
                    f"{side} imported {wrong[0]}, expected its copy below {tree}: check PYTHONPATH"
                )

    def runs(self) -> list[store.Run]:
        """Base's and head's run, of one session; empty where nothing was finished."""
        if self.turns is None or not self.turns.rows("base"):
            return []
        runs = []
        for side, commit in zip(SIDES, self.commits):
            found = self.turns.hello[side]["fingerprint"] | {"revision": commit}
            rows = self.turns.rows(side)
            runs.append(store.Run(self.line, found, rows, complete=self.complete, side=side))
        runs[1].session = runs[0].session
        return runs

    def report(self) -> Report:
        """The verdicts on what was measured so far; each of several looks gets its part of the level."""
        base, head = self.runs()
        gate = Gate(self.gate.level / self.looks, self.gate.least, self.gate.absolute_us)
        impls = sorted({target.impl for target in self.targets})
        report = compare([base], [head], gate, impls=impls, force=True)
        if len(set(self.commits)) == 1:
            report.notes.append("Base and head are the same revision: a change is a false alarm.")
        return report


def top_for(package: str, given: Path | None) -> Path:
    """The repository that is measured: the one named, or that of the package of specs."""
    repository = top_of(given or package_directory(package))
    if not package_directory(package).is_relative_to(repository):
        raise UsageError(f"{package} is imported from {package_directory(package)}, outside of {repository}")
    return repository
