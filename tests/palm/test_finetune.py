"""What learns: exactly the parameters that were named move, of PaLM and of models of transformers."""

import pytest
import torch

from palm_rlhf.models.checkpoint import load_palm, save_palm
from palm_rlhf.models.finetune import chosen
from palm_rlhf.models.lora import PROJECTIONS
from palm_rlhf.tasks.text import lines
from palm_rlhf.tokens import ByteTokenizer
from palm_rlhf.trainers.sft import SFTConfig, SFTTrainer

SAME = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {"attention": {0, 1, 2, 3}, "mlp": {4, 5, 6}, "all": set(range(7)), "q": {0}, ("v", "down"): {2, 6}}


def numbers(model, scope="a"):
    """Layers and numbers of the adapters."""
    names = (n.split(".") for n, _ in model.named_parameters() if n.startswith(f"finetune_modules.{scope}."))
    return {(int(parts[2]), int(parts[3])) for parts in names}


def randomised(model, scope="a"):
    for parameter in model.finetune_parameters(scope):
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("targets", KINDS, ids=str)
def test_adapters_on_any_projection_merge(make_palm, tokens, tmp_path, targets):
    model = make_palm(dim=16, dim_head=8)
    exact = model(tokens)
    model.add_finetune_params("b", 3, "attention")
    model.add_finetune_params("a", 2, targets, last_layers=1, alpha=6)
    assert torch.equal(model(tokens, finetune_scope="a"), exact)
    assert numbers(model) == {(1, number) for number in KINDS[targets]}
    apart = randomised(model)(tokens, finetune_scope="a")
    assert not torch.allclose(apart, exact, atol=1e-3)
    torch.testing.assert_close(model.for_sampling("a").hidden_states(tokens),
                               model.hidden_states(tokens, scope="a"), **SAME)  # fmt: skip
    again = load_palm(save_palm(tmp_path / "model.safetensors", model))
    assert torch.equal(again(tokens, finetune_scope="a"), apart)
    assert again.adapter_options("a") == model.adapter_options("a")
    assert (model.adapter_options("a")["last_layers"], model.adapter_options("a")["alpha"]) == (1, 6)
    model.merge_finetune_params("a")
    torch.testing.assert_close(model(tokens), apart, **SAME)


@pytest.mark.parametrize(
    ("scope", "last_layers", "expected"),
    [
        (None, None, lambda name: ".a." not in name),
        (None, 1, lambda name: name.startswith("layers.1.")),
        ("a", None, lambda name: ".a." in name),
    ],
    ids=["full", "last-layer", "adapters"],
)
def test_exactly_what_is_named_moves(make_palm, scope, last_layers, expected):
    model = make_palm(dim=16, dim_head=8, num_tokens=256)
    if scope is not None:
        model.add_finetune_params("a", 2, "all", last_layers=1)
        randomised(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = lines(["so much", "depends"], ByteTokenizer())
    trainer = SFTTrainer(model, samples, None, SFTConfig(batch=2, warmup=0), scope, last_layers=last_layers)
    trainer.step(0)
    moved = {name for name, now in model.named_parameters() if not torch.equal(before[name], now)}
    assert moved == {name for name in before if expected(name)}


def test_wrong_targets_and_layers_are_one_sentence(make_palm):
    model = make_palm(dim=16, dim_head=8)
    with pytest.raises(ValueError, match=r"PaLM has no projection 'q_proj' for adapters. Choose from all"):
        model.add_finetune_params("a", 2, ["v", "q_proj"])
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"from 1 to 2 of the last ones can learn, got {count}"):
            model.add_finetune_params("a", 2, last_layers=count)
    with pytest.raises(ValueError, match="at least"):
        chosen(PROJECTIONS, [])
    assert model.scopes == ()
