"""vLLM's DeepSeek-V3.2 and GLM-5, which have layers of their own: those for CUDA in their sequence-parallel form.

That is the one with tensor, expert and data parallelism together (sequence_parallel.py). With tensor parallelism alone
the residual is not scattered, and on other platforms vLLM has other layers: then it builds the model as without the
plugin, after one line that says so.
"""

from vllm.models import deepseek_v32

from . import workspace

_CUDA = "vllm.models.deepseek_v32.nvidia.model"


class _Scattered:
    """Before a model of vLLM's."""

    published: str

    def __init__(self, *, vllm_config, prefix: str = ""):
        on_cuda = any(base.__module__ == _CUDA for base in type(self).__mro__)
        if not on_cuda:  # said first: what vLLM builds there may fail
            workspace.say_left(f"{self.published} has other layers in vLLM on this platform")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if on_cuda:
            from . import sequence_parallel

            sequence_parallel.replace_layers(self.model, vllm_config)


class DeepseekV32ForCausalLM(_Scattered, deepseek_v32.DeepseekV32ForCausalLM):
    published = "DeepSeek-V3.2"


class GlmMoeDsaForCausalLM(_Scattered, deepseek_v32.GlmMoeDsaForCausalLM):
    published = "GLM-5"
