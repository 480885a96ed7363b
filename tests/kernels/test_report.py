"""The HTML report: what stands on the page, that it needs nothing else, and what it says of bad input."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from rlhf_kernels.engine import report, results, roofs, store
from rlhf_kernels.engine.fingerprint import machine_id
from rlhf_kernels.engine.report import plots, tables
from rlhf_kernels.engine.results import Entry

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu-2026-11-20.jsonl"


@pytest.fixture(scope="module")
def swiglu():
    """The recorded runs of swiglu: three sizes, eager, compiled, native and a peer."""
    runs = [run for run in store.read(RECORDED)[0] if " swiglu " in run.command]
    assert len(runs) == 2
    return runs


@pytest.fixture
def stored(swiglu, tmp_path):
    """Their file."""
    path = tmp_path / "swiglu.jsonl"
    for run in swiglu:
        store.append(path, run)
    return path


def _left_out_on_a_phone(page):
    """How many columns are; a head must be left out with its cells."""
    hidden = 0
    for text in re.findall(r"<table>.*?</table>", page, flags=re.S):
        heads, *rows = (
            ["minor" in c.split() for c in re.findall(r'<t[hd][^>]*class="([^"]*)"', row)]
            for row in re.findall(r"<tr>.*?</tr>", text, flags=re.S)
        )
        assert rows
        assert all(row == heads for row in rows)
        hidden += sum(heads)
    return hidden


def test_the_page_stands_alone(command, parsed, swiglu, stored, tmp_path):
    code, out, err = command("report", stored, "--out", tmp_path / "page.html", "--title", "A < B")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'page.html'}: 60 rows of 2 runs" in out
    text = (tmp_path / "page.html").read_text()
    page = parsed(text)
    assert text.startswith("<!doctype html>")
    assert text.count("A &lt; B") == 3, "the title, the heading and the command"
    assert len(page.ids) == len(set(page.ids)), "two drawings share an id"
    assert {ref.removeprefix("#") for ref in page.refs} <= set(page.ids), "something outside is referred to"
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert page.counts["svg"] == 4, "speed-ups, two directions of times, a roofline"
    assert "prefers-color-scheme: dark" in text
    assert "#0102f" not in text, "a role's colour was not replaced by the page's"
    assert all(name in text for name in ("AMD EPYC", "fff8d890470f", "backward/bf16", "f73ce0f9"))
    assert _left_out_on_a_phone(text) >= 5
    assert text.count(swiglu[1].command) >= 8, "each part says how it was measured"


def test_every_time_is_in_the_table_once(swiglu):
    (machine,) = results.Results([], swiglu, []).machines()
    newest = machine.newest()
    wanted = {row.key for one in swiglu for row in one.rows if row.median_us}
    timed = [entry for entry in newest if entry.row.median_us]
    assert {entry.row.key for entry in timed} == wanted
    assert len(tables.times(timed).rows) == len(wanted)
    assert {entry.number for entry in timed} == {2}, "both runs timed the same: the newer one counts"


def test_the_summary_is_the_geometric_mean_of_one_run(swiglu):
    timed = [e for e in results.Results([], swiglu, []).machines()[0].newest() if e.row.median_us]
    (line,) = tables.summary(timed).rows
    rows = {(e.row.impl, e.row.case, e.row.direction): e.row.median_us for e in timed}
    product, n = 1.0, 0
    for (impl, case, direction), time in rows.items():
        if impl == "torch":
            product, n = product * time / rows["native", case, direction], n + 1
    assert n == 6
    assert line[3].key == pytest.approx(product ** (1 / 6))
    assert line[3].kind == "good"
    assert line[0].text == "swiglu"


def test_a_later_check_does_not_hide_a_time(swiglu):
    checked = dataclasses.replace(swiglu[1], started="2027-01-01T00:00:00+00:00")
    checked.rows = [
        dataclasses.replace(row, median_us=None, ci_us=None, samples_us=[], speedup=None)
        for row in swiglu[1].rows
        if row.direction == "forward"
    ]
    machine = results.Results([], [*swiglu, checked], []).machines()[0]
    keys = [entry.row.key for entry in machine.newest() if entry.row.median_us]
    assert set(keys) == {row.key for row in swiglu[1].rows if row.median_us}


def test_machines_are_kept_apart(swiglu):
    other = dataclasses.replace(swiglu[0], fingerprint=swiglu[0].fingerprint | {"threads": 2})
    upgraded = dataclasses.replace(swiglu[1], fingerprint=swiglu[1].fingerprint | {"torch": "2.99"})
    found = results.Results([], [swiglu[1], upgraded, other], []).machines()
    assert [machine.title for machine in found] == ["AMD EPYC, 1 thread", "AMD EPYC, 2 threads"]
    assert found[0].fingerprint["torch"] == "2.99", "a new version is the same machine"


def test_what_failed_is_shown_with_its_reason_as_text(command, parsed, swiglu, tmp_path):
    bad = dataclasses.replace(swiglu[1])
    bad.rows = [
        row.failed("incorrect", "off by <b>3</b>") if row.impl == "native" else row for row in swiglu[1].rows
    ]
    store.append(tmp_path / "bad.jsonl", bad)
    over = {
        "op": "swiglu", "impl": "triton", "case": "forward/bf16", "device": "sm_90", "status": "incorrect",
        "reason": "registers 40, budget 32", "registers": 40, "spills": 8,
        "budget": {"registers": 32, "spills": 0},
    }  # fmt: skip
    (tmp_path / "budget.json").write_text(json.dumps([over]))
    words = ("--out", tmp_path / "page.html", "--budget", tmp_path / "budget.json")
    assert command("report", tmp_path / "bad.jsonl", *words)[0] == 0
    text = (tmp_path / "page.html").read_text()
    cells = parsed(text).cells
    assert cells.count("off by <b>3</b>") == 6
    assert "<b>3</b>" not in text
    assert '<div class="card bad"><b>6</b>incorrect</div>' in text
    assert "40 (budget 32)" in cells
    assert "incorrect: registers 40, budget 32" in cells
    (tmp_path / "budget.json").write_text('{"rows": 1}')
    code, _, err = command("report", tmp_path / "bad.jsonl", *words)
    assert code == 64
    assert "it is not what `rlhf-kernels budget --json` prints" in err


def test_roofs_of_this_machine_are_drawn(swiglu, monkeypatch, tmp_path):
    timed = [e for e in results.Results([], swiglu, []).machines()[0].newest() if e.row.median_us]
    (without,) = plots.roofline(timed, None)
    assert "timed beside the rows" in without.caption
    assert "no matrix product" in without.caption
    known = roofs.Roofs({1 << 16: 4e9, 1 << 20: 2e9}, {"float32": 77e9})
    (drawn,) = plots.roofline(timed, known)
    assert "(2 and 4 GB/s, measured on this machine)" in drawn.caption
    assert "77 GFLOP/s" in drawn.caption
    monkeypatch.setenv("RLHF_KERNELS_CACHE", str(tmp_path))
    name = machine_id(swiglu[0].fingerprint)
    machines = {name: {"copy": {"65536": 4e9}, "matmul": {"float32": 77e9}}}
    (tmp_path / "roofs.json").write_text(json.dumps({"schema": roofs.SCHEMA, "machines": machines}))
    assert roofs.remembered(name).matmul == {"float32": 77e9}
    assert roofs.remembered("another") is None
    (machine,) = results.Results([], swiglu, []).machines()
    assert report._roofs(machine).matmul == {"float32": 77e9}
    store.append(
        tmp_path / "kept.jsonl", dataclasses.replace(swiglu[1], roofs=machines[name] | {"matmul": {}})
    )
    (machine,) = results.Results([], store.read(tmp_path / "kept.jsonl")[0], []).machines()
    assert report._roofs(machine) == roofs.Roofs({1 << 16: 4e9}), "what the results hold comes first"


def test_implementations_look_the_same_in_every_figure():
    row = store.read(RECORDED)[0][0].rows[0]
    run = store.read(RECORDED)[0][0]

    def styles(*names):
        return plots.styles([Entry(dataclasses.replace(row, impl=name), run, 1) for name in names])

    assert styles("native", "torch", "TRL", "verl") == {"native": 0, "torch": 1, "TRL": 3, "verl": 4}
    assert styles("native", "TRL") == {"native": 0, "TRL": 3}, "those of the baseline are not lent out"
    assert styles("triton", "TRL") == {"triton": 3, "TRL": 4}


def test_sizes_that_differ_by_a_mask_are_one():
    rows = [row for run in store.read(RECORDED)[0] for row in run.rows if row.op == "gae" and row.median_us]
    forward = [row for row in rows if row.direction == "forward"]
    found = plots.sizes(forward)
    assert len(set(found.values())) == 3, "64x1024, 512x1024 and 4096x2048, masked or not"
    assert len(found) > 3


def test_broken_files(command, stored, tmp_path):
    page = ("--out", tmp_path / "page.html")
    cases = {
        tmp_path / "absent.jsonl": "does not exist",
        tmp_path / "empty.jsonl": "holds no run",
        tmp_path / "binary.jsonl": "rlhf-kernels: ",
        tmp_path / "later.jsonl": "holds schema 99, this version reads up to",
        tmp_path / "nothing": "no result in",
    }
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "later.jsonl").write_text('{"kind": "run", "schema": 99}\n')
    (tmp_path / "nothing").mkdir()
    for path, said in cases.items():
        code, out, err = command("report", path, *page)
        assert (code, out) == (64, "")
        assert said in err
        assert err.count("\n") == 1
        assert str(path) in err
    assert command("report", stored, "--out", tmp_path)[0] == 64
    whole = stored.read_text()
    stored.write_text(whole[:-200])
    found = results.load([stored])
    assert found.notes == ["swiglu.jsonl: 1 line could not be read."]
    assert [len(one.rows) for one in found.runs] == [30, 29]


def test_a_directory_leaves_out_what_is_no_result(stored, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"task": "step"}\n')
    found = results.load([tmp_path])
    assert found.files == [stored]
    assert found.notes == ["other.jsonl holds no run and was left out."]


def test_the_base_of_regress_is_no_run_of_its_day(swiglu, tmp_path):
    for side in ("base", "head"):
        store.append(tmp_path / "r.jsonl", dataclasses.replace(swiglu[1], side=side))
    found = results.load([tmp_path / "r.jsonl"])
    assert [run.side for run in found.runs] == ["head"]
    assert found.notes == ["1 of 2 runs are the base of `regress` and were left out."]


def test_without_the_extra_it_says_what_to_install(command, stored, monkeypatch, tmp_path):
    found = report.importlib.util.find_spec
    monkeypatch.setattr(
        report.importlib.util, "find_spec", lambda name: None if name == "jinja2" else found(name)
    )
    code, _, err = command("report", stored, "--out", tmp_path / "page.html")
    assert code == 64
    assert err == "rlhf-kernels: a report needs jinja2: pip install 'rlhf-kernels[report]'\n"
    assert not (tmp_path / "page.html").exists()
