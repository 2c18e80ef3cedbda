"""What happens between attention and MLP, in each way that a forward can run.

All take this rank's partial sum [num_tokens, hidden_size], which they may overwrite, and the residual as they left it:
None at the first layer. `tp` is the `TensorParallel` of the model, `latent` the `LatentProjection` of a layer.
"""

from ... import ops, partition
from .latents import rms_norm


class Unfused:
    """All-reduce, then every rank adds, normalises and projects all tokens."""

    def __init__(self, tp, all_reduce):
        self.tp, self.all_reduce = tp, all_reduce

    def norm_rows(self, partial, residual, norm):
        """-> (all tokens, normalised; residual)"""
        with self.tp.timed("communication"):
            reduced = self.all_reduce(partial)
        with self.tp.timed("rms_norm"):
            residual = reduced if residual is None else reduced.add_(residual)
            return rms_norm(residual, norm), residual

    def attention_input(self, partial, residual, norm, latent):
        """-> (all tokens that queries are projected from; kv latent, normalised; the latent's other columns; residual)

        What queries are projected from is the latent q_a, or, where there is none, the normalised rows.
        """
        rows, residual = self.norm_rows(partial, residual, norm)
        with self.tp.timed("qkv_a_proj"):
            columns = latent.multiply(rows)
        with self.tp.timed("rms_norm"):
            q_a, kv_a, rest = latent.normed(columns)
        return (rows if latent.q_norm is None else q_a), kv_a, rest, residual


class Fused:
    """The same on tp_fused's ops: the residual is this rank's slice."""

    def __init__(self, tp):
        self.tp = tp

    def norm_rows(self, partial, residual, norm):
        with self.tp.timed("communication"):
            return ops.rs_rmsnorm_ag(partial, residual, norm.weight, norm.variance_epsilon, self.tp.group)

    def attention_input(self, partial, residual, norm, latent):
        num_tokens, group = partial.shape[0], self.tp.group
        same_eps = norm.variance_epsilon == latent.kv_norm.variance_epsilon
        if latent.q_norm is not None and latent.norms_fuse and same_eps:
            with self.tp.timed("qkv_a_proj"):
                return latent.prologue(partial, residual, norm, group)
        if latent.q_norm is None:
            queries, residual = self.norm_rows(partial, residual, norm)
            own = latent.own(queries[partition.row_slice(num_tokens, self.tp.rank, self.tp.world_size)])
        else:
            with self.tp.timed("communication"):
                own, residual = latent.reduce(partial, residual, norm, group)
        if latent.norms_fuse:
            with self.tp.timed("qkv_a_proj"):
                q_a, kv_a, rest = latent.project_normed(own, num_tokens, group)
        else:
            with self.tp.timed("qkv_a_proj"):
                columns = latent.project(own, num_tokens, group)
            with self.tp.timed("rms_norm"):
                q_a, kv_a, rest = latent.normed(columns)
        return (queries if latent.q_norm is None else q_a), kv_a, rest, residual
