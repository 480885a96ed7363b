"""What a target offers, and what machine code says: registers, spills, matrix instructions, width of loads.

Registers and SASS are read with cuobjdump and nvdisasm, which Triton's package brings along; AMD's assembly
carries its own numbers.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import re
import struct
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Reading(NamedTuple):
    """What machine code says: figures for the budget, and notes to show beside them."""

    figures: dict[str, int]
    notes: dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """One target's limits. A warp is a wave on AMD, a multiprocessor a compute unit.

    Attributes:
        matrix: the matrix instruction that a kernel must show to run at full speed here.
        pattern: what its opcodes look like.
        registers: 32-bit registers of a multiprocessor (of the four SIMDs together on AMD).
        register_unit: registers of one thread are handed out in multiples of this.
        warp: threads of a warp.
        warps: most resident warps of a multiprocessor.
        shared: bytes of shared memory of a multiprocessor.
        shared_block: most bytes that one block may have.
        shared_reserved: bytes that the system takes of every block.
    """

    matrix: str
    pattern: str
    registers: int
    register_unit: int
    warp: int
    warps: int
    shared: int
    shared_block: int
    shared_reserved: int


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD CDNA 3 ISA, 3.6.4 and 11.
MACHINES = {
    "sm_80": Machine("HMMA", "HMMA", 65536, 8, 32, 64, 167936, 166912, 1024),
    "sm_90": Machine("HGMMA", "HGMMA", 65536, 8, 32, 64, 233472, 232448, 1024),
    "sm_100": Machine("UTCHMMA", "UTC[A-Z]*MMA", 65536, 8, 32, 64, 233472, 232448, 1024),
    "gfx942": Machine("MFMA", "V_S?MFMAC?", 131072, 8, 64, 32, 65536, 65536, 0),
}
_BLOCKS = 32  # most resident blocks of a multiprocessor

_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_MATRIX = re.compile(r"\w*MMA|V_S?MFMAC?")
_SASS_LOAD = re.compile(r"LDG|LD\.E|LDGSTS")
_SASS_WIDTH = re.compile(r"\.(128|64|[US]16|[US]8)(?:\.|$)")
_AMD = re.compile(r"^\s+([a-z]\w+)\s", re.MULTILINE)
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_\w*?(dwordx4|dwordx3|dwordx2|dword|[us]?short|[us]byte)")
_AMD_WIDTH = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}


def nvidia_tools() -> Path | None:
    """Where Triton keeps cuobjdump and nvdisasm; None where there is no Triton, or it came without them."""
    found = importlib.util.find_spec("triton")
    tools = Path(found.origin).parent / "backends/nvidia/bin" if found else None
    return tools if tools and (tools / "nvdisasm").exists() else None


def occupancy(target: str, registers: int, shared: int, warps: int) -> float:
    """Share of the resident warps that registers and shared memory of one block of `warps` warps allow."""
    m = MACHINES[target]
    per_thread = max(1, -(-registers // m.register_unit)) * m.register_unit
    resident = m.registers // (per_thread * m.warp)  # warps
    resident -= resident % 4  # warps are spread over four schedulers
    blocks = min(_BLOCKS, m.warps // warps, resident // warps, m.shared // max(1, shared + m.shared_reserved))
    return blocks * warps / m.warps


def read_cubins(cubins: Sequence[bytes], target: str, tools: Path, scratch: Path) -> list[Reading]:
    """Figures and notes of kernels for one NVIDIA target. Local memory counts as spilled.

    One disassembly for all: nvdisasm takes a quarter of a second to start.

    Raises:
        RuntimeError: the tools fail.
    """
    codes = [_code(cubin) for cubin in cubins]
    raw, ends = scratch / "code.bin", list(itertools.accumulate(map(len, codes)))
    raw.write_bytes(b"".join(codes))
    opcodes: list[list[str]] = [[] for _ in cubins]
    for address, opcode in _SASS.findall(
        _run(tools / "nvdisasm", "--binary", target.upper().replace("_", ""), raw)
    ):
        opcodes[bisect.bisect_right(ends, int(address, 16))].append(opcode)
    return [_read_sass(own, cubin, target, tools, scratch) for own, cubin in zip(opcodes, cubins)]


def _read_sass(opcodes: list[str], cubin: bytes, target: str, tools: Path, scratch: Path) -> Reading:
    file = scratch / "kernel.cubin"
    file.write_bytes(cubin)
    text = _run(tools / "cuobjdump", "-res-usage", file)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None or not opcodes:
        raise RuntimeError(f"cuobjdump and nvdisasm did not understand a kernel for {target}: {text[:200]!r}")
    families = Counter(opcode.split(".")[0] for opcode in opcodes)
    loads = Counter(_sass_width(opcode) for opcode in opcodes if _SASS_LOAD.match(opcode))
    own = {"registers": int(usage[1]), "spills": families["STL"] + families["LDL"]}
    notes = {"bulk_loads": families["UTMALDG"], "stack": int(usage[2])}
    return _reading(families, loads, own, notes)


def _code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections .text.<kernel>."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * i) for i in range(count)]
    starts = [sections[names][4] + name for name, *_ in sections]
    found = [s for s, at in zip(sections, starts) if cubin.startswith(b".text.", at)]
    return b"".join(cubin[offset : offset + size] for *_, offset, size in found)


def read_amdgcn(assembly: str) -> Reading:
    """Figures and notes of AMD assembly. Spilled SGPRs go to lanes of VGPRs, not to memory: noted only."""
    opcodes = _AMD.findall(assembly)
    families = Counter(opcode.split("_")[0].upper() for opcode in opcodes)
    families.update("_".join(opcode.upper().split("_")[:2]) for opcode in opcodes)
    widths = (_AMD_LOAD.match(opcode) for opcode in opcodes)
    loads = Counter(_AMD_WIDTH.get(found[1], 8 if "byte" in found[1] else 16) for found in widths if found)

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    scratch = number("private_segment_fixed_size")
    own = {"registers": number("vgpr_count"), "spills": max(number("vgpr_spill_count"), scratch // 4)}
    notes = {"sgpr_spills": number("sgpr_spill_count"), "stack": scratch}
    return _reading(families, loads, own, notes)


def faults(target: str, reading: Reading, tensor_core: bool = False) -> Iterable[str]:
    """What no budget excuses in a configuration that may be chosen: one sentence each.

    Args:
        target: one of MACHINES.
        reading: with `shared` among the figures; `serialized` among the notes where ptxas said so.
        tensor_core: whether the target's own matrix instruction must be there.
    """
    figures, notes = reading
    m = MACHINES[target]
    if figures["spills"]:
        yield f"{figures['spills']} spills on {target}: take a smaller tile, more warps or fewer stages"
    if figures["shared"] > m.shared_block:
        yield f"{figures['shared']} bytes of shared memory, {target} has {m.shared_block}: fewer stages"
    if tensor_core and not any(re.fullmatch(m.pattern, name) for name in notes["matrix"]):
        yield f"no {m.matrix} on {target}: that takes 16 bits and, from sm_90 on, a row tile of 64 or more"
    if notes.get("serialized"):
        yield f"ptxas serialised the matrix instructions on {target}: accumulators do not fit in registers"


def _reading(families: Counter, loads: Counter, figures: dict[str, int], notes: dict[str, Any]) -> Reading:
    """Adds matrix instructions of any kind, so that none may creep into float32, and loads by width."""
    matrix = {name: n for name, n in families.items() if _MATRIX.fullmatch(name)}
    narrow = sum(n for width, n in loads.items() if width < 128)
    widths = {str(width): loads[width] for width in sorted(loads, reverse=True)}
    return Reading(
        figures | {"tensor_core": sum(matrix.values()), "narrow_loads": narrow},
        notes | {"matrix": matrix, "loads": widths},
    )


def _sass_width(opcode: str) -> int:
    found = _SASS_WIDTH.search(opcode)
    return int(found[1].lstrip("US")) if found else 32


def _run(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[:300]}")
    return done.stdout
