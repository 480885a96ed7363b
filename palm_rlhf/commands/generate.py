"""`palm-rlhf generate`: responses to prompts."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from palm_rlhf.commands.common import HFOptions, Loaded
from palm_rlhf.commands.steps import load_any
from palm_rlhf.commands.terminal import visible
from palm_rlhf.commands.train import make_reward
from palm_rlhf.generation import Generation, best_of, generate
from palm_rlhf.pipeline.sampling import read_prompt_texts
from palm_rlhf.tokens import Tokenizer, prompt_ids


@dataclass
class Generate:
    """Continue prompts.

    $ palm-rlhf generate --model runs/sft --prompt "12*7=" --samples 4
    $ palm-rlhf generate --model runs/sft --prompt "12*7=" --best-of 8 --reward-model runs/reward
    """

    model: Path
    """Run or file, or a model of transformers: its folder, or hf:NAME."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts_file: Path | None = None
    """More of them: a text file with one a line, or JSON lines or Parquet with "prompt"."""
    samples: int = 1
    """Responses to each prompt."""
    max_new_tokens: int = 128
    """Tokens of a response at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most probable token."""
    top_k: int | None = None
    """Sample from so many of the most probable tokens."""
    top_p: float | None = None
    """Sample from the smallest set of tokens with this probability."""
    stop: str | None = None
    """Text of one token that ends a response; default: what ended the texts that the model learned from."""
    best_of: int | None = None
    """Sample so many and keep the one with the highest reward."""
    reward: str | None = None
    """FILE.py:function for --best-of, or a name: palm-rlhf --help."""
    reward_model: Path | None = None
    """Run of palm-rlhf reward, for --best-of."""
    seed: int | None = None
    """Of the first response; the next has one more. Default: another each time. --json says each."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for a --model that does not say what its tokens are."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    json: bool = False
    """One JSON object a line, with the log-probability of each response; else control characters are spelled
    out."""


FORM = Generate


def run(args: Generate, line: str) -> int:
    """Prints prompts with their responses."""
    texts = [*args.prompt, *(read_prompt_texts(args.prompts_file) if args.prompts_file is not None else ())]
    if not texts or not all(texts):
        raise ValueError("give a prompt that is not empty: --prompt TEXT or --prompts-file FILE")
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    loaded = load_any(args.model, tokenizer=args.tokenizer, on=args.device, hf=args.hf)
    tokenizer = loaded.tokenizer
    stop = loaded.stop if args.stop is None else _stop(args.stop, tokenizer)
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    prompts = [prompt_ids(tokenizer, text) for text in texts]
    # 32 bits, so that a seed can be typed again.
    first = secrets.randbits(32) if args.seed is None else args.seed
    seeds = range(first, first + len(prompts) * (args.best_of or args.samples))
    options = {
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_k": args.top_k,
        "top_p": args.top_p, "stop": stop, "pad": tokenizer.pad, "seeds": seeds,
    }  # fmt: skip
    if args.best_of is None:
        found, scores = generate(loaded.model, prompts, samples=args.samples, **options), None
    else:
        if args.samples != 1:
            raise ValueError(
                "--samples and --best-of exclude each other: the best of several is one response"
            )
        reward = make_reward(args, None, tokenizer, stop)
        found, scores = best_of(loaded.model, prompts, reward, samples=args.best_of, **options)
    for row in range(len(found.tokens)):
        entry = _entry(found, row, loaded, texts[row // args.samples], stop)
        if scores is not None:
            entry["reward"] = float(scores[row])
        print(json.dumps(entry) if args.json else _shown(entry))
    return 0


def _stop(text: str, tokenizer: Tokenizer) -> int:
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(f"--stop must be one token, and {text!r} has {len(ids)}")
    return ids[0]


def _entry(found: Generation, row: int, loaded: Loaded, prompt: str, stop: int) -> dict[str, Any]:
    response = found.response(row, without=(stop,) if bool(found.stopped[row]) else ())
    return {
        "prompt": prompt,
        "response": loaded.tokenizer.decode(response),
        "tokens": int(found.response_mask[row].sum()),
        "logprob": float(found.logprob[row].sum()),
        "stopped": bool(found.stopped[row]),
        "seed": int(found.seeds[row]),
    }


def _shown(entry: dict[str, Any]) -> str:
    score = f"    [{entry['reward']:.3f}]" if "reward" in entry else ""
    return visible(f"{entry['prompt']}{entry['response']}{score}")
