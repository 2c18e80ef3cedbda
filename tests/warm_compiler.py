"""What torch.compile does once in every process, half of it making patterns: done here for all ranks.

To be imported where ranks are forked: `pytest.mark.preload("warm_compiler")`.
"""

import torch
from compile_pass_ranks import FrontEnd, rank_of_its_own


class _NoPass:
    options = None


def _program(rows: torch.Tensor) -> torch.Tensor:
    return rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1)


with rank_of_its_own():
    torch.compile(_program, backend=FrontEnd(_NoPass))(torch.ones(2, 3))
torch._dynamo.reset()
torch._dynamo.utils.counters.clear()
