#!/usr/bin/env bash
# Builds, tests, checks, tunes and times on a GPU with the python3 found here: no pip, no network, under 10 minutes.
# Results go to $OUT (default: benchmarks/results/<date>), at most 8 files. Without a GPU the CUDA steps are
# skipped by name and the rest is rehearsed.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/$(date +%Y-%m-%d)}
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
failed=()
cuda=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')

step() { # name, needs a GPU (0|1), seconds, command...
  local name=$1 needs=$2 limit=$3 start=$SECONDS
  shift 3
  if [ "$needs" = 1 ] && [ "$cuda" != 1 ]; then
    echo "== $name: skipped, no CUDA device (would run: $*)"
    return
  fi
  echo "== $name"
  if ! timeout "$limit" "$@"; then failed+=("$name"); echo "== $name FAILED"; fi
  echo "== $name: $((SECONDS - start)) s"
}

device=cpu
[ "$cuda" = 1 ] && device=cuda
kernels="$PYTHON -m rlhf_kernels"
step build 0 180 env RLHF_KERNELS_REQUIRE_EXT=1 "$PYTHON" setup.py -q build_ext --inplace
step doctor 0 60 $kernels doctor
step tests 1 200 sh -c "'$PYTHON' -m pytest -q -n 6 tests/kernels/test_gpu.py 2>&1 | tee '$OUT/tests.txt' | tail -n 25"
step check 0 120 $kernels check --device $device --tier smoke --out "$OUT/check.jsonl" --quiet
step tune 1 160 $kernels tune --device $device --out "$OUT/tune.jsonl" --quiet
step bench 1 150 $kernels bench --device $device --tier typical --seconds 0.3 --out "$OUT/bench.jsonl"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps that this machine can run have passed; results in $OUT"
