"""token_advantages by the C++ kernels: one walk through time with rows in vector lanes, then the whitening.

Rewards exist in registers alone. The backward walks forwards in time, behind a walk that makes the advantages
once more where they were whitened.
"""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("token_advantages")
backward = operator("token_advantages_backward")
