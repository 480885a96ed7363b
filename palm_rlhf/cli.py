"""The command `palm-rlhf`: sft, reward, train, generate, rollouts."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

OK, USAGE, INTERRUPTED = 0, 64, 130

COMMANDS = {
    "sft": "train a model on text, from nothing or further",
    "reward": "train a reward model on pairs of a better and a worse response",
    "train": "train a model on rewards or on pairs: palm-rlhf train ppo, grpo, dpo, and others",
    "generate": "continue prompts, or choose the best of several responses",
    "sample": "several responses to each prompt of a file, with a seed each",
    "score": "score what was sampled, by a reward model, a classifier or a rule",
    "pairs": "the best and the worst response to each prompt, for palm-rlhf train rebel, dpo, ...",
    "evaluate": "compare models: perplexity, rewards, win rate, KL, diversity; judge a reward model",
    "rollouts": "list what a run sampled, with rewards: of palm-rlhf train ... --keep-rollouts",
}

HELP = f"""\
usage: palm-rlhf COMMAND [flags]        each command explains its flags: palm-rlhf COMMAND --help

Trains PaLM, and causal models of Hugging Face transformers: on text, then on rewards.
Everything of a run is in one folder: --out.

commands:
{chr(10).join(f"  {name:10}{text}" for name, text in COMMANDS.items())}

a first run, on a task with answers that can be checked, such as 12*7= (minutes on two cores):
  palm-rlhf sft --task calculator --out runs/sft
  palm-rlhf train ppo --task calculator --model runs/sft --out runs/ppo
  palm-rlhf generate --model runs/ppo --prompt "12*7=" --samples 3

on your own data:
  palm-rlhf sft --text book.txt --out runs/book                           bytes as tokens
  palm-rlhf sft --text book.txt --tokenizer tokenizer.json --out runs/bpe a Hugging Face tokenizer file
  palm-rlhf train ppo --model runs/book --prompts-file prompts.txt --reward score.py:polite --out runs/polite
  palm-rlhf train dpo --model runs/book --pairs pairs.jsonl --out runs/dpo
  palm-rlhf reward --model runs/book --pairs pairs.jsonl --out runs/reward
  palm-rlhf train ppo --model runs/book --prompts-file prompts.txt --reward-model runs/reward --out runs/rlhf

rewards by name, for --reward:
  FILE.py:function           called with the texts of a prompt and a response; returns a number
  lexicon:FILE               mean weight of a response's words; lines of a word, a tab, a number; or JSON
  sentiment:FILE             log-odds of label 1 by Naive Bayes; lines of a text, a tab, 0 or 1
  matches:REGEX, lacks:REGEX 1 where the response has a match, or has none; else 0
  words:5-20, characters:-80 0 for such a length, 1 less for each that is missing or too many
  run:RUN                    a reward model, as --reward-model RUN
  implicit:RUN               beta (log pi - log pi_ref) of a run of train dpo or kto
  hf:NAME, hf:NAME@LABEL     a sequence-classification model of transformers; log-odds of a label
  FILE.json                  several: {{"combine": "mean", "rewards": ["words:5-20", "run:runs/reward"]}};
                             sum, min, or lower (mean less k deviations); "weights", "k"

on a model of transformers, by its folder or its name on the hub (docs/models.md):
  palm-rlhf train grpo --model hf:Qwen/Qwen2.5-0.5B-Instruct --chat --prompts-file prompts.txt \\
      --reward score.py:polite --out runs/grpo

your own model's responses, in stages that can be stopped and go on (docs/pipeline.md):
  palm-rlhf sample --model runs/book --prompts-file prompts.txt --out runs/samples.jsonl
  palm-rlhf score --samples runs/samples.jsonl --reward score.py:polite --out runs/scored.jsonl
  palm-rlhf pairs --scored runs/scored.jsonl --out runs/pairs.jsonl
  palm-rlhf train rebel --model runs/book --pairs runs/pairs.jsonl --temperature 0.8 --out runs/rebel
  palm-rlhf evaluate --model runs/book runs/rebel --prompts-file test.txt --reward score.py:polite

in several processes, on GPUs or on the CPU, or in bfloat16 (docs/training.md):
  accelerate launch --config_file examples/accelerate/processes.yaml --num_processes 4 \\
      -m palm_rlhf train ppo --task calculator --model runs/sft --out runs/ppo --precision bf16

a run's folder:
  config.json         what the command was called with
  metrics.jsonl       one line a step; tensorboard/ has the same
  curve.png           the most telling of them, drawn at the end
  checkpoints/        the last two, with optimizer and random states
  rollouts/           with --keep-rollouts what was sampled: palm-rlhf rollouts --run FOLDER
  model.safetensors   the result, with its tokenizer: what --model takes, by the folder's name
  model/              the same of a model of transformers, in its own format

Ctrl-C finishes the step, saves a checkpoint and says how to go on: the same command goes on, bit for bit.

exit codes: 0 fine, 64 something is wrong with what was given (one sentence says what), 130 interrupted
environment: PALM_RLHF_TRACEBACK=1 shows where an error comes from; RLHF_KERNELS_BACKEND, NO_COLOR
"""


class UsageError(ValueError):
    """The command line is wrong; the text says how, in one sentence."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _command(argv)
    except BrokenPipeError:
        sys.stderr.close()  # a reader such as `head` has left: nothing more to say
        return OK
    except KeyboardInterrupt as stopped:
        _complain(str(stopped) or "interrupted")
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("PALM_RLHF_TRACEBACK"):
            raise
        _complain(_sentence(error))
        return USAGE


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return OK
    if argv[0] == "--version":
        import palm_rlhf

        print(palm_rlhf.__version__)
        return OK
    name, rest = _known("command", argv[0], COMMANDS), argv[1:]
    if os.environ.get("NO_COLOR"):  # tyro knows a name of its own for it, and reads that when it is loaded
        os.environ.setdefault("PYTHON_TYRO_ANSI_CODES", "False")
    module = importlib.import_module(f"palm_rlhf.commands.{name}")
    prog = f"palm-rlhf {name}"
    if name == "train":
        if not rest or rest[0] in ("-h", "--help"):
            print(module.overview(), end="")
            return OK
        options = module.ROWS[_known("algorithm", rest[0], module.ROWS)]
        prog, form, rest = f"{prog} {rest[0]}", module.form(options), rest[1:]
    else:
        form = module.FORM
    args = _parsed(form, prog, rest)
    return OK if args is None else module.run(args, shlex.join(["palm-rlhf", *argv]))


def _known(kind: str, name: str, there: Any) -> str:
    if name in there:
        return name
    near = difflib.get_close_matches(name, there, 1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(there)}."
    raise UsageError(f"there is no {kind} {name!r}. {hint}")


def _parsed(form: type, prog: str, argv: list[str]) -> Any:
    """The dataclass from the command line; None where its help was printed. UsageError says what is wrong."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(form, prog=prog, args=argv)
    except SystemExit as stopped:
        if not stopped.code:
            return None
    raise UsageError(f"{_problem(said.getvalue())}. See {prog} --help.")


def _problem(box: str) -> str:
    """What the parser says is wrong: below a title, and above hints that --help gives as well.

    The title is part of the box, or where standard output takes no such characters a line over a rule.
    """
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if line.startswith("─ ") or not line.strip("─-"):
            parts.append([])
        else:
            parts[-1].append(line)
    said = " ".join([" ".join(part) for part in parts if part][not box.startswith("╭")].split())
    missing = re.findall(r"(--[\w-]+) [A-Z]", said) if said.startswith("Missing from") else []
    return f"{' and '.join(missing)} must be given" if missing else said.rstrip(".")


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed, which this command needs: pip install 'rlhf-kernels[train]'"
    return " ".join(str(error).split()) or type(error).__name__


def _complain(text: str) -> None:
    from palm_rlhf.commands.terminal import visible

    print(f"palm-rlhf: {visible(text)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
