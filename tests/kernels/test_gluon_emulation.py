"""Gluon kernels without a GPU: their source runs on an emulation of warps, barriers and asynchronous units.

What it cannot show (layouts, the memory model, speed) the ahead-of-time budgets show in part
(test_budget.py), and the rest needs a GPU: test_gpu.py.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental.gluon._runtime import GluonJITFunction

from rlhf_kernels.engine.check import Judge
from rlhf_kernels.engine.spec import Case, load_specs
from rlhf_kernels.ops.attention import gluon_forward, kernel_gluon
from rlhf_kernels.runtime import dispatch
from rlhf_kernels.runtime.tuned import Trial
from tests.emulation.gluon import language
from tests.emulation.gluon.scheduler import Fault

SPEC = load_specs()["attention"]
ROOMS = ("tiles", "forward", "query_gradient", "key_gradient")
KERNELS = {f"{name}_kernel" for name in ROOMS[1:]}


@pytest.fixture
def emulated(monkeypatch):
    """attention=gluon on this CPU; the names of the kernels that ran, each in an order of its own."""
    ran = []

    def run(kernel, grid, on, /, *args, **meta):
        assert isinstance(kernel, GluonJITFunction)
        ran.append(kernel.fn.__name__)
        language.launch(kernel, grid, on, *args, seed=len(ran), **meta)

    monkeypatch.setattr(kernel_gluon, "launch", run)
    unavailable = dispatch.unavailable
    monkeypatch.setattr(
        dispatch, "unavailable", lambda name, device: None if name == "gluon" else unavailable(name, device)
    )
    yield ran
    dispatch.OPS["attention"]._chosen.clear()


def _case(name, sizes, dtype=torch.float16, **options):
    batch, heads, *rest = sizes.split("x")
    letters = dict(zip("BHGTSD", map(int, (batch, *heads.split("/"), *rest))))
    return Case(name, letters, options, "awkward", (dtype,))


# Several tiles of queries and of keys, and a ragged rest of both.
CASES = [
    _case("causal", "1x2/1x200x300x64", causal=True),
    _case("full", "1x2/2x150x290x128", torch.bfloat16, return_lse=True),
    _case("masked", "3x2/1x150x290x64", causal=True, mask="random", return_lse=True),
    _case("masked_rows", "2x2/2x140x140x128", mask="row", strided=True, scale=0.5),
    _case("more_queries", "1x1/1x270x100x64", torch.bfloat16, causal=True, return_lse=True),
    _case("palm", "2x2/1x150x290x64", causal=True, mask="tail", rotary="xpos", return_lse=True),
    _case("rotary_rows", "2x2/2x140x150x128", torch.bfloat16, rotary="plain_rows"),
    _case("window_causal", "1x2/1x300x420x64", causal=True, window=100),
    _case("window_both", "2x1/1x290x290x128", torch.bfloat16, mask="random", window=70),
    _case("gemma_64", "1x2/1x150x290x64", causal=True, window=130, softcap=2.0, rotary="plain"),
    _case("gemma_128", "1x2/1x150x290x128", mask="middle", softcap=5.0, rotary="xpos", return_lse=True),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_attention_is_right(emulated, case):
    judge = Judge(SPEC, case, case.dtypes[0])
    with dispatch.backend("attention=gluon", strict=True):
        # A second run has another order of events, and must have the same bits.
        rows = judge.rows("gluon", SPEC.function, repeat=case.name == "causal")
    for row in rows:
        assert row.status == "ok", f"{row.direction}: {row.reason}"
    assert set(emulated) == KERNELS


@pytest.mark.parametrize("values", [{"block_n": 64, "pinned": 0}], ids=str)
def test_knobs_change_no_result(emulated, values):
    judge = Judge(SPEC, CASES[0], torch.float16)
    with (
        dispatch.backend("attention=gluon", strict=True),
        dispatch.trial(Trial("attention", "gluon", "forward", tuple(values.items()))),
    ):
        (row,) = judge.rows("gluon", SPEC.function, ["forward"], repeat=False)
    assert row.status == "ok", row.reason


def test_what_tma_cannot_copy_is_copied_before(emulated):
    whole = torch.randn(1, 1, 70, 68, dtype=torch.float16)
    cut, aligned = whole[..., 3:67], whole[..., 3:67].clone()
    expanded = aligned[:, :, :1].expand(1, 1, 70, 64)
    for x, like in ((cut, aligned), (expanded, expanded.clone())):
        out, lse = kernel_gluon.forward(x, aligned, x, True, None, 0.125, True)
        expected, expected_lse = kernel_gluon.forward(like, aligned, like, True, None, 0.125, True)
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


def test_empty_inputs(emulated):
    q, k = torch.randn(1, 2, 5, 64).half(), torch.randn(1, 1, 0, 64).half()
    out, lse = kernel_gluon.forward(q, k, k, True, None, 0.125, True)
    assert not out.any()
    assert lse.eq(float("-inf")).all()
    dq, dk, dv = kernel_gluon.backward(out, None, q, k, k, out, lse, True, None, 0.125, True)
    assert not dq.any()
    assert dk.shape == dv.shape == k.shape
    assert not emulated


@pytest.mark.parametrize(
    ("dtype", "shape_class", "reason"),
    [
        (torch.float32, 64, "wgmma takes no float32"),
        (torch.float16, 96, "head size 96 is none of 64, 128"),
        (torch.float16, (256, "window"), "head size 256 is none of 64, 128"),
    ],
)
def test_what_it_does_not_know_falls_back_with_the_reason(dtype, shape_class, reason):
    op = dispatch.OPS["attention"]
    dispatch._warned.clear()
    with dispatch.backend("attention=gluon"), pytest.warns(dispatch.FallbackWarning, match=reason):
        chosen = op.decide("cuda", dtype, shape_class)
    assert chosen.backend == "triton"
    with (
        dispatch.backend("attention=gluon", strict=True),
        pytest.raises(dispatch.BackendError, match=reason),
    ):
        op.decide("cuda", dtype, shape_class)


def test_it_is_not_chosen_by_itself():
    assert dispatch.OPS["attention"].decide("cuda", torch.bfloat16, 128).backend == "triton"


# Faults, planted in the source of a kernel: (file, text, what replaces it, what becomes of it).
WAIT = "    acc, weights = warpgroup_mma_wait(0, deps=(acc, weights))\n"
FREE = "    mbarrier.arrive(v_empty.index(before))\n"
STEP_WAIT = "    dv, dk, left, right = warpgroup_mma_wait(0, deps=(dv, dk, left, right))\n"
STEP_FREE = "    mbarrier.arrive(empty.index(slot))\n"
KEYS_WAIT = "    dq, left = warpgroup_mma_wait(0, deps=(dq, left))\n"
KEYS_FREE = "    mbarrier.arrive(k_empty.index(slot))\n"
CLEARED = "    tile.store(gl.where(keep[:, None], values, gl.zeros_like(values)))\n"
TURNED = "    right.store((b * cos + a * sin).to(tile.dtype))\n"
FENCE = "    fence_async_shared()\n"
FAULTS = {
    "no wait for the keys": (
        "forward", "    mbarrier.wait(k_full.index(slot), phase)\n    k_tile", "    k_tile",
        "more arrivals|wrong",
    ),
    "no wait for the queries": (
        "forward", "    mbarrier.wait(q_full, 0)\n", "", "copies that nobody waited for",
    ),
    "values freed before they are read": ("forward", WAIT + FREE, FREE + WAIT, "wrong results"),
    "the producer waits for the other parity": (
        "forward", "free = (i // STAGES + 1) & 1", "free = (i // STAGES) & 1", "nobody can go on: .*_produce",
    ),
    "a consumer waits for the other parity": (
        "forward", "phase = (i // STAGES) & 1\n    before", "phase = (i // STAGES + 1) & 1\n    before",
        "more arrivals|wrong",
    ),
    "a slot is freed by one consumer for two": (
        "forward", "mbarrier.init(k_empty.index(slot), count=CONSUMERS)",
        "mbarrier.init(k_empty.index(slot), count=1)", "more arrivals|wrong|nobody",
    ),
    "fewer bytes are announced": (
        "forward", "mbarrier.expect(q_full, CONSUMERS *", "mbarrier.expect(q_full, ",
        "nobody can go on|nobody waited",
    ),
    "masked values are not cleared": (
        "tiles", "        mbarrier.wait(cleared.index(slot), phase)\n",
        "        mbarrier.wait(full.index(slot), phase)\n", "wrong results|without fence",
    ),
    "a store without a fence": ("tiles", CLEARED + FENCE, CLEARED, "without fence_async_shared"),
    "barriers without a fence": (
        "forward", FENCE + "\n    lse +=", "    lse +=", "before it is initialised and fenced",
    ),
    "scores taken under way": (
        "forward", "warpgroup_mma_wait(1, deps=(scores,))", "warpgroup_mma_wait(2, deps=(scores,))",
        "leaves one of its deps under way",
    ),
    "a register operand not kept": (
        "forward", WAIT + FREE, WAIT.replace("acc, weights", "acc", 1).replace("weights)", ")") + FREE,
        "must be among the deps",
    ),
    "no wait for the output": ("forward", "    tma.store_wait(0)\n", "", "ends without tma.store_wait"),
    "gradients: a step freed before it is read": (
        "key_gradient", STEP_WAIT + STEP_FREE, STEP_FREE + STEP_WAIT, "wrong results",
    ),
    "gradients: no wait for those of the output": (
        "key_gradient", "    mbarrier.wait(do_full.index(slot), phase)\n", "",
        "more arrivals|wrong|nobody waited",
    ),
    "turned queries without a fence": ("tiles", TURNED + FENCE, TURNED, "without fence_async_shared"),
    "gradients: turned queries overwritten before they left": (
        "query_gradient", "    if ROTARY:\n        tma.store_wait(0)\n", "", "wrong results",
    ),
    "gradients: keys freed before they are read": (
        "query_gradient", KEYS_WAIT + KEYS_FREE, KEYS_FREE + KEYS_WAIT, "wrong results",
    ),
}  # fmt: skip


def _results():
    """Output and gradients over five tiles of keys, some of them masked and NaN, with rotary embeddings."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 190, 64, generator=generator).half()
    k, v = (torch.randn(1, 1, 600, 64, generator=generator).half() for _ in range(2))
    mask = torch.arange(600)[None] % 200 > 20
    v[0, 0, ~mask[0]] = float("nan")
    angle = torch.randn(600, 32, generator=generator)
    tables = (angle[410:].cos(), angle[410:].sin(), angle.cos(), angle.sin())
    options = (False, mask, 0.125, True, None, None, *tables)
    out, lse = kernel_gluon.forward(q, k, v, *options)
    return out, lse, *kernel_gluon.backward(q.flip(2), None, q, k, v, out, lse, *options)


@pytest.fixture(scope="module")
def healthy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_gluon, "launch", language.launch)
        found = _results()
    assert all(x.isfinite().all() for x in found)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(emulated, healthy, monkeypatch, tmp_path, fault):
    which, old, new, becomes = FAULTS[fault]
    rooms = {name: Path(gluon_forward.__file__).with_name(f"gluon_{name}.py").read_text() for name in ROOMS}
    assert rooms[which].count(old) == 1
    rooms[which] = rooms[which].replace(old, new)
    for name, source in rooms.items():  # the tiles first: the others take them from there
        copy = tmp_path / f"broken_{name}.py"
        copy.write_text(source.replace("rlhf_kernels.ops.attention.gluon_tiles", "broken_tiles"))
        spec = importlib.util.spec_from_file_location(copy.stem, copy)
        broken = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, copy.stem, broken)
        spec.loader.exec_module(broken)
        if name != "tiles":
            monkeypatch.setattr(kernel_gluon, f"{name}_kernel", getattr(broken, f"{name}_kernel"))
    try:
        same = all(map(torch.equal, _results(), healthy))
        outcome = "unnoticed" if same else "wrong results"
    except Fault as error:
        outcome = str(error)
    assert re.search(becomes, outcome), outcome
