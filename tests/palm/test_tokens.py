"""Bytes and Hugging Face tokenizer files: texts come back, and files that do not serve are refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from palm_rlhf.models.palm import PaLM
from palm_rlhf.tokens import ByteTokenizer, FileTokenizer, check_fits, load_tokenizer, stop_token
from tests.palm.command_line import tokenizer_file

TEXT = "so much depends\nupon a red wheel barrow — ünïcödé, 12*7=84"


def test_bytes_come_back_and_special_bytes_have_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([tokenizer.pad, 104, 105, tokenizer.stop]) == "hi"
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.decode([104, 256, 105, 511]) == "hi", "a model may have more ids than there are bytes"
    assert tokenizer.pad != tokenizer.stop


def test_a_tokenizer_file_gives_texts_back_and_knows_its_special_tokens(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path / "tokenizer.json", "<pad>", "</s>"))
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.pad, tokenizer.stop) == (0, 1)
    assert tokenizer.vocabulary == 1 + max(*ids, 299) == 300
    assert tokenizer.decode([tokenizer.pad, *ids, tokenizer.stop]) == TEXT


def test_named_tokens_are_used(tmp_path):
    file = tokenizer_file(tmp_path / "tokenizer.json", "<fill>", "<end>")
    tokenizer = load_tokenizer(file, pad="<fill>", stop="<end>")
    assert (tokenizer.token(tokenizer.pad), tokenizer.token(tokenizer.stop)) == ("<fill>", "<end>")


def test_truncation_and_padding_that_a_file_declares_are_not_applied(tmp_path):
    file = tokenizer_file(tmp_path / "tokenizer.json", "<fill>", "</s>")
    changed = Tokenizer.from_file(str(file))
    changed.enable_truncation(4)
    changed.enable_padding(pad_id=0, pad_token="<fill>", length=9)
    changed.save(str(file))
    tokenizer = FileTokenizer(file)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.pad == 0, "the padding token that the file declares"


def test_a_file_without_a_padding_token_pads_with_some_other_token(tmp_path):
    tokenizer = FileTokenizer(tokenizer_file(tmp_path / "tokenizer.json", "<|endoftext|>"))
    assert tokenizer.stop == 0
    assert tokenizer.pad == 1
    # It is a token of texts as well, and stays one: masks say what is padding.
    assert tokenizer.decode([tokenizer.pad]) != ""


def test_padding_and_stop_must_differ(tmp_path):
    file = tokenizer_file(tmp_path / "tokenizer.json", "</s>")
    with pytest.raises(ValueError, match="'</s>' is both padding and what ends a text"):
        FileTokenizer(file, pad="</s>")


@pytest.mark.parametrize("text", ["", "no json", '{"a": 1}', json.dumps(["a", "b"])])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, text):
    file = tmp_path / "vocab.json"
    file.write_text(text)
    with pytest.raises(
        ValueError, match=r"vocab\.json is no Hugging Face tokenizer\.json .*Give such a file"
    ):
        load_tokenizer(file)


def test_files_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\0\1")
    with pytest.raises(ValueError, match=r"is no Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path / "binary.json")
    plain = tokenizer_file(tmp_path / "plain.json")
    with pytest.raises(ValueError, match="no token with a usual name for the end of a text"):
        load_tokenizer(plain)
    with pytest.raises(ValueError, match="has no token '<none>'"):
        load_tokenizer(plain, stop="<none>")
    with pytest.raises(ValueError, match="'bytes' has its own"):
        load_tokenizer("bytes", pad="<pad>")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path / "tokenizer.json", "<pad>", "</s>"))
    with torch.device("meta"):
        small, fits = (PaLM(dim=8, num_tokens=n, depth=1, heads=1, dim_head=4) for n in (256, 300))
    with pytest.raises(ValueError, match="has 300 tokens and the model 256: they do not fit"):
        check_fits(tokenizer, small)
    check_fits(tokenizer, fits)
    check_fits(ByteTokenizer(), small)


def test_the_text_that_stops_is_one_token_or_the_tokenizer_decides(tmp_path):
    tokenizer = ByteTokenizer()
    assert stop_token(tokenizer, "\n") == 10
    assert stop_token(tokenizer, "END") == tokenizer.stop
    assert stop_token(tokenizer) == tokenizer.stop
