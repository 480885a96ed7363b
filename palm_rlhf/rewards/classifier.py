"""Any sequence-classification model of transformers as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palm_rlhf.generation import Generation
from palm_rlhf.tokens import Tokenizer, prompt_text


class Classifier:
    """Texts to one number each: the only output, or the log-odds of one label against all others.

    A reward model of the hub is one; so is a judge of sentiment or of toxicity. It has a tokenizer of its
    own, so that the policy may write in any tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: str | int | None = None,
        batch: int = 32,
        max_tokens: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        """
        Args:
            model: name on the hub, folder, or a model of transformers.
            tokenizer: of transformers; None: that of the name.
            label: name or index of the label that is good; not needed for a single output.
            batch: texts in one forward pass.
            max_tokens: longer texts lose their beginning; None: what model and tokenizer allow.
            device: where to put the model; None: where it is.

        Raises:
            ValueError: there is no such model, it has no such label, or a model is given without a tokenizer.
        """
        if isinstance(model, (str, Path)):
            model, loaded = _loaded(str(model))
            tokenizer = loaded if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ValueError("Classifier: a model needs its tokenizer beside it")
        if batch < 1:
            raise ValueError(f"Classifier: batch must be at least 1, got {batch}")
        self.model = (model if device is None else model.to(device)).eval().requires_grad_(False)
        self.tokenizer, self.batch, self.label = tokenizer, batch, _label(model.config, label)
        tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
        if model.config.pad_token_id is None:
            # A decoder finds the last token of a text by it, and without refuses batches.
            model.config.pad_token_id = tokenizer.pad_token_id
        bounds = (max_tokens, _positions(model), tokenizer.model_max_length)
        self.max_tokens = min(bound for bound in bounds if bound is not None)

    @torch.no_grad()
    def scores(self, texts: Sequence[str], *, special: bool = True) -> Tensor:
        """[B] in float32 of B texts; `special`: put the tokenizer's special tokens around them."""
        found = []
        for start in range(0, len(texts), self.batch):
            part = self.tokenizer(
                list(texts[start : start + self.batch]), padding=True, truncation=True,
                max_length=self.max_tokens, add_special_tokens=special, return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            logits = self.model(**part).logits.float()
            if self.label is None:
                found.append(logits[:, 0])
                continue
            others = [i for i in range(logits.shape[1]) if i != self.label]
            found.append(logits[:, self.label] - logits[:, others].logsumexp(1))
        return torch.cat(found) if found else torch.zeros(0)


class ClassifierReward:
    """A Classifier as a reward: maps a Generation to [B], by the texts of prompt and response.

    Where the policy is asked in a chat and the classifier has a chat template too, it reads the chat in that.
    """

    def __init__(self, classifier: Classifier, tokenizer: Tokenizer, *, stop: int | None = None) -> None:
        """`tokenizer` is the policy's, and `stop` what it ends a response with: no part of the text."""
        self.classifier, self.tokenizer = classifier, tokenizer
        self.stop = tokenizer.stop if stop is None else stop

    def __call__(self, generation: Generation) -> Tensor:
        """Rewards [B] in float32."""
        judge = self.classifier.tokenizer
        chat = bool(getattr(self.tokenizer, "chat", False) and judge.chat_template)
        texts = []
        for row in range(len(generation.tokens)):
            prompt = prompt_text(self.tokenizer, generation.prompt(row))
            response = self.tokenizer.decode(generation.response(row, without=(self.stop,)))
            said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
            texts.append(judge.apply_chat_template(said, tokenize=False) if chat else prompt + response)
        # A template writes the special tokens itself.
        return self.classifier.scores(texts, special=not chat).to(generation.tokens.device)


def _loaded(name: str) -> tuple[Any, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        return AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is no sequence-classification model: {reason:.200}") from error


def _positions(model: Any) -> int | None:
    """How many tokens a model has positions for, where there is such a bound."""
    bound = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count from behind the index of padding.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return bound


def _label(config: Any, label: str | int | None) -> int | None:
    """The index of the good label; None where there is a single output."""
    names = {int(index): str(text) for index, text in config.id2label.items()}
    if config.num_labels == 1:
        return None
    known = {**{str(index): index for index in names}, **{text: index for index, text in names.items()}}
    if str(label) not in known:
        raise ValueError(
            f"the classifier has the labels {', '.join(names.values())}: say which is good, got {label}"
        )
    return known[str(label)]
