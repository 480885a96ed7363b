#!/usr/bin/env bash
# Makes .peers, an environment beside .venv with the stacks that we compare with (tools/peers.txt).
#
# .peers sees the packages of .venv, so PyTorch is neither downloaded again nor replaced. A peer that cannot be installed
# is named at the end and the rest goes on; a line that succeeded is not run again, so the second call is instant.
# Usage: bash tools/peers.sh      (after `make setup`, or whatever made .venv)
set -uo pipefail
cd "$(dirname "$0")/.."

main=.venv/bin/python
peers=.peers/bin/python
done_dir=.peers/done

stamp_of() { echo "$done_dir/$(echo "$1" | tr -c 'A-Za-z0-9.=\n-' '_')"; }

missing=()
while IFS= read -r line; do
    line=${line%%#*}
    [ -n "${line// /}" ] && [ ! -e "$(stamp_of "$line")" ] && missing+=("$line")
done < tools/peers.txt
if [ ${#missing[@]} -eq 0 ]; then
    echo "peers: ready in .peers"
    exit 0
fi

if ! "$main" -c 'import torch' 2>/dev/null; then
    echo "peers: .venv with torch is needed first (make setup)" >&2
    exit 1
fi

if [ ! -x "$peers" ]; then
    "$main" -m venv .peers || exit 1
    "$main" - <<'PY'
import pathlib, sysconfig
main = sysconfig.get_path("purelib")
peers = pathlib.Path(".peers", pathlib.Path(main).relative_to(pathlib.Path(".venv").absolute()))
peers.joinpath("_venv.pth").write_text(f"import site; site.addsitedir({main!r})\n")
PY
fi
mkdir -p "$done_dir"

# Hold what .venv has, and let nothing bring a second PyTorch.
"$main" - > .peers/constraints.txt <<'PY'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "triton", "numpy"):
    try:
        print(f"{name}=={version(name).split('+')[0]}")
    except PackageNotFoundError:
        pass
PY

failed=()
for line in "${missing[@]}"; do
    echo "peers: $line"
    # shellcheck disable=SC2086  # the line is a list of arguments
    if "$peers" -m pip install --quiet --disable-pip-version-check -c .peers/constraints.txt $line > .peers/log.txt 2>&1
    then
        touch "$(stamp_of "$line")"
    else
        failed+=("$line")
        grep -i error .peers/log.txt | tail -3 >&2
    fi
done

if [ ${#failed[@]} -gt 0 ]; then
    printf 'peers: could not install: %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "peers: ready in .peers"
