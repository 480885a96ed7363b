"""Reproduces the figures of palm_rlhf against what one has: generation, PPO cycles, a training step.

    python benchmarks/palm_bars.py [TASK...] [--rounds 3] [--threads 2] [--impl NAME...] [--out FILE.jsonl]

Needs `make peers`, and an otherwise idle machine. Every implementation runs once before it is timed, but for
what takes minutes; rounds are interleaved, and the table shows medians and ratios taken round by round.
float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import palm_cycles  # noqa: E402
from palm_cycles import OURS, UPSTREAM  # noqa: E402

from rlhf_kernels.stacks import activate  # noqa: E402
from rlhf_kernels.stacks.peer import installed_version  # noqa: E402


def generation() -> dict[str, Callable[[], int]]:
    """4 layers, 256 wide, V 256, batch 16, 256 tokens in all of which 32 are the prompt; tokens drawn."""
    from palm_rlhf_pytorch import PaLM as Upstream
    from transformers import LlamaConfig, LlamaForCausalLM

    from palm_rlhf import PaLM, generate

    prompt, total = torch.randint(1, 256, (16, 32)), 256
    ours = PaLM(dim=256, num_tokens=256, depth=4)
    theirs = Upstream(dim=256, num_tokens=256, depth=4).eval()
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, head_dim=64,
            num_key_value_heads=1, vocab_size=256, tie_word_embeddings=True, pad_token_id=0,
            eos_token_id=None, bos_token_id=None, max_position_embeddings=512,
        )
    ).eval()  # fmt: skip
    new = total - prompt.shape[1]

    def run_llama() -> int:
        llama.generate(prompt, max_new_tokens=new, do_sample=True, use_cache=True, top_k=0)
        return new * 16

    def run_upstream() -> int:
        theirs.generate(total, prompt=prompt, temperature=1.0)
        return new * 16

    def run_ours() -> int:
        generate(ours, prompt, max_new_tokens=new)
        return new * 16

    return {
        OURS: run_ours,
        UPSTREAM: run_upstream,
        f"transformers {installed_version('transformers')} Llama, cache": run_llama,
    }


def step() -> dict[str, Callable[[], int]]:
    """Forward, backward and Adam on 4 x 512 tokens; 512 wide, depth 4, V 256."""
    from palm_rlhf_pytorch import PaLM as Upstream

    from palm_rlhf import PaLM

    tokens = torch.randint(1, 256, (4, 513))

    def of(model: torch.nn.Module) -> Callable[[], int]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

        def run() -> int:
            model(tokens, return_loss=True).backward()
            optimizer.step()
            optimizer.zero_grad()
            return 4 * 512

        return run

    sizes = {"dim": 512, "num_tokens": 256, "depth": 4}
    return {
        OURS: of(PaLM(**sizes)),
        UPSTREAM: of(Upstream(**sizes)),
    }


TASKS = {"generation": generation, "step": step}
# Their makers return what makes one.
CYCLES = {"cycle": palm_cycles.cycle, "ppo": palm_cycles.ppo, "ppo_lora": palm_cycles.ppo_lora}


def timed(run: Callable[[], int]) -> float:
    """Tokens per second of one call."""
    began = time.perf_counter()
    tokens = run()
    return tokens / (time.perf_counter() - began)


def interleaved(names: list[str], rounds: int, speed: Callable[[str, int], float]) -> dict[str, list[float]]:
    """What `speed` finds for every implementation, round by round, every other round from the last on."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            speeds[name].append(speed(name, index))
    return speeds


def measure(task: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens per second of every implementation, round by round."""
    torch.manual_seed(0)
    runs = TASKS[task]()
    for run in runs.values():
        run()
    found = interleaved(list(runs), rounds, lambda name, _: timed(runs[name]))
    return {name: {"tokens_per_s": speeds} for name, speeds in found.items()}


def in_process(task: str, name: str, threads: int) -> dict[str, float]:
    """What `alone` finds in a process of its own."""
    code = f"import palm_bars as b; b.alone({task!r}, {name!r}, {threads})"
    found = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    return json.loads(found.stdout.splitlines()[-1])


def alone(task: str, name: str, threads: int) -> None:
    """Prints of a cycle: speed, processor time, peak MB above that of the imports, how much is trained."""
    activate()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    import palm_rlhf_pytorch  # noqa: F401  its imports count for neither

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cycle = CYCLES[task]()[name]()
    if name != UPSTREAM:  # whose cycle takes minutes: what only a first one does is nothing of it
        cycle.run()
    began = time.process_time()
    speed = timed(cycle.run)
    processor = time.process_time() - began
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    found = {"tokens_per_s": speed, "processor_s": processor, "memory_mb": memory, "trained": cycle.trained}
    print(json.dumps(found))


def measure_cycle(
    task: str, rounds: int, threads: int, only: list[str] | None = None
) -> dict[str, dict[str, Any]]:
    """Tokens per second, memory and number of trained parameters of each implementation; upstream once."""
    names = [name for name in CYCLES[task]() if not only or name in only]
    ran: dict[str, list[dict[str, float]]] = {name: [] for name in names}

    def speed(name: str, index: int) -> float:
        if name != UPSTREAM or index == 0:
            ran[name].append(in_process(task, name, threads))
        return ran[name][-1]["tokens_per_s"]

    interleaved(names, rounds, speed)
    return {
        name: {
            "tokens_per_s": [each["tokens_per_s"] for each in found],
            "processor_s": [each["processor_s"] for each in found],
            "memory_mb": statistics.median(each["memory_mb"] for each in found),
            "trained": found[0]["trained"],
        }
        for name, found in ran.items()
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Medians, and how many times as fast ours is round by round; of a cycle by processor time as well."""
    lines = []
    for name, row in found.items():
        line = f"  {name:34} {statistics.median(row['tokens_per_s']):9.1f} tokens/s"
        if OURS in found:
            line += f"   ours {_ratio(found[OURS]['tokens_per_s'], row['tokens_per_s']):.2f}x"
            if "processor_s" in row:
                line += f", {_ratio(row['processor_s'], found[OURS]['processor_s']):.2f}x by processor time"
        if "memory_mb" in row:
            line += f"   {row['memory_mb']:.0f} MB   {row['trained']:,} trained"
        lines.append(line)
    return "\n".join(lines)


def _ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios; what was measured once stands beside each round of the other."""
    most = max(len(above), len(below))
    above, below = (values * most if len(values) == 1 else values for values in (above, below))
    return statistics.median(a / b for a, b in zip(above, below))


def main() -> None:
    """Measures what was named, or all; prints a table and writes the raw figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tasks = TASKS | CYCLES
    parser.add_argument("tasks", nargs="*", choices=[*tasks, []], help="what to measure; all by default")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--impl", nargs="*", help="of a cycle, these implementations alone")
    parser.add_argument("--out", type=Path, help="append the raw figures to this file")
    options = parser.parse_args()
    activate()
    torch.set_num_threads(options.threads)
    for task in options.tasks or tasks:
        if task in CYCLES:
            found = measure_cycle(task, options.rounds, options.threads, options.impl)
        else:
            found = measure(task, options.rounds)
        print(f"\n{task}: {tasks[task].__doc__}\n{table(found)}", flush=True)
        if options.out:
            with options.out.open("a") as file:
                for name, row in found.items():
                    row = {"task": task, "impl": name, **row, "threads": options.threads,
                           "torch": torch.__version__}  # fmt: skip
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
