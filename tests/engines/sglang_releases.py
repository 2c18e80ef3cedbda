"""How a process comes to each release of SGLang, and how each puts the blocks of `sglang_layers.py` together."""

import itertools
import types

import sglang_layers
import sglang_stubs
import torch
import torch.distributed as dist
from sglang_layers import MLP, Attention, Weights, norm

MAX_TOKENS = 48


def start(release: str):
    """This process becomes a rank of SGLang, without the plugin."""
    sglang_stubs.install(release)
    made = {"0.5.6": Communicators, "0.5.23": Boundaries}[release]()
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    # The torch ops in between are registered for CUDA only.
    GroupCoordinator.reduce_scatter_tensor = GroupCoordinator._reduce_scatter_tensor
    GroupCoordinator.all_gather_into_tensor = GroupCoordinator._all_gather_into_tensor
    made.attention_module._is_cuda = True  # a condition of scattering
    return made


class _Release:
    def __init__(self):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.arguments = {
            "model_path": "dummy",
            "device": "cpu",
            "tp_size": self.world_size,
            "enable_attn_tp_input_scattered": True,
            "chunked_prefill_size": MAX_TOKENS,
        }

    @property
    def context(self):
        return self.attention_module.get_attn_tp_context()

    def build(self, num_layers: int, dtype=torch.float32, quant_config=None):
        """A model of this release, with the weights that it has; as SGLang does, under the model's dtype."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = types.SimpleNamespace(weights=Weights(num_layers, dtype))
            model.embed = sglang_layers.embedding(model.weights)
            model.norm = norm(model.weights.final_norm)
            ranks = (self.rank, self.world_size)
            model.blocks = [
                types.SimpleNamespace(
                    attention=Attention(layer, *ranks, quant_config),
                    mlp=MLP(layer, *ranks),
                    input_norm=norm(layer.input_norm),
                    mlp_norm=norm(layer.mlp_norm),
                )
                for layer in model.weights.layers
            ]
            self.connect(model)
            self.context.init_context(sglang_layers.Q_LORA, False)
        finally:
            torch.set_default_dtype(before)
        return model

    @torch.no_grad()
    def forward(self, model, input_ids, embeddings=None, mode: str = "EXTEND"):
        forward_batch = sglang_layers.batch(input_ids, mode)
        with self.context.maybe_input_scattered(forward_batch):
            rows = model.embed(input_ids) if embeddings is None else embeddings.clone()
            return self.layers(model, rows, forward_batch)


class Communicators(_Release):
    """0.5.6"""

    def __init__(self):
        super().__init__()
        from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

        server_args = ServerArgs(**self.arguments)
        set_global_server_args_for_scheduler(server_args)
        from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
        from sglang.srt.layers import communicator
        from sglang.srt.layers.dp_attention import initialize_dp_attention

        init_distributed_environment(self.world_size, self.rank, local_rank=self.rank, backend="gloo")
        initialize_model_parallel(self.world_size, backend="gloo")
        sizes = types.SimpleNamespace(hidden_size=sglang_layers.HIDDEN, dtype=torch.float32)
        initialize_dp_attention(server_args, sizes)
        self.attention_module = communicator

    def connect(self, model):
        communicator = self.attention_module
        for index, block in enumerate(model.blocks):
            last = index == len(model.blocks) - 1
            block.communicator = communicator.LayerCommunicator(
                layer_scatter_modes=communicator.LayerScatterModes.init_new(
                    layer_id=index,
                    num_layers=len(model.blocks),
                    is_layer_sparse=False,
                    is_previous_layer_sparse=False,
                ),
                input_layernorm=block.input_norm,
                post_attention_layernorm=block.mlp_norm,
                allow_reduce_scatter=True,
                is_last_layer=last,
                qkv_latent_func=block.attention.prepare_qkv_latent,
            )

    def layers(self, model, rows, forward_batch):
        from sglang.srt.distributed import tensor_model_parallel_all_reduce

        residual = None
        num_tokens = rows.shape[0]
        for block in model.blocks:
            between = block.communicator
            rows, residual = between.prepare_attn(rows, residual, forward_batch)
            rows = block.attention(rows, self.context, num_tokens)
            rows, residual = between.prepare_mlp(rows, residual, forward_batch)
            rows = block.mlp(rows)
            if not between.should_use_reduce_scatter(forward_batch):
                rows = tensor_model_parallel_all_reduce(rows)
            rows, residual = between.postprocess_layer(rows, residual, forward_batch)
        return model.norm(rows, residual)[0] if num_tokens else rows


class Boundaries(_Release):
    """0.5.23"""

    stages = (0,)
    captured = None  # the layer whose input is captured, as speculation does

    def __init__(self):
        super().__init__()
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import ServerArgs

        ranks = SpawnRanks(world_rank=self.rank, dp_rank=None)
        publish(ServerArgs(**self.arguments), role="test", ranks=ranks)
        from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
        from sglang.srt.layers.layer_boundary.adapters import attention

        init_distributed_environment(self.world_size, self.rank, local_rank=self.rank, backend="gloo")
        initialize_model_parallel(backend="gloo")
        self.attention_module = attention

    def connect(self, model):
        """In pipeline stages that begin at the layers `self.stages`."""
        from sglang.srt.layers.layer_boundary.factories import append_stages, declare_attn, declare_ffn, layer_stack

        def elsewhere():
            return declare_attn(), declare_ffn()

        for begin, end in itertools.pairwise((*self.stages, len(model.blocks))):
            before = [elsewhere] if begin else []
            after = [elsewhere] if end < len(model.blocks) else []
            with layer_stack(previous_layers=before, next_layers=after):
                for block in model.blocks[begin:end]:
                    block.attn_boundary, block.ffn_boundary = append_stages(
                        (declare_attn(), block.input_norm, {"qkv_latent_func": block.attention.prepare_qkv_latent}),
                        (declare_ffn(), block.mlp_norm, {}),
                    )

    def layers(self, model, rows, forward_batch):
        from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

        num_tokens = rows.shape[0]
        residual_batch.start(forward_batch)
        for index, block in enumerate(model.blocks):
            if index in self.stages[1:]:
                self.sent = residual_batch.to_pp(rows, forward_batch)
                rows = block.attn_boundary.from_pp(self.sent, forward_batch)
            if index == self.captured:
                self.capture = residual_batch.snapshot(rows, forward_batch)
            rows = block.attn_boundary.prepare(rows, forward_batch)
            rows = block.attention(rows, self.context, num_tokens)
            self.context.clear_attn_inputs()
            rows = block.attn_boundary.finish(rows, forward_batch)
            rows = block.ffn_boundary.prepare(rows, forward_batch)
            with block.ffn_boundary.exit(forward_batch) as output:
                rows = output.finish(block.mlp(rows))
        return residual_batch.final_norm(rows, forward_batch, model.norm, skip_empty=True)
