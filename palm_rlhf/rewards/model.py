"""Reward models: one number for a text, from a backbone that the policy may share."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from palm_rlhf.algorithms.preferences import binned_loss, expected_value, regression_loss
from palm_rlhf.generation import Generation
from palm_rlhf.models.finetune import Targets, learned, learned_dtype
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.models.value import set_dropout
from rlhf_kernels import sample

Pooling = Literal["last", "mean"]


class RewardModel(nn.Module):
    """`head(pool(hidden states))`: trained on pairs, on labels in bins, or on labels as numbers.

    Where palm-rlhf-pytorch 0.8.0 is wrong this is not, and differs:

    - bins give their expected value: theirs gives a random bin. `sample_from_bins=True` asks for that;
    - `finetune_parameters` holds the embeddings of prompt and response: theirs never learn;
    - padding, on either side, is neither attended to nor pooled: theirs attends to it;
    - the last token is read, which has seen all of the text: theirs is the mean over prompt and response
      alike, `pooling="mean"` here;
    - adapters share the backbone that they adapt: theirs copies it. Dropout is this model's own all the same.

    Attributes:
        palm: the backbone, its modules this model's own, its weights shared or copied.
        prompt_embed, response_embed: [1, 1, E], added to the embeddings of either; zeros at first.
        to_pred: the head, E to 1 or to the number of bins.
        gain, offset: scalars; a reward is `gain * prediction + offset`.
    """

    def __init__(
        self,
        palm: CausalModel,
        dropout: float = 0.1,
        num_binned_output: int = 0,
        use_lora: bool = True,
        lora_r: int = 8,
        reward_lora_scope: str = "reward",
        sample_from_bins: bool | None = None,
        sample_temperature: float = 1.0,
        *,
        pooling: Pooling = "last",
        share: bool | None = None,
        lora_targets: Targets = "attention",
        last_layers: int | None = None,
        lora_alpha: float | None = None,
    ) -> None:
        """The head starts at N(0, 1/sqrt(E + 1)) with bias 0 (Ziegler et al., 2019, arXiv:1909.08593).

        Args:
            palm: a model; adapters that it has are left out.
            dropout: of the backbone, in training.
            num_binned_output: bins, whose values are 0, 1, 2, ...; below 2 for a number.
            use_lora: learn adapters, not the backbone.
            lora_r: their rank. reward_lora_scope: their name.
            sample_from_bins: draw a bin at inference; `forward` then needs a generator.
            sample_temperature: of the draw.
            pooling: the `last` real token, or the `mean` of all.
            share: use palm's own weights; None: with adapters only. Whatever changes them changes the
                rewards: pass False where the policy learns without adapters, or merges them.
            lora_targets: the projections that get adapters; see the model's `add_finetune_params`.
            lora_alpha: their output is scaled by it over the rank; by default by 1.
            last_layers: adapt, or without adapters learn, so many of the backbone's last layers only.

        Raises:
            ValueError: pooling is neither, or palm has adapters of that name.
            TypeError: adapters are asked for, and palm takes none.
        """
        super().__init__()
        if pooling not in ("last", "mean"):
            raise ValueError(f"RewardModel: pooling must be 'last' or 'mean', got {pooling!r}")
        if use_lora and not hasattr(palm, "add_finetune_params"):
            raise TypeError(f"RewardModel: a {type(palm).__name__} takes no adapters. Pass use_lora=False.")
        if use_lora and reward_lora_scope in getattr(palm, "scopes", ()):
            raise ValueError(
                f"RewardModel: there are adapters {reward_lora_scope!r} already. Choose another "
                "reward_lora_scope, or load the reward model that they belong to."
            )
        self.palm = _twin(palm, share=use_lora if share is None else share)
        set_dropout(dropout, self.palm)
        self.reward_lora_scope = reward_lora_scope if use_lora else None
        self.last_layers = last_layers
        if use_lora:
            self.palm.add_finetune_params(reward_lora_scope, lora_r, lora_targets, last_layers, lora_alpha)
        self.binned_output = num_binned_output > 1
        self.pooling, self.dropout = pooling, dropout
        self.sample_from_bins = bool(sample_from_bins) and self.binned_output
        self.sample_temperature = sample_temperature
        self._takes_embed = "extra_embed" in inspect.signature(palm.hidden_states).parameters
        like = {"dtype": learned_dtype(palm.head.weight), "device": palm.head.weight.device}
        self.prompt_embed = nn.Parameter(torch.zeros(1, 1, palm.dim, **like))
        self.response_embed = nn.Parameter(torch.zeros(1, 1, palm.dim, **like))
        self.to_pred = nn.Linear(palm.dim, num_binned_output if self.binned_output else 1, **like)
        nn.init.normal_(self.to_pred.weight, std=1 / math.sqrt(palm.dim + 1))
        nn.init.zeros_(self.to_pred.bias)
        self.register_buffer("gain", torch.ones((), device=like["device"]))
        self.register_buffer("offset", torch.zeros((), device=like["device"]))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        disable_lora: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Rewards [B] of tokens x [B, T]; with labels the mean loss instead, a scalar.

        Args:
            x: token ids; negative ones are padding.
            mask: [B, T] boolean, True where a token is real; padding may be on either side. A row without any
                real token gets the head's bias.
            prompt_mask: [B, T] boolean, True in the prompt; not used by a backbone without `extra_embed`.
            prompt_lengths: [B], the same for rows that begin with their prompt.
            labels: [B], a bin's index in int64, or a number: of predictions before gain and offset.
            disable_lora: leave the adapters out.
            generator: of `sample_from_bins`.

        Raises:
            ValueError: shapes do not fit, both forms of the prompt are given, or a draw has no generator.
        """
        pred = self.predictions(x, mask, prompt_mask, prompt_lengths, disable_lora)
        if labels is not None:
            return self.label_loss(pred, labels).mean()
        if self.sample_from_bins:
            if generator is None:
                raise ValueError(
                    "RewardModel: sample_from_bins draws at random. Pass generator=torch.Generator()."
                )
            drawn = sample(pred.float(), temperature=self.sample_temperature, generator=generator)
            return self._scaled(drawn[0].to(pred.dtype))
        return self._scaled(expected_value(pred) if self.binned_output else pred)

    def predictions(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        disable_lora: bool = False,
    ) -> Tensor:
        """What the head gives: [B], or logits [B, bins]; arguments as in `forward`."""
        mask = _checked_mask(x, mask)
        extra = self._extra_embed(x, prompt_mask, prompt_lengths)
        hidden = self.palm.hidden_states(
            x.masked_fill(x < 0, 0),
            mask=None if bool(mask.all()) else mask,
            scope=None if disable_lora else self.reward_lora_scope,
            **({} if extra is None else {"extra_embed": extra}),
        )
        with torch.autocast(hidden.device.type, enabled=False):  # a number wants all its digits
            pred = self.to_pred(pooled(hidden, mask, self.pooling).to(self.to_pred.weight.dtype))
        return pred if self.binned_output else pred.squeeze(-1)

    def pair_scores(
        self, x: Tensor, mask: Tensor | None = None, prompt_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rewards [P] of the two halves of x [2 P, T], in one pass: the chosen, then the rejected.

        In training bins give their expected value as well, which has a gradient.
        """
        pred = self.predictions(x, mask, prompt_mask)
        chosen, rejected = self._scaled(expected_value(pred) if self.binned_output else pred).chunk(2)
        return chosen, rejected

    def label_loss(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """Loss [B] of predictions: cross-entropy of bins, squared error of numbers."""
        if labels.shape != predictions.shape[:1]:
            raise ValueError(
                f"RewardModel: labels must be [{len(predictions)}], one a row, got {tuple(labels.shape)}"
            )
        return (binned_loss if self.binned_output else regression_loss)(predictions, labels)

    def finetune_parameters(self) -> list[nn.Parameter]:
        """What learns: the head, the embeddings of prompt and response, and the adapters or the backbone."""
        backbone = learned(self.palm, self.reward_lora_scope, self.last_layers)
        return [*self.to_pred.parameters(), self.prompt_embed, self.response_embed, *backbone]

    def _scaled(self, value: Tensor) -> Tensor:
        return self.gain.to(value.dtype) * value + self.offset.to(value.dtype)

    def _extra_embed(
        self, x: Tensor, prompt_mask: Tensor | None, prompt_lengths: Tensor | None
    ) -> Tensor | None:
        if prompt_mask is not None and prompt_lengths is not None:
            raise ValueError("RewardModel: pass prompt_mask or prompt_lengths, not both")
        if prompt_lengths is not None:
            if prompt_lengths.shape != x.shape[:1]:
                raise ValueError(
                    f"RewardModel: prompt_lengths must be [{len(x)}], got {tuple(prompt_lengths.shape)}"
                )
            prompt_mask = torch.arange(x.shape[1], device=x.device) < prompt_lengths[:, None]
        if prompt_mask is None or not self._takes_embed:
            return None
        if prompt_mask.shape != x.shape:
            raise ValueError(
                f"RewardModel: prompt_mask must be {tuple(x.shape)}, got {tuple(prompt_mask.shape)}"
            )
        extra = torch.where(prompt_mask[..., None], self.prompt_embed, self.response_embed)
        return extra.to(self.palm.head.weight.dtype)


def pooled(hidden: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """[B, E] of hidden states [B, T, E]: of the last real token, or the mean of the real ones; 0 without any.

    `where`, not a product: NaN in a masked slot is harmless, in the gradient as well.
    """
    zero = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    if pooling == "mean":
        count = mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(mask[..., None], hidden, zero).sum(1) / count
    place = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, place, 0).amax(1)
    at = hidden[torch.arange(len(hidden), device=hidden.device), last]
    return torch.where(mask.any(1)[:, None], at, zero)


class ModelReward:
    """A reward model as a reward: maps a Generation to [B] in float32, without gradients or dropout.

    Attributes:
        cut: how many texts were longer than the model can read, and lost their beginning, as in its training.
    """

    def __init__(
        self, model: RewardModel, micro_batch: int = 32, generator: torch.Generator | None = None
    ) -> None:
        """
        Args:
            model: scores.
            micro_batch: texts in one forward pass.
            generator: where the model draws its bins.

        Raises:
            ValueError: micro_batch is below 1.
        """
        if micro_batch < 1:
            raise ValueError(f"ModelReward: micro_batch must be at least 1, got {micro_batch}")
        self.model, self.micro_batch, self.generator = model, micro_batch, generator
        self.cut = 0

    @torch.no_grad()
    def __call__(self, generation: Generation, *, mark_prompt: bool = True) -> Tensor:
        """Rewards of prompt and response up to and including the stop token: padding is never read.

        Without `mark_prompt` the model is not told what is prompt: as it was trained on texts without one.

        Warns:
            RuntimeWarning: a text is longer than the model can read; once, `cut` counts them.
        """
        device = self.model.palm.device
        prompt = torch.arange(generation.tokens.shape[1], device=device) < generation.prompt_width
        training = self.model.training
        self.model.eval()
        try:
            found = []
            for start in range(0, len(generation.tokens), self.micro_batch):
                part = generation.rows(slice(start, start + self.micro_batch))
                tokens, mask = part.tokens.to(device), self._fitting(part.mask.to(device))
                # What is padding in every row is at the ends: prompts end where responses begin.
                used = mask.any(0)
                in_prompt = prompt[used].expand(len(tokens), -1) if mark_prompt else None
                scores = self.model(tokens[:, used], mask[:, used], in_prompt, generator=self.generator)
                found.append(scores.float())
        finally:
            self.model.train(training)
        return torch.cat(found).to(generation.tokens.device) if found else torch.zeros(0)

    def _fitting(self, mask: Tensor) -> Tensor:
        """The same mask [B, T], with the last tokens alone of a row that the model cannot read whole."""
        longest, lengths = self.model.palm.max_length, mask.sum(1)
        if longest is None or not bool((lengths > longest).any()):
            return mask
        if not self.cut:
            warnings.warn(
                f"a text of {int(lengths.max())} tokens is longer than the {longest} that the reward model "
                "can read: such texts lose their beginning, as in its training",
                RuntimeWarning,
                stacklevel=4,
            )
        self.cut += int((lengths > longest).sum())
        return mask & (mask.flip(1).cumsum(1).flip(1) <= longest)

    def normalize_on(self, generation: Generation) -> tuple[float, float]:
        """Sets gain and offset so that the rewards of these responses have mean 0 and variance 1.

        On samples of the policy before and after a reward model is trained (Ziegler et al., 2019,
        arXiv:1909.08593, 2.1). Returns the mean and the standard deviation that the rewards had.

        Raises:
            ValueError: there are fewer than two responses, or all rewards are equal or one is not finite.
        """
        scores = self(generation).double()
        mean, deviation = float(scores.mean()), float(scores.std(correction=0)) if len(scores) > 1 else 0.0
        if not (math.isfinite(deviation) and deviation > 1e-6 * abs(mean) and deviation > 0):
            raise ValueError(
                f"normalize_on(): {len(scores)} rewards have mean {mean:.4g} and deviation {deviation:.4g}, "
                "expected at least two that differ and are finite. Sample more responses."
            )
        self.model.gain.div_(deviation)
        self.model.offset.sub_(mean).div_(deviation)
        return mean, deviation


def _twin(palm: Any, share: bool) -> Any:
    """The same model in modules of its own, without adapters; its weights are shared or copied."""
    tensors = (*palm.parameters(), *palm.buffers()) if share else ()
    twin = copy.deepcopy(palm, {id(tensor): tensor for tensor in tensors})
    for scope in getattr(twin, "scopes", ()):
        twin.remove_finetune_params(scope)
    return twin


def _checked_mask(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T], without negative ids."""
    if x.dim() != 2 or not x.shape[1] or (mask is not None and mask.shape != x.shape):
        got = tuple(x.shape) if mask is None else f"{tuple(x.shape)} with a mask {tuple(mask.shape)}"
        raise ValueError(f"RewardModel: tokens and their mask must be [batch, time >= 1], got {got}")
    return x >= 0 if mask is None else mask.bool() & (x >= 0)
