"""logprob by the C++ row kernels: one pass over the logits, and one that writes their gradient."""

from __future__ import annotations

from rlhf_kernels.runtime.native import operator

forward = operator("logprob")
backward = operator("logprob_backward")
