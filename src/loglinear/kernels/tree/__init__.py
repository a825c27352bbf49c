"""TREE: what the kernels of both families share: where a chunk lies, loads and stores, decays, λ, sums over heads, launches.

Legend of all kernels: B batch, T tokens, C chunk, N chunks, H value heads, G q/k groups, K, V widths, L levels. A *chunk*
is numbered through the batch; an *octet* is ``OCTET`` consecutive chunks, aligned in the sequence; a *site* is one of them
for one head. Logs of decays are float32 in base 2. Offsets that can pass 2^31 elements are int64.
"""
