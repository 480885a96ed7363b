"""`python -m rlhf_kernels` is `rlhf-kernels`."""

from rlhf_kernels.cli import main

raise SystemExit(main())
