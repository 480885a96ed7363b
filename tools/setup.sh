#!/usr/bin/env bash
# Makes .venv and installs this package with everything its tests and demo need. Idempotent: a second run
# returns at once; changed C++ or CUDA sources are rebuilt.
#
#   PYTHON=python3.12 bash tools/setup.sh     another interpreter
#   TORCH_VERSION=2.12.0 bash tools/setup.sh  another torch
#   RLHF_KERNELS_LEVELS=all bash tools/setup.sh  with AVX-512 kernels where this processor cannot run them
#
# With a GPU, the torch already installed for $PYTHON is used (--system-site-packages) and nothing is downloaded
# that it brings along. Without one, the CPU build of torch is installed.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
TORCH_VERSION=${TORCH_VERSION:-2.13.0}
TRITON_NEWEST=${TRITON_NEWEST:-triton==3.9.0}
venv=.venv
stamp=$venv/.installed
wanted=$(cat pyproject.toml tools/setup.sh tools/constraints.txt | cksum | cut -d' ' -f1)

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

has_gpu_torch() { "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

install_torch_cpu() {
  local pip="$venv/bin/python -m pip install --quiet"
  # The CPU build by its full name where an index or a local folder has it; then PyTorch's own index; then whatever
  # the default index gives (on Linux that is the CUDA build: larger, and just as good).
  $pip "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
    $pip --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH_VERSION+cpu" 2>/dev/null ||
    $pip "torch==$TORCH_VERSION"
}

# With the versions of tools/constraints.txt where this Python can have them.
install_pinned() {
  "$venv/bin/python" -m pip install --quiet -c tools/constraints.txt "$@" || {
    say "not all versions of tools/constraints.txt are to be had for this Python: installing the newest"
    "$venv/bin/python" -m pip install --quiet "$@"
  }
}

# The sources decide whether to build: pip needs seconds to find out that there is nothing to do.
export RLHF_KERNELS_LEVELS=${RLHF_KERNELS_LEVELS:-here}
sources=$({
  find csrc setup.py rlhf_kernels/_build_flags.py -type f 2>/dev/null | LC_ALL=C sort | xargs cat
  echo "$RLHF_KERNELS_LEVELS" && grep -m1 -o avx512vl /proc/cpuinfo || true
} | cksum | cut -d' ' -f1)
build() {
  # A compiler that fails ends it, with what it printed; none at all leaves a build without native kernels.
  RLHF_KERNELS_REQUIRE_EXT=1 PATH="$PWD/$venv/bin:$PATH" \
    "$venv/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
  echo "$sources" >"$venv/.built"
}

if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  if [ ! -x "$venv/bin/python" ]; then
    if has_gpu_torch; then
      say "making $venv on top of the torch of $PYTHON (it sees a GPU)"
      "$PYTHON" -m venv --system-site-packages "$venv"
    else
      say "making $venv"
      "$PYTHON" -m venv "$venv"
    fi
  fi
  if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    say "installing torch $TORCH_VERSION (CPU)"
    install_torch_cpu
  fi
  install_pinned "setuptools>=77" ninja pybind11 "numpy<2.4"
  say "building and installing rlhf-kernels, and what its tests and demo need"
  set -m # a process group of its own, so that Ctrl-C ends the compilers too
  build &
  building=$!
  set +m
  trap 'kill -- -$building 2>/dev/null || true' EXIT
  "$venv/bin/python" -c 'import triton' 2>/dev/null || "$venv/bin/python" -m pip install --quiet triton==3.6.0
  "$venv/bin/python" - >"$venv/packages.txt" <<'PY'
import re
from pathlib import Path
extras = re.findall(r'^(?:cli|report|test|train) = \[(.*)\]$', Path("pyproject.toml").read_text(), re.M)
found = {item for line in extras for item in re.findall(r'"([^"]+)"', line)}
print("\n".join(sorted(found | {"clang-format", "codespell"})))
PY
  install_pinned -r "$venv/packages.txt"
  rm -rf "$venv/triton-newest"
  "$venv/bin/python" -m pip install --quiet --no-deps --target "$venv/triton-newest" "$TRITON_NEWEST" ||
    say "no $TRITON_NEWEST for this interpreter: the interpreter tests run with one Triton only"
  wait $building
  trap - EXIT
elif [ "$(cat "$venv/.built" 2>/dev/null)" != "$sources" ]; then
  say "building rlhf-kernels"
  build
fi
echo "$wanted" >"$stamp"
