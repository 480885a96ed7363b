"""What generation, rewards and trainers see of a model. PaLM is one; so can any causal transformer be."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

# Label of a token that is not scored.
IGNORED = -100


class Head(NamedTuple):
    """The projection to the vocabulary: weight [V, E], an optional bias [V] and logit softcap."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


@runtime_checkable
class CausalModel(Protocol):
    """A causal language model over tokens [B, T].

    `mask` [B, T] says which tokens are real: no token sees one that is not, on either side. `scope` names
    a set of adapters; None is the model without any.
    """

    dim: int
    num_tokens: int
    # Longest sequence, or None where there is no bound.
    max_length: int | None

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        ...

    @property
    def head(self) -> Head:
        """Its projection to the vocabulary."""
        ...

    def hidden_states(
        self, tokens: Tensor, *, mask: Tensor | None = None, scope: str | None = None, cache: Any = None
    ) -> Tensor:
        """[B, T, E], what the head projects; with a cache, of new tokens that follow those in it.

        It may take `extra_embed` [B, T, E] besides, added to the embeddings: reward models use it.
        """
        ...

    def new_cache(self, batch: int, capacity: int) -> Any:
        """An empty cache for `hidden_states`, with `length` and `keep(rows)`."""
        ...

    def for_sampling(self, scope: str | None = None) -> CausalModel:
        """The same model, made for many short calls without gradients: adapters merged into the weights."""
        ...
