"""PaLM: the same numbers as palm-rlhf-pytorch's where that is right; padding and dtypes spoil none."""

import copy

import pytest
import torch
import torch.nn.functional as F

from palm_rlhf.models.checkpoint import from_upstream
from palm_rlhf.models.palm import PaLM
from palm_rlhf.models.protocol import CausalModel
from palm_rlhf.models.value import Policy
from tests.golden.load import golden

RECORDS = {r["case"]: r for r in golden("palm_models")}
SAME = {"atol": 1e-5, "rtol": 1e-5}


def loaded(record) -> PaLM:
    state = {
        name.removeprefix("weight."): x for name, x in record["inputs"].items() if name.startswith("weight.")
    }
    kwargs = record["kwargs"]
    return from_upstream(
        state,
        causal=kwargs.get("causal", True),
        xpos_scale_base=kwargs.get("rotary_xpos_scale_base", 512),
        compat=True,
    ).eval()


@pytest.mark.parametrize("case", RECORDS)
def test_logits_embeddings_and_loss_are_those_of_palm_rlhf_pytorch(case):
    record = RECORDS[case]
    model, tokens, expected = loaded(record), record["inputs"]["tokens"], record["outputs"]
    extra = record["inputs"]["extra_embed"]
    torch.testing.assert_close(model(tokens), expected["logits"], **SAME)
    torch.testing.assert_close(model(tokens, return_only_embedding=True), expected["embeds"], **SAME)
    torch.testing.assert_close(model(tokens, return_loss=True), expected["loss"], **SAME)
    torch.testing.assert_close(model(tokens, extra_embed=extra), expected["logits_with_extra_embed"], **SAME)
    logits, embeds = model(tokens, return_logits_with_embedding=True)
    torch.testing.assert_close((logits, embeds), (expected["logits"], expected["embeds"]), **SAME)


@pytest.mark.parametrize("case", [case for case in RECORDS if "encoder" in case])
def test_negative_ids_hide_tokens_as_in_palm_rlhf_pytorch_where_they_are_real(case):
    record = RECORDS[case]
    real = record["inputs"]["padded"] >= 0
    found = loaded(record)(record["inputs"]["padded"])
    torch.testing.assert_close(found[real], record["outputs"]["logits_of_padded"][real], **SAME)


@pytest.mark.parametrize("padded", [False, True])
def test_a_forward_pass_is_one_graph_and_waits_for_no_number(make_palm, tokens, padded):
    model = make_palm(depth=1)
    ids = tokens.clone()
    ids[0, :3] = -1 if padded else 1
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    assert model.to("meta")(ids.to("meta")).shape == (*ids.shape, model.num_tokens)


@pytest.mark.parametrize("scope", ["actor", "critic"])
def test_adapters_give_what_they_give_in_palm_rlhf_pytorch(scope):
    record = RECORDS["lora"]
    model, tokens, expected = loaded(record), record["inputs"]["tokens"], record["outputs"]
    torch.testing.assert_close(model(tokens, finetune_scope=scope), expected[f"logits_{scope}"], **SAME)
    assert not torch.allclose(expected[f"logits_{scope}"], expected["logits"], atol=1e-2)
    without = model(tokens, finetune_scope=scope, disable_lora=True)
    torch.testing.assert_close(without, expected["logits"], **SAME)
    model.merge_finetune_params(scope)
    torch.testing.assert_close(model(tokens), expected[f"merged_{scope}"], **SAME)
    assert scope not in model.finetune_modules


def test_qk_scale_is_what_compat_leaves_out(make_palm, tokens):
    ours, theirs = make_palm(qk_rmsnorm=True), make_palm(qk_rmsnorm=True, compat=True)
    for block in theirs.layers:
        # Theirs divides by sqrt(dim_head), ours multiplies by 8.
        block.q_scale.data.mul_(8 * ours.config.dim_head**0.5)
    torch.testing.assert_close(ours(tokens), theirs(tokens), **SAME)


def padded_on(side: str, tokens: torch.Tensor, lengths: list[int], width: int):
    """Rows cut to these lengths, padded with token 5, which is a real one elsewhere; with their mask."""
    out, mask = torch.full((len(tokens), width), 5), torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(length)
        out[row, place], mask[row, place] = tokens[row, :length], True
    return out, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": False}, {"qk_rmsnorm": True}, {"rotary_xpos_scale_base": 16}], ids=str
)
def test_padding_changes_no_real_token(make_palm, tokens, options, side):
    model, lengths = make_palm(**options), [9, 4, 1]
    ids, mask = padded_on(side, tokens, lengths, 12)
    found, by_ids = model(ids, mask=mask), model(ids.masked_fill(~mask, -3))
    assert found.isfinite().all()
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, :length])[0]
        torch.testing.assert_close(found[row][mask[row]], alone, **SAME)
        torch.testing.assert_close(by_ids[row][mask[row]], alone, **SAME)
    # Some by one, some by the other.
    half = mask.clone()
    half[:2] = True
    both = model(ids.masked_fill(~mask & half, -1), mask=half | mask)
    torch.testing.assert_close(both[mask], found[mask], **SAME)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_neither_the_loss_nor_its_gradient(palm, tokens, side):
    lengths = [9, 4, 2]
    ids, mask = padded_on(side, tokens, lengths, 12)
    logprobs = [
        F.log_softmax(palm(tokens[row : row + 1, : length - 1])[0], -1).gather(1, tokens[row, 1:length, None])
        for row, length in enumerate(lengths)
    ]
    expected = -torch.cat(logprobs).mean()
    wanted = torch.autograd.grad(expected, list(palm.parameters()))
    for given in (lambda: palm(ids, return_loss=True, mask=mask),
                  lambda: palm(ids.masked_fill(~mask, -1), return_loss=True)):  # fmt: skip
        loss = given()
        torch.testing.assert_close(loss, expected, **SAME)
        torch.testing.assert_close(torch.autograd.grad(loss, list(palm.parameters())), wanted, **SAME)


def test_the_ignored_label_leaves_no_token_out_unless_it_is_set(make_palm, tokens):
    tokens = tokens.clone()
    tokens[:, 4] = 0
    everything, without = make_palm(), make_palm(cross_entropy_ignore_index=0)
    logits = everything(tokens[:, :-1]).flatten(0, 1)
    labels = tokens[:, 1:].flatten()
    torch.testing.assert_close(everything(tokens, return_loss=True), F.cross_entropy(logits, labels), **SAME)
    torch.testing.assert_close(
        without(tokens, return_loss=True), F.cross_entropy(logits, labels, ignore_index=0), **SAME
    )


@pytest.mark.parametrize("causal", [True, False])
def test_rows_without_a_real_token_are_finite_and_pass_nothing_on(make_palm, tokens, causal):
    model, mask = make_palm(causal=causal), torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    hidden = model.hidden_states(tokens, mask=mask)
    assert hidden.isfinite().all()
    (hidden * mask[..., None]).sum().backward()
    grads = [p.grad for p in model.parameters()]
    assert all(grad.isfinite().all() for grad in grads)
    others = make_palm(causal=causal)
    others.hidden_states(tokens[[0, 2]]).sum().backward()
    torch.testing.assert_close(grads, [p.grad for p in others.parameters()], atol=1e-4, rtol=1e-4)


def test_a_token_does_not_see_what_follows_it(palm, tokens):
    later = tokens.clone()
    later[:, 5:] = (later[:, 5:] + 3) % palm.num_tokens
    torch.testing.assert_close(palm(later)[:, :5], palm(tokens)[:, :5], **SAME)
    assert not torch.allclose(palm(later)[:, 5:], palm(tokens)[:, 5:], atol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_positions_do_not_collapse_in_bfloat16(make_palm, causal):
    """bfloat16 has 8 bits: it does not tell position 512 from 513, so angles are not made in it."""
    model = make_palm(causal=causal, depth=1, spread=0.3)
    tables, low = model._tables(600), copy.deepcopy(model).bfloat16()._tables(600)
    for exact, found in zip((*tables.query, *tables.key), (*low.query, *low.key)):
        assert torch.equal(found, exact)
    late = low.query.cos[512:600]
    assert len(late.unique(dim=0)) == len(late)
    # One token at the end, which looks for the token 3 somewhere among equal others.
    ids = torch.full((2, 600), 4)
    ids[0, 520], ids[1, 521] = 3, 3
    with torch.no_grad():
        expected, found = model(ids)[:, -1], copy.deepcopy(model).bfloat16()(ids)[:, -1].float()
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0)


def test_dropout_reaches_the_attention_and_the_feed_forward(make_palm, tokens):
    model = make_palm()
    exact = model(tokens)
    assert torch.equal(model.train()(tokens), exact)
    for drop in ("attn_dropout", "ff_dropout"):
        for block in model.layers:
            setattr(block, drop, 0.5)
        assert not torch.allclose(model(tokens), exact, atol=1e-2), drop
        assert torch.equal(model.eval()(tokens), exact)
        assert model.train().set_dropout(0.0) is model
        assert torch.equal(model(tokens), exact)
    model.set_dropout(0.25)
    assert {(block.attn_dropout, block.ff_dropout) for block in model.layers} == {(0.25, 0.25)}


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_is_attention_where_nothing_is_dropped(make_palm, tokens, causal):
    model = make_palm(causal=causal)
    ids, mask = padded_on("left", tokens, [9, 4, 1], 12)
    mask[2] = False
    exact = model(ids, mask=mask)
    model.train()
    for block in model.layers:
        block.attn_dropout = 1e-9  # drops nothing, but takes the other way
    torch.testing.assert_close(model(ids, mask=mask), exact, **SAME)


def test_dropout_keeps_the_mean(make_palm, tokens):
    model = make_palm(depth=1).train()
    exact = model(tokens[:1])
    model.set_dropout(0.1)
    with torch.no_grad():
        mean = torch.stack([model(tokens[:1].expand(64, -1)).mean(0) for _ in range(8)]).mean(0)
    torch.testing.assert_close(mean[None], exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("options", [{}, {"qk_rmsnorm": True}, {"finetune_scopes": ("a",)}], ids=str)
def test_gradients_reach_every_parameter(make_palm, tokens, options):
    model = make_palm(**options)
    scope = next(iter(options.get("finetune_scopes", ())), None)
    model.train()(tokens, return_loss=True, finetune_scope=scope).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradients_are_those_of_finite_differences(make_palm, tokens):
    model = make_palm(qk_rmsnorm=True, finetune_scopes=("a",), dim=8, dim_head=4, depth=1).double()
    names = [name for name, _ in model.named_parameters()]
    mask = torch.ones_like(tokens[:, :5], dtype=torch.bool)
    mask[1, :2] = False

    def loss(*values):
        given = dict(zip(names, values))
        return torch.func.functional_call(
            model, given, (tokens[:, :5],), {"return_loss": True, "finetune_scope": "a", "mask": mask}
        )

    values = tuple(p.detach().requires_grad_() for p in model.parameters())
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)


def test_float64_is_as_exact_as_its_rotations(make_palm, tokens):
    """Rotary tables are float32 in every dtype: 1e-7 is what is left."""
    model = make_palm()
    wide = copy.deepcopy(model).double()
    found = wide(tokens)
    assert found.dtype is torch.float64
    torch.testing.assert_close(found.float(), model(tokens), **SAME)
    assert wide(tokens, return_loss=True).dtype is torch.float64


def test_a_copy_is_a_model_of_its_own(make_palm, tokens):
    model = make_palm(finetune_scopes=("a",))
    exact = model(tokens, finetune_scope="a")
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens, finetune_scope="a"), exact)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(tokens, finetune_scope="a"), exact)


def test_for_sampling_shares_memory_and_leaves_the_model_as_it_was(make_palm, tokens):
    model = make_palm(finetune_scopes=("a",)).train().set_dropout(0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    twin = model.for_sampling("a")
    plain = model.for_sampling()
    adapted = twin(tokens)
    assert not any(module.training for part in (twin, plain) for module in (part, *part.layers))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(twin(tokens), adapted), "dropout is on"
    model.eval()
    torch.testing.assert_close(adapted, model(tokens, finetune_scope="a"), **SAME)
    torch.testing.assert_close(plain(tokens), model(tokens), **SAME)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in plain.parameters()} == own
    merged = {p.data_ptr() for p in twin.parameters()} - own
    assert len(merged) == 2 * len(model.layers)
    assert all(p.requires_grad for p in model.parameters())


def test_training_after_a_call_in_inference_mode(make_palm, tokens):
    """What is kept from one call to the next must serve both."""
    model = make_palm()
    with torch.inference_mode():
        model(tokens)
    model(tokens, return_loss=True).backward()
    assert model.token_emb.weight.grad.any()


def test_autocast_trains_float32_weights(make_palm, tokens):
    model = make_palm(finetune_scopes=("a",))
    policy = Policy(model, "a")
    exact = [model(tokens, return_loss=True), policy(tokens, None, 4)[0].mean()]
    with torch.autocast("cpu", torch.bfloat16):
        rough = [model(tokens, return_loss=True), policy(tokens, None, 4)[0].mean()]
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
    sum(rough).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype is torch.float32
        assert parameter.grad.any(), name


def test_what_xpos_cannot_reach_is_refused(make_palm):
    model = make_palm(rotary_xpos_scale_base=2, depth=1)
    with torch.no_grad():
        assert model(torch.ones(1, 256, dtype=torch.int64)).isfinite().all()
    with pytest.raises(ValueError, match="257 tokens are too many for rotary_xpos_scale_base=2"):
        model(torch.ones(1, 257, dtype=torch.int64))


def test_palm_is_a_causal_model(palm):
    assert isinstance(palm, CausalModel)
    assert palm.head.weight is palm.token_emb.weight


def test_empty_batches_and_sequences(palm):
    assert palm(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, palm.num_tokens)
    assert palm(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, palm.num_tokens)


@pytest.mark.parametrize("name", ["dim", "num_tokens", "depth", "dim_head", "heads", "ff_mult"])
def test_sizes_are_checked(make_palm, name):
    with pytest.raises(ValueError, match=name):
        make_palm(**{name: 0})
    with pytest.raises(ValueError, match="dim_head"):
        make_palm(dim_head=15)


def test_shapes_and_scopes_are_checked(palm, tokens):
    with pytest.raises(ValueError, match=r"\[batch, time\]"):
        palm(tokens[0])
    with pytest.raises(ValueError, match="mask"):
        palm(tokens, mask=torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="add_finetune_params"):
        palm(tokens, finetune_scope="reward")
    with pytest.raises(ValueError, match="causal"):
        PaLM(dim=8, num_tokens=4, depth=1, causal=False).new_cache(1, 4)
