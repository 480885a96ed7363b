"""`rlhf-kernels compare`: exit codes, formats, named baselines, and files that are broken."""

import json

import pytest

from rlhf_kernels import cli
from rlhf_kernels.engine import baselines, store
from tests.kernels.made_runs import made_row, made_run


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs `rlhf-kernels compare`, with a cache of its own: exit code, standard output, standard error."""
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = cli.main(["compare", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _stored(path, changes, processes=10):
    """Base and head runs of a session that differ by these changes, in two files."""
    for side in ("base", "head"):
        rows = []
        for case, change in changes.items():
            factor = 1 + change if side == "head" else 1.0
            rows.append(made_row([[100.0 * factor * (1 + p / 1000)] * 5 for p in range(processes)], case))
        store.append(path / f"{side}.jsonl", made_run(rows, session="s", side=side))
        store.append(path / "both.jsonl", made_run(rows, session="s", side=side))
    return path / "base.jsonl", path / "head.jsonl"


def test_exit_codes_and_formats(command, tmp_path):
    base, head = _stored(tmp_path, {"fine": 0.001, "slow": 0.10})
    code, out, err = command(base, head, "--markdown", tmp_path / "comment.md")
    assert code == 1, err
    assert "| slower " in out
    assert "1 slower, 1 same; geometric mean of head's times over base's 1.049." in out
    comment = (tmp_path / "comment.md").read_text()
    assert comment.startswith("### rlhf-kernels: base -> head\n\n🔺 1 slower, ✅ 1 same.\n")
    assert comment.index("slow float32") < comment.index("<details>") < comment.index("fine float32")
    assert "Again: `rlhf-kernels compare" in comment
    code, out, _ = command(base, head, "--json", "--least", "20%")
    value = json.loads(out)
    assert code == value["exit_code"] == 0
    assert value["counts"]["same"] == 2
    assert {"verdict", "ratio", "ratio_ci", "p", "floor"} <= set(value["rows"][0])
    assert command(tmp_path / "both.jsonl")[0] == 1
    assert command(base, base)[0] == 0


def test_inconclusive_by_policy(command, tmp_path):
    base, head = _stored(tmp_path, {"few": 0.10}, processes=3)
    assert command(base, head)[0] == 0
    assert command(base, head, "--inconclusive=fail")[0] == 1
    code, out, _ = command(base, head, "--inconclusive=rerun")
    assert code == 75
    assert "Measure again, with more processes: rlhf-kernels bench op --case 'few' --processes 12" in out


def test_incorrect_is_worse_than_slow(command, tmp_path):
    store.append(tmp_path / "a.jsonl", made_run([made_row([[100.0] * 3] * 6)]))
    store.append(tmp_path / "b.jsonl", made_run([made_row([]).failed("incorrect", "off by 3")]))
    code, out, _ = command("a.jsonl", "b.jsonl")
    assert code == 2
    assert "incorrect: off by 3" in out


def test_unlike_machines_exit_with_three(command, tmp_path):
    store.append(tmp_path / "a.jsonl", made_run([made_row([[100.0] * 3] * 6)]))
    other = made_run([made_row([[100.0] * 3] * 6)])
    other.fingerprint["torch"] = "2.14"
    store.append(tmp_path / "b.jsonl", other)
    code, out, err = command("a.jsonl", "b.jsonl")
    assert (code, out) == (3, "")
    assert "torch: 2.13 and 2.14" in err
    assert err.count("\n") == 1
    assert command("a.jsonl", "b.jsonl", "--force")[0] == 0


def test_named_baselines(command, tmp_path):
    run = made_run([made_row([[100.0] * 3] * 6)])
    path = baselines.save("main", [run, run])
    assert path == tmp_path / "cache" / "baselines" / "main.jsonl"
    store.append(tmp_path / "head.jsonl", run)
    assert command("main", "head.jsonl")[0] == 0
    baselines.save("main", [run])
    assert len(store.read(path)[0]) == 1, "saved again in place of what it was"
    code, _, err = command("nain", "head.jsonl")
    assert code == 64
    assert err == "rlhf-kernels: there is no result file and no baseline 'nain'; baselines: main\n"
    code, _, err = command("../main", "head.jsonl")
    assert code == 64
    assert cli.main(["bench", "--save-baseline", "../x"]) == 64


def test_bad_files_are_one_sentence_and_finished_rows_count(command, tmp_path):
    base, head = _stored(tmp_path, {"a": 0.0, "b": 0.0})
    text = head.read_text()
    head.write_text(text[:-40])  # torn in the middle of the last row
    code, out, err = command(base, head)
    assert (code, err) == (1, "")
    assert f"Careful: 1 lines of {head} are broken and were left out." in out
    assert "head has no such row" in out
    assert "| same " in out
    for content, said in (
        ("", "holds no results: it is empty"),
        ("{broken", "holds no results: 1 of its lines cannot be read"),
        (
            json.dumps(made_run([]).header() | {"schema": 99}),
            "holds schema 99, this version reads up to 1: upgrade",
        ),
        (json.dumps({"kind": "run"}), "holds schema None: expected a number up to 1"),
    ):
        head.write_text(content)
        code, out, err = command(base, head)
        assert (code, out) == (64, "")
        assert said in err
        assert err.count("\n") == 1
    code, _, err = command(base, tmp_path)
    assert code == 64
    assert "cannot be read: Is a directory" in err


def test_nothing_to_compare_is_an_error(command, tmp_path):
    store.append(tmp_path / "a.jsonl", made_run([made_row([[100.0] * 3] * 6, impl="TRL")]))
    code, out, err = command("a.jsonl", "a.jsonl")
    assert (code, out) == (64, "")
    assert "has no result to compare" in err
    assert command("a.jsonl", "a.jsonl", "--impl", "TRL")[0] == 0
