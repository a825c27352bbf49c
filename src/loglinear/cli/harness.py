"""``loglinear harness``: EleutherAI's lm-evaluation-harness on checkpoints of this library.

    loglinear harness --model hf --model_args pretrained=out/run,max_length=16384 \\
        --tasks niah_single_1 --metadata '{"max_seq_lengths": [4096, 16384]}' --device cuda --batch_size 1

Needs ``pip install 'loglinear[eval]'``. RULER's niah_single_1 makes its own text (a repeated sentence), keys and numbers, so
it reads no data set and runs with ``--offline``; niah_single_2 and niah_single_3 would fetch essays.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loglinear.cli.offline import offline


def harness(argv: Sequence[str], prog: str) -> None:
    """``lm_eval`` with its own options, and ``--offline``."""
    words = offline(argv)
    from lm_eval.__main__ import cli_evaluate

    import loglinear.models  # noqa: F401 - registers the model with the Auto classes
    from loglinear.cli.checkpoint import check_checkpoints

    check_checkpoints(words)
    sys.argv = [prog, *words]  # where it reads its options
    cli_evaluate()
