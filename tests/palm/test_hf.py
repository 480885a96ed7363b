"""Causal models of transformers as ours: the same numbers, padded, cached, adapted, saved."""

import copy

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.algorithms.objectives import log_ratio
from palm_rlhf.generation import generate
from palm_rlhf.models.hf import HFModel, load_hf, quiet
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.models.value import Policy, set_dropout
from tests.palm.hf_models import FAMILIES, VOCABULARY, build, configuration, random_model

TOKENS = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(3, 9, dtype=torch.bool)
MASK[1, :4], MASK[2, :1] = False, False
SAME = {"atol": 2e-5, "rtol": 1e-5}
every_family = pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
PROMPTS = [[3, 4, 5, 6], [9], [10, 11, 12]]


def drawn(model, scope=None, **options):
    return generate(
        model, PROMPTS, max_new_tokens=8, samples=3, stop=range(0, VOCABULARY, 9), scope=scope,
        generator=torch.Generator().manual_seed(1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_head_give_the_logits_of_transformers(family):
    model = build(family).eval()
    assert isinstance(model, CausalModel)
    with torch.no_grad():
        expected = model.model(input_ids=TOKENS, attention_mask=MASK.long()).logits
        found = F.linear(model.hidden_states(TOKENS, mask=MASK), *model.head[:2])
        torch.testing.assert_close(found[MASK], expected[MASK], **SAME)
        whole = model.model(input_ids=TOKENS).logits
        found = F.linear(model.hidden_states(TOKENS), *model.head[:2])
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)


@every_family
def test_padding_changes_nothing_on_either_side(family):
    model = build(family)
    embed = torch.randn(1, 5, model.dim, generator=torch.Generator().manual_seed(1))
    alone = model.hidden_states(TOKENS[:1, :5], extra_embed=embed)
    assert not torch.allclose(alone, model.hidden_states(TOKENS[:1, :5]), atol=1e-3)
    for left, right in ((3, 0), (0, 2), (2, 3)):
        tokens = F.pad(TOKENS[:1, :5], (left, right), value=50)
        mask = F.pad(torch.ones(1, 5, dtype=torch.bool), (left, right))
        found = model.hidden_states(tokens, mask=mask, extra_embed=F.pad(embed, (0, 0, left, right)))
        torch.testing.assert_close(found[mask], alone[0], **SAME)
        found.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scope", [None, "actor"])
@every_family
def test_the_learner_finds_what_the_sampler_recorded(family, scope):
    model = build(family, () if scope is None else ("actor", "other"), targets="all")
    found = drawn(model, scope)
    assert not found.mask.all()
    uncached = drawn(model, scope, cache=False)
    assert torch.equal(found.tokens, uncached.tokens)
    policy = Policy(model, scope)
    for rows in (slice(0, 4), slice(4, 9)):
        part = found.rows(rows)
        logprob, _ = policy(part.tokens, part.mask, part.prompt_width)
        assert log_ratio(logprob, part.logprob, part.response_mask).abs().max() < 1e-5
        again, _ = policy(part.tokens, part.mask, part.prompt_width)
        assert torch.equal(again, logprob)


def test_a_cache_of_fixed_size_gives_the_same():
    model = build("llama")
    expected = drawn(model)
    model.static_cache = True
    found = drawn(model)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.logprob, expected.logprob, **SAME)


@pytest.mark.parametrize(
    ("name", "options", "scale", "softcap"),
    [
        ("CohereConfig", {"logit_scale": 0.3}, 0.3, None),
        ("GraniteConfig", {"logits_scaling": 4.0}, 0.25, None),
        ("Gemma2Config", {"head_dim": 4, "final_logit_softcapping": 2.0}, 1.0, 2.0),
    ],
    ids=["cohere", "granite", "gemma2"],
)
def test_factors_and_limits_of_logits_are_kept(name, options, scale, softcap):
    import transformers

    sizes = {name: getattr(configuration("llama"), name) for name in (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}  # fmt: skip
    theirs = random_model(getattr(transformers, name)(**sizes, **options)).eval()
    model = HFModel(theirs)
    assert (model.scale, model.head.softcap) == (scale, softcap)
    expected = theirs(input_ids=TOKENS).logits.log_softmax(-1)[:, 1:-1].gather(2, TOKENS[:, 2:, None])
    found, _ = Policy(model)(TOKENS, None, 2)
    torch.testing.assert_close(found, expected.squeeze(2), atol=1e-5, rtol=1e-5)


def test_what_cannot_be_expressed_is_refused():
    theirs = random_model(configuration("llama"))
    theirs.lm_head.register_forward_hook(lambda module, args, out: out.sin())
    with pytest.raises(ValueError, match="logits of LlamaForCausalLM"):
        HFModel(theirs)
    theirs = random_model(configuration("gpt_neox"))
    theirs.gpt_neox.register_forward_pre_hook(
        lambda module, args, given: (args, given | {"attention_mask": None}), with_kwargs=True
    )
    with pytest.raises(ValueError, match="changes what GPTNeoXForCausalLM finds"):
        HFModel(theirs)
    forward = theirs.gpt_neox.forward
    theirs.gpt_neox.forward = lambda *tokens, input_ids=None, **rest: forward(*tokens, input_ids=input_ids)
    with pytest.raises(ValueError, match="does not run with padding"):
        HFModel(theirs)
    with pytest.raises(TypeError, match="causal model of transformers"):
        HFModel(torch.nn.Linear(2, 2))
    theirs = random_model(configuration("llama"))
    theirs.is_quantized = True
    with pytest.raises(ValueError, match="quantised"):
        HFModel(theirs)
    with pytest.raises(TypeError, match="LlamaModel"):
        HFModel(random_model(configuration("llama")).model)


@every_family
def test_adapters_side_by_side_share_the_weights_and_merge(family):
    model = build(family, ("a", "b"), targets="all")
    assert model.scopes == ("a", "b")
    base, a, b = (model.hidden_states(TOKENS, scope=scope) for scope in (None, "a", "b"))
    assert torch.equal(base, build(family).hidden_states(TOKENS))
    for one, other in ((a, b), (a, base), (b, base)):
        assert not torch.allclose(one, other, atol=1e-2)
    weights = {id(p) for p in model.parameters()}
    twin = model.for_sampling("a")
    assert (twin.training, twin.scopes, model.scopes) == (False, (), ("a", "b"))
    assert {id(p) for p in twin.model.get_input_embeddings().parameters()} <= weights
    torch.testing.assert_close(twin.hidden_states(TOKENS), a, **SAME)
    model.merge_finetune_params("a")
    torch.testing.assert_close(model.hidden_states(TOKENS), a, **SAME)
    model.remove_finetune_params("b")
    names = [name for name, _ in build(family).named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    with pytest.raises(ValueError, match="no adapters 'b', only none"):
        model.hidden_states(TOKENS, scope="b")


def test_new_adapters_change_nothing_and_freeze_nothing():
    pytest.importorskip("peft", reason="peft is not installed (make peers)")
    model = build("llama")
    expected = model.hidden_states(TOKENS)
    frozen = next(iter(model.parameters())).requires_grad_(False)
    model.add_finetune_params("a", 2)
    assert torch.equal(model.hidden_states(TOKENS, scope="a"), expected)
    assert [p for p in model.parameters() if not p.requires_grad] == [frozen]
    for wrong, word in (({"scope": "a"}, "already"), ({"scope": "b", "lora_r": 0}, "rank"),
                        ({"scope": "b", "targets": "nothing"}, "no projection 'nothing'"),
                        ({"scope": "b", "last_layers": 3}, "from 1 to 2")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            model.add_finetune_params(**wrong)


def test_no_dropout_turns_off_all_that_a_configuration_asks_for(tmp_path):
    config = configuration("gpt_neox", attention_dropout=0.4, hidden_dropout=0.3)
    model = HFModel(random_model(config)).train()
    assert not torch.equal(model.hidden_states(TOKENS), model.hidden_states(TOKENS))
    set_dropout(0.0, Policy(model))
    assert torch.equal(model.hidden_states(TOKENS), model.hidden_states(TOKENS))
    # It is kept as it came.
    saved = load_hf(model.save_pretrained(tmp_path / "saved"))
    assert (saved.model.config.attention_dropout, saved.model.config.hidden_dropout) == (0.4, 0.3)
    llama = HFModel(random_model(configuration("llama", attention_dropout=0.5))).train()
    assert not torch.equal(llama.hidden_states(TOKENS), llama.hidden_states(TOKENS))
    llama.set_dropout(0.0)
    assert torch.equal(llama.hidden_states(TOKENS), llama.hidden_states(TOKENS))


def test_what_is_saved_loads_in_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build("llama", ("actor",))
    with pytest.raises(ValueError, match="merge or remove the adapters actor"):
        model.save_pretrained(tmp_path / "saved")
    expected = model.hidden_states(TOKENS, scope="actor")
    model.merge_finetune_params("actor")
    for _ in range(2):  # over an older one as well
        model.save_pretrained(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    found = theirs.model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(found, expected, **SAME)
    torch.testing.assert_close(load_hf(tmp_path / "saved").hidden_states(TOKENS), found)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


def test_a_patched_model_finds_the_same(tmp_path):
    folder = build("llama").save_pretrained(tmp_path / "saved")
    plain, patched = load_hf(folder), load_hf(folder, patch=True)
    assert any("forward" in vars(module) for module in patched.modules())
    torch.testing.assert_close(patched.hidden_states(TOKENS), plain.hidden_states(TOKENS), **SAME)
    # The twin's operators are its own.
    twin = patched.for_sampling()
    assert all(m.forward.__self__ is m for m in twin.modules() if "forward" in vars(m))
    torch.testing.assert_close(twin.hidden_states(TOKENS), plain.hidden_states(TOKENS), **SAME)


def test_a_copy_is_a_model_of_its_own():
    model = build("llama", ("a",))
    twin = copy.deepcopy(model)
    expected = model.hidden_states(TOKENS, scope="a")
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(model.hidden_states(TOKENS, scope="a"), expected)


def test_bfloat16_is_checked_by_its_own_measure():
    model = HFModel(random_model(configuration("llama"), torch.bfloat16))
    assert model.hidden_states(TOKENS, mask=MASK).dtype is torch.bfloat16
    # Adapters are small, and learn in float32; what they add to has its own type.
    pytest.importorskip("peft", reason="peft is not installed (make peers)")
    model.add_finetune_params("a", 2)
    assert {p.dtype for p in model.finetune_parameters("a")} == {torch.float32}
    assert model.hidden_states(TOKENS, scope="a").dtype is torch.bfloat16
    assert {p.dtype for p in model.for_sampling("a").parameters()} == {torch.bfloat16}


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .* with a model of transformers"):
        load_hf(tmp_path / "none")
    with pytest.raises(ValueError, match="needs a name"):
        load_hf("")
    with quiet():
        build("llama").model.model.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"missing, such as lm_head.weight, and would be random"):
        load_hf(tmp_path / "headless")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="cannot be loaded as a causal model"):
        load_hf(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_are_computed_again_use_the_adapters_that_they_used(family):
    def gradients(model):
        """Of two scopes at once: the first is no longer in use when its layers are computed again."""
        (model.hidden_states(TOKENS, mask=MASK, scope="a")[MASK].square().sum()
         + model.hidden_states(TOKENS, mask=MASK, scope="b")[MASK].sin().sum()).backward()  # fmt: skip
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = build(family, ("a", "b")), copy.deepcopy(build(family, ("a", "b")).checkpoint_layers())
    passes = []
    next(again.blocks[0].children()).register_forward_pre_hook(lambda *_: passes.append(1))
    plain.eval(), again.eval()
    torch.manual_seed(0)
    for one, other in zip(plain.parameters(), again.parameters()):
        other.data.copy_(one.data)
    expected, found = gradients(plain), gradients(again)
    assert len(passes) == 4
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **SAME)
    assert not again.for_sampling("a").blocks[0].training
