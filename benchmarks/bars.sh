#!/usr/bin/env bash
# Reproduces the README's figures: float32, one thread, median of 5 processes, interleaved rounds. Needs `make peers`
# for the foreign implementations and an otherwise idle machine. About 15 minutes.
#   bash benchmarks/bars.sh [results.jsonl]
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
out=${1:-benchmarks/results/cpu-$(date +%F).jsonl}
mkdir -p "$(dirname "$out")"

bench() { rlhf-kernels bench --dtype "${dtype:-float32}" --processes 5 --seconds 0.5 --out "$out" "$@"; }

bench gae --case 'ppo_*' --baseline 'Python loop' --impl 'native,Python loop,C++ row loop,OpenRLHF,TRL PPO'
bench gae --case 'large_*' --impl native
bench masked_normalize --case 'ppo_512x1024,whiten_512x1024,large_4096x4096,large_whiten_4096x4096'
bench swiglu --case small_64x512,palm_4096x2048,wide_512x8192
bench rotary --case palm_8x8x512x64
bench layer_norm --case plain_2048x512,residual_2048x512,wide_2048x4096,residual_2048x4096
bench rms_norm --case plain_2048x512,residual_2048x512,wide_2048x4096,residual_2048x4096
bench vtrace --case ppo_64x1024 --impl 'native,TorchRL loop'
bench token_advantages --case ppo_verl_256x1024 --impl native,verl
dtype=bfloat16 bench decode_attention --case palm_1x4096,palm_128_1x4096,palm_1x32768
bench logprob --case gpt2_1024x50257 --impl native,TRL
python benchmarks/linear_products.py
python benchmarks/call_cost.py
