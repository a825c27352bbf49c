"""Whether Triton can be imported. A constant that this module finds on import: the compiler cannot follow the search."""

from importlib.util import find_spec

from loglinear.versions import warn_untested

INSTALLED = find_spec("triton") is not None
warn_untested()  # the first kernel is about to be asked for
