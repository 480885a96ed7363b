"""The guards that need no GPU: every kernel within its budget, and every guard fails on a planted fault."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_kernels import cli
from rlhf_kernels.engine import budget, store
from rlhf_kernels.engine.budget import callgrind, cuda, machine, triton_kernels
from rlhf_kernels.engine.budget.ledger import Ledger, excess
from rlhf_kernels.engine.budget.measured import CSRC, Measured
from rlhf_kernels.engine.compare import compare
from rlhf_kernels.engine.spec import load_specs

ROOT = Path(__file__).parents[2]


def _needs(kind):
    if reason := budget.KINDS[kind].missing():
        pytest.skip(reason)


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """`run` on the planted op, with budgets of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n### Added\n- All.\n\n## [0.0.1]\n- It.\n"
    )

    def run(**options):
        where = {"directory": tmp_path, "changelog": tmp_path / "CHANGELOG.md"}
        return budget.run(package="planted_kernels", **where, **options)

    run.folder = tmp_path
    return run


@pytest.mark.parametrize("kind", budget.KINDS)
def test_every_kernel_is_within_its_budget(kind):
    rows = budget.run(kinds=[kind], changed=True)
    bad = [row for row in rows if row["status"] in ("incorrect", "error")]
    assert not bad, "\n".join(f"{r['op']}/{r['case']}/{r['device']}: {r['reason']}" for r in bad)
    if unavailable := [row["reason"] for row in rows if row["status"] == "unavailable"]:
        pytest.skip(unavailable[0])


def test_every_native_source_is_guarded():
    specs = load_specs().values()
    families = {path.parent.name for path in CSRC.glob("*/ops.cpp")}
    assert {path.parent.name for path in CSRC.glob("*/cuda.cu")} <= {spec.family for spec in specs}
    assert families <= {spec.family for spec in specs if spec.host_kernels}
    assert families <= {path.parent.name for path in CSRC.glob("*/fuzz.py")}


def test_planted_faults_of_triton_kernels_are_found(planted):
    _needs("triton")
    rows = planted(kinds=["triton"], update=True)
    found = {(row["case"], row["device"]): row for row in rows}
    healthy = [row for (case, _), row in found.items() if case == "healthy"]
    assert len(healthy) == 4
    assert all(row["status"] == "ok" and row["tensor_core"] > 0 for row in healthy), healthy
    assert found["healthy", "sm_90"]["matrix"].keys() == {"HGMMA"}
    assert found["healthy", "sm_100"]["matrix"].keys() >= {"UTCHMMA"}

    assert found["aligned", "sm_90"]["loads"] == {"128": 1}
    assert found["unaligned", "sm_90"]["loads"] == {"32": 4}
    assert found["unaligned", "sm_90"]["narrow_loads"] == 4

    lost = found["lost_hgmma", "sm_90"]
    assert lost["status"] == "incorrect"
    assert lost["reason"].startswith("no HGMMA on sm_90")
    assert lost["matrix"].keys() == {"HMMA"}
    spills = found["spills", "sm_90"]
    assert spills["status"] == "incorrect"
    assert f"{spills['spills']} spills on sm_90" in spills["reason"]
    assert spills["spills"] > 0
    aborts = found["aborts", "sm_90"]
    assert (aborts["status"], budget.exit_code(rows)) == ("error", 2)
    assert "the compiler died with exit status -6" in aborts["reason"]
    # What is at fault is not written down, so it cannot be excused.
    budgets = Ledger.load("planted", planted.folder).budgets
    assert {key.split("/")[1] for key in budgets} == {"healthy", "aligned", "unaligned"}


def test_what_is_as_it_was_recorded_is_not_compiled_again(planted):
    _needs("triton")

    def taken_from_the_record():
        rows = planted(kinds=["triton"], targets=["sm_90"], changed=True)
        assert {row["case"] for row in rows if row["status"] != "ok"} == {"lost_hgmma", "spills", "aborts"}
        return {row["case"] for row in rows if row.get("recorded")}

    planted(kinds=["triton"], targets=["sm_90"], update=True)
    assert taken_from_the_record() == {"healthy", "unaligned"}, "all but what is at fault and the first"
    ledger = Ledger.load("planted", planted.folder)
    (key,) = (key for key in ledger.sources if "/healthy/" in key)
    ledger.sources[key] = "of another source"
    ledger.save()
    assert taken_from_the_record() == {"unaligned"}


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) planted_kernel(const float* x, float* out) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[threadIdx.x + 1024 * i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) out[threadIdx.x + 1024 * i] = v[i] * v[95 - i] + v[(i * 7) % 96];
}
__global__ void lean_kernel(float* out) { out[threadIdx.x] = 1.0f; }
"""


def test_planted_spill_of_a_cuda_kernel_is_found(tmp_path):
    _needs("cuda")
    source = tmp_path / "planted" / "cuda.cu"
    source.parent.mkdir()
    source.write_text(SPILLING)
    found = {(one.name, one.target): one for one in cuda.measure_source(source, tmp_path)}
    assert {target for _, target in found} == {"sm_80", "sm_90", "sm_100"}
    for (name, _), one in found.items():
        assert bool(one.faults) == (name == "cuda/planted_kernel"), one
        assert one.figures["registers"] > 0
    source.write_text(SPILLING.replace("1.0f;", "one;"))
    (broken,) = cuda.measure_source(source, tmp_path)
    assert broken.status == "error"
    assert 'identifier "one" is undefined' in broken.reason


def test_a_cuda_file_as_it_was_recorded_is_not_compiled_again(monkeypatch):
    _needs("cuda")
    compiled = []

    def record(source, include=CSRC, targets=cuda.CUDA_TARGETS):
        compiled.append((source.parent.name, len(targets)))
        return []

    monkeypatch.setattr(cuda, "measure_source", record)
    rows = budget.run(kinds=["cuda"], changed=True)
    assert compiled == [("advantage", 1)], "the shortest, for one target"
    assert all(row["recorded"] and row["status"] == "ok" for row in rows)
    assert {row["device"] for row in rows} == set(cuda.TARGETS)
    compiled.clear()
    (wanted,) = cuda.sources(["advantage"])
    monkeypatch.setattr(cuda, "_included", lambda source, include: [] if source == wanted else [source])
    budget.run(kinds=["cuda"], changed=True)
    assert sorted(compiled) == [("advantage", 3), ("normalize", 3)]
    compiled.clear()
    budget.run(kinds=["cuda"])
    assert sorted(compiled) == [("advantage", 3), ("normalize", 3)]


def test_a_cuda_file_is_named_by_what_it_includes(tmp_path):
    (tmp_path / "room").mkdir()
    (tmp_path / "common").mkdir()
    source, header = tmp_path / "room" / "cuda.cu", tmp_path / "common" / "a.cuh"
    source.write_text('#include "common/a.cuh"\n#include <cstdint>\n')
    header.write_text('  #include "common/b.h"\n#include "not/ours.h"\n')
    (tmp_path / "common" / "b.h").write_text('#include "common/a.cuh"\n')
    (tmp_path / "common" / "c.h").write_text("")
    assert [path.name for path in cuda._included(source, tmp_path)] == ["a.cuh", "b.h", "cuda.cu"]


def test_cuda_names_are_stable():
    name = "void rk::cuda::(anonymous namespace)::gae_kernel<rk::bf16, 4, true>(rk::bf16 const*, float*)"
    assert cuda.stable_name(name) == "gae_kernel<bf16,4,true>"


def test_more_instructions_are_found(planted, monkeypatch):
    _needs("host")
    assert planted(kinds=["host"], update=True)[0]["status"] == "ok"
    (again,) = planted(kinds=["host"])
    assert again["status"] == "ok"
    monkeypatch.setenv("PLANTED_MORE", "2")
    (more,) = planted(kinds=["host"])
    assert more["status"] == "incorrect"
    assert again["instructions"] < more["instructions"] < again["instructions"] * 1.01
    assert more["reason"] == f"instructions {more['instructions']}, budget {again['instructions']}"


def test_two_percent_more_instructions_are_found_between_results(planted, monkeypatch, tmp_path, capsys):
    _needs("host")
    words = ["budget", "--specs", "planted_kernels", "--kind", "host", "--budgets", str(tmp_path)]
    for name, more in (("base", "0"), ("again", "0"), ("head", "6")):
        monkeypatch.setenv("PLANTED_MORE", more)
        assert cli.main([*words, "--out", str(tmp_path / f"{name}.jsonl")]) == 1, "no budget is recorded"
    results = {name: str(tmp_path / f"{name}.jsonl") for name in ("base", "again", "head")}
    assert cli.main(["compare", results["base"], results["again"]]) == 0
    capsys.readouterr()
    assert cli.main(["compare", results["base"], results["head"], "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    base, head = row["figures"]["instructions"]
    assert 1.02 < head / base < 1.03
    assert (row["verdict"], row["reason"]) == ("slower", f"instructions {base} -> {head}")
    (run,), _ = store.read(Path(results["head"]))
    assert run.fingerprint["tools"]["host"] == callgrind.tool()
    assert cli.main([*words, "--update", "--quiet"]) == 0
    assert (tmp_path / "planted.json").exists(), "budgets of one's own, in a place of one's own"


def test_planted_faults_are_found_between_results(planted):
    """What budget says of a healthy kernel against a spill, a lost HGMMA and narrowed loads, as results."""
    _needs("triton")
    rows = {row["case"]: budget.stored(row) for row in planted(kinds=["triton"], targets=["sm_90"])}
    tools = {"tools": budget.tools()}

    def verdict(good, bad):
        now = replace(rows[bad], case=good)
        report = compare([store.Run("", tools, [rows[good]])], [store.Run("", tools, [now])])
        return report.rows[0].verdict, report.rows[0].reason

    for bad, figure in (("spills", "spills 0 -> "), ("lost_hgmma", "tensor_core "), ("aborts", "died")):
        called, why = verdict("healthy", bad)
        assert called == ("missing" if bad == "aborts" else "slower")
        assert figure in why
    called, why = verdict("aligned", "unaligned")
    assert called == "slower"
    assert "narrow_loads 0 -> " in why


def test_counts_leave_out_what_is_called():
    own = "ob=/x/_host.so\nfn=row\n0 7\ncob=/x/libpython3.so\ncalls=1 0\n0 900\n0 5\n"
    profile = own + "ob=/x/libpython3.so\nfn=f\n0 900\nob=/x/libm.so.6\nfn=exp\n0 20\n"
    assert callgrind.own_instructions(profile) == 32


# Registers, bytes of shared memory and warps of a block give a share, as CUDA's occupancy calculator does.
@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 1.0),
        ("sm_80", 33, 0, 4, 0.75),
        ("sm_80", 255, 0, 8, 8 / 64),
        ("sm_90", 168, 164092, 12, 12 / 64),
        ("sm_90", 32, 112 * 1024, 8, 16 / 64),
        ("sm_90", 32, 0, 1, 0.5),
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx942", 64, 40000, 4, 4 / 32),
    ],
)
def test_occupancy(target, registers, shared, warps, expected):
    assert machine.occupancy(target, registers, shared, warps) == expected


def test_too_much_shared_memory_is_a_fault():
    reading = machine.Reading({"spills": 0, "shared": 250_000}, {"matrix": {"HGMMA": 4}})
    (fault,) = machine.faults("sm_90", reading, tensor_core=True)
    assert fault == "250000 bytes of shared memory, sm_90 has 232448: fewer stages"
    reading = machine.Reading({"spills": 0, "shared": 0}, {"matrix": {}, "serialized": True})
    (fault,) = machine.faults("sm_90", reading)
    assert "serialised" in fault


# What follows is about the ledger; kernels are made up.


class Pretended:
    """A kind of kernels that measures what it is told."""

    def __init__(self):
        self.figures = {"a": 10, "b": 20}
        self.version = "pretended 1"
        self.reason = None

    def missing(self):
        return self.reason

    def tool(self):
        return self.version

    def owners(self, specs):
        return [(spec.family, spec.name) for spec in specs]

    def measure(self, specs, targets, package, recorded):
        for name, registers in self.figures.items():
            yield Measured(
                "planted", "planted", "triton", name, "sm_90", {"registers": registers, "tensor_core": 4}
            )


@pytest.fixture
def pretended(planted, monkeypatch):
    """The planted op with made-up kernels: the stand-in, and `run`."""
    kind = Pretended()
    monkeypatch.setattr(budget, "KINDS", {"triton": kind})
    assert budget.exit_code(planted()) == 1  # no budget yet
    assert budget.exit_code(planted(update=True)) == 0
    return SimpleNamespace(
        kind=kind, run=planted, path=planted.folder / "planted.json", folder=planted.folder
    )


def test_a_kernel_without_a_budget_fails(pretended):
    pretended.kind.figures["c"] = 5
    rows = {row["case"]: row for row in pretended.run()}
    assert rows["a"]["status"] == "ok"
    assert rows["c"]["reason"] == "no budget is recorded: rlhf-kernels budget planted --update"


def test_tightening_is_free_and_kept(pretended):
    pretended.kind.figures["a"] = 8
    assert budget.exit_code(pretended.run()) == 0
    assert json.loads(pretended.path.read_text())["budgets"]["planted/a/sm_90"]["registers"] == 10
    pretended.run(update=True)
    pretended.kind.figures["a"] = 9
    rows = pretended.run()
    assert (rows[0]["status"], rows[0]["reason"]) == ("incorrect", "registers 9, budget 8")
    assert budget.exit_code(rows) == 1


def test_loosening_needs_a_reason_which_goes_into_the_changelog(pretended):
    pretended.kind.figures["b"] = 24
    before = pretended.path.read_text()
    with pytest.raises(
        ValueError, match=r"would loosen: planted/b/sm_90 \(registers 24, budget 20\)\. Say why"
    ):
        pretended.run(update=True)
    assert pretended.path.read_text() == before
    assert budget.exit_code(pretended.run(update=True, reason="b masks its tail now.")) == 0
    assert budget.exit_code(pretended.run()) == 0
    pretended.kind.figures |= {"b": 25}
    pretended.run(update=True, reason="Once more")
    unreleased, _, older = (pretended.folder / "CHANGELOG.md").read_text().partition("\n## [0.0.1]")
    assert unreleased.endswith(
        "### Budgets loosened\n"
        "- b masks its tail now: planted/b/sm_90 (registers 24, budget 20).\n"
        "- Once more: planted/b/sm_90 (registers 25, budget 24).\n"
    )
    assert older == "\n- It.\n"


def test_a_kernel_that_vanishes_is_missed(pretended):
    del pretended.kind.figures["b"]
    gone = pretended.run()[-1]
    assert (gone["case"], gone["device"], gone["status"]) == ("b", "sm_90", "incorrect")
    assert "no longer declared" in gone["reason"]
    with pytest.raises(ValueError, match="planted/b/sm_90 dropped"):
        pretended.run(update=True)
    pretended.run(update=True, reason="b is part of a")
    assert len(pretended.run()) == 1
    # What was not asked for is not missed.
    assert not [row for row in pretended.run(targets=["sm_80"]) if row["status"] == "incorrect"]


def test_another_compiler_is_not_compared(pretended):
    pretended.kind.version = "pretended 2"
    pretended.kind.figures["a"] = 30
    rows = pretended.run()
    assert {row["status"] for row in rows} == {"unavailable"}
    assert budget.exit_code(rows) == 3
    assert rows[0]["reason"] == "the budget is pretended 1's, and this is pretended 2: not compared"
    with pytest.raises(ValueError, match="would loosen"):
        pretended.run(update=True)
    del pretended.kind.figures["b"]
    with pytest.raises(ValueError, match="was recorded with pretended 1, this is pretended 2: update all"):
        pretended.run(update=True, targets=["sm_80"], reason="a newer compiler")


def test_a_missing_tool_is_a_row_with_its_reason(pretended):
    pretended.kind.reason = "the tool is not here: fetch it"
    (row,) = pretended.run()
    assert (row["op"], row["status"], row["reason"]) == (
        "planted",
        "unavailable",
        "the tool is not here: fetch it",
    )
    assert budget.exit_code([row]) == 0


def test_tolerated_instructions_do_not_add_up(tmp_path):
    ledger = Ledger(tmp_path / "room.json", {}, {"op/host/row/v3": {"instructions": 10_000}})
    one = Measured("room", "op", "host", "host/row", "v3", {"instructions": 10_049})
    assert ledger.update([one], [], {}) == []
    assert ledger.budgets["op/host/row/v3"] == {"instructions": 10_000}
    assert ledger.update([replace(one, figures={"instructions": 10_051})], [], {})


def test_matrix_instructions_may_not_become_more_either():
    assert excess({"tensor_core": 8, "registers": 9}, {"tensor_core": 4, "registers": 10}) == [
        "tensor_core 8, budget exactly 4"
    ]
    assert excess({"spills": 1}, {}) == ["spills 1 has no budget"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ops": ["atention"]}, "unknown op 'atention': did you mean 'attention'"),
        ({"targets": ["v5"]}, "unknown target 'v5': .*expected one of sm_80, sm_90, sm_100, gfx942, v3"),
        ({"kinds": ["hip"]}, "unknown kind 'hip': expected one of triton, cuda, host"),
    ],
)
def test_unknown_names_are_one_sentence(given, message):
    with pytest.raises(ValueError, match=message):
        budget.run(**given)


def test_tools_that_are_absent_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    cuda._nvcc.cache_clear()
    assert "install the CUDA toolkit" in cuda.missing()
    assert "pip install" in triton_kernels.missing()
    assert callgrind.missing()
    cuda._nvcc.cache_clear()
