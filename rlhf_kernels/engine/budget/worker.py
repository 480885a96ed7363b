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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_kernels.engine.budget import machine
from rlhf_kernels.engine.budget.measured import Measured, digest, recall, remember
from rlhf_kernels.engine.spec import KernelBuild, OpSpec, load_specs


@dataclass
class Compiled:
    """A kernel on its way through the compiler and the disassembler.

    Attributes:
        one: which it is.
        build: its declaration.
        key: what its answer is kept under.
        answer: figures and notes, once they are known.
        code: cubin or AMD assembly, until then.
        facts: what the compiler says besides.
    """

    one: Measured
    build: KernelBuild
    key: str
    answer: dict[str, Any] | None
    code: bytes | str = b""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def measured(self) -> Measured:
        """The row of a kernel whose answer is known."""
        if self.answer["notes"].get("recorded"):  # what had a fault was not written down
            return dataclasses.replace(self.one, **self.answer)
        reading = machine.Reading(**self.answer)
        found = machine.faults(self.one.target, reading, self.build.tensor_core)
        return dataclasses.replace(self.one, **self.answer, faults=tuple(found))


def main() -> None:
    """Reads the request: package, ops, targets, share (which, of how many), skip, recorded."""
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes elsewhere

    def tell(what: str, one: Measured) -> None:
        print(json.dumps({what: dataclasses.asdict(one)}), file=answers)

    which, of = request["share"]
    pending = []
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
            tell("start", one)
            try:
                found = compile_one(one, build, request["recorded"])
            except Exception as error:  # whatever a compiler raises belongs in this kernel's row
                first = next(iter(str(error).strip().splitlines()), "")
                tell(
                    "done",
                    dataclasses.replace(one, status="error", reason=f"{type(error).__name__}: {first}"),
                )
                continue
            if found.answer:
                tell("done", found.measured())
            else:
                pending.append(found)
        print(json.dumps({"read": len(pending)}), file=answers)  # from here on no kernel is to blame
        for one in read(pending, Path(scratch)):
            tell("done", one)


def _builds(request: dict[str, Any]) -> Iterator[tuple[OpSpec, KernelBuild]]:
    for spec in load_specs(request["package"]).values():
        if spec.name in request["ops"]:
            for build in spec.kernels():
                if build.target in request["targets"]:
                    yield spec, build


def compile_one(one: Measured, build: KernelBuild, recorded: Mapping[str, Mapping[str, Any]]) -> Compiled:
    """Asks what is recorded of this source, then the cache, then the compiler."""
    import triton
    from triton.backends.compiler import GPUTarget

    source = source_of(build)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages}
    readers = (Path(__file__), Path(machine.__file__))
    key = digest(source.hash(), build.target, options, triton.__version__, *readers)
    one = dataclasses.replace(one, source=key[:16])
    if key[:16] in recorded:
        return Compiled(one, build, key, {"figures": recorded[key[:16]], "notes": {"recorded": True}})
    found = Compiled(one, build, key, recall(key))
    if found.answer is None:
        amd = build.target.startswith("gfx")
        number = build.target.removeprefix("sm_")
        target = GPUTarget("hip", build.target, 64) if amd else GPUTarget("cuda", int(number), 32)
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            made = triton.compile(source, target=target, options=options)
        found.code = made.asm["amdgcn" if amd else "cubin"]
        found.facts = {"shared": made.metadata.shared, "warps": made.metadata.num_warps}
        found.facts["serialized"] = "serialized" in log.getvalue()
    return found


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


def read(compiled: Sequence[Compiled], scratch: Path) -> Iterator[Measured]:
    """Disassembles what was compiled, target by target, and keeps the answers."""
    tools = machine.nvidia_tools()
    for target in sorted({c.one.target for c in compiled}):
        several = [c for c in compiled if c.one.target == target]
        if target.startswith("gfx"):
            readings = [machine.read_amdgcn(c.code) for c in several]
        else:
            readings = machine.read_cubins([c.code for c in several], target, tools, scratch)
        for one, (figures, notes) in zip(several, readings):
            shared, warps = one.facts["shared"], one.facts["warps"]
            share = machine.occupancy(target, figures["registers"], shared, warps)
            notes |= {"occupancy": round(share, 4), "warps": warps, "serialized": one.facts["serialized"]}
            one.answer = {"figures": figures | {"shared": shared}, "notes": notes}
            remember(one.key, one.answer)
            yield one.measured()


if __name__ == "__main__":
    main()
