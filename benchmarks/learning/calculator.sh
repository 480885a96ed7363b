#!/usr/bin/env bash
# SFT, then PPO, on products such as 243*3=: the last part of `make demo`, and the README's learning figures.
#   bash benchmarks/learning/calculator.sh FOLDER SEED...
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$1
shift
for seed in "$@"; do
  palm-rlhf sft --task calculator --out "$folder/sft-$seed" --seed "$seed" \
    --dim 96 --depth 2 --ff-mult 2 --steps 200 --batch 128 --lr 5e-3 --warmup 50 --final-lr 0 --eval-every 100
  palm-rlhf train ppo --task calculator --model "$folder/sft-$seed" --out "$folder/ppo-$seed" --seed "$seed" \
    --no-lora --steps 120 --prompts 256 --minibatch 64 --epochs 2 --policy-lr 8e-4 --critic-lr 1e-3 --warmup 10 \
    --critic-warmup 3 --kl-coef 0.005 --value-coef 0.5 --eval-every 20
done
