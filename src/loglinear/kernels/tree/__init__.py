"""TREE: what the kernels of both families share: where a chunk lies, loads and stores, decays, λ, sums over heads, launches.

Legend of all kernels: B batch, T tokens, C chunk, N chunks, H value heads, G q/k groups, K, V widths, L levels. A *row* is
one chunk of one sequence, numbered through the batch; a *group* is ``GROUP`` consecutive chunks, aligned in the sequence.
Logs of decays are float32 in base 2. Offsets that can pass 2^31 elements are int64.
"""
