"""`palm-rlhf evaluate`: models beside each other, and reward models on pairs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from palm_rlhf import evaluate
from palm_rlhf.commands.common import HFOptions, Loaded, load_function
from palm_rlhf.commands.stages import Prompts, Scores, origin
from palm_rlhf.commands.steps import begun_with, load_any, models_of_run
from palm_rlhf.evaluate_plots import plot_frontier, plot_win_rate
from palm_rlhf.pipeline.chat import load_template, talking
from palm_rlhf.pipeline.sampling import ModelSampler, SamplingOptions, select
from palm_rlhf.pipeline.scoring import Scorer, finite
from palm_rlhf.tasks.pairs import read_pairs
from palm_rlhf.tasks.text import read_lines, read_text
from palm_rlhf.tokens import identity
from palm_rlhf.trainers.log import progress_bar
from rlhf_kernels.runtime.files import write_aside


@dataclass(frozen=True)
class Evaluated(SamplingOptions):
    """How responses are drawn: from the whole distribution, or the KL divergence is no longer unbiased."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token, and leaves the KL divergence out."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability; None: from all."""


@dataclass
class Evaluate:
    """Compare models: what each is asked for is measured, and the first model is what others are held to.

    $ palm-rlhf evaluate --model runs/sft runs/rebel --text book.txt
    $ palm-rlhf evaluate --model runs/sft runs/rebel --prompts-file test.txt --reward score.py:polite
    $ palm-rlhf evaluate --run runs/ppo --prompts-file test.txt --reward-model runs/reward --out runs/frontier
    $ palm-rlhf evaluate --reward-model runs/reward --pairs test.jsonl

    Intervals are at 95 %: Wilson's of shares, the normal one of means; prompts are counted, not responses.
    """

    model: tuple[Path, ...] = ()
    """Runs, checkpoints of runs, files, models of transformers (a folder, or hf:NAME). Win rate and KL
    divergence are against the first."""
    run: Path | None = None
    """Instead of models a run of palm-rlhf train: its start, its checkpoints, its result."""
    text: Path | None = None
    """Perplexity of this text."""
    lines: bool = False
    """Each line of --text is a sample of its own, with a stop token."""
    length: int = 128
    """Tokens that a window of --text foresees, or of a line at most."""
    prompts: Annotated[Prompts, tyro.conf.arg(name="")] = field(default_factory=Prompts)
    scores: Annotated[Scores, tyro.conf.arg(name="")] = field(default_factory=Scores)
    judge: str | None = None
    """FILE.py:function of (prompt, first, second): the chance, from 0 to 1, that the first is better. It is
    asked in both orders. Without it the higher score wins."""
    pairs: Path | None = None
    """Accuracy of what scores on these pairs."""
    samples: int = 1
    """Responses to each prompt."""
    sampling: Annotated[Evaluated, tyro.conf.arg(name="")] = field(default_factory=Evaluated)
    template: str = "auto"
    """Makes texts of prompts: auto (the tokenizer's own if it has one), none, plain, or a Jinja file."""
    limit: int | None = None
    """Take so many prompts at most."""
    seed: int = 0
    """Of the responses: each model has the same ones, response by response."""
    batch: int = 16
    """Prompts, windows or pairs at a time."""
    out: Path | None = None
    """Folder for evaluation.json, the responses as JSON lines, frontier.png and win_rate.png."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for models that do not say what their tokens are."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """All figures as one JSON object."""


FORM = Evaluate


def run(args: Evaluate, line: str) -> int:
    """Measures, and prints a table or JSON."""
    paths, wants_prompts = _checked(args)
    found: dict[str, Any] = {"models": [], "sampling": asdict(args.sampling)}
    if args.pairs is not None:
        scorer = args.scores.scorer(origin(args.pairs), args.device)
        accuracy = evaluate.reward_accuracy(scorer, read_pairs(args.pairs))
        found["reward_model"] = {"pairs": str(args.pairs), "accuracy": accuracy._asdict()}
    comparison = _Comparison(args)
    for place, (path, name) in enumerate(zip(paths, _names(paths))):
        loaded = _loaded(args, path, starts=args.run is not None and place == 0)
        loaded.model.eval()
        entry = {"name": name, "model": str(path)} | _on_text(args, loaded)
        found["models"].append(entry | (comparison.add(loaded, name) if wants_prompts else {}))
    comparison.add_diversity(found["models"])
    written = _write(args, found, comparison.drawn, line) if args.out is not None else []
    if args.json:
        print(json.dumps(_plain(found)))
    else:
        print("\n".join([*_report(found), *(f"file   {path}" for path in written)]))
    return 0


def _checked(args: Evaluate) -> tuple[list[Path], bool]:
    """The models, and whether they are to answer prompts; ValueError where nothing is asked for."""
    if (args.run is not None) and args.model:
        raise ValueError("--run and --model exclude each other: a run's models are its own")
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    paths = list(args.model) if args.run is None else models_of_run(args.run)
    p = args.prompts
    wants_prompts = any((p.prompts_file, p.task, p.gsm8k))
    if not paths and args.pairs is None:
        raise ValueError("there is nothing to evaluate: give --model, --run, or --reward-model with --pairs")
    if paths and not wants_prompts and args.text is None:
        raise ValueError("say what models are to do: --text FILE, --prompts-file FILE or --task calculator")
    if not paths and (wants_prompts or args.text is not None):
        raise ValueError("give --model or --run: prompts and texts are for models")
    if args.pairs is not None and not args.scores.given():
        raise ValueError("--pairs are for what scores: give --reward-model RUN, or --reward FILE.py:function")
    if args.judge is not None and not wants_prompts:
        raise ValueError("--judge compares responses: give prompts, such as --prompts-file FILE")
    return paths, wants_prompts


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, or all of them where these are not different."""
    short = [path.stem if path.is_file() else path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def _loaded(args: Evaluate, path: Path, starts: bool) -> Loaded:
    """A model as it is to answer, of a run as the run asks it: in a chat its stop token ends a turn."""
    options = {"tokenizer": args.tokenizer, "on": args.device, "hf": args.hf}
    loaded = begun_with(args.run, **options) if starts else load_any(path, **options)
    tokenizer = talking(loaded.tokenizer, args.template)
    return loaded if tokenizer is loaded.tokenizer else Loaded(loaded.model, tokenizer, tokenizer.stop)


def _on_text(args: Evaluate, loaded: Loaded) -> dict[str, Any]:
    if args.text is None:
        return {}
    text = read_lines(args.text) if args.lines else read_text(args.text)
    found = evaluate.perplexity(
        loaded.model, loaded.tokenizer, text, stop=loaded.stop, length=args.length, batch=args.batch
    )
    return {**found, "text_tokens": found.pop("tokens")}


class _Comparison:
    """Responses of several models to the same prompts; the first model is what the others are held to."""

    def __init__(self, args: Evaluate) -> None:
        self.args, self.drawn, self._first = args, list[evaluate.Drawn](), None
        self._scores: list[float] = []
        self._scorer: tuple[str, Scorer] | None = None
        # Before anything is sampled: a mistake in it is then told at once.
        self._judge = load_function(args.judge, ("prompt", "first", "second")) if args.judge else None

    def add(self, loaded: Loaded, name: str) -> dict[str, Any]:
        """Lets a model answer; what is found of it."""
        args, tokenizer, o = self.args, loaded.tokenizer, self.args.sampling
        template = load_template(args.template, tokenizer)
        prompts, _ = select(args.prompts.dialogues(), template, tokenizer, limit=args.limit)
        sampler = ModelSampler(loaded.model, stop=loaded.stop, pad=tokenizer.pad)
        if args.scores.given() and (self._scorer is None or self._scorer[0] != identity(tokenizer)):
            self._scorer = identity(tokenizer), args.scores.scorer(identity(tokenizer), args.device)
        with progress_bar(name, 0, len(prompts), not args.quiet) as advance:
            drawn = evaluate.draw(
                prompts, sampler, tokenizer, o, samples=args.samples, seed=args.seed, stop=loaded.stop,
                batch=args.batch, advance=advance,
            )  # fmt: skip
        self.drawn.append(drawn)
        self._first = self._first or loaded
        found: dict[str, Any] = {
            "tokens": evaluate.mean_interval(
                drawn.by_prompt([len(a.tokens) for a in drawn.answers])
            )._asdict(),
            "stopped": sum(drawn.stopped) / len(drawn.stopped),
        }
        if identity(tokenizer) == identity(self._first.tokenizer) and o.temperature > 0:
            kl = evaluate.kl_divergence(
                drawn, loaded.model, self._first.model, pad=tokenizer.pad, temperature=o.temperature,
                batch=args.batch,
            )  # fmt: skip
            found["kl"] = kl._asdict()
        return found | self._judged(drawn)

    def _judged(self, drawn: evaluate.Drawn) -> dict[str, Any]:
        """Rewards, and who wins over the first model."""
        args, found, against = self.args, {}, self.drawn[0]
        if self._scorer is not None:
            scores = finite(self._scorer[1](drawn.answers), drawn.answers)
            found["reward"] = evaluate.mean_interval(drawn.by_prompt(scores))._asdict()
            if drawn is against:
                self._scores = scores
            elif args.judge is None:
                found["win_rate"] = evaluate.win_rate(scores, self._scores, args.samples)._asdict()
        if self._judge is not None and drawn is not against:
            won, swayed = evaluate.judged_win_rate(self._judge, drawn, against)
            found |= {"win_rate": won._asdict(), "swayed_by_order": swayed}
        return found

    def add_diversity(self, models: Sequence[dict[str, Any]]) -> None:
        """Distinct-1 and -2 over as many words of each model as the tersest has: they fall with it."""
        texts = [[answer.response for answer in drawn.answers] for drawn in self.drawn]
        words = min(map(evaluate.word_count, texts), default=0)
        for entry, own in zip(models, texts):
            counted = list(evaluate.first_words(own, words))
            entry |= {f"distinct_{n}": evaluate.distinct(counted, n) for n in (1, 2)} | {"words": words}


def _write(
    args: Evaluate, found: Mapping[str, Any], drawn: Sequence[evaluate.Drawn], line: str
) -> list[Path]:
    """Figures, responses and pictures in --out; the files."""
    folder, models = args.out, found["models"]
    text = json.dumps(_plain({**found, "command": line}), indent=1)
    written = [write_aside(folder / "evaluation.json", text)]
    if drawn:
        rows = [
            {"model": entry["name"], "prompt": answer.prompt, "response": answer.response}
            for entry, one in zip(models, drawn)
            for answer in one.answers
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        written.append(write_aside(folder / "responses.jsonl", lines))
    try:
        pictures = [
            plot_frontier(models, folder / "frontier.png", line),
            plot_win_rate(models, folder / "win_rate.png", line),
        ]
    except ImportError:
        print("no matplotlib here: no picture was drawn (pip install matplotlib)", file=sys.stderr)
        return written
    return [*written, *(path for path in pictures if path is not None)]


def _plain(value: Any) -> Any:
    """With null for what is no number, which JSON has not."""
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_COLUMNS = (
    ("perplexity", "perplexity", "{:.4g}"),
    ("bits/byte", "bits_per_byte", "{:.3f}"),
    ("reward", "reward", "{:.3f}"),
    ("win rate", "win_rate", "{:.1%}"),
    ("KL, nats", "kl", "{:.3f}"),
    ("tokens", "tokens", "{:.1f}"),
    ("stopped", "stopped", "{:.0%}"),
    ("distinct-1", "distinct_1", "{:.3f}"),
    ("distinct-2", "distinct_2", "{:.3f}"),
    ("swayed", "swayed_by_order", "{:.1%}"),
)


def _report(found: Mapping[str, Any]) -> list[str]:
    """A table of the models with a line each, and what else was measured."""
    models = found["models"]
    columns = [column for column in _COLUMNS if any(column[1] in entry for entry in models)]
    rows = [["model", *(title for title, _, _ in columns)]]
    for entry in models:
        rows.append([entry["name"], *(_cell(entry.get(name), form) for _, name, form in columns)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    if "reward_model" in found:
        right = found["reward_model"]["accuracy"]
        said = f"accuracy {_cell(right, '{:.1%}')} on {right['n']} pairs of {found['reward_model']['pairs']}"
        return [*(lines if models else []), said]
    return lines


def _cell(value: Any, form: str) -> str:
    """A figure with its interval, where it has one; a dash for none (distinct-2 of single words)."""
    if value is None or value != value:
        return "-"
    if isinstance(value, Mapping):
        shown = f"{form} [{form}, {form}]".format(value["value"], value["low"], value["high"])
        return shown.replace("-0.000", "0.000")
    return form.format(value)
