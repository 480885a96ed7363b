"""OpenRLHF: what its workers get, compared with its own functions on this machine.

    python examples/patch_openrlhf.py
    RLHF_KERNELS_PATCH=openrlhf python -m openrlhf.cli.train_ppo_ray ...     # docs/patch.md: workers

OpenRLHF itself wants Ray, DeepSpeed and flash-attn. Where these are missing, its functions are taken from the
installed source, so that the comparison runs on any machine.
"""

from __future__ import annotations

import rlhf_kernels
from rlhf_kernels import stacks
from rlhf_kernels.engine import patched
from rlhf_kernels.stacks import patching

stacks.activate()  # the peers of a checkout; has no effect where OpenRLHF is installed


def main() -> None:
    """Patches where OpenRLHF can be imported, and compares in any case."""
    try:
        with rlhf_kernels.patch("openrlhf") as held:
            print(held)
    except rlhf_kernels.PatchError as error:
        print(f"not replaced in this process: {error}")
    print("its functions from the installed source, against ours:")
    for name in ("get_advantages_and_returns", "masked_normalize"):
        (row,) = patched.check(patching.find("openrlhf"), only=[name], seconds=0.1)
        print(f"  {name}: {row.status}, difference {row.error:.1e}, {row.speedup:.1f}x")
        assert row.status != "incorrect"


if __name__ == "__main__":
    main()
