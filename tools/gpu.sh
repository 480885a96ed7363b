#!/usr/bin/env bash
# Builds, tests, checks, tunes and times on a GPU with the python3 found here: no pip, no network.
#   bash tools/gpu.sh [all | right | fast | bars]
# `right` builds, tests and checks, `fast` builds, tunes and times, each in under 10 minutes; `all` is both, and
# leaves out of `fast` what was not right. `bars` builds and times what the kernels are measured by on a GPU: large
# shapes, beside PyTorch's own attentions. Results go to $OUT (default: benchmarks/results/<date>), at most 8
# files. Without a GPU the CUDA steps are skipped by name and the rest is rehearsed.
set -uo pipefail
part=${1:-all}
case $part in all | right | fast | bars) ;; *)
  echo "gpu.sh: '$part' is none of all, right, fast, bars"
  exit 2
  ;;
esac
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/$(date +%Y-%m-%d)}
export PYTHONUNBUFFERED=1 TRITON_INTERPRET=0 PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"
failed=()
cuda=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))')
device=cpu
[ "$cuda" = 1 ] && device=cuda
kernels="$PYTHON -m rlhf_kernels"

step() { # name, needs a GPU (0|1), seconds, command...
  local name=$1 needs=$2 limit=$3 start=$SECONDS
  shift 3
  if [ "$needs" = 1 ] && [ "$cuda" != 1 ]; then
    echo "== $name: skipped, no CUDA device (would run: $*)"
    return
  fi
  echo "== $name"
  # An interrupt, so that what is cut short still sums up what it has done.
  if ! timeout -s INT -k 10 "$limit" "$@"; then failed+=("$name"); echo "== $name FAILED"; fi
  echo "== $name: $((SECONDS - start)) s"
}

# One test after the other into a file, so that one which never ends is known by what stands before it.
# Contiguous shares: what one test had compiled serves its neighbours.
workers=$(nproc)
[ "$workers" -gt 12 ] && workers=12
tests() { # name, seconds, arguments of pytest
  step "$1" 1 "$2" bash -c 'exec "${@:2}" >"$1" 2>&1' - "$OUT/$1.txt" \
    "$PYTHON" -m pytest -v --tb=short tests/kernels/test_gpu.py -n "$workers" --dist worksteal "${@:3}"
  [ -f "$OUT/$1.txt" ] && tail -n 25 "$OUT/$1.txt"
}

right() {
  step doctor 0 60 $kernels doctor
  # Gluon's kernels wait for each other by barriers, and a mistake in one is a wait without end: they run apart and first.
  tests gluon 100 -k gluon
  tests tests 200 -k "not gluon" -m "not slow"
  step check 0 90 $kernels check --device $device --tier smoke --out "$OUT/check.jsonl" --quiet
}

fast() {
  local tuned=triton,gluon without=torch.compile
  if [[ " ${failed[*]} " == *" gluon "* ]]; then
    echo "Gluon's kernels failed: nothing below runs them"
    tuned=triton without=torch.compile,gluon
  fi
  step tune 1 240 $kernels tune --device $device --backend $tuned --seconds 0.3 --out "$OUT/tune.jsonl" --quiet
  step bench 1 180 $kernels bench --device $device --tier typical --seconds 0.3 --without $without --out "$OUT/bench.jsonl"
}

bars() {
  row() { step "$1" 1 "$2" $kernels bench "$1" --device cuda --dtype bfloat16 --seconds 0.3 --out "$OUT/bars.jsonl" "${@:3}"; }
  row attention 120 --case llama8b_4096,llama8b_8192,palm_xpos_2048 --without torch.compile
  row gae 30 --dtype float32 --case ppo_128x1024,large_8192x2048 --without torch.compile
  row decode_attention 40 --case palm_64x32768 --without torch.compile
  row rotary 40 --case 'many_*'
  row swiglu 40 --case 'large_*'
  row layer_norm 40 --case 'large_*'
  row rms_norm 40 --case 'large_*'
  row linear_logprob 80 --case mistral_8192x4096x131072 --without torch.compile
  row logprob 90 --case 'qwen_*' --without torch.compile
}

step build 0 150 env RLHF_KERNELS_REQUIRE_EXT=1 RLHF_KERNELS_LEVELS=here "$PYTHON" setup.py -q build_ext --inplace
case $part in
  all) right; fast ;;
  *) "$part" ;;
esac
rm -f "$OUT"/.*.lock
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "all steps that this machine can run have passed; results in $OUT"
