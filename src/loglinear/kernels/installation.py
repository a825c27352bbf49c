"""Whether Triton is there to be imported: a constant, found when this module is, for the compiler can not follow the search."""

from importlib.util import find_spec

from loglinear.versions import warn_untested

INSTALLED = find_spec("triton") is not None
warn_untested()  # the first kernel is about to be asked for
