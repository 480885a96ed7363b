#!/usr/bin/env bash
# What `make demo` shows: which backends run here, every kernel against its definition, short timings against what
# you would use instead, and a model that learns arithmetic by SFT and PPO. 3 to 7 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

heading "1/4  What runs here: rlhf-kernels doctor"
rlhf-kernels doctor
heading "2/4  Every kernel against its float64 definition: rlhf-kernels check --tier smoke"
rlhf-kernels check --tier smoke
heading "3/4  Against plain PyTorch and torch.compile: rlhf-kernels bench --tier smoke --dtype float32 --seconds 0.1"
echo "Scans along time come last, without torch.compile, which takes 10 to 40 s to compile each of them."
scans="gae token_advantages linear_recurrence discounted_return lambda_return vtrace"
others=$(rlhf-kernels list --json | python -c '
import json, sys
print(*(one["op"] for one in json.load(sys.stdin) if one["op"] not in sys.argv[1:]))' $scans)
short="--tier smoke --dtype float32 --seconds 0.1"
rlhf-kernels bench $others $short
rlhf-kernels bench $scans $short --without torch.compile
heading "4/4  A model learns to multiply: palm-rlhf sft, palm-rlhf train ppo (benchmarks/learning/calculator.sh)"
rm -rf runs/demo
bash benchmarks/learning/calculator.sh auto runs/demo 1
palm-rlhf generate --model runs/demo/ppo-1 --prompt "12*4=" --samples 3
heading "Next: 'rlhf-kernels bench attention', 'make peers' to compare with TRL, verl and others, 'palm-rlhf --help'"
