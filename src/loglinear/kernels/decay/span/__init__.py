"""SPAN: the kernels of the scalar gate for Hopper, in Gluon. Queries attend to 256 tokens, a *span*, directly.

The rest of the tree is read from entries of a span on. ``choice.py`` says which calls have them. The other calls have the
kernels of the folder above, which compute the same. Where Triton has no Gluon, only ``choice.py`` can be imported.
"""
