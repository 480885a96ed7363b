"""Prints as JSON which Triton kernels do not lower for the arguments that cases launch them with.

A launch on a GPU makes a constant of an argument that is 1 and tells multiples of 16; the interpreter does
neither, and the budgets compile one signature. Here Triton's own binder says what a launch would compile, and
its front end lowers that to MLIR. A process of its own, since the interpreter cannot share one.
"""

import contextlib
import functools
import json
import os

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from rlhf_kernels.engine.check import run
from rlhf_kernels.engine.spec import as_outputs, load_specs
from rlhf_kernels.ops.attention import triton_config
from rlhf_kernels.runtime import dispatch

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)
seen, failed = set(), []


@functools.cache
def binder(kernel):
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def lower(kernel, *args, grid, warmup, **meta):
    """In place of JITFunction.run."""
    bound, specialization, options = binder(kernel)(*args, debug=False, **meta)
    ones = tuple(
        name
        for name, (kind, value), parameter in zip(bound, specialization, kernel.params)
        if kind == "constexpr" and not parameter.is_constexpr
    )
    # Without such a constant, and in other dtypes, it is what the budgets compile.
    key = (kernel.fn, ones)
    if not ones or key in seen:
        return
    seen.add(key)
    options, signature, constants, attributes = kernel._pack_args(
        BACKEND, {"debug": False, **meta}, bound, specialization, options
    )
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    source = ASTSource(kernel, signature, constants, attributes)
    try:
        codegen, modules = BACKEND.get_codegen_implementation(options), BACKEND.get_module_map()
        source.make_ir(TARGET, options, codegen, modules, context)
    except Exception as error:  # whatever Triton raises
        while error.__cause__ is not None:
            error = error.__cause__
        failed.append(
            {"kernel": kernel.fn.__name__, "constants": ones, "error": f"{type(error).__name__}: {error}"}
        )


def launch_all(spec, case, dtype):
    """Forward and backward of a case, whose kernels compute nothing here."""
    inputs = spec.make(case, dtype, torch.Generator().manual_seed(0), torch.device("cpu"))
    with dispatch.backend(f"{spec.op.name}=triton", strict=True), contextlib.suppress(dispatch.BackendError):
        outputs = as_outputs(spec.function(**inputs.args))
        run(spec.function, inputs, [torch.zeros(o.shape, dtype=o.dtype) for o in outputs])


def main():
    torch.set_num_threads(1)
    JITFunction.run = lower
    dispatch.unavailable = lambda name, device: None
    triton_config.target_of = lambda device: "sm_90"
    for spec in load_specs().values():
        for case in spec.cases if "triton" in spec.op.backends("cuda") else ():
            for dtype in case.dtypes[:1] if case.tier in ("smoke", "awkward") else ():
                if not spec.op.unsupported("triton", "cuda", dtype, case.sizes.get("D")):
                    launch_all(spec, case, dtype)
    print(json.dumps({"lowered": len(seen), "failed": failed}))


main()
