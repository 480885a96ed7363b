"""Patched causal models of transformers against themselves: loss, logits, every gradient, left padding."""

import copy
import io

import pytest
import torch

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine import patched as comparison
from rlhf_kernels.runtime.dispatch import OPS
from rlhf_kernels.stacks import patching

stacks.activate()
pytest.importorskip("transformers", reason="transformers is not installed (make peers)")

from rlhf_kernels.stacks.transformers import FAMILIES, PATCH, configuration  # noqa: E402

NAMES = [rebinding.name for rebinding in PATCH.rebindings]


def _model(family, **options):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(family, **options))
    for parameter in model.parameters():  # biases and norms too, which start at 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _batch():
    tokens = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5], mask[2, :1] = 0, 0  # left padding
    labels = tokens.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _results(model, **extra):
    """Loss, logits of real positions, and the gradient of every parameter."""
    batch = _batch()
    model.zero_grad()
    out = model(**batch, **extra)
    out.loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    return [out.loss.detach(), out.logits.detach()[batch["attention_mask"].bool()], *grads]


def _equal(before, after):
    assert comparison.difference(before, after) <= comparison.TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_the_same_patched(family):
    model = _model(family)
    before = _results(model)
    for op in OPS.values():
        op._chosen.clear()
    pays = family != "gpt_neox"  # a quarter of its heads is turned
    with rlhf_kernels.patch("transformers") as patched:
        assert (f"{family}.rotary" in {one.name for one in patched.replaced}) == pays
        assert patched.left["attention"].startswith("on a CPU")
        _equal(before, _results(model))
    used = {name for name, op in OPS.items() if op._chosen}
    assert used >= ({"rotary", "logprob"} if pays else {"logprob"})
    with rlhf_kernels.patch("transformers", only=NAMES):  # attention too, which is left on a CPU
        _equal(before, _results(model))
    with rlhf_kernels.patch(model) as patched:
        assert {one.name for one in patched.replaced} == {"loss"} | {
            r.name for r in PATCH.rebindings if r.name.startswith(f"{family}.") and pays
        }
        _equal(before, _results(model))
    after = _results(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_a_model_alone_is_patched_and_its_twin_is_not():
    model, twin = _model("llama"), _model("llama")
    before = _results(model)
    with rlhf_kernels.patch(model, only=["llama.rotary", "loss", "attention"]) as patched:
        assert [one.name for one in patched.replaced] == ["llama.rotary", "loss", "attention"]
        assert model.config._attn_implementation == "rlhf_kernels"
        assert twin.config._attn_implementation == "sdpa"
        assert not any("forward" in vars(module) for module in twin.modules())
        _equal(before, _results(model))
        clone = copy.deepcopy(model)
        assert clone.model.layers[0].self_attn.forward.__self__ is clone.model.layers[0].self_attn
        with pytest.raises(rlhf_kernels.PatchError, match="this model is patched already: call undo"):
            rlhf_kernels.patch(model)
    assert model.config._attn_implementation == "sdpa"
    assert not any({"forward", "_loss_function"} & vars(module).keys() for module in model.modules())


def _own_attributes(model):
    return [key for module in model.modules() for key in {"forward", "_loss_function"} & vars(module).keys()]


def test_a_file_holds_the_plain_model():
    model, read = _model("llama", num_hidden_layers=1), io.BytesIO()
    before = _results(model)
    with rlhf_kernels.patch(model) as patched:
        torch.save(model, read)
        names = [one.name for one in patched.replaced]
    assert b"rlhf_kernels" not in read.getvalue()
    model = torch.load(io.BytesIO(read.getvalue()), weights_only=False)
    assert all(torch.equal(a, b) for a, b in zip(before, _results(model)))
    with rlhf_kernels.patch(model) as patched:
        assert [one.name for one in patched.replaced] == names
        _equal(before, _results(model))
    assert set(_own_attributes(model)) <= {"_loss_function"}  # that of the file, which is the stack's
    assert all(torch.equal(a, b) for a, b in zip(before, _results(model)))


def test_a_copy_of_a_patched_model_is_taken_over():
    model = _model("llama", num_hidden_layers=1)
    before = _results(model)
    with rlhf_kernels.patch(model, only=["llama.rotary", "loss", "attention"]):
        twin = copy.deepcopy(model)
        ours = sorted(_own_attributes(model))
        rlhf_kernels.patch(twin).undo()
        assert not _own_attributes(twin)
        assert twin.config._attn_implementation == "sdpa"
        assert all(torch.equal(a, b) for a, b in zip(before, _results(twin)))
        assert sorted(_own_attributes(model)) == ours
        assert model.config._attn_implementation == "rlhf_kernels"
    assert not _own_attributes(model)


def test_a_model_and_its_class_are_not_patched_twice():
    model = _model("llama")
    with (
        rlhf_kernels.patch("transformers"),
        pytest.raises(rlhf_kernels.PatchError, match=r"LlamaForCausalLM.*are patched already"),
    ):
        rlhf_kernels.patch(model)


def test_a_model_of_another_kind_is_one_sentence():
    with pytest.raises(rlhf_kernels.PatchError, match=r"this model has nothing that is replaced\. Known are"):
        rlhf_kernels.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_generation_with_a_cache_and_left_padding_draws_the_same_tokens(family):
    model = _model(family).eval()
    batch = _batch()
    del batch["labels"]

    def tokens():
        return model.generate(**batch, max_new_tokens=6, do_sample=False)

    expected = tokens()
    with rlhf_kernels.patch("transformers", only=NAMES):
        assert torch.equal(tokens(), expected)


def test_what_ours_does_not_know_goes_to_the_original():
    gelu = _model("llama", hidden_act="gelu")
    dropping = _model("mistral", attention_dropout=0.5, sliding_window=4)
    expected, window = _results(gelu), _results(dropping.eval())
    torch.manual_seed(5)
    dropped = _results(dropping.train())
    with rlhf_kernels.patch("transformers", only=NAMES):
        _equal(expected, _results(gelu))
        _equal(window, _results(dropping.eval()))
        torch.manual_seed(5)
        _equal(dropped, _results(dropping.train()))


def test_the_loss_counts_items_as_the_trainer_does():
    model = _model("qwen2")
    before = _results(model, num_items_in_batch=torch.tensor(7))
    with rlhf_kernels.patch("transformers"):
        _equal(before, _results(model, num_items_in_batch=torch.tensor(7)))


def test_the_registries_are_what_they_were():
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.loss import loss_utils

    tables = (
        AttentionInterface._global_mapping,
        AttentionMaskInterface._global_mapping,
        loss_utils.LOSS_MAPPING,
    )
    before = [dict(table) for table in tables]
    with rlhf_kernels.patch("transformers", only=["attention", "attention_mask", "loss"]):
        changed = [{key for key in table if table[key] is not was[key]} for table, was in zip(tables, before)]
        assert changed[:2] == [{"sdpa"}, {"sdpa"}]
        assert "ForCausalLM" in changed[2]
    assert all(table[key] is was[key] for table, was in zip(tables, before) for key in was)
    assert not patching.active()


def test_a_mask_of_two_dimensions_never_meets_the_stacks_own_attention():
    with rlhf_kernels.patch("transformers", only=["attention_mask"]) as patched:
        assert not patched.replaced
        assert patched.left["attention_mask"] == "it goes with attention, which is not replaced"


def test_a_model_that_is_patched_alone_compiles_to_the_same():
    model, batch = _model("llama", num_hidden_layers=1), {"input_ids": _batch()["input_ids"]}
    expected = model(**batch).logits.detach()
    with rlhf_kernels.patch(model):
        torch._dynamo.reset()
        found = torch.compile(model, backend="aot_eager")(**batch).logits.detach()
    _equal([expected], [found])
