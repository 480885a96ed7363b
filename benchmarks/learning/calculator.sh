#!/usr/bin/env bash
# SFT, then PPO, on products such as 243*3=: the last part of `make demo`, and the README's learning figures.
#   bash benchmarks/learning/calculator.sh products|gsm8k|auto FOLDER SEED...
# gsm8k: the products among GSM8K's calculator steps, from $PALM_RLHF_DATA/gsm8k/train.jsonl or .jsonl.gz (default:
# ../shared/data); auto: these where the file is, else products made up.
set -euo pipefail
cd "$(dirname "$0")/../.."
source=$1 folder=$2
shift 2

found=
for file in "${PALM_RLHF_DATA:-../shared/data}"/gsm8k/train.jsonl{,.gz}; do
  [ -e "$file" ] && found=$file
done
case $source in
  products) problems=(--task calculator) rollouts=120 ;;
  gsm8k | auto) problems=(--gsm8k "$found") rollouts=240 ;;
  *) echo "problems are 'products', 'gsm8k' or 'auto', got '$source'" >&2; exit 64 ;;
esac
if [ "$source" != products ] && [ -z "$found" ]; then
  if [ "$source" = gsm8k ]; then
    echo "no GSM8K in ${PALM_RLHF_DATA:-../shared/data}/gsm8k: put its train.jsonl there, or set PALM_RLHF_DATA" >&2
    exit 64
  fi
  problems=(--task calculator) rollouts=120
fi
echo "problems: ${problems[*]}"

for seed in "$@"; do
  palm-rlhf sft "${problems[@]}" --out "$folder/sft-$seed" --seed "$seed" \
    --dim 96 --depth 2 --ff-mult 2 --steps 200 --batch 128 --lr 5e-3 --warmup 50 --final-lr 0 --eval-every 100
  palm-rlhf train ppo "${problems[@]}" --model "$folder/sft-$seed" --out "$folder/ppo-$seed" --seed "$seed" \
    --no-lora --steps "$rollouts" --prompts 256 --minibatch 64 --epochs 2 --policy-lr 8e-4 --critic-lr 1e-3 \
    --warmup 10 --critic-warmup 3 --kl-coef 0.005 --value-coef 0.5 --eval-every 20
done
