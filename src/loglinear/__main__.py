"""``python -m loglinear``, as ``loglinear``; so ``torchrun --nproc-per-node 8 -m loglinear train ...``."""

import sys

from loglinear.cli import main

if __name__ == "__main__":
    sys.exit(main())
