#!/usr/bin/env bash
# What `make demo` shows: which backends run here, every kernel against its definition, and short timings against
# what you would use instead. Under 3 minutes on 2 cores.
set -euo pipefail
cd "$(dirname "$0")/.."

heading() { printf '\n\033[1m%s\033[0m\n' "$*"; }

heading "1/3  What runs here: rlhf-kernels doctor"
rlhf-kernels doctor
heading "2/3  Every kernel against its float64 definition: rlhf-kernels check --tier smoke"
rlhf-kernels check --tier smoke
heading "3/3  Against plain PyTorch and torch.compile: rlhf-kernels bench --tier smoke --seconds 0.3"
rlhf-kernels bench --tier smoke --seconds 0.3
heading "Next: 'rlhf-kernels bench attention', 'make peers' to compare with TRL, verl and others, 'rlhf-kernels --help'"
