"""Tables on a terminal: at any width no name and no number is broken, headings have lines of their own."""

import re
import sys

import pytest

from rlhf_kernels.engine import show, table
from rlhf_kernels.engine.row import Row
from rlhf_kernels.engine.spec import load_specs

pytestmark = pytest.mark.skipif(table.Console is None, reason="rich is not installed")
NAMES = ("op", "implementation", "case", ">time", ">of allowed error", "why")
ROWS = [
    ["selective_log_softmax", "C++ row loop", "smoke_general_8x200 float32", "1.25 ms", "13%", ""],
    ["gae", "native", "one_element bfloat16", "479 us", "1000%+", "noise alone makes up to 10 %, so nothing"],
]


@pytest.fixture
def drawn(monkeypatch, capsys):
    """What a function prints on a terminal of so many columns, by lines."""

    def draw(columns, function, *args):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        function(*args)
        out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
        return [line.rstrip() for line in out.splitlines()]

    return draw


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_no_name_and_no_number_is_broken(drawn, columns):
    lines = drawn(columns, table.print_table, NAMES, ROWS, "a title")
    assert lines[0] == "a title"
    assert max(map(len, lines)) <= columns
    words = set(" ".join(lines).split())
    assert {word for row in ROWS for cell in row for word in cell.split()} <= words
    for figure in ("1.25 ms", "479 us", "1000%+"):
        assert any(figure in line for line in lines)
    texts = [line for line in lines if "noise alone" in line]
    assert texts, "a text is not squeezed into a column of words"


def test_headings_stand_on_lines_of_their_own(drawn):
    timed = {
        "median_us": 1520.0,
        "ci_us": (1500.0, 1540.0),
        "speedup": 1.0,
        "gbps": 0.0185,
        "peak_bytes": 640,
    }
    rows = [
        Row("gae", impl, "smoke_general_8x200", "bfloat16", "forward+backward", "cpu", error=1e-6, **timed)
        for impl in ("torch", "torch.compile")
    ]
    heading = "smoke_general_8x200 bfloat16 fwd+bwd"
    for columns in (60, 80, 120):
        lines = drawn(columns, show.bench, rows, load_specs())
        assert lines.count(heading) == 1
        assert lines[lines.index(heading) + 1].startswith("  torch")
    assert next(line for line in lines if "torch.compile" in line).split()[1:3] == ["1.52", "ms"]


def test_a_failed_row_says_why_below_it_where_it_is_narrow(drawn):
    failed = Row("gae", "native", "smoke_8x200", "float32", "forward", "cpu").failed("incorrect", "it is off")
    lines = drawn(50, show.check, [failed], False)
    at = lines.index("gae  native  smoke_8x200  float32  fwd  incorrect")
    assert lines[at + 1] == "    it is off"


def test_markdown_keeps_a_heading_in_its_first_column(capsys):
    table.print_table(("a", ">b"), [["heading"], ["x", "1"]])
    assert capsys.readouterr().out.splitlines()[2:] == ["| heading |     |", "| x       |   1 |", ""]
