"""What the learning runs share: every row of the two tables from one start, and the file that a run leaves.

A run is one JSON file: its settings, what was measured before and after, and a thinned curve.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.algorithms.offline_table import PAIR_ALGORITHMS
from palm_rlhf.algorithms.table import ALGORITHMS
from palm_rlhf.commands.common import metadata
from palm_rlhf.generation import Generation
from palm_rlhf.models.checkpoint import load_palm, save_palm
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.value import Policy, ValueModel, frozen
from palm_rlhf.tasks.pairs import Pair
from palm_rlhf.tokens import FileTokenizer, Tokenizer
from palm_rlhf.trainers.offline import OfflineConfig, OfflineTrainer
from palm_rlhf.trainers.online import OnlineConfig, OnlineTrainer
from rlhf_kernels.runtime.files import write_aside

RESULTS = Path(__file__).parents[1] / "results" / "learning"
RUNS = Path(__file__).parents[2] / "runs" / "learning"
DATA = Path(os.environ.get("PALM_RLHF_DATA", Path(__file__).parents[3] / "shared" / "data"))
# Of a step's metrics these are kept, on at most so many steps, with so many digits.
KEPT = (
    "reward", "kl_response", "entropy", "approx_kl", "clip_fraction", "explained_variance", "response_tokens",
    "loss", "margin", "accuracy", "validation_loss", "held_out_accuracy",
)  # fmt: skip
POINTS, DIGITS = 100, 5
# Rates of the rows that learn from pairs, of which each row has the one that judged best with --tune.
RATES = (3e-4, 1e-4, 3e-5)
Evaluate = Callable[[PaLM, torch.Generator], Mapping[str, float]]
# A model after training, and the metrics of every step.
Trained = tuple[PaLM, list[dict[str, float]]]


@dataclass(frozen=True)
class Setting:
    """What a row is run with where it differs from what all rows of its kind are run with.

    Attributes:
        config: fields of OnlineConfig or OfflineConfig. options: the algorithm's.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Start:
    """The model that every row begins with, and what its texts end with."""

    model: PaLM
    tokenizer: Tokenizer
    stop: int


@dataclass(frozen=True)
class Task:
    """What the rows learn from, and how they are run.

    Attributes:
        name: the script's. judged: what of a model's evaluation says how good it is.
        start: where they begin.
        prompts: token ids. reward: of responses to them.
        pairs: makes the pairs for offline rows, from as many samples as online rows draw.
        online, offline: of all rows. settings: of single ones.
        group: responses to one prompt where a row compares them; online.prompts is then divided by it.
        evaluate: what a model is judged by.
    """

    name: str
    judged: str
    start: Start
    prompts: Sequence[Sequence[int]]
    reward: Callable[[Generation], Tensor]
    pairs: Callable[[], list[Pair]]
    online: OnlineConfig
    offline: OfflineConfig
    settings: Mapping[str, Setting]
    group: int
    evaluate: Evaluate


def parsed(doc: str, out: Path) -> argparse.Namespace:
    """The command line of a script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*ALGORITHMS, *PAIR_ALGORITHMS]
    parser.add_argument("--rows", nargs="*", choices=everything, default=everything, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    parser.add_argument("--out", type=Path, default=out, help="folder of the results")
    parser.add_argument("--tune", action="store_true", help="judge by a part of what is learned from")
    parser.add_argument(
        "--rates", action="store_true",
        help=f"--tune all rows that learn from pairs, at each of {RATES} and seed 1, in a folder of its own",
    )  # fmt: skip
    for name, what in (("config", "OnlineConfig or OfflineConfig"), ("options", "the algorithm's options")):
        parser.add_argument(
            f"--{name}", type=ast.literal_eval, default={}, help=f"fields of {what} over the row's, as a dict"
        )
    args = parser.parse_args()
    if args.rates:
        args.tune, args.rows, args.seeds = True, list(PAIR_ALGORITHMS), [1]
        args.out = args.out.with_name(f"{args.out.name}-tune")
    return args


def every_row(args: argparse.Namespace, task: Task, seed: int, before: Mapping[str, float]) -> None:
    """The rows that the command line names, each from the start to its file."""
    pairs: list[Pair] = []
    for name, rate in [(row, rate) for row in args.rows for rate in rates(row, task, args.rates)]:
        setting = task.settings.get(name, Setting())
        setting = Setting({**setting.config, **rate, **args.config}, {**setting.options, **args.options})
        facts = {"row": name, "seed": seed, "samples": task.online.steps * task.online.prompts}
        if name in ALGORITHMS:
            config = replace(task.online, seed=seed)
            if ALGORITHMS[name].samples > 1:
                config = replace(config, prompts=config.prompts // task.group, samples=task.group)
        else:
            pairs = pairs or task.pairs()
            config, facts["pairs"] = replace(task.offline, seed=seed), len(pairs)
        config = replace(config, **setting.config)
        facts["settings"] = asdict(config) | dict(setting.options)
        path = args.out / (f"{name}-{rate['lr']:g}-{seed}.json" if args.rates else f"{name}-{seed}.json")
        if path.exists():
            print(f"{path.name}: is there", flush=True)
            continue
        began = time.process_time()
        if name in ALGORITHMS:
            model, metrics = online(name, task, config, setting.options)
        else:
            model, metrics = offline(name, task.start, pairs, config, setting.options)
        seconds = time.process_time() - began
        after = task.evaluate(frozen(model), torch.Generator().manual_seed(seed))
        write(
            path,
            metrics,
            **facts,
            processor_seconds=round(seconds, 1),
            before=dict(before),
            after=dict(after),
        )
        said = ", ".join(f"{key} {before[key]:.3f} to {after[key]:.3f}" for key in after if key in before)
        print(f"{path.name}: {said} ({seconds:.0f} s)", flush=True)


def rates(name: str, task: Task, every: bool) -> list[dict[str, float]]:
    """Fields of a row's config: its rate if it learns from pairs, or every one to compare them.

    Raises:
        ValueError: they were not compared.
    """
    if name not in PAIR_ALGORITHMS:
        return [{}]
    if every:
        return [{"lr": rate} for rate in RATES]
    found = compared(task.name, task.judged).get(name, {})
    if set(found) != set(RATES):
        raise ValueError(
            f"{name} needs its rate: expected runs at {sorted(RATES)}, got {sorted(found)}. "
            f"Run {task.name}.py --rates"
        )
    return [{"lr": chosen_rate(found)}]


def compared(task: str, judged: str) -> dict[str, dict[float, float]]:
    """What rows that learn from pairs were judged by at each rate, with --rates."""
    found: dict[str, dict[float, float]] = {}
    for run in read(RESULTS / f"{task}-tune"):
        if run["row"] in PAIR_ALGORITHMS:
            found.setdefault(run["row"], {})[run["settings"]["lr"]] = run["after"][judged]
    return found


def chosen_rate(found: Mapping[float, float]) -> float:
    """Of rates and what they were judged by the best; of equals the smallest."""
    return max(sorted(found), key=lambda rate: found[rate])


def kept(name: str, settings: Mapping[str, Any], make: Callable[[], Trained]) -> Trained:
    """The model of runs/learning/`name`, without metrics, if these settings made it; or a new one."""
    path = RUNS / f"{name}.safetensors"
    settings = json.loads(json.dumps(settings))
    if path.exists() and metadata(path).get("settings") == settings:
        return frozen(load_palm(path)), []
    model, metrics = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_palm(path, model, settings=settings)
    return model, metrics


def online(name: str, task: Task, config: OnlineConfig, options: Mapping[str, Any]) -> Trained:
    """A row that samples; all weights learn, reference and critic are copies."""
    row, start = ALGORITHMS[name], task.start
    model = copy.deepcopy(start.model)
    torch.manual_seed(config.seed)
    trainer = OnlineTrainer(
        row,
        Policy(model),
        task.reward,
        task.prompts,
        config=config,
        options=row.options(**options),
        reference=Policy(frozen(copy.deepcopy(start.model))) if row.reference else None,
        critic=ValueModel(copy.deepcopy(start.model)) if row.critic else None,
        stop=start.stop,
        pad=start.tokenizer.pad,
    )
    return model, [{"step": i + 1, **trainer.step(i)} for i in range(config.steps)]


def offline(
    name: str,
    start: Start,
    pairs: Sequence[Pair],
    config: OfflineConfig,
    options: Mapping[str, Any],
    held_out: Sequence[Pair] = (),
) -> Trained:
    """A row that learns from pairs; all weights learn."""
    row, model = PAIR_ALGORITHMS[name], copy.deepcopy(start.model)
    trainer = OfflineTrainer(
        row,
        Policy(model),
        pairs,
        start.tokenizer,
        config=config,
        options=row.options(**options),
        held_out=held_out,
        stop=start.stop,
    )
    return model, [{"step": i + 1, **trainer.step(i)} for i in range(trainer.steps)]


def learned_tokenizer(texts: Sequence[str], words: int, *, apart: bool = False) -> FileTokenizer:
    """The most frequent words of these texts as tokens; with `apart` punctuation is words of its own."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers, trainers

    found = Words(models.WordLevel(unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Whitespace() if apart else pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=words, special_tokens=["<pad>", "<unk>", "<|endoftext|>"], show_progress=False
    )
    found.train_from_iterator(texts, trainer)
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
        file.write(found.to_str())
        file.flush()
        return FileTokenizer(file.name)


def thinned(metrics: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    """At most POINTS steps, the first and the last among them, and of each what is KEPT."""
    count = min(POINTS, len(metrics))
    places = sorted({round(i * (len(metrics) - 1) / max(1, count - 1)) for i in range(count)})
    return [
        {"step": metrics[i]["step"], **{k: _short(metrics[i][k]) for k in KEPT if k in metrics[i]}}
        for i in places
    ]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def write(path: Path, metrics: Sequence[Mapping[str, float]], **facts: Any) -> None:
    """The file of a run: facts first, then the curve, a step a line."""
    curve = ",\n  ".join(json.dumps(row) for row in thinned(metrics))
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(facts, indent=1)[:-2]
    write_aside(path, f'{head},\n "curve": [\n  {curve}\n ]\n}}\n')


def read(folder: Path) -> list[dict[str, Any]]:
    """All runs of a folder, by name of the file."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
