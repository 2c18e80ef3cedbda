"""Decoders of transformers, tensor-parallel, with the residual kept scattered from first layer to last.

    model = DeepseekV3ForCausalLM.from_pretrained(...)      # unsharded, the same on every rank
    parallelize(model, max_num_tokens=4096)                 # now sharded, in place
    model.generate(...)                                     # on every rank, with the same arguments

    model, tp = load_parallel(folder, max_num_tokens=4096)  # or: each rank reads its part of the weights

The attention, its rotary embedding, the cache, the router and the experts stay transformers' own and see smaller
weights. What is replaced is what lies between them: the embedding, the decoder layer and the final norm. Between those,
a partial sum and the residual travel instead of the hidden states.
"""

from .core import parallelize
from .loading import load_parallel
from .tensor_parallel import TensorParallel

__all__ = ["TensorParallel", "load_parallel", "parallelize"]
