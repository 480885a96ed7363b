"""Two revisions of a repository, measured by turns: a kernel of someone's own, in a repository of its own."""

import random
import subprocess
import typing
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_kernels import cli
from rlhf_kernels.engine import regress, revisions, store
from rlhf_kernels.engine.campaign import Place
from rlhf_kernels.engine.conditions import WorkerError
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.select import UsageError
from rlhf_kernels.engine.turns import Side, Target, Worker, pairs_needed

KERNEL = '''"""A kernel of someone's own."""

import torch

PASSES = {passes}


def forward(x):
    """2 x, in more passes over the data than it needs."""
    for _ in range(PASSES):
        torch.exp(x)
    return 2 * x
'''


def _git(directory, *words):
    subprocess.run(["git", "-C", directory, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """planted_ops under another name in a repository: `fast` makes 5 passes over the data, HEAD 20."""
    top = tmp_path_factory.mktemp("regress") / "mine"
    package = top / "own_ops"
    package.mkdir(parents=True)
    for path in (Path(__file__).parent / "planted_ops").glob("*.py"):
        text = path.read_text().replace("planted", "own")
        (package / path.name).write_text(
            text.replace('(Knob("waste", "native", (0, 1, 2), ("forward",)),)', "()")
        )
    _git(top, "init", "-q", "-b", "main")
    for name, passes in (("fast", 5), ("slow", 20)):
        (package / "kernel_native.py").write_text(KERNEL.format(passes=passes))
        _git(top, "add", ".")
        _git(top, "-c", "user.name=test", "-c", "user.email=test@example.com", "commit", "-qm", name)
        _git(top, "tag", name)
    return top


@pytest.fixture
def repository(committed, tmp_path, monkeypatch):
    """That repository on the module search path, and a cache of its own."""
    monkeypatch.syspath_prepend(str(committed))
    monkeypatch.setenv("PYTHONPATH", str(committed))
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path / "cache"))
    return committed


WORDS = ["regress", "own_double", "--specs", "own_ops.spec", "--case", "small", "--quiet"]


def test_two_revisions_and_ctrl_c(repository, tmp_path, monkeypatch, capsys):
    """One pair of processes is finished, the second is interrupted; what follows is of the first."""
    target = regress.Turns._target

    def until_the_second_pair(self, workers, what, draw):
        if self._rows["base"][what]:
            raise KeyboardInterrupt
        target(self, workers, what, draw)

    monkeypatch.setattr(regress.Turns, "_target", until_the_second_pair)
    build = "echo {} > own_ops/_build.json"
    words = [*WORDS, "--base", "fast", "--pairs", "2", "--seconds", "0.05", "--out", tmp_path / "out.jsonl"]
    code = cli.main([*map(str, words), "--dtype", "float32", "--build", build])
    out, err = capsys.readouterr()
    assert code == 130, err
    assert "interrupted: what follows is what was measured so far" in err
    (base, head), broken = store.read(tmp_path / "out.jsonl")
    assert broken == 0
    assert (base.side, head.side, base.session) == ("base", "head", head.session)
    assert not base.complete
    assert base.fingerprint["revision"] == revisions.commit_of(repository, "fast")
    (was,), (now,) = base.rows, head.rows
    assert (was.impl, was.status, was.case) == ("native", "ok", "small")
    assert was.error is not None, "the first pair is checked"
    assert len(was.samples_us) == len(now.samples_us) == 1
    assert len(was.samples_us[0]) == len(now.samples_us[0]) >= 12
    assert now.median_us > 2 * was.median_us, "four times the passes"
    assert "| inconclusive | own_double" in out, "one process on each side proves nothing"
    assert list((tmp_path / "cache" / "worktrees").iterdir()) == []
    listed = subprocess.run(["git", "-C", repository, "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
    assert len(list((tmp_path / "cache" / "builds").glob("*/own_ops/_build.json"))) == 2


def test_builds_are_kept_by_content(repository, tmp_path):
    commit = revisions.commit_of(repository, "HEAD")
    said = []
    for _ in range(2):
        with revisions.checkouts(repository, [commit, commit]) as trees:
            assert list(trees) == [commit]
            said.append(revisions.build(repository, commit, trees[commit], "echo {} > _build.json"))
            assert (trees[commit] / "_build.json").read_text() == "{}\n"
            assert revisions.build(repository, commit, trees[commit]) == "nothing to build"
    assert said == ["built", "kept from an earlier build of the same sources"]
    with (
        revisions.checkouts(repository, [commit]) as trees,
        pytest.raises(WorkerError, match=r"building failed with 3 .*: no compiler"),
    ):
        revisions.build(repository, commit, trees[commit], "echo no compiler >&2; exit 3")
    assert not trees[commit].exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--base", "nain"], 64, "unknown revision 'nain': expected a commit, branch or tag of"),
        (["--base", "fast", "--repository", "/"], 64, "/ is in no git repository"),
        (["--base", "fast", "--backend", "triton"], 64, "nothing to measure on cpu"),
        (["--base", "fast", "--build", "echo no gcc >&2; false"], 70, "building failed with 1 (echo no gcc"),
        ([], 64, "the following arguments are required: --base"),
    ],
)
def test_mistakes_are_one_sentence(repository, capsys, words, code, said):
    assert cli.main([*WORDS, *words]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_a_dying_side_leaves_its_last_words(tmp_path):
    worker = Worker(Side(tmp_path), Place(package="no_such_package"))
    with pytest.raises(WorkerError, match="No module named 'no_such_package'"):
        worker.ask("hello")
    worker.close()


def test_enough_pairs_for_the_rank_test():
    assert pairs_needed(1) == 8
    for targets in (1, 10, 100):
        assert 2 / 2 ** pairs_needed(targets) * targets <= 0.05 / 2


def test_specs_outside_of_the_repository(repository):
    with pytest.raises(UsageError, match="outside of"):
        regress.top_for("rlhf_kernels.ops", repository)
    assert regress.top_for("own_ops.spec", None) == repository


def test_a_file_of_specs_is_that_of_the_worktree(repository):
    commit = revisions.commit_of(repository, "HEAD")
    place = Place(package=str(repository / "own_ops" / "spec.py"))
    found = regress.Regression(repository, (commit, commit), place, [])
    with revisions.checkouts(repository, [commit]) as trees:
        side = found._side(trees[commit])
        found.turns = regress.Turns(dict.fromkeys(regress.SIDES, side), place)
        found.turns.pair(0, [])
        found._from_the_worktrees()
        files = found.turns.hello["base"]["files"]
        assert {str(trees[commit] / "own_ops" / name) for name in ("spec.py", "reference.py")} <= {*files}
        # What the file imports now comes from the checkout itself.
        astray = Worker(replace(side, directory=repository, paths=()), place)
        found.turns.hello["head"] = astray.ask("hello")
        astray.close()
        with pytest.raises(UsageError, match=r"head imported .*own_ops/.*\.py, expected its copy below"):
            found._from_the_worktrees()


class Synthetic(regress.Turns):
    """Samples of known truth in place of processes; notes what was asked for."""

    asked: typing.ClassVar[list] = []

    def pair(self, number, targets, tell=lambda target: None):
        self.asked.append((number, [target.impl for target in targets]))
        self.hello = {
            side: {"files": [str(one.directory / "x")], "fingerprint": {}} for side, one in self.sides.items()
        }
        draw = random.Random(number)
        for target in targets:
            tell(target)
            # "clear" is slower in every process, "hazy" in two of three, "loud" and "wild" in every second.
            change = {
                "clear": 0.06 + draw.gauss(0, 0.01),
                "hazy": 0.07 if number % 3 else -0.02,
                "loud": 0.03 * (-1) ** number,
                "wild": 0.20 if number % 2 else -0.15,
            }[target.impl]
            for side, factor in (("base", 1.0), ("head", 1 + change)):
                samples = [100.0 * factor * (1 + i / 1000) for i in range(12)]
                row = Row(
                    *target[:1], target.impl, *target[1:4], "cpu", median_us=samples[6], samples_us=[samples]
                )
                row.ci_us = (samples[0], samples[-1])
                self._rows[side][target].append(row)


@pytest.mark.parametrize(
    ("rerun", "pairs", "again"),
    [(False, 11, set()), (True, 11, {"hazy", "loud", "wild"}), (False, None, {"hazy"})],
    ids=["so many", "rerun", "by itself"],
)
def test_rows_without_a_verdict_are_measured_again(repository, monkeypatch, rerun, pairs, again):
    monkeypatch.setattr(regress, "Turns", Synthetic)
    Synthetic.asked = asked = []
    commits = (revisions.commit_of(repository, "fast"), revisions.commit_of(repository, "slow"))
    names = ["clear", "hazy", "loud", "wild"]
    targets = [Target("own_double", "small", "float32", "forward", impl) for impl in names]
    found = regress.Regression(
        repository, commits, Place(package="own_ops.spec"), targets, pairs=pairs, rerun=rerun
    )
    found.measure(lambda *_: None)
    verdicts = {row.impl: row for row in found.report().rows}
    assert verdicts["clear"].verdict == "slower"
    assert verdicts["loud"].verdict in ("inconclusive", "same")
    assert verdicts["wild"].verdict == "inconclusive"
    first = verdicts["clear"].processes[0]
    assert first == pairs or first == pairs_needed(4, 0.05 / 3)
    assert [number for number, _ in asked] == list(range(len(asked)))
    assert asked[:first] == [(number, names) for number in range(first)]
    assert set().union(*(impls for _, impls in asked[first:])) == again
    assert {verdicts[name].processes for name in again} <= {(2 * first,) * 2, (4 * first,) * 2}
    assert found.report().gate.level == pytest.approx(0.05 / 3 if again else 0.05), "three looks share it"
    assert verdicts["hazy"].verdict == ("slower" if again else "inconclusive")
    base, head = found.runs()
    assert (base.complete, head.complete, base.session) == (True, True, head.session)
