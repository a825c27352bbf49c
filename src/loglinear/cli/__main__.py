"""``python -m loglinear.cli``, and so ``torchrun --nproc-per-node 8 -m loglinear.cli train ...``."""

import sys

from loglinear.cli import main

sys.exit(main())
