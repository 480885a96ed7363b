"""Batched generation: prompts of any lengths, a cache, rows that stop, and what a learner must know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from palm_rlhf.models.protocol import CausalModel, Head
from palm_rlhf.padding import left_padded
from palm_rlhf.seeds import seeds_of, uniforms
from rlhf_kernels import sample
from rlhf_kernels.runtime.linear import pack, packed_linear

# Rows that have stopped are dropped from the cache once they are this share of it.
_DROP = 0.25
# Steps from which a copy of the head in oneDNN's layout is made.
_REPAID = 16


@dataclass(frozen=True)
class Generation:
    """Prompts, padded on the left, and the responses to them, padded on the right.

    Attributes:
        tokens: [B, P + R] int64.
        mask: [B, P + R] boolean, True where a token is real; a stop token is part of its response.
        prompt_width: P.
        logprob: [B, R], of each token at the sampling temperature, without truncation; 0 where masked.
        log_mass: [B, R], log of the probability that top-k and top-p kept; 0 where masked.
        stopped: [B], whether the response ended with a stop token.
        seeds: [B] int64, which reproduce each response by itself; None where one generator served all.
    """

    tokens: Tensor
    mask: Tensor
    prompt_width: int
    logprob: Tensor
    log_mass: Tensor
    stopped: Tensor
    seeds: Tensor | None = None

    @property
    def responses(self) -> Tensor:
        """[B, R] tokens."""
        return self.tokens[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """[B, R]."""
        return self.mask[:, self.prompt_width :]

    def response(self, row: int, *, without: Iterable[int] = ()) -> list[int]:
        """One row's response, its padding and these tokens left out."""
        found, left_out = self.responses[row][self.response_mask[row]].tolist(), set(without)
        return [token for token in found if token not in left_out]

    def prompt(self, row: int) -> list[int]:
        """One row's prompt without its padding."""
        return self.tokens[row, : self.prompt_width][self.mask[row, : self.prompt_width]].tolist()

    def rows(self, index: Tensor | slice) -> Generation:
        """Some of the rows."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self, **{name: value[index] for name, value in found.items() if isinstance(value, Tensor)}
        )

    def to(self, device: str | torch.device) -> Generation:
        """The same on another device."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: x.to(device) for name, x in found.items() if isinstance(x, Tensor)})


def joined(parts: Sequence[Generation], pad: int = 0) -> Generation:
    """One Generation of several: prompts padded to the longest on the left, responses on the right."""
    width = max(part.prompt_width for part in parts)
    length = max(part.logprob.shape[1] for part in parts)
    found: dict[str, list[Tensor]] = {}
    for part in parts:
        left, right = width - part.prompt_width, length - part.logprob.shape[1]
        found.setdefault("tokens", []).append(F.pad(part.tokens, (left, right), value=pad))
        found.setdefault("mask", []).append(F.pad(part.mask, (left, right)))
        for name in ("logprob", "log_mass"):
            found.setdefault(name, []).append(F.pad(getattr(part, name), (0, right)))
        found.setdefault("stopped", []).append(part.stopped)
    if all(part.seeds is not None for part in parts):
        found["seeds"] = [part.seeds for part in parts]
    return Generation(prompt_width=width, **{name: torch.cat(tensors) for name, tensors in found.items()})


@torch.no_grad()
def generate(
    model: CausalModel,
    prompts: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    max_new_tokens: int,
    mask: Tensor | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | Iterable[int] | None = None,
    pad: int = 0,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | Tensor | None = None,
    scope: str | None = None,
    cache: bool = True,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Continues every prompt until a stop token or `max_new_tokens`.

    A row's random numbers are its own: they do not depend on when other rows stop.

    Args:
        model: a causal model; dropout is off, adapters of `scope` are merged for the time of the call.
        prompts: lists of token ids, or a tensor [B, P] padded on the left with its `mask`.
        max_new_tokens: tokens of a response at most, the stop token included.
        mask: [B, P] boolean, True where a token is real; None where prompts are lists or without padding.
        samples: responses to each prompt; those to one prompt are neighbours.
        temperature, top_k, top_p: as in `rlhf_kernels.sample`; temperature 0 is greedy.
        stop: token or tokens that end a response. One in the prompt ends nothing.
        pad: token in the slots that are not real.
        generator: of the random numbers.
        seeds: one for each of the B * samples responses, instead of a generator: a response then follows
            from the model, its prompt, the sampling options and its own seed. So it can be sampled again by
            itself (matrix products of other sizes round differently: a draw within 1e-6 of a boundary
            between two tokens may fall to the other).
        scope: adapters to sample from.
        cache: False computes every step from the start, to check the cache by.
        on_token: called with the number of tokens a row so far, after every step.

    Returns:
        A Generation with [B * samples] rows.

    Raises:
        TypeError: prompts are floating-point or texts, or a stop token is none.
        ValueError: a prompt is empty or no list, a token is out of range, the model's greatest length is
            exceeded, there are both seeds and a generator, or not as many seeds as responses.
    """
    tokens, mask = _prompts(model, prompts, mask, max_new_tokens, pad, samples)
    if seeds is not None:
        if generator is not None:
            raise ValueError("generate(): seeds and generator exclude each other: pass one of them")
        seeds = seeds_of(seeds, len(tokens)).to(tokens.device)
    ends = _stops(stop)
    for name, ids in (("stop", ends), ("pad", [pad])):
        _in_vocabulary(model, name, ids)
    policy, logits = model.for_sampling(scope), _Logits(model.head, max_new_tokens)
    rows = _Rows(tokens, mask, max_new_tokens, pad, ends)
    kept = policy.new_cache(len(tokens), tokens.shape[1] + max_new_tokens) if cache else None
    fresh, fresh_mask = tokens, None if bool(mask.all()) else mask
    where = tokens.device if generator is None else generator.device
    steps = 0
    while steps < max_new_tokens:
        if kept is None:
            hidden = _uncached(policy, *rows.so_far(steps))
        else:
            hidden = policy.hidden_states(fresh, mask=fresh_mask, cache=kept)[:, -1]
        if seeds is None:
            uniform = torch.rand(len(tokens), dtype=torch.float64, device=where, generator=generator)
            uniform = uniform.to(tokens.device)[rows.live]
        else:
            uniform = uniforms(seeds[rows.live], steps)
        drawn = sample(logits(hidden), temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
        rows.record(steps, *drawn)
        steps += 1
        if on_token is not None:
            on_token(steps)
        if rows.all_ended():
            break
        if kept is not None and (keep := rows.drop()) is not None:
            kept.keep(keep)
        fresh, fresh_mask = rows.last(steps), None
    return replace(rows.generation(steps), seeds=seeds)


class _Rows:
    """Rows on their way: what was drawn, which of them still go on, which are still computed (`live`)."""

    def __init__(self, tokens: Tensor, mask: Tensor, new: int, pad: int, stops: Sequence[int]) -> None:
        count, self.width = tokens.shape
        self.pad = pad
        self.stops = torch.tensor(stops, dtype=torch.int64, device=tokens.device)
        self.tokens, self.mask = F.pad(tokens, (0, new), value=pad), F.pad(mask, (0, new))
        self.found = torch.zeros(2, count, new, device=tokens.device)
        self.live = torch.arange(count, device=tokens.device)
        self.ended = torch.zeros(count, dtype=torch.bool, device=tokens.device)

    def record(self, step: int, token: Tensor, logprob: Tensor, log_mass: Tensor) -> None:
        """Writes what was drawn for the live rows, padding for those that have ended."""
        live, at = self.live, self.width + step
        going = ~self.ended[live]
        self.tokens[live, at] = torch.where(going, token, self.pad)
        self.mask[live, at] = going
        self.found[0, live, step] = torch.where(going, logprob.float(), 0.0)
        self.found[1, live, step] = torch.where(going, log_mass.float(), 0.0)
        if len(self.stops):
            self.ended[live] |= torch.isin(token, self.stops)

    def all_ended(self) -> bool:
        """Whether nothing is left to draw."""
        return len(self.stops) > 0 and bool(self.ended.all())

    def drop(self) -> Tensor | None:
        """Takes out the live rows that have ended, once they are enough; which of them stay."""
        if not len(self.stops):
            return None
        going = ~self.ended[self.live]
        if int(going.sum()) > (1 - _DROP) * len(going):
            return None
        keep = going.nonzero().squeeze(1)
        self.live = self.live[keep]
        return keep

    def so_far(self, steps: int) -> tuple[Tensor, Tensor]:
        """Everything up to now: tokens and mask."""
        return self.tokens[:, : self.width + steps], self.mask[:, : self.width + steps]

    def last(self, steps: int) -> Tensor:
        """The newest tokens of the live rows, [live, 1]."""
        return self.tokens[self.live, self.width + steps - 1, None]

    def generation(self, steps: int) -> Generation:
        """What was drawn."""
        tokens, mask = self.so_far(steps)
        logprob, log_mass = self.found[:, :, :steps]
        return Generation(tokens, mask, self.width, logprob, log_mass, self.ended)


def _prompts(
    model: CausalModel,
    prompts: Tensor | Sequence[Sequence[int] | Tensor],
    mask: Tensor | None,
    max_new_tokens: int,
    pad: int,
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B * samples, P], checked."""
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or prompts.numel() == 0:
            raise ValueError(
                f"generate(): prompts must be [batch, time] and not empty, got {tuple(prompts.shape)}"
            )
        if prompts.is_floating_point():
            raise TypeError(f"generate(): prompts must be token ids, got {prompts.dtype}. Cast with .long().")
        tokens = prompts.to(model.device, torch.int64)
        mask = torch.ones_like(tokens) if mask is None else mask.to(model.device)
        mask = mask.bool()
        if mask.shape != tokens.shape or not bool(mask[:, -1].all()):
            raise ValueError(
                f"generate(): the mask must be {tuple(tokens.shape)} as the prompts are, with padding on the "
                f"left, got {tuple(mask.shape)}"
                + ("" if mask.shape != tokens.shape else " with padding at the end")
            )
    else:
        tokens, mask = left_padded(prompts, pad, model.device)
    real = tokens[mask]
    _in_vocabulary(model, "token", [int(real.min()), int(real.max())])
    if model.max_length is not None and tokens.shape[1] + max_new_tokens > model.max_length:
        raise ValueError(
            f"generate(): a prompt of {tokens.shape[1]} tokens and {max_new_tokens} new ones exceed the "
            f"model's {model.max_length}. Shorten the prompt or lower max_new_tokens."
        )
    if max_new_tokens < 0 or samples < 1:
        raise ValueError(
            f"generate(): max_new_tokens and samples must be positive, got {max_new_tokens} and {samples}"
        )
    return tokens.repeat_interleave(samples, 0), mask.repeat_interleave(samples, 0)


def _stops(stop: Any) -> list[int]:
    ids = () if stop is None else (stop,) if isinstance(stop, (int, str)) else stop
    try:
        return sorted(map(operator.index, ids))
    except TypeError:
        raise TypeError(
            f"generate(): stop must be a token id or several, got {stop!r:.40}. A text is encoded by the "
            "model's tokenizer."
        ) from None


def _in_vocabulary(model: CausalModel, name: str, ids: Iterable[int]) -> None:
    for token in ids:
        if not 0 <= token < model.num_tokens:
            raise ValueError(
                f"generate(): {name} ids must be from 0 to {model.num_tokens - 1}, got {token}. "
                "Does the tokenizer belong to this model?"
            )


def _uncached(policy: CausalModel, tokens: Tensor, mask: Tensor) -> Tensor:
    return policy.hidden_states(tokens, mask=mask)[:, -1]


class _Logits:
    """The projection to the vocabulary, by a packed copy of the head where so many steps repay it."""

    def __init__(self, head: Head, steps: int) -> None:
        self._head = head
        with _without_autocast(head.weight):
            self._packed = pack(head.weight) if steps >= _REPAID else None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, V] of hidden [B, E]."""
        weight, bias, softcap = self._head
        with _without_autocast(hidden):
            if self._packed is None:
                logits = F.linear(hidden, weight, bias)
            else:
                logits = packed_linear(hidden, self._packed, bias)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _without_autocast(x: Tensor) -> torch.autocast:
    # As the learner's: logits of 16 bits would move a log-probability by more than an update does.
    return torch.autocast(x.device.type, enabled=False)


def best_of(
    model: CausalModel,
    prompts: Tensor | Sequence[Sequence[int] | Tensor],
    reward: Callable[[Generation], Tensor],
    *,
    samples: int = 4,
    **options: Any,
) -> tuple[Generation, Tensor]:
    """The best of so many responses to each prompt, and their rewards [B]; `options` are those of `generate`.

    `reward` gives one number for each row of a Generation; of equal ones the first wins.

    Raises:
        ValueError: it gives not as many, or one that is not finite; see also `generate`.
    """
    drawn = generate(model, prompts, samples=samples, **options)
    scores = checked_finite(scored(reward, drawn)).view(-1, samples)
    best = scores.argmax(1)
    index = torch.arange(len(scores), device=best.device) * samples + best
    return drawn.rows(index), scores.gather(1, best[:, None]).squeeze(1)


def scored(reward: Callable[[Generation], Tensor], generation: Generation) -> Tensor:
    """[B]: what a reward gives; ValueError where it is not one number for each response."""
    found, rows = reward(generation), len(generation.tokens)
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if shape != (rows,):
        raise ValueError(
            f"a reward gives a tensor [{rows}], a number for each of {rows} responses, and this one "
            f"gave {shape}"
        )
    return found


def checked_finite(scores: Tensor) -> Tensor:
    """The same rewards; ValueError where one is not finite."""
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(
            f"a reward is not finite: {scores.tolist()[:8]}. Check the reward model or function."
        )
    return scores
