"""`palm-rlhf sample`: responses to the prompts of a file."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from palm_rlhf.commands.common import HFOptions, hf_name
from palm_rlhf.commands.stages import Prompts, concluded
from palm_rlhf.commands.steps import load_any
from palm_rlhf.pipeline.chat import load_template, talking
from palm_rlhf.pipeline.files import StageFile, shard, version
from palm_rlhf.pipeline.sampling import (
    ModelSampler,
    Sampler,
    SamplingOptions,
    VLLMSampler,
    sample_rows,
    select,
)
from palm_rlhf.tokens import Tokenizer, identity, load_tokenizer


@dataclass
class Sample:
    """Sample several responses to each prompt, with a seed each: the first stage on the way to pairs.

    Stopped or killed, the same command goes on where it was, and the file is the same as without the stop.

    $ palm-rlhf sample --model runs/sft --prompts-file prompts.txt --samples 5 --out runs/samples.jsonl
    $ palm-rlhf sample --model runs/rebel-1 --prompts-file prompts.txt --shard 2/4 --out runs/samples-2.jsonl
    """

    model: Path
    """Run or file, or a model of transformers: its folder, or hf:NAME."""
    out: Path
    """File of JSON lines, or .parquet, to write: a row for each prompt."""
    prompts: Annotated[Prompts, tyro.conf.arg(name="")] = field(default_factory=Prompts)
    samples: int = 5
    """Responses to each prompt."""
    sampling: Annotated[SamplingOptions, tyro.conf.arg(name="")] = field(default_factory=SamplingOptions)
    template: str = "auto"
    """Makes texts of prompts: auto (the tokenizer's own if it has one), none, plain, or a Jinja file."""
    max_prompt_tokens: int | None = 1024
    """Longer prompts are left out, and counted."""
    shard: str | None = None
    """i/n: the i-th of n equal stretches of the prompts, from 1/n."""
    limit: int | None = None
    """Take so many prompts of the shard at most."""
    seed: int = 0
    """Of all responses: that of each follows from it, the prompt's place and the response's."""
    batch: int = 16
    """Prompts at a time."""
    sampler: Literal["palm", "vllm"] = "palm"
    """Who samples: palm_rlhf, or vLLM where it is installed (--model is then of Hugging Face)."""
    tokenizer: str | None = None
    """'bytes', a tokenizer.json or hf:NAME, for a --model that does not say what its tokens are."""
    hf: Annotated[HFOptions, tyro.conf.arg(name="")] = field(default_factory=HFOptions)
    device: str | None = None
    """cpu or cuda; default: the GPU if there is one."""
    quiet: bool = False
    """No progress bar."""
    json: bool = False
    """The summary as one JSON object."""


FORM = Sample


def run(args: Sample, line: str) -> int:
    """Samples what is not there yet."""
    for name in ("samples", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    piece = shard(args.shard)
    dialogues = args.prompts.dialogues()
    sampler, tokenizer, stop, allowed = _sampler(args)
    template = load_template(args.template, tokenizer)
    prompts, left_out = select(
        dialogues, template, tokenizer, shard=piece, limit=args.limit, longest=args.max_prompt_tokens
    )
    _check_length(prompts, args.sampling.max_new_tokens, allowed)
    file = StageFile(args.out, _config(args, template.name, identity(tokenizer)))

    def make(part: list[Any]) -> list[dict[str, Any]]:
        return sample_rows(
            part, sampler, tokenizer, args.sampling, samples=args.samples, seed=args.seed, stop=stop
        )

    began = time.perf_counter()
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    rows = file.write(batches, make, name="sample", show=not args.quiet)
    summary = _summary(rows, left_out) | {"out": str(args.out)}
    if not file.complete:
        file.finish(summary)
    summary["seconds"] = time.perf_counter() - began
    return concluded(
        summary,
        args.json,
        [
            f"{summary['responses']} responses to {summary['prompts']} prompts; {summary['tokens']} tokens, "
            f"{summary['stopped']:.1%} of responses came to a stop",
            *([f"left out: {left_out} prompts over {args.max_prompt_tokens} tokens"] if left_out else []),
            f"file   {args.out}",
            f"next   palm-rlhf score --samples {args.out} --out {args.out.with_name('scored.jsonl')} "
            "--reward-model RUN",
        ],
    )


def _sampler(args: Sample) -> tuple[Sampler, Tokenizer, int, int | None]:
    """Who samples, the tokenizer, the token that ends a response, and the longest sequence."""
    if args.sampler == "vllm":
        tokenizer = talking(load_tokenizer(args.tokenizer or str(args.model)), args.template)
        name = hf_name(args.model) or str(args.model)
        return VLLMSampler(name, stop=tokenizer.stop), tokenizer, tokenizer.stop, None
    loaded = load_any(args.model, tokenizer=args.tokenizer, on=args.device, hf=args.hf)
    tokenizer = talking(loaded.tokenizer, args.template)
    stop = loaded.stop if tokenizer is loaded.tokenizer else tokenizer.stop
    sampler = ModelSampler(loaded.model.eval(), stop=stop, pad=tokenizer.pad)
    return sampler, tokenizer, stop, loaded.model.max_length


def _config(args: Sample, template: str, tokens: str) -> dict[str, Any]:
    """What the rows depend on."""
    return {
        "stage": "sample",
        "model": str(args.model),
        "model_version": version(args.model),
        "tokenizer": tokens,
        "template": template,
        **args.prompts.identity(),
        "sampling": asdict(args.sampling),
        "samples": args.samples,
        "seed": args.seed,
        "shard": args.shard,
        "limit": args.limit,
        "max_prompt_tokens": args.max_prompt_tokens,
        "sampler": args.sampler,
        **{name: getattr(args.hf, name) for name in ("system", "dtype", "patch")},
        "batch": args.batch,
    }


def _check_length(prompts: list[Any], new: int, allowed: int | None) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts)
    if allowed is not None and longest + new > allowed:
        raise ValueError(
            f"the longest prompt has {longest} tokens, which with --max-new-tokens {new} exceeds the model's "
            f"{allowed}. Lower --max-prompt-tokens or --max-new-tokens."
        )


def _summary(rows: list[dict[str, Any]], left_out: int) -> dict[str, Any]:
    stopped = [value for row in rows for value in row["stopped"]]
    return {
        "stage": "sample",
        "prompts": len(rows),
        "responses": len(stopped),
        "tokens": sum(len(tokens) for row in rows for tokens in row["response_tokens"]),
        "stopped": sum(stopped) / len(stopped),
        "over-long prompts": left_out,
    }
