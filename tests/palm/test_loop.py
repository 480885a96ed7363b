"""The loop: a run that stops goes on bit for bit, leaves nothing half-written, and says what is damaged."""

import json
import shutil
import signal

import pytest
import torch

from palm_rlhf.models.checkpoint import CheckpointError, read_tensors
from palm_rlhf.models.palm import PaLM
from palm_rlhf.tasks.text import windows
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.checkpoints import Checkpoints
from palm_rlhf.trainers.log import RunLog, _smoothed, plot_metrics, read_metrics
from palm_rlhf.trainers.loop import Interrupted, run
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

STEPS = 8


class Stopping(SFTTrainer):
    """Ctrl-C, or another misfortune, in the midst of one step."""

    at, misfortune = None, None

    def step(self, index):
        if index == self.at:
            self.misfortune()
        return super().step(index)


def learner(at=None, misfortune=None, **config):
    """With dropout, so that PyTorch's global generator matters as well."""
    torch.manual_seed(0)
    model = PaLM(dim=32, num_tokens=256, depth=1, heads=2, dim_head=16, attn_dropout=0.2, ff_dropout=0.2)
    samples, judge = windows("the quick brown fox " * 20, ByteTokenizer(), 8).divided(0.1)
    options = {"steps": STEPS, "batch": 4, "warmup": 2, "eval_every": 4} | config
    trainer = Stopping(model, samples, judge, SFTConfig(**options))
    trainer.at, trainer.misfortune = at, misfortune
    return trainer


def train(trainer, folder, steps=STEPS, save_every=3, **options):
    log = RunLog(folder, tensorboard=False, **options)
    return run(trainer, log, Checkpoints(folder / "c"), steps=steps, save_every=save_every, progress=False)


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise ValueError("something broke")


def figures(folder):
    """Metrics without what the clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def same_bits(one, other):
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    for mine, theirs in zip(*(t.optimizers()["model"].state.values() for t in (one, other)), strict=True):
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without any stop."""
    folder = tmp_path_factory.mktemp("straight")
    trainer = learner()
    assert train(trainer, folder) == STEPS
    return trainer, folder


@pytest.mark.parametrize("at", [0, 2, 4])
def test_ctrl_c_saves_after_the_step_and_the_run_goes_on_bit_for_bit(tmp_path, straight, at):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted) as stopped:
        train(learner(at, ctrl_c), tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.value.step == at + 1
    assert stopped.value.checkpoint == tmp_path / "c" / f"step-{at + 1:08d}"
    torch.manual_seed(99)  # what happens between the runs is of no consequence
    resumed = learner()
    torch.rand(3)
    assert train(resumed, tmp_path) == STEPS - at - 1
    same_bits(resumed, straight[0])
    assert figures(tmp_path) == figures(straight[1])


def test_a_termination_saves_as_ctrl_c_does(tmp_path):
    with pytest.raises(Interrupted) as stopped:
        train(learner(3, lambda: signal.raise_signal(signal.SIGTERM)), tmp_path)
    assert stopped.value.step == 4


def test_ctrl_c_while_the_run_is_set_up_costs_no_step(tmp_path):
    class Slow(Checkpoints):
        def restore(self, learner):
            ctrl_c()
            return super().restore(learner)

    with pytest.raises(Interrupted) as stopped:
        run(learner(), RunLog(tmp_path, tensorboard=False), Slow(tmp_path / "c"), steps=STEPS, progress=False)
    assert (stopped.value.step, stopped.value.checkpoint) == (0, None)
    assert not (tmp_path / "c").exists()


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    def twice():
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        train(learner(4, twice), tmp_path)
    assert Checkpoints(tmp_path / "c").last.name == "step-00000003"


def test_ctrl_c_in_the_last_step_ends_the_run_as_usual(tmp_path):
    assert train(learner(STEPS - 1, ctrl_c), tmp_path) == STEPS


def test_what_was_logged_after_the_last_checkpoint_is_dropped(tmp_path, straight):
    with pytest.raises(ValueError, match="something broke"):
        train(learner(5, fail), tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # a crash in the midst of a line
    resumed = learner()
    assert train(resumed, tmp_path) == STEPS - 3
    assert figures(tmp_path) == figures(straight[1])
    same_bits(resumed, straight[0])


def test_a_finished_run_stays_as_it_is_and_may_grow(tmp_path, straight):
    shutil.copytree(straight[1], tmp_path / "run")
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = learner()
    assert train(again, tmp_path / "run") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept
    same_bits(again, straight[0])
    assert train(learner(steps=STEPS + 2), tmp_path / "run", steps=STEPS + 2) == 2
    assert [row["step"] for row in figures(tmp_path / "run")] == list(range(1, STEPS + 3))


def test_the_newest_checkpoints_stay(straight):
    assert [path.name for path in Checkpoints(straight[1] / "c").all()] == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("file", ["training.pt", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "rubbish", "gone"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(tmp_path, straight, file, damage):
    shutil.copytree(straight[1], tmp_path / "run")
    last = tmp_path / "run" / "c" / "step-00000008"
    data = (last / file).read_bytes()
    if damage == "gone":
        (last / file).unlink()
    else:
        (last / file).write_bytes(
            {"cut": data[: len(data) // 2], "empty": b"", "rubbish": b"x" * 999}[damage]
        )
    kept = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError) as error:
        train(learner(), tmp_path / "run")
    text = str(error.value)
    assert text.startswith(f"the checkpoint {last} cannot be resumed: ")
    assert text.endswith("Remove the folder step-00000008 to go on from step-00000006.")
    assert "\n" not in text
    assert len(text) < 500
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == kept
    # The remedy helps.
    shutil.rmtree(last)
    resumed = learner()
    assert train(resumed, tmp_path / "run") == 2
    same_bits(resumed, straight[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path, straight):
    shutil.copytree(straight[1], tmp_path / "run")
    other = learner()
    other.name = "ppo"
    with pytest.raises(CheckpointError, match="it is one of 'sft', not of 'ppo'"):
        train(other, tmp_path / "run")
    wider = learner()
    wider.model = PaLM(dim=48, num_tokens=256, depth=1, heads=2, dim_head=16)
    with pytest.raises(CheckpointError, match=r"does not fit: .* expected"):
        train(wider, tmp_path / "run")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "run" / "c" / "step-00000008" / "training.pt")
    with pytest.raises(CheckpointError, match="it lacks 'learner'"):
        train(learner(), tmp_path / "run")


def test_a_checkpoint_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    trainer, checkpoints = learner(), Checkpoints(tmp_path)
    checkpoints.save(trainer, 1)
    monkeypatch.setattr(
        torch, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(trainer, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_a_killed_run_left_of_a_checkpoint_is_cleared_away(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(learner(), 1)
    (tmp_path / ".step-00000002.123").mkdir()
    (tmp_path / "step-00000001.backup").mkdir()
    assert checkpoints.restore(learner()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000001.backup"]


def test_frozen_weights_are_left_out_where_their_model_is_named(tmp_path):
    def frozen():
        trainer = learner()
        trainer.model.token_emb.requires_grad_(False)
        return trainer

    checkpoints, trainer = Checkpoints(tmp_path, base="runs/sft"), frozen()
    path = checkpoints.save(trainer, 1)
    tensors, metadata = read_tensors(path / "model.safetensors")
    assert trainer.model.state_dict().keys() - tensors.keys() == {"token_emb.weight"}
    assert (metadata["frozen"]["model"], metadata["frozen"]["tensors"]) == ("runs/sft", 1)
    assert checkpoints.restore(frozen()) == 1
    # One bit.
    other = frozen()
    other.model.token_emb.weight.data.view(torch.int32)[3, 3] ^= 1
    with pytest.raises(CheckpointError, match="goes with the frozen weights of runs/sft as they were"):
        checkpoints.restore(other)
    # Without a name everything is in it.
    whole = Checkpoints(tmp_path / "whole").save(frozen(), 1)
    assert "token_emb.weight" in read_tensors(whole / "model.safetensors")[0]


def test_metrics_can_be_read_while_the_run_goes_on_and_are_json(tmp_path):
    log = RunLog(tmp_path, tensorboard=False)
    log.resume_at(0)
    log.write(1, {"loss": 2.5, "ratio": float("nan")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.5, "ratio": None}
    log.close()


def test_tensorboard_has_the_same_figures(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = RunLog(tmp_path)
    log.resume_at(0)
    for step in (1, 2):
        log.write(step, {"loss": step / 2})
    log.close()
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(1, 0.5), (2, 1.0)]


def test_a_curve_is_a_picture_and_leaves_no_other_file(tmp_path):
    rows = [{"step": i, "loss": 1 / i, "accuracy": None} for i in range(1, 5)]
    path = plot_metrics(rows, ("loss", "accuracy"), tmp_path / "curve.png", "a caption")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    few = path.read_bytes()
    plot_metrics([{"step": i, "loss": i % 3} for i in range(100)], ("loss",), path)
    assert path.read_bytes() not in (few, b"")


def test_many_points_are_drawn_with_the_mean_of_the_last_ones():
    points = [(step, float(step % 2)) for step in range(80)]
    found = _smoothed(points)
    assert [step for step, _ in found] == list(range(80))
    assert [value for _, value in found[:5]] == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2, 1 / 2])
