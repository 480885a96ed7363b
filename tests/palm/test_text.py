"""Training text: every token is predicted once, padding is masked, files that hold no text are refused."""

import gzip

import pytest
import torch

from palm_rlhf.tasks.text import Samples, lines, read_lines, read_text, windows
from palm_rlhf.tokens import ByteTokenizer
from tests.palm.command_line import real_text

BYTES = ByteTokenizer()


def everything(samples):
    return samples.batch(torch.arange(len(samples)))


def test_windows_predict_every_token_once():
    text = "".join(chr(32 + i % 90) for i in range(103))
    samples = windows(text, BYTES, 10)
    tokens, mask = everything(samples)
    assert tokens.shape == (10, 11)
    assert mask.all()
    assert tokens[:, 1:].flatten().tolist() == list(text.encode())[1:101]
    assert torch.equal(tokens[1:, 0], tokens[:-1, -1])


def test_a_text_of_exactly_one_window_is_one_sample_and_one_token_less_is_refused():
    assert len(windows("abcde", BYTES, 4)) == 1
    with pytest.raises(ValueError, match=r"notes has 4 tokens, fewer than a window of 5\..* at most 3"):
        windows("abcd", BYTES, 4, what="notes")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        windows("abcd", BYTES, 0)


def test_lines_end_with_the_stop_token_and_padding_is_masked():
    samples = lines(["a", "long", "bc"], BYTES, stop=10)
    tokens, mask = samples.batch(torch.tensor([2, 0]))
    assert tokens.tolist() == [[98, 99, 10], [97, 10, BYTES.pad]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    assert everything(lines(["a"], BYTES))[0][0, -1] == BYTES.stop


def test_lines_that_do_not_serve_are_refused():
    with pytest.raises(ValueError, match="poems has no lines"):
        lines([], BYTES, what="poems")
    with pytest.raises(ValueError, match="sample 1 has no tokens"):
        lines(["a", ""], BYTES)
    with pytest.raises(ValueError, match="sample 0 has 5 tokens with its stop token, more than the length 4"):
        lines(["abcd"], BYTES, length=4)


def test_samples_are_divided_without_overlap():
    samples = lines([chr(97 + i) for i in range(20)], BYTES)
    train, judge = samples.divided(0.1)
    assert everything(judge)[0][:, 0].tolist() == [97 + 18, 97 + 19], "the end of the text"
    train, judge = samples.divided(0.25, torch.Generator().manual_seed(0))
    both = everything(train)[0][:, 0].tolist() + everything(judge)[0][:, 0].tolist()
    assert (len(judge), sorted(both)) == (5, list(range(97, 117)))
    assert [len(part) for part in samples.divided(0.0)] == [20, 0]
    assert [len(part) for part in samples.divided(0.001)] == [19, 1]
    assert [len(part) for part in lines(["a"], BYTES).divided(0.5)] == [1, 0]
    with pytest.raises(ValueError, match="below 1, got 1"):
        samples.divided(1.0)


def test_a_stream_is_not_copied():
    samples = windows("x" * 1001, BYTES, 10)
    assert isinstance(samples, Samples)
    assert samples.divided(0.1)[0].stream is samples.stream


def test_text_comes_as_it_is_without_a_byte_order_mark_and_unpacked(tmp_path):
    text = "Ünïcödé\r\nline two\n\n  \nlast"
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "packed.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    assert read_text(tmp_path / "bom.txt") == read_text(tmp_path / "packed.gz") == text
    assert read_lines(tmp_path / "bom.txt") == ["Ünïcödé", "line two", "last"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty$"),
        (b" \n\n ", "is empty: it holds white space only"),
        (b"text\0more", "is no text file: byte 4 is NUL"),
        ("é".encode("latin-1"), "is no UTF-8 text: byte 0 is 0xe9"),
        (gzip.compress(b"a" * 100, mtime=0)[:-9], "cannot be unpacked"),
        (gzip.compress(b"\0\1\2", mtime=0), "byte 0 is NUL"),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, data, reason):
    file = tmp_path / "file.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_text(file)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_text(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_text(tmp_path)


def test_real_text_is_read_whole():
    text = read_text(real_text())
    tokens, mask = everything(windows(text, BYTES, 256))
    assert mask.all()
    # All but fewer than 256 bytes at the end.
    assert 0 <= len(text.encode()) - 1 - tokens[:, 1:].numel() < 256
    assert BYTES.decode(tokens[0].tolist()) == text.encode()[:257].decode(errors="replace")
