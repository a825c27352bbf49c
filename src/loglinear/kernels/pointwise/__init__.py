"""POINTWISE: the kernels around the attention op: convolution, gates, norms, unit lengths, products of an MLP, the loss."""
