#!/usr/bin/env bash
# Builds, tests, checks, tunes and times on a GPU with the python3 found here: no pip, no network, under 10 minutes.
#   bash tools/gpu.sh [all | bars]
# `bars` builds and times what the kernels are measured by on a GPU: large shapes, beside PyTorch's own attentions.
# Results go to $OUT (default: benchmarks/results/<date>), at most 8 files. Without a GPU the CUDA steps are
# skipped by name and the rest is rehearsed.
set -uo pipefail
part=${1:-all}
if [ "$part" != all ] && [ "$part" != bars ]; then
  echo "gpu.sh: '$part' is none of all, bars"
  exit 2
fi
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
  if ! timeout -k 10 "$limit" bash -c '"$@"' - "$@"; then failed+=("$name"); echo "== $name FAILED"; fi
  echo "== $name: $((SECONDS - start)) s"
}

device=cpu
[ "$cuda" = 1 ] && device=cuda
kernels="$PYTHON -m rlhf_kernels"
export PYTHON OUT
tests() { # file for the output, arguments of pytest
  set -o pipefail
  "$PYTHON" -m pytest -q tests/kernels/test_gpu.py "${@:2}" 2>&1 | tee "$OUT/$1.txt" | tail -n 25
}
export -f tests

all() {
  step doctor 0 60 $kernels doctor
  # Gluon's kernels wait for each other by barriers, and a mistake in one is a wait without end: they run apart and first.
  step gluon 1 90 tests gluon -n 2 -k gluon
  local tuned=() timed=()
  if [[ " ${failed[*]} " == *" gluon "* ]]; then
    echo "Gluon's kernels failed: nothing below runs them"
    tuned=(--backend native,triton) timed=(--without gluon)
  fi
  step tests 1 200 tests tests -n 6 -k "not gluon"
  step check 0 120 $kernels check --device $device --tier smoke --out "$OUT/check.jsonl" --quiet
  step tune 1 160 $kernels tune --device $device --out "$OUT/tune.jsonl" --quiet "${tuned[@]}"
  step bench 1 150 $kernels bench --device $device --tier typical --seconds 0.3 --out "$OUT/bench.jsonl" "${timed[@]}"
}

bars() {
  row() { step "$1" 1 "$2" $kernels bench "$1" --device cuda --dtype bfloat16 --seconds 0.3 --out "$OUT/bars.jsonl" "${@:3}"; }
  row attention 150 --case llama8b_4096,llama8b_8192,palm_xpos_2048
  row rotary 20 --case 'many_*'
  row swiglu 20 --case 'large_*'
  row layer_norm 20 --case 'large_*'
  row rms_norm 20 --case 'large_*'
  row logprob 30 --case 'qwen_*'
  row gae 30 --dtype float32 --case ppo_128x1024,large_8192x2048
  row linear_logprob 90 --case mistral_8192x4096x131072
  row decode_attention 30 --case palm_64x32768
}

step build 0 180 env RLHF_KERNELS_REQUIRE_EXT=1 RLHF_KERNELS_LEVELS=here "$PYTHON" setup.py -q build_ext --inplace
"$part"
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps that this machine can run have passed; results in $OUT"
