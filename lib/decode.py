"""Reading one more token with a KV cache, on CUDA as one CUDA graph.

On a GPU the model's small kernels take less time than their launches from Python, 150 per token of a GPT-2. A graph
launches them together. It needs tensors of fixed shape and place, so the cache is attended to as a whole, with a mask.
"""
import contextlib
import math

import torch

from lib.machine.device import without_onednn
from lib.machine.graph import Graph
from model import GPT, KVCache

DEVICES = ('cuda',)  # where the step is recorded; () switches it off


class StaticCache(KVCache):
    """A KVCache whose step of one token reads and writes the same memory at every position.

    at: (1,), the position of that token; the caller sets it. Later positions are masked, and those before the window.
    """
    _newest = None  # (B, 1, C): the memory of prev_embedding

    def __init__(self, config, batch_size, device, dtype):
        super().__init__(config, batch_size, device, dtype)
        for slots in self.k + self.v:
            slots.zero_()  # a masked position counts 0 times its value, and 0 times NaN would be NaN
        self.positions, self.window = torch.arange(config.block_size, device=device), config.window or config.block_size
        self.at, self.mask = torch.zeros(1, dtype=torch.long, device=device), None

    @property
    def prev_embedding(self):
        return None if self._newest is None else self._newest.clone()  # the next one is stored before this one is used

    @prev_embedding.setter
    def prev_embedding(self, x):
        if x is not None and self._newest is not None:
            self._newest.copy_(x)
        elif x is not None:
            self._newest = x.clone()

    def update(self, layer, k, v):
        """As KVCache.update; for one position at `at` all slots are returned, with a mask (1, block_size) to add."""
        if k.size(2) > 1:
            return super().update(layer, k, v)
        for slots, new in ((self.k[layer], k), (self.v[layer], v)):
            slots.index_copy_(2, self.at, new.to(slots.dtype))
        if layer == 0:  # one mask serves all layers
            seen = (self.positions <= self.at) & (self.positions > self.at - self.window)
            self.mask = torch.where(seen, 0.0, -math.inf).to(self.k[0].dtype)[None]
        return self.k[layer], self.v[layer], self.mask


def make_cache(model, batch_size, dtype):
    """Return an empty KVCache of batch_size rows for `model`, a GPT or what torch.compile makes of it.

    On DEVICES it is a static one, unless the model is compiled or has hooks, which a recording would not call.
    """
    device = model.lm_head.weight.device
    static = device.type in DEVICES and type(model) is GPT and not model._forward_hooks
    return (StaticCache if static else KVCache)(model.config, batch_size, device, dtype)


class Reader:
    """Lets a model read tokens after those in its cache."""

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        if isinstance(cache, StaticCache):
            idx = self.idx = torch.zeros(len(cache.k[0]), 1, dtype=torch.long, device=cache.at.device)
            self.graph = Graph(lambda: model(idx, cache=cache, positions=cache.at)[0])

    def __call__(self, idx):
        """Return the logits (B, 1, V) of the token after idx (B, T); the next call may overwrite them."""
        cache, pos = self.cache, self.cache.pos
        if isinstance(cache, StaticCache):
            cache.at.fill_(pos)
            if pos and idx.size(1) == 1:
                self.idx.copy_(idx)
                logits, cache.pos = self.graph(), pos + 1  # a recording does not advance `pos`
                return logits
        one_row = idx.is_cpu and idx.numel() == 1 and self.model.dtype == torch.bfloat16
        with without_onednn() if one_row else contextlib.nullcontext():
            return self.model(idx, cache=cache)[0]
