"""The calculator: problems with one answer, divided so that no one judges what it learned by heart."""

import gzip
import json
import os
from pathlib import Path

import pytest
import torch

from palm_rlhf.generation import generate
from palm_rlhf.tasks.calculator import answer, divided, gsm8k, products
from palm_rlhf.tokens import ByteTokenizer

BYTES = ByteTokenizer()
DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_every_problem_is_on_one_side_alone():
    task = products(30, 4, held_out=0.25, seed=3)
    assert len(task.train) == 90
    assert len(task.held_out) == 30
    assert {*task.train, *task.held_out} == {f"{a}*{b}=" for a in range(1, 31) for b in range(1, 5)}
    assert task == products(30, 4, held_out=0.25, seed=3)
    assert set(task.held_out) != set(products(30, 4, held_out=0.25, seed=4).held_out)


def test_the_answer_is_the_product_and_nothing_else_is_rewarded():
    task = products(3, 3)
    assert all(task.reward(prompt, response) == 1 for prompt, response in task.solved)
    assert [task.reward("12*7=", response) for response in ("84", "084", "84 ", "83", "")] == [1, 0, 0, 0, 0]
    assert [answer(prompt) for prompt in ("12+7=", "12-7=", "7-12=")] == ["19", "5", "-5"]
    with pytest.raises(ValueError, match=r"looks like '12\*7=', '12\+7=' or '12-7=', got '12/7='"):
        answer("12/7=")


def test_gsm8k_gives_the_right_products_of_its_steps(tmp_path):
    rows = [
        "a <<12*7=84>>84 and <<3 * 4 = 12>>",
        "<<2*0.5=1>> <<5*5=26>> <<1+1=2>>",
        "<<12*7=84>> <<8*9=72>>",
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"answer": row}) for row in rows))
    task = gsm8k(path, held_out=0.34)
    assert sorted((*task.train, *task.held_out)) == ["12*7=", "3*4=", "8*9="]
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert gsm8k(packed, held_out=0.34) == task
    path.write_text("nothing of that kind")
    with pytest.raises(ValueError, match="has no calculator steps"):
        gsm8k(path)


def test_steps_of_other_kinds_up_to_a_bound(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("<<1+1=2>> <<12-7=5>> <<40+60=100>> <<99-98=1>> <<7-12=5>> <<3*4=12>> <<2+0.5=2.5>>")
    task = gsm8k(path, held_out=0.34, operators="+-", largest=99)
    assert sorted((*task.train, *task.held_out)) == ["1+1=", "12-7=", "99-98="]
    for operators in ("", "+/"):
        with pytest.raises(ValueError, match="operators are of"):
            gsm8k(path, operators=operators)


def test_gsm8k_as_it_is():
    path = DATA / "gsm8k" / "train.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not here: set PALM_RLHF_DATA to the folder that holds gsm8k")
    task = gsm8k(path)
    assert len(task.train) > 1000
    assert all(task.reward(*pair) for pair in task.solved)
    assert task.max_new_tokens > max(len(right) for _, right in task.solved)


def test_a_side_without_problems_is_refused():
    with pytest.raises(ValueError, match="leaves one side empty"):
        divided(["1*1=", "1*2="], held_out=0.0, seed=0)
    with pytest.raises(ValueError, match="reach at least 1, got 0 and 4"):
        products(0)


def test_accuracy_is_the_share_of_right_answers(make_palm):
    model, task = make_palm(num_tokens=256), products(4, 3, held_out=0.5)
    prompts = [BYTES.encode(prompt) for prompt in task.held_out]
    drawn = generate(
        model, prompts, max_new_tokens=task.max_new_tokens, stop=10, samples=3,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    answers = {prompt: set() for prompt in task.held_out}
    for row in range(len(drawn.tokens)):
        answers[task.held_out[row // 3]].add(BYTES.decode(drawn.response(row, without=(10,))))

    class Marked(type(task)):
        """Rewards exactly what the model says to the first half of the problems."""

        @staticmethod
        def reward(prompt, response):
            return float(response in answers[prompt] and prompt in task.held_out[: len(task.held_out) // 2])

    marked = Marked(task.train, task.held_out)
    found = marked.evaluate(model, None, BYTES, torch.Generator().manual_seed(1), samples=3)
    assert found == {"accuracy": 0.5}
