"""``python -m loglinear.cli``, and so ``torchrun --nproc-per-node 8 -m loglinear.cli train ...``."""

import sys

from loglinear.cli import main

if __name__ == "__main__":
    sys.exit(main())
