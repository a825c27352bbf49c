"""STAGES: a plain twin of every kernel stage, in batched PyTorch that works in float64.

A wrong gradient is found by comparing stages: the first stage that differs is wrong. Another backend can be written from
these files. Each function has the name, the inputs and the outputs of a kernel in ``loglinear.kernels``, in its layout:

    place.py         where chunks, octets, entries and paths lie (``kernels/tree``)
    decay.py         the family whose span is a log for each head (``kernels/decay``)
    delta.py         the family whose span is a matrix, forward (``kernels/delta``)
    delta_grads.py   the same, backward
    channel.py       a gate per key channel (``kernels/channel``)

With the delta rule and a gate per channel, the first and the last stage are those of ``channel.py``; between them stand the
stages of ``delta.py`` and ``delta_grads.py``, on decayed queries and keys.

Logs are natural (the kernels' have base 2). A gate below ``GATE_FLOOR`` counts as this floor, as in the kernels. Loops run
over levels, path lengths and the units of an octet, never over tokens. ``decay.trace`` and ``delta_grads.trace`` compose the
stages of a family to a forward and a backward pass, and return what every stage made, by name.
"""
