"""Records whole models of palm-rlhf-pytorch: what they give for the options of constructor and `forward`.

    make peers && .peers/bin/python tests/golden/record_palm.py

The state dict, as saved, is in the inputs as `weight.<name>`; models of one shape have one set of weights.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[0])]

import torch  # noqa: E402
from golden.inputs import generator  # noqa: E402
from golden.palm import normal, source  # noqa: E402
from golden.record import Book  # noqa: E402
from torch import Tensor  # noqa: E402

SIZES = {"dim": 16, "num_tokens": 19, "depth": 2, "heads": 2, "dim_head": 8, "ff_mult": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "causal": {},
    "encoder": {"causal": False},
    "qk_rmsnorm": {"qk_rmsnorm": True},
    "encoder/qk_rmsnorm": {"causal": False, "qk_rmsnorm": True},
    "lora": {"finetune_scopes": ("actor", "critic"), "lora_r": 3},
    "xpos_16": {"rotary_xpos_scale_base": 16},
    "other_sizes": {"depth": 1, "heads": 3, "dim_head": 10, "ff_mult": 3},
}


def moved(model: Any) -> Any:
    """The model in evaluation mode, its parameters away from where they start: B of LoRA is zero there."""
    for index, (_, parameter) in enumerate(sorted(model.named_parameters(), key=lambda item: len(item[0]))):
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator(parameter.numel(), index)))
    return model.eval()


def padded(tokens: Tensor) -> Tensor:
    """With negative ids at the end of one row and at the beginning of another."""
    tokens = tokens.clone()
    tokens[1, 6:] = -1
    tokens[2, :4] = -100
    return tokens


def record_palm_models(book: Any) -> None:
    """Logits, hidden states and losses; with adapters those of each scope, and with one merged."""
    from palm_rlhf_pytorch import PaLM

    for name, kwargs in VARIANTS.items():
        torch.manual_seed(1)
        model = moved(PaLM(**(SIZES | kwargs)))
        tokens = torch.randint(1, SIZES["num_tokens"], (3, 11), generator=generator(7))
        inputs = {"tokens": tokens, "extra_embed": normal((3, 11, SIZES["dim"]), 3)}
        inputs |= {f"weight.{key}": tensor for key, tensor in model.state_dict().items()}

        def call(tokens: Tensor, extra_embed: Tensor, model: Any = model, **_: Any) -> tuple[Tensor, ...]:
            embeds = model(tokens, return_only_embedding=True)
            loss = model(tokens, return_loss=True)
            return model(tokens), embeds, loss, model(tokens, extra_embed=extra_embed)

        outputs = ["logits", "embeds", "loss", "logits_with_extra_embed"]
        calls = [call]
        if not model.causal:
            outputs.append("logits_of_padded")
            calls.append(lambda tokens, model=model, **_: (model(padded(tokens)),))
            inputs["padded"] = padded(tokens)
        for scope in kwargs.get("finetune_scopes", ()):
            merged = copy.deepcopy(model)
            merged.merge_finetune_params(scope)
            outputs += [f"logits_{scope}", f"merged_{scope}"]
            calls.append(
                lambda tokens, model=model, merged=merged, scope=scope, **_: (
                    model(tokens, finetune_scope=scope),
                    merged(tokens),
                )
            )
        book.add(
            source("palm.PaLM.forward"),
            name,
            lambda calls=calls, **given: tuple(out.detach() for run in calls for out in run(**_known(given))),
            inputs,
            SIZES | kwargs,
            outputs=tuple(outputs),
        )


def _known(given: dict[str, Any]) -> dict[str, Any]:
    """What a model is called with: the constructor's arguments and the weights are in it already."""
    return {name: given[name] for name in ("tokens", "extra_embed")}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    book = Book("palm_models")
    record_palm_models(book)
    book.save()
