"""`generate` of a parallelized model: transformers' own, and then the ranks compare what they have generated."""

import copy
import inspect
import weakref

import torch
from transformers import PreTrainedModel

from .tensor_parallel import TensorParallel


class Generate:
    """Takes the place of a model's `generate`. Held by the model, so it does not hold the model."""

    def __init__(self, tp: TensorParallel, model: PreTrainedModel):
        self.tp, self._model = tp, weakref.ref(model)
        self.__signature__ = inspect.signature(type(model).generate.__get__(model))
        self.__doc__ = type(model).generate.__doc__

    def __call__(self, *args, **kwargs):
        model = self._model()
        made = type(model).generate(model, *args, **kwargs)
        # A rank that ends earlier than its peers meets them here: they compare what they feed.
        tokens = getattr(made, "sequences", made)
        if isinstance(tokens, torch.Tensor):  # a custom_generate returns what it likes
            self.tp.compare_generated(tokens)
        return made

    def __deepcopy__(self, memo) -> "Generate":
        """Of the copied model."""
        return Generate(self.tp, copy.deepcopy(self._model(), memo))
