"""Whether Triton is there to be imported: a constant, found when this module is, for the compiler can not follow the search."""

from importlib.util import find_spec

INSTALLED = find_spec("triton") is not None
