"""Whole steps of the stacks that `rlhf_kernels.patch` knows, patched against themselves.

    python benchmarks/patched_steps.py                     # all; --help for one
    python benchmarks/patched_steps.py trl-grpo trl-dpo --rounds 5 --out figures.jsonl

Time: seconds of processor time on one thread, which a busy machine disturbs less than the clock's, of rounds
that interleave both in one process, after one round that does not count. Memory: a fresh process each, which
runs a first step, and then one under the profiler: `tensors` is the most that tensors hold above what they
held before (so without the weights, with gradients and the optimizer's state), `process` is by how much the
first step raised the most that the process ever held. `difference` is between the gradients of both,
relative to each tensor's largest element. float32 on the CPU; needs `make peers`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor

import rlhf_kernels
from rlhf_kernels.engine.memory import peak_bytes
from rlhf_kernels.engine.patched import difference
from rlhf_kernels.stacks import activate
from rlhf_kernels.stacks.peer import installed_version

VOCABULARY = 50257
Step = Callable[[], list[Tensor]]  # does one step and returns what is to be compared


class Task(NamedTuple):
    """A step of a stack: the names to patch, the packages it is of, and what makes it."""

    targets: tuple[str, ...]
    packages: tuple[str, ...]
    make: Callable[[], Step]


def _llama(layers: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=128, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
            vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip


def _tokenizer() -> Any:
    """A word a token: "w17"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, VOCABULARY))]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **names)


def _text(words: int) -> str:
    return "".join(f"w{random.randrange(3, VOCABULARY)} " for _ in range(words))


def _options() -> dict[str, Any]:
    """One step of a trainer that writes nothing and logs nothing."""
    return {
        "output_dir": tempfile.mkdtemp(), "max_steps": 1, "use_cpu": True, "bf16": False, "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip


def _stepping(trainer: Any) -> Step:
    """`trainer.train()`, one step, from the same weights and random numbers; gives the gradients."""
    from transformers import TrainerCallback

    weights = copy.deepcopy(trainer.model.state_dict())
    gradients: list[Tensor] = []

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            gradients[:] = [p.grad for p in trainer.model.parameters() if p.grad is not None]

    trainer.add_callback(Gradients())

    def step() -> list[Tensor]:
        trainer.model.load_state_dict(weights)
        torch.manual_seed(1)
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
        return list(gradients)

    return step


def trl_grpo() -> Step:
    """8 completions of 64 tokens to prompts of 32, and the update; Llama 2 x 128, V 50257, AdamW."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion) % 7) for completion in completions]

    options = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 64}
    prompts = Dataset.from_dict({"prompt": [_text(32) for _ in range(8)]})
    return _stepping(
        GRPOTrainer(
            _llama(), reward_funcs=reward, args=GRPOConfig(**_options(), **options), train_dataset=prompts,
            processing_class=_tokenizer(),
        )
    )  # fmt: skip


def trl_dpo() -> Step:
    """4 pairs, prompts of 32 tokens and responses of 64; Llama 2 x 128 and a reference, V 50257, AdamW."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    lengths = {"prompt": 32, "chosen": 64, "rejected": 64}
    pairs = Dataset.from_dict({name: [_text(words) for _ in range(8)] for name, words in lengths.items()})
    model = _llama()
    return _stepping(
        DPOTrainer(
            model, ref_model=copy.deepcopy(model), processing_class=_tokenizer(), train_dataset=pairs,
            args=DPOConfig(**_options(), per_device_train_batch_size=4),
        )
    )  # fmt: skip


def transformers_loss() -> Step:
    """Loss and gradients of 4 x 96 tokens by the model's own head; Llama 4 x 128, V 50257."""
    model, tokens = _llama(layers=4), torch.randint(3, VOCABULARY, (4, 96))
    mask = torch.ones_like(tokens)
    mask[1, :20] = 0  # padding on the left
    labels = tokens.masked_fill(mask == 0, -100)

    def step() -> list[Tensor]:
        model.zero_grad()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())]

    return step


def palm_train() -> Step:
    """RLHFTrainer.train of palm-rlhf-pytorch: a rollout of 256 tokens to a prompt of 32, and the update; 512
    wide, depth 4, V 256, LoRA of rank 8."""
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    torch.manual_seed(0)
    palm = PaLM(dim=512, num_tokens=256, depth=4)
    reward = RewardModel(palm, num_binned_output=5)
    prompts = torch.randint(1, 256, (1, 32))
    trainer = RLHFTrainer(palm=palm, reward_model=reward, prompt_token_ids=prompts)
    optims = (trainer.actor_optim, trainer.critic_optim)
    trained = [p for optim in optims for group in optim.param_groups for p in group["params"]]
    for parameter in trained:  # half of an adapter starts at 0, and gives the other half no gradient
        torch.nn.init.normal_(parameter, std=0.02)
    weights = [p.detach().clone() for p in trained]
    gradients: list[Tensor] = []

    def keep(optim: Any, *_: Any) -> None:
        gradients.extend(p.grad.clone() for group in optim.param_groups for p in group["params"])

    for optim in optims:
        optim.optimizer.register_step_pre_hook(keep)

    def step() -> list[Tensor]:
        gradients.clear()
        with torch.no_grad():
            for parameter, weight in zip(trained, weights):
                parameter.copy_(weight)
        torch.manual_seed(1)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train(num_episodes=1, max_timesteps=1, update_timesteps=1, max_seq_len=256)
        return list(gradients)

    return step


TASKS = {
    "trl-grpo": Task(("trl", "transformers"), ("trl", "transformers"), trl_grpo),
    "trl-dpo": Task(("trl", "transformers"), ("trl", "transformers"), trl_dpo),
    "transformers-loss": Task(("transformers",), ("transformers",), transformers_loss),
    "palm-train": Task(("palm_rlhf_pytorch",), ("palm-rlhf-pytorch",), palm_train),
}


@contextlib.contextmanager
def holding(task: Task, patched: bool) -> Any:
    """The task's stacks, patched or as they are."""
    with contextlib.ExitStack() as held:
        for target in task.targets if patched else ():
            held.enter_context(rlhf_kernels.patch(target))
        yield


def in_turns(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of steps as they are and patched, and the difference of their results."""
    task = TASKS[name]
    step = task.make()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    results: dict[bool, list[Tensor]] = {}
    for number in range(rounds + 1):
        for patched in (False, True) if number % 2 else (True, False):
            with holding(task, patched):
                began = time.process_time()
                found = step()
                took = time.process_time() - began
            if number:
                seconds[patched].append(took)
            else:
                results[patched] = [t.clone() for t in found]
    return {
        "before_s": seconds[False],
        "after_s": seconds[True],
        "difference": difference(results[False], results[True]),
    }


def memory(name: str, patched: bool) -> dict[str, float]:
    """MB of a step in this process, which has to be a fresh one."""
    task = TASKS[name]
    step = task.make()
    with holding(task, patched):
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        step()
        raised = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
        tensors = peak_bytes(step, torch.device("cpu"))
    return {"tensors_mb": tensors / 1e6, "process_mb": raised * 1024 / 1e6}


def in_process(function: str, *args: Any) -> dict[str, Any]:
    """What a function of this file gives in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps([function, *args])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{function}{args} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child(function: str, *args: Any) -> None:
    """The other side of `in_process`."""
    warnings.simplefilter("ignore")
    activate()
    torch.set_num_threads(1)
    random.seed(0)
    found = {"in_turns": in_turns, "memory": memory}[function](*args)
    print(f"\n{json.dumps(found)}")


def measure(name: str, rounds: int) -> dict[str, Any]:
    """The figures of one task."""
    row = {"task": name, **in_process("in_turns", name, rounds)}
    row["speedup"] = statistics.median(b / a for b, a in zip(row["before_s"], row["after_s"]))
    for patched, label in ((False, "before"), (True, "after")):
        for kind, most in in_process("memory", name, patched).items():
            row[f"{label}_{kind}"] = most
    versions = {package: installed_version(package) for package in TASKS[name].packages}
    return row | {"torch": torch.__version__, **versions}


def table(row: dict[str, Any]) -> str:
    """The figures of one task, to be read."""
    before, after = statistics.median(row["before_s"]), statistics.median(row["after_s"])
    lines = [f"{row['task']}: {' '.join(TASKS[row['task']].make.__doc__.split())}"]
    lines.append(f"  time      {before:8.2f} s  -> {after:8.2f} s    {row['speedup']:.2f}x")
    for kind in ("tensors", "process"):
        old, new = row[f"before_{kind}_mb"], row[f"after_{kind}_mb"]
        lines.append(f"  {kind:9} {old:8.0f} MB -> {new:8.0f} MB   {new / old - 1:+.0%}")
    lines.append(f"  difference {row['difference']:.1e}")
    return "\n".join(lines)


def main() -> int:
    """Measures what was named, or all; prints a table each, or rows. 64 where an argument is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", help=f"what to measure: {', '.join(TASKS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default: 3)")
    parser.add_argument("--json", action="store_true", help="a JSON row each in place of tables")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*json.loads(options.child))
        return 0
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown or options.rounds < 1:
        wrong = f"unknown task {unknown[0]!r}: expected some of {', '.join(TASKS)}" if unknown else ""
        print(wrong or f"--rounds must be at least 1, got {options.rounds}", file=sys.stderr)
        return 64
    activate()
    for name in options.tasks or TASKS:
        row = measure(name, options.rounds)
        print(json.dumps(row) if options.json else table(row), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
