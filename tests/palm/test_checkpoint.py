"""Models in files: exact, whole or not there at all, and no file can run code or bring a traceback."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from palm_rlhf.models import checkpoint
from palm_rlhf.models.checkpoint import CheckpointError, load_palm, read_tensors, save_palm, write_tensors
from tests.golden.load import golden

RECORDS = {r["case"]: r for r in golden("palm_models")}
SAME = {"atol": 1e-5, "rtol": 1e-5}


def upstream_state(case: str) -> dict[str, torch.Tensor]:
    inputs = RECORDS[case]["inputs"]
    return {name.removeprefix("weight."): x for name, x in inputs.items() if name.startswith("weight.")}


def one_sentence(error: BaseException) -> None:
    text = str(error)
    assert "\n" not in text
    assert 20 < len(text) < 500, text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "qk_rmsnorm": True, "compat": True},
        {"finetune_scopes": ("actor", "critic"), "lora_r": 3, "rotary_xpos_scale_base": 64},
        {"cross_entropy_ignore_index": 0, "heads": 3, "dim_head": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_comes_back_bit_for_bit(make_palm, tokens, tmp_path, options, dtype):
    model = make_palm(**options).to(dtype)
    path = save_palm(tmp_path / "deep" / "model.safetensors", model, note={"step": 3})
    again = load_palm(path).eval()
    assert again.config == model.config
    assert list(again.state_dict()) == list(model.state_dict())
    for (name, mine), theirs in zip(model.state_dict().items(), again.state_dict().values()):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    for scope in (None, *options.get("finetune_scopes", ())):
        assert torch.equal(again(tokens, finetune_scope=scope), model(tokens, finetune_scope=scope))
    assert all(p.requires_grad for p in again.parameters())
    assert read_tensors(path)[1]["note"] == {"step": 3}


def test_scopes_of_different_rank_come_back(make_palm, tokens, tmp_path):
    model = make_palm()
    for scope, rank in (("small", 1), ("large", 6)):
        model.add_finetune_params(scope, rank)
    again = load_palm(save_palm(tmp_path / "m.safetensors", model))
    assert [blocks[0][0].A.shape[1] for blocks in again.finetune_modules.values()] == [1, 6]


def test_a_loaded_model_does_not_change_with_its_file(make_palm, tokens, tmp_path):
    path = save_palm(tmp_path / "m.safetensors", make_palm())
    model = load_palm(path)
    expected = model(tokens)
    save_palm(path, make_palm(seed=1))
    assert torch.equal(model(tokens), expected)
    model.token_emb.weight.data.add_(1)
    assert not torch.equal(load_palm(path)(tokens), model(tokens))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("case", ["causal", "lora", "other_sizes"])
def test_files_of_palm_rlhf_pytorch_load(tmp_path, case, zipped):
    path = tmp_path / "palm.pt"
    torch.save(upstream_state(case), path, _use_new_zipfile_serialization=zipped)
    record = RECORDS[case]
    model = load_palm(path).eval()
    torch.testing.assert_close(model(record["inputs"]["tokens"]), record["outputs"]["logits"], **SAME)
    assert list(model.finetune_modules) == list(record["kwargs"].get("finetune_scopes", ()))
    # What came from there can be kept as ours.
    again = load_palm(save_palm(tmp_path / "ours.safetensors", model))
    assert torch.equal(again(record["inputs"]["tokens"]), model(record["inputs"]["tokens"]))


def test_what_a_foreign_file_does_not_say_is_given(tmp_path):
    record = RECORDS["encoder/qk_rmsnorm"]
    torch.save(upstream_state("encoder/qk_rmsnorm"), tmp_path / "palm.pt")
    model = load_palm(tmp_path / "palm.pt", causal=False, compat=True).eval()
    torch.testing.assert_close(model(record["inputs"]["tokens"]), record["outputs"]["logits"], **SAME)
    assert not model.causal
    assert model.config.qk_rmsnorm
    assert not load_palm(tmp_path / "palm.pt").config.compat


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "before 1.6", "plain pickle"])
def test_a_pickle_does_not_run(tmp_path, form):
    path, target = tmp_path / "evil.pt", tmp_path / "ran"
    state = upstream_state("causal") | {"token_emb.weight": Malicious(target)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError) as caught:
        load_palm(path)
    one_sentence(caught.value)
    assert not target.exists()


def spoiled(make_palm, tmp_path):
    """Files that are no checkpoint of a PaLM, by name."""
    ours = save_palm(tmp_path / "ours.safetensors", make_palm()).read_bytes()
    torch.save(upstream_state("causal"), tmp_path / "theirs.pt")
    theirs = (tmp_path / "theirs.pt").read_bytes()
    torch.save(upstream_state("causal"), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.pt").read_bytes()
    yield "missing", None
    yield "folder", tmp_path
    contents = {
        "empty": b"",
        "text": b"this is not a checkpoint",
        "short": b"PK",
        "ours cut": ours[: len(ours) // 2],
        "ours cut in the header": ours[:100],
        "theirs cut": theirs[: len(theirs) // 2],
        "old cut": old[: len(old) // 2],
        "old cut early": old[:30],
        "header too long": b"\xff" * 8 + ours[8:],
        "pickle of a list": pickle.dumps([1, 2], protocol=2),
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        yield name, path
    states = {
        "nothing": {},
        "another model": {"weight": torch.zeros(2)},
        "a tensor": torch.zeros(3),
        "numbers": {"token_emb.weight": 3},
        "odd keys": {"token_emb.weight": torch.zeros(2, 2), 3: torch.zeros(1)},
        "no layers": {"token_emb.weight": torch.zeros(2, 2)},
        "a layer without its norm": {
            k: v for k, v in upstream_state("causal").items() if k != "layers.1.fn.norm.gamma"
        },
        "a wrong shape": upstream_state("causal") | {"layers.0.fn.ff_out.2.weight": torch.zeros(16, 48)},
        "a flat shape": upstream_state("causal") | {"layers.0.fn.attn_out.weight": torch.zeros(16)},
        "no frequencies": upstream_state("causal") | {"layers.0.fn.rotary_emb.inv_freq": torch.zeros(0)},
        "flat adapters": upstream_state("lora") | {"finetune_modules.actor.0.0.A": torch.zeros(3)},
        "something more": upstream_state("causal") | {"value_head.weight": torch.zeros(16)},
    }
    for name, state in states.items():
        path = tmp_path / f"{name}.pt"
        torch.save(state, path)
        yield name, path
    tensors = make_palm().state_dict()
    foreign = tmp_path / "foreign.safetensors"
    from safetensors.torch import save_file

    save_file(tensors, foreign)
    yield "foreign safetensors", foreign
    yield "another kind", write_tensors(tmp_path / "kind.safetensors", tensors, {"kind": "Reward"})
    yield "no configuration", write_tensors(tmp_path / "config.safetensors", tensors, {"kind": "PaLM"})
    yield (
        "a configuration that is none",
        write_tensors(
            tmp_path / "bad.safetensors", tensors, {"kind": "PaLM", "config": {"dim": 0}, "scopes": {}}
        ),
    )


def test_what_is_no_checkpoint_is_told_in_one_sentence(make_palm, tmp_path):
    names = []
    for name, path in spoiled(make_palm, tmp_path):
        path = tmp_path / "nowhere" if path is None else path
        with pytest.raises(CheckpointError) as caught:
            load_palm(path)
        one_sentence(caught.value)
        assert str(path) in str(caught.value), name
        names.append(name)
    assert len(names) > 25


def test_a_file_cut_or_changed_anywhere_brings_no_other_error(make_palm, tmp_path):
    model = make_palm(dim=8, dim_head=4, depth=1, num_tokens=5)
    contents = [save_palm(tmp_path / "ours", model).read_bytes()]
    for zipped in (True, False):
        torch.save(upstream_state("other_sizes"), tmp_path / "theirs", _use_new_zipfile_serialization=zipped)
        contents.append((tmp_path / "theirs").read_bytes())
    generator = torch.Generator().manual_seed(0)
    path, refused = tmp_path / "broken", 0
    for content in contents:
        for trial in range(60):
            at = int(torch.randint(len(content) if trial % 2 else 600, (), generator=generator))
            byte = int(torch.randint(256, (), generator=generator))
            path.write_bytes(
                content[:at] if trial % 3 == 0 else content[:at] + bytes([byte]) + content[at + 1 :]
            )
            try:
                load_palm(path)
            except CheckpointError as error:
                refused += 1
                one_sentence(error)
    assert refused > 60


@pytest.mark.parametrize(("length", "mark"), [(0x4B50, b"PK"), (0x10280, b"\x80\x02")])
def test_a_header_whose_length_looks_like_a_pickle_is_read(make_palm, tokens, tmp_path, length, mark):
    """A file of ours begins with the length of its header, which may be the bytes that others begin with."""
    model = make_palm()
    path = save_palm(tmp_path / "m.safetensors", model)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header + content[8 + size :])
    assert path.read_bytes()[:2] == mark
    assert torch.equal(load_palm(path)(tokens), model(tokens))


def test_saving_never_leaves_half_a_file(make_palm, tokens, tmp_path, monkeypatch):
    path, model = tmp_path / "m.safetensors", make_palm()
    save_palm(path, model)
    expected = path.read_bytes()

    def breaks(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", breaks)
    with pytest.raises(OSError, match="no space"):
        save_palm(path, make_palm(seed=1))
    with pytest.raises(OSError, match="no space"):
        save_palm(tmp_path / "new.safetensors", model)
    assert path.read_bytes() == expected
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_file_is_written_aside(make_palm, tmp_path, monkeypatch):
    """While it is written the old one is what others see."""
    path = save_palm(tmp_path / "m.safetensors", make_palm())
    seen, written = path.read_bytes(), checkpoint.save_file

    def watched(tensors, file, metadata):
        written(tensors, file, metadata)
        assert Path(file) != path
        assert path.read_bytes() == seen

    monkeypatch.setattr(checkpoint, "save_file", watched)
    save_palm(path, make_palm(seed=1))
    assert path.read_bytes() != seen


def test_a_model_made_of_a_state_leaves_that_as_it_was():
    state = upstream_state("causal")
    expected = {name: x.clone() for name, x in state.items()}
    model = checkpoint.from_upstream(state)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(x, expected[name]) for name, x in state.items())


def test_a_model_for_sampling_can_be_kept(make_palm, tokens, tmp_path):
    """It is how adapters are handed on in the weights."""
    model = make_palm(finetune_scopes=("a",))
    again = load_palm(save_palm(tmp_path / "m.safetensors", model.for_sampling("a")))
    torch.testing.assert_close(again(tokens), model(tokens, finetune_scope="a"), **SAME)
