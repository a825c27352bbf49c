"""FOREIGN: checkpoints of other libraries: the paper's own, and flash-linear-attention's.

options.py      their config.json as fields of ``LogLinearConfig``
tensors.py      which of their tensors make up each of ours
files.py        safetensors in a folder or on the hub
loading.py      both together: weights of ours, read one by one
conversion.py   the same, written to a folder
"""
