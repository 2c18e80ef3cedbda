"""What Inductor takes as a pass, which is not the same in every torch.

| torch | whether a graph is for inference | several passes |
|---|---|---|
| 2.10, 2.11 | no pass is told | no |
| 2.12 | a pass of a class of its own is told | no |
| 2.13 | the same | a list of them |
"""

import sys

from torch import fx
from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass

# Inductor caches no graph of a pass of another class. It gives this one `is_inference`, where torch has such a class.
GraphPass: type = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", CustomGraphPass)


def is_inference(told: bool | None) -> bool:
    """Whether the graph that a pass is called for is for inference. told: what Inductor says; None where it does not.

    Then it is an argument of the function that calls the pass, in 2.10 and 2.11. The graph does not tell: the branches
    of a `torch.cond` look the same in training.
    """
    frame = sys._getframe() if told is None else None
    while frame is not None:
        if frame.f_code.co_name == "post_grad_passes" and "is_inference" in frame.f_locals:
            told = frame.f_locals["is_inference"]
            break
        frame = frame.f_back
    if told is None:
        raise TypeError("is_inference has to be given where it is not Inductor's post_grad_passes that calls the pass")
    return told


class InOrder(GraphPass):
    """Several passes, one after the other."""

    def __init__(self, passes: list):
        self.passes = passes

    def __call__(self, graph: fx.Graph, is_inference: bool | None = None) -> None:
        for each in self.passes:
            if is_inference is not None and isinstance(each, GraphPass):
                each(graph, is_inference)
            else:
                each(graph)

    def uuid(self):
        """None, as theirs is, where one of them has none."""
        uuids = tuple(each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes)
        return uuids if all(uuids) else None


def passes_of(setting) -> list:
    """The passes that Inductor's setting has, one by one."""
    setting = setting.passes if isinstance(setting, InOrder) else setting
    if isinstance(setting, (list, tuple)):
        return [each for one in setting for each in passes_of(one)]
    return [] if setting is None else [setting]


def setting_of(passes: list):
    """What Inductor's setting is for these passes, in a torch that takes one alone, too."""
    return InOrder(passes) if len(passes) > 1 else passes[0] if passes else None
