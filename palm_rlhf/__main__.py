"""`python -m palm_rlhf` is `palm-rlhf`."""

import sys

from palm_rlhf.cli import main

sys.exit(main())
