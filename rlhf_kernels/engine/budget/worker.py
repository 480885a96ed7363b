"""Compiles a share of the Triton kernels, one JSON line each: `python -m rlhf_kernels.engine.budget.worker`.

A process of its own, because the interpreter cannot share one with the compiler and because some mistakes in
a Gluon kernel abort the compiler: the line that announces a kernel tells the parent which one it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget import machine
from rlhf_kernels.engine.budget.measured import Measured, digest, recall, remember
from rlhf_kernels.engine.spec import KernelBuild, OpSpec, load_specs


def main() -> None:
    """Reads the request from standard input: package, ops, targets, share (which, of how many), skip."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    which, of = request["share"]
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {
            "TRITON_CACHE_DIR": scratch,
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_DUMP_PTXAS_LOG": "1",
        }
        for index, (spec, build) in enumerate(_builds(request)):
            one = Measured(spec.family, spec.name, "triton", build.name, build.target)
            if index % of != which or one.key in request["skip"]:
                continue
            print(json.dumps({"start": dataclasses.asdict(one)}), file=answers)
            one = measure(one, build, Path(scratch))
            print(json.dumps({"done": dataclasses.asdict(one)}), file=answers)


def _builds(request: dict[str, Any]) -> Iterator[tuple[OpSpec, KernelBuild]]:
    for spec in load_specs(request["package"]).values():
        if spec.name in request["ops"]:
            for build in spec.kernels():
                if build.target in request["targets"]:
                    yield spec, build


def measure(one: Measured, build: KernelBuild, scratch: Path) -> Measured:
    """`one` with its figures, from the cache or the compiler; a failure becomes its reason."""
    import triton

    try:
        source = source_of(build)
        options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
        readers = (Path(__file__), Path(machine.__file__))
        key = digest(source.hash(), build.target, options, triton.__version__, *readers)
        answer = recall(key)
        if answer is None:
            answer = _compile(source, build.target, options, scratch)
            remember(key, answer)
    except Exception as error:  # whatever a compiler raises belongs in this kernel's row
        first = next(iter(str(error).strip().splitlines()), "")
        return dataclasses.replace(one, status="error", reason=f"{type(error).__name__}: {first}")
    figures, notes = answer["figures"], answer["notes"]
    found = machine.faults(build.target, figures, build.tensor_core, notes["serialized"])
    return dataclasses.replace(one, figures=figures, notes=notes, faults=tuple(found))


def source_of(build: KernelBuild) -> Any:
    """What triton.compile takes; ValueError where the declaration does not fit the kernel's arguments."""
    from triton.compiler import ASTSource

    if build.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource

    names = build.kernel.arg_names
    declared = [*build.signature, *build.constants]
    if sorted(declared) != sorted(names):
        odd = set(declared) ^ set(names)
        raise ValueError(
            f"{build.name} declares other arguments than the kernel has: {', '.join(sorted(odd))}"
        )
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in build.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    return ASTSource(build.kernel, signature, constants, attributes)


def _compile(source: Any, target: str, options: dict[str, Any], scratch: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    amd = target.startswith("gfx")
    goal = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=goal, options=options)
    if amd:
        figures, notes = machine.read_amdgcn(compiled.asm["amdgcn"], target)
    else:
        cubin = scratch / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        figures, notes = machine.read_cubin(cubin, tools, target)
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    share = machine.occupancy(target, figures["registers"], shared, warps)
    notes |= {"occupancy": round(share, 4), "warps": warps, "serialized": "serialized" in log.getvalue()}
    return {"figures": figures | {"shared": shared}, "notes": notes}


if __name__ == "__main__":
    main()
