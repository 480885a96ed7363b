"""Proof of learning: the page is what the raw files say, and the scripts run rows as they claim."""

import json
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from palm_rlhf.models.value import frozen
from palm_rlhf.tasks.pairs import Labelled, Pair
from palm_rlhf.trainers.offline import OfflineConfig
from palm_rlhf.trainers.online import OnlineConfig

LEARNING = Path(__file__).parents[2] / "benchmarks" / "learning"
DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts import one another by name, as they do when they are run."""
    sys.path.insert(0, str(LEARNING))
    yield
    sys.path.remove(str(LEARNING))
    for name in ("rows", "tables", "arithmetic", "judges"):
        sys.modules.pop(name, None)


def test_the_page_is_what_the_raw_files_say():
    import tables

    assert tables.page() == tables.PAGE.read_text(encoding="utf-8")


def test_raw_files_are_small_and_of_fixed_seeds():
    import rows

    paths = sorted(rows.RESULTS.glob("*/*.json"))
    assert paths
    for path in paths:
        run = json.loads(path.read_text())
        assert path.stat().st_size < 200_000
        assert path.stem in (
            f"{run['row']}-{run['seed']}",
            f"{run['row']}-{run['settings'].get('lr', 0):g}-1",
        )
        assert run["seed"] in (1, 2, 3)


def test_online_rows_draw_equal_samples():
    import rows

    for folder in rows.RESULTS.iterdir():
        for run in rows.read(folder):
            found = run["settings"]
            if "prompts" in found:
                assert found["prompts"] * found["samples"] * found["steps"] == run["samples"], run["row"]


def test_a_curve_keeps_its_ends(tmp_path):
    import rows

    metrics = [{"step": i + 1, "reward": i / 3, "seconds": 1.0} for i in range(1000)]
    rows.write(tmp_path / "ppo-1.json", metrics, row="ppo", seed=1)
    (found,) = rows.read(tmp_path)
    assert len(found["curve"]) == rows.POINTS
    assert found["curve"][0] == {"step": 1, "reward": 0.0}
    assert found["curve"][-1] == {"step": 1000, "reward": 333.0}


def test_numbers_are_written_from_the_last_digit_on():
    import arithmetic

    tokens = arithmetic.Digits()
    assert [tokens.signs[i] for i in tokens.encode("12*7=\n")] == ["2", "1", "*", "7", "0", "=", "\n"]
    assert tokens.decode([*tokens.encode("12*7="), tokens.stop]) == "12*7="
    assert tokens.decode(tokens.encode("4")[:1]) == "4"
    assert tokens.encode("\n") == [tokens.stop]


def test_no_practice_with_what_judges():
    if not (DATA / "gsm8k").exists():
        pytest.skip(f"{DATA} has no gsm8k: set PALM_RLHF_DATA")
    import arithmetic

    final, tuned = arithmetic.division(tune=False), arithmetic.division(tune=True)
    judge = {*final.held_out}
    assert not judge & {*arithmetic.practice(final)}
    assert not judge & {*tuned.held_out, *arithmetic.practice(tuned)}
    assert not {*tuned.held_out} & {*arithmetic.practice(tuned)}
    solved = arithmetic.demonstrations(arithmetic.practice(final), 1)
    right = sum(final.reward(*pair) for pair in solved) / len(solved)
    assert right == pytest.approx(1 - arithmetic.SLIPS, abs=0.02)


def test_every_row_begins_where_the_others_do(make_palm, tmp_path, monkeypatch):
    import rows

    class Letters:
        name, vocabulary, pad, stop = "letters", 23, 0, 1

        def encode(self, text):
            return [2 + "abcd".index(sign) for sign in text]

        def decode(self, tokens):
            return "".join("abcd"[token - 2] for token in tokens if 2 <= token < 6)

    start = rows.Start(frozen(make_palm()), Letters(), 1)
    before = {name: value.clone() for name, value in start.model.state_dict().items()}
    seen = []

    def evaluate(model, generator):
        moved = max(float((a - b).abs().max()) for a, b in zip(model.parameters(), before.values()))
        seen.append(moved)
        return {"moved": moved}

    online = OnlineConfig(prompts=8, max_new_tokens=3, minibatch=8, policy_lr=1e-2, steps=2)
    task = rows.Task(
        "letters", "moved", start, [[2, 3], [4]], lambda g: g.responses[:, 0].float(),
        lambda: [Pair("a", "b", "c", 1.0)] * 3, online, OfflineConfig(batch=3, lr=1e-2),
        {"grpo": rows.Setting({}, {"kl_coef": 0.0})}, 4, evaluate,
    )  # fmt: skip
    args = Namespace(rows=["grpo", "ppo", "dpo"], config={}, options={}, out=tmp_path, rates=False)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"dpo needs its rate: .* got \[\]. Run letters.py --rates"):
        rows.every_row(args, task, 2, {"moved": 0.0})
    for rate, judged in zip(rows.RATES, (0.2, 0.3, 0.3)):
        facts = {"row": "dpo", "settings": {"lr": rate}, "after": {"moved": judged}}
        rows.write(tmp_path / "letters-tune" / f"dpo-{rate:g}-1.json", [{"step": 1}], **facts)
    rows.every_row(args, task, 2, {"moved": 0.0})
    assert json.loads((tmp_path / "dpo-2.json").read_text())["settings"]["lr"] == 3e-5, "best, then smallest"
    assert len(seen) == 3
    assert min(seen) > 0
    assert all(torch.equal(value, before[name]) for name, value in start.model.state_dict().items())
    grpo = json.loads((tmp_path / "grpo-2.json").read_text())
    assert (grpo["settings"]["prompts"], grpo["settings"]["samples"]) == (2, 4)
    assert (grpo["settings"]["kl_coef"], grpo["samples"], grpo["before"]) == (0.0, 16, {"moved": 0.0})
    rows.every_row(replace_rows(args, ["grpo"]), task, 2, {"moved": 0.0})
    assert len(seen) == 3, "a run that is there was run again"


def test_the_judge_calls_half_of_what_it_has_not_read_positive():
    import judges

    generator = torch.Generator().manual_seed(0)
    found = []
    for label, words, count in ((1.0, "good fine film plot", 300), (0.0, "bad film plot plot", 100)):
        drawn = torch.randint(4, (count, 3), generator=generator).tolist()
        found += [Labelled(" ".join(words.split()[i] for i in each), label) for each in drawn]
    judge = judges.judge(found)
    assert judge("film plot") < judges.NaiveBayes(found)("film plot"), "most are positive here"
    called = sum(judge(example.text) > 0 for example in found) / len(found)
    assert called == pytest.approx(0.5, abs=0.1)
    assert judges.called_positive(lambda text: 1.0, found, "all") == {
        "all_accuracy": 0.75, "all_on_positive": 1.0, "all_on_negative": 1.0,
    }  # fmt: skip


def replace_rows(args, rows):
    return Namespace(**{**vars(args), "rows": rows})
