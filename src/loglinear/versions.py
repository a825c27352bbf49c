"""VERSIONS: the releases of PyTorch, Triton and transformers that this library is tested with. Others warn once."""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

# Oldest and newest, as constraints/oldest.txt and constraints/newest.txt pin them.
TESTED = {"torch": ((2, 8), (2, 15)), "triton": ((3, 4), (3, 9)), "transformers": ((5, 17), (5, 24))}
RELEASE = re.compile(r"(\d+)\.(\d+)(\.\d+)*(\.post\d+)?(\+.*)?")  # a user of a development build knows it


@cache
def warn_untested() -> None:
    """One UserWarning in a process, if a package is older or newer than the tested ones. Imports none of them.

    Releases that differ in their third number count as one.
    """
    untested = []
    for package, (oldest, newest) in TESTED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        release = RELEASE.fullmatch(found)
        if release and not oldest <= (int(release[1]), int(release[2])) <= newest:
            low, high = (".".join(map(str, end)) for end in (oldest, newest))
            untested.append(f"{package} {found} is installed, and {low} to {high} are tested")
    if untested:
        warnings.warn(f"loglinear may not work with these packages: {'; '.join(untested)}", UserWarning, stacklevel=3)
