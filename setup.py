"""Builds the native kernels with ninja: `pip install --no-build-isolation -e .`

Three extensions, none of them required:
  _C       CPU kernels as torch operators (stable ABI: one binary for torch 2.11 and later)
  _C_cuda  CUDA kernels for the same operators; built where nvcc and a CUDA torch are (or FORCE_CUDA=1)
  _host    the torch-free row kernels on NumPy arrays (pybind11)

A room of csrc/ is found by its files: <family>/ops.cpp, <family>/cuda.cu, <family>/host.cpp; a room of
several ops may have more of them, such as <family>/<op>_ops.cpp.
Environment: RLHF_KERNELS_NO_EXT=1 builds nothing; RLHF_KERNELS_LEVELS=here leaves AVX-512 out where this
processor has none; FORCE_CUDA=1; TORCH_CUDA_ARCH_LIST; MAX_JOBS.
What was left out, and why, is written to rlhf_kernels/_build.json, which `rlhf-kernels doctor` prints.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).parent.resolve()
CSRC = Path("csrc")
PACKAGE = ROOT / "rlhf_kernels"
FLAGS = runpy.run_path(str(PACKAGE / "_build_flags.py"))  # the guards compile with the same
STABLE_ABI, NVCC_FLAGS = FLAGS["STABLE_ABI"], FLAGS["NVCC_FLAGS"]
CXX_FLAGS = FLAGS["CXX_FLAGS"] + FLAGS["level_flags"](os.environ.get("RLHF_KERNELS_LEVELS") == "here")

skipped: dict[str, str] = {}


def sources(name: str) -> list[str]:
    return sorted(str(path) for path in CSRC.glob(f"*/*{name}"))


def depends() -> list[str]:
    return sorted(str(path) for pattern in ("**/*.h", "**/*.cuh") for path in CSRC.glob(pattern))


def compiler_missing() -> str | None:
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) or shutil.which("c++") or shutil.which("g++"):
        return None
    return f"no C++ compiler ({compiler} is not on PATH): install g++ and run pip install again"


def cuda_missing() -> str | None:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "this torch is a CPU build (torch.version.cuda is None): install a CUDA torch and reinstall"
    if CUDA_HOME is None or not shutil.which("nvcc", path=str(Path(CUDA_HOME) / "bin")):
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME, and reinstall"
    if not os.environ.get("TORCH_CUDA_ARCH_LIST") and not torch.cuda.is_available():
        # Without a GPU and without the list, torch's own flag helper fails on an empty list.
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0a;10.0+PTX"
    return None


def torch_extensions() -> list:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    common = {"include_dirs": [str(ROOT / CSRC)], "py_limited_api": True, "depends": depends()}
    cpu = CppExtension(
        "rlhf_kernels._C",
        ["csrc/module.cpp", *sources("ops.cpp")],
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI, "-DRK_MODULE=_C"]},
        **common,
    )
    extensions = [cpu]
    reason = None if os.environ.get("FORCE_CUDA") == "1" else cuda_missing()
    if reason:
        skipped["_C_cuda"] = reason
    elif sources("cuda.cu"):
        cuda = CUDAExtension(
            "rlhf_kernels._C_cuda",
            ["csrc/module.cpp", *sources("cuda.cu")],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, STABLE_ABI, "-DRK_MODULE=_C_cuda"],
                "nvcc": list(NVCC_FLAGS),
            },
            **common,
        )
        extensions.append(cuda)
    return extensions


def host_extension() -> list:
    try:
        import pybind11
    except ImportError:
        skipped["_host"] = "pybind11 is not installed: pip install pybind11 and reinstall"
        return []
    return [
        Extension(  # not torch's CppExtension, which would link torch
            "rlhf_kernels._host",
            ["csrc/host.cpp", *sources("host.cpp")],
            include_dirs=[str(ROOT / CSRC), pybind11.get_include()],
            extra_compile_args={"cxx": list(CXX_FLAGS)},
            language="c++",
            depends=depends(),
        )
    ]


def extensions() -> tuple[list, dict]:
    """The extension list and the build commands; empty, with the reason kept, where nothing can be built."""
    reason = "RLHF_KERNELS_NO_EXT=1 was set" if os.environ.get("RLHF_KERNELS_NO_EXT") == "1" else None
    reason = reason or compiler_missing()
    if reason is None:
        try:
            from torch.utils.cpp_extension import BuildExtension
        except ImportError:
            reason = "torch was not importable: install torch, then pip install --no-build-isolation -e ."
    if reason:
        skipped.update(dict.fromkeys(("_C", "_C_cuda", "_host"), reason))
        return [], {}

    class Build(BuildExtension):
        """A failing compiler must not fail the installation: the reason is kept and shown by `doctor`."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # torch raises bare RuntimeErrors for compiler failures
                if os.environ.get("RLHF_KERNELS_REQUIRE_EXT") == "1":
                    raise
                skipped["_C"] = f"the build failed: {error}"
                print(f"warning: rlhf_kernels is installed without native kernels: {error}", file=sys.stderr)
                self.extensions = []
            write_build_record()

    return [*torch_extensions(), *host_extension()], {"build_ext": Build}


def write_build_record() -> None:
    record = PACKAGE / "_build.json"
    aside = record.with_suffix(".tmp")
    aside.write_text(json.dumps({"skipped": skipped}, indent=1) + "\n")
    aside.replace(record)


ext_modules, commands = extensions()
write_build_record()
setup(ext_modules=ext_modules, cmdclass=commands)
