"""Sentiment: SST-2's file, the judge, variety."""

import math
import os
from pathlib import Path

import pytest

from palm_rlhf.tasks.pairs import Labelled
from palm_rlhf.tasks.sentiment import NaiveBayes, distinct, features, parts, read_sst2

DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_sentences_have_a_label_behind_a_tab(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na fine film\t1\n\ndull \t0\n")
    assert read_sst2(path) == [Labelled("a fine film", 1.0), Labelled("dull", 0.0)]
    for line in ("no label", "half\t0.5", "\t1"):
        path.write_text(f"a fine film\t1\n{line}\n")
        with pytest.raises(ValueError, match="line 2: expected a sentence, a tab and 0 or 1"):
            read_sst2(path)


def test_parts_share_no_example():
    examples = [Labelled(str(i), 0.0) for i in range(10)]
    found = parts(examples, (0.5, 0.3, 0.2), seed=3)
    assert [len(part) for part in found] == [5, 3, 2]
    assert {e.text for part in found for e in part} == {e.text for e in examples}
    assert found == parts(examples, (0.5, 0.3, 0.2), seed=3) != parts(examples, (0.5, 0.3, 0.2), seed=4)
    with pytest.raises(ValueError, match=r"shares must add up to 1, got \[0.5, 0.4\]"):
        parts(examples, (0.5, 0.4))
    with pytest.raises(ValueError, match="leave a part empty"):
        parts(examples, (0.99, 0.01))


def test_the_judge_adds_log_odds_of_words_and_pairs():
    judge = NaiveBayes([Labelled("Good good", 1), Labelled("bad", 0), Labelled("bad film", 0)])
    # Of 1: good, "good good"; of 0: bad twice, film, "bad film"; five features in all.
    good = math.log((1 + 1) / (2 + 5)) - math.log(1 / (4 + 5))
    bad = math.log(1 / (2 + 5)) - math.log((2 + 1) / (4 + 5))
    prior = math.log(1 / 2)
    assert judge("good") == pytest.approx(prior + good, abs=1e-12)
    assert judge("good GOOD good") == pytest.approx(prior + 2 * good, abs=1e-12)
    assert judge("bad unheard") == pytest.approx(prior + bad, abs=1e-12)
    assert judge("") == pytest.approx(prior, abs=1e-12)
    assert judge.accuracy([Labelled("good", 1), Labelled("bad", 0), Labelled("bad", 1)]) == pytest.approx(
        2 / 3
    )
    assert list(features("A b C")) == ["a", "b", "c", "a b", "b c"]


@pytest.mark.parametrize(
    ("examples", "said"),
    [
        ([Labelled("a", 1)], "both classes need texts, got 0 of 0 and 1 of 1"),
        ([Labelled("a", 0.5)], "labels are 0 or 1, got 0.5 for 'a'"),
    ],
)
def test_a_judge_needs_two_classes(examples, said):
    with pytest.raises(ValueError, match=said):
        NaiveBayes(examples)


def test_the_judge_is_right_about_sst2():
    folder = DATA / "sst2"
    if not (folder / "train.tsv").exists():
        pytest.skip(f"{folder} is not here: set PALM_RLHF_DATA to the folder that holds sst2")
    train, dev = read_sst2(folder / "train.tsv"), read_sst2(folder / "dev.tsv")
    assert (len(train), len(dev)) == (6920, 872)
    assert NaiveBayes(train).accuracy(dev) > 0.78


def test_distinct_counts_different_pairs():
    assert distinct(["a b a b", "b a"]) == pytest.approx(2 / 4)
    assert distinct(["a b a b"], n=1) == pytest.approx(2 / 4)
    assert distinct(["alone"]) == 0.0
