"""`rlhf-kernels patch`, the examples and the other version of TRL: what a user types."""

import importlib
import json
import runpy
from pathlib import Path

import pytest

import rlhf_kernels
from rlhf_kernels import cli, stacks
from rlhf_kernels.engine.patched import PatchRow
from rlhf_kernels.stacks import patching, slots

ROOT = Path(__file__).parents[2]
stacks.activate()


def _installed(name):
    if patching._folder(patching.targets()[name].root) is None:
        pytest.skip(f"{name} is not installed (make peers)")


def test_the_stacks_are_listed(capsys):
    assert cli.main(["patch"]) == 0
    out = capsys.readouterr().out
    assert all(f"| {name} " in out for name in patching.targets())
    assert cli.main(["patch", "--json"]) == 0
    assert {row["target"] for row in json.loads(capsys.readouterr().out)} == set(patching.targets())


def test_check_gives_difference_time_and_memory(capsys):
    _installed("verl")
    words = ["patch", "verl", "--check", "--only", "masked_whiten", "--seconds", "0.05", "--quiet"]
    assert cli.main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row.keys() == PatchRow("", "", "", "", "", "").as_dict().keys()
    assert row["status"] == "ok"
    assert row["error"] <= row["tolerance"] == 1e-5
    assert row["speedup"] == pytest.approx(row["before_us"] / row["after_us"])
    assert 0 < row["after_bytes"] < row["before_bytes"]
    assert cli.main(words) == 0
    assert "| masked_whiten | masked_normalize | ok " in capsys.readouterr().out


def test_a_wrong_replacement_is_incorrect_and_has_no_time(capsys, monkeypatch):
    _installed("verl")
    rebinding = patching.select(patching.find("verl"), "masked_whiten")[0]
    wrong = lambda original: lambda values, mask: original(values, mask) * 1.001  # noqa: E731
    monkeypatch.setitem(rebinding.__dict__, "make", wrong)
    assert cli.main(["patch", "verl", "--check", "--only", "masked_whiten", "--quiet", "--json"]) == 2
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["before_us"], row["chosen"]) == ("incorrect", None, False)
    assert "differs by 1.0e-03 relative, allowed is 1e-05" in row["reason"]


def test_without_check_nothing_is_measured(capsys):
    _installed("transformers")
    assert cli.main(["patch", "transformers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["loss"]["chosen"]
    assert rows["loss"]["before_us"] is None
    assert rows["attention"]["status"] == "left"
    assert rows["the gates of Gemma"]["reason"].startswith("its gate is a tanh GELU")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["trll"], 64, "unknown target 'trll': did you mean 'trl'?"),
        (["verl", "--seconds", "0"], 64, "expected a number above zero"),
    ],
)
def test_a_wrong_word_is_one_sentence(words, code, message, capsys):
    _refused(words, code, message, capsys)


def test_a_wrong_function_is_one_sentence(capsys):
    _installed("verl")
    _refused(["verl", "--only", "gae"], 64, "verl has no 'gae' to replace: expected some of", capsys)


def _refused(words, code, message, capsys):
    assert cli.main(["patch", *words]) == code
    found = capsys.readouterr()
    assert message in found.err
    assert found.err.count("\n") == 1


def test_a_patched_stack_is_not_compared_with_itself(capsys):
    _installed("verl")
    with rlhf_kernels.patch("verl", only="masked_whiten"):
        assert cli.main(["patch", "verl", "--check", "--only", "masked_whiten", "--quiet"]) == 3
    assert "masked_whiten is patched in this process: undo() it" in capsys.readouterr().err


def test_what_cannot_be_imported_is_not_said_to_be_replaced(capsys, monkeypatch):
    _installed("openrlhf")
    whole = importlib.import_module

    def without(name, *more):
        if name.startswith("openrlhf"):
            raise ModuleNotFoundError("No module named 'ray'")
        return whole(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    words = ["patch", "openrlhf", "--only", "masked_normalize", "--quiet", "--json", "--seconds", "0.05"]
    assert cli.main(words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    missing = "cannot be imported here: ModuleNotFoundError: No module named 'ray'"
    assert (row["status"], row["chosen"], row["reason"]) == ("unavailable", False, missing)
    assert cli.main([*words, "--check"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["status"], row["chosen"]) == ("ok", False)
    assert row["reason"] == f"compared from the installed source; {missing}"
    assert row["before_us"]


def test_an_unchecked_version_is_exit_code_3(capsys, monkeypatch):
    _installed("verl")
    monkeypatch.setattr(patching, "installed_version", lambda package, folder: "0.12.0")
    assert cli.main(["patch", "verl"]) == 3
    assert "verl 0.12.0 was not checked" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["verl", "openrlhf", "trl", "palm_rlhf_pytorch", "transformers"])
def test_example(name, capsys):
    _installed(name)
    runpy.run_path(str(ROOT / "examples" / f"patch_{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert "replaced" in out
    assert not patching.active()


def test_a_test_of_the_stack_that_ends_otherwise_is_found(tmp_path, capsys, monkeypatch):
    _installed("transformers")
    (tmp_path / "test_loss.py").write_text(
        "from transformers.loss.loss_utils import ForCausalLMLoss as function\n"
        "def test_is_callable():\n    assert callable(function)\n"
        "def test_is_the_stacks_own():\n    assert function.__module__.startswith('transformers')\n"
        "def test_fails():\n    assert function is None\n"
    )
    (tmp_path / "test_else.py").write_text("raise AssertionError('it names nothing that is replaced')\n")
    tool = runpy.run_path(str(ROOT / "tools" / "target_tests.py"))
    monkeypatch.setattr("sys.argv", ["target_tests.py", "transformers", "--tests", str(tmp_path), "--json"])
    assert tool["main"]() == 2
    row = json.loads(capsys.readouterr().out)
    assert row["files"] == ["test_loss.py"]
    assert row["before"] == {"passed": 2, "failed": 1}
    ((name, outcomes),) = row["differing"].items()
    assert name.endswith("::test_is_the_stacks_own")
    assert [outcome.partition(":")[0] for outcome in outcomes] == ["passed", "failed"]
    assert row["replaced"] == ["loss"]  # what has been imported
    monkeypatch.setattr("sys.argv", ["target_tests.py", "trll"])
    assert tool["main"]() == 64
    assert "unknown target 'trll'" in capsys.readouterr().err


def test_the_entropy_of_the_old_head_passes_no_gradient_unless_asked_by_name():
    if not (stacks.peers_root() / "trl-1.12").is_dir():
        pytest.skip("TRL 1.12 is not installed (make peers)")
    theirs, right = (
        one
        for one in patching.targets()["trl"].rebindings
        if one.name.startswith("loss_head") and one.fits("1.12.0", patching.find("trl"))
    )
    call, original = theirs.call(False), theirs.source()

    def gradient(function):
        logprob, entropy = function.apply(*call.args)
        (logprob.sum() * 0 + entropy.sum()).backward()
        found, call.args[0].grad = call.args[0].grad, None
        return float(found.abs().max())

    assert gradient(original) == gradient(theirs.make(original)) == 0
    assert gradient(right.make(original)) > 0.01


def test_the_right_one_is_had_by_name():
    _installed("palm_rlhf_pytorch")
    import torch

    palm = __import__("palm_rlhf_pytorch.palm").palm
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert palm.top_p(logits, thres=0.75).isfinite().sum() == 1  # it keeps a quarter of the mass
    with rlhf_kernels.patch("palm_rlhf_pytorch", only="top_p:right") as held:
        assert [one.name for one in held.replaced] == ["top_p:right"]
        assert palm.top_p(logits, thres=0.75).isfinite().sum() == 3
    assert slots.look_up("palm_rlhf_pytorch.palm:top_p", palm)


def test_the_tables_of_the_documentation_are_those_of_all_records():
    tool = runpy.run_path(str(ROOT / "tools" / "patch_tables.py"))
    text, records = tool["DOCS"].read_text(), sorted(tool["RESULTS"].glob("patch-cpu-*.jsonl"))
    assert all(record.name in text for record in records)
    rows = tool["read"](records)
    assert tool["updated"](text, list(rows.values())) == text, "run python tools/patch_tables.py"
    with pytest.raises(ValueError, match="no record has a row of trl, whose table has some"):
        tool["updated"](text, [row for row in rows.values() if row["target"] != "trl"])
