"""How much memory training takes, found by running one training step on tensors that have no data.

Such a tensor has a shape, a dtype and a device, so the model's code decides which tensors exist and for how long,
and no formula has to follow its changes. Only tensors are counted, not what libraries allocate internally.
"""
import functools
import inspect
import weakref
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import kernels
from lib.training.optim import make_optimizer
from lib.weights import lora
from model import GPT, GPTConfig


class _NoData(torch.Tensor):
    """A tensor that reports the CPU as its device; `meta` is the same tensor on the meta device."""

    @staticmethod
    def __new__(cls, meta):
        return torch.Tensor._make_wrapper_subclass(cls, meta.shape, strides=meta.stride(), dtype=meta.dtype,
                                                   storage_offset=meta.storage_offset(), device='cpu')

    def __init__(self, meta):
        self.meta = meta

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f'{func} was called outside of MemoryCount')


class MemoryCount(TorchDispatchMode):
    """While active, operations allocate nothing; `live` and `peak` are the bytes that their tensors would take.

    device_type: the device to plan for. With 'cpu' the model takes its CPU code paths; for other devices the caller
    creates tensors on the meta device, which takes the same paths as a GPU.
    """

    def __enter__(self):
        kernels._mask.cache_clear()  # masks of real runs do not belong in a count, nor the other way round
        return super().__enter__()

    def __exit__(self, *error):
        kernels._mask.cache_clear()
        return super().__exit__(*error)

    def __init__(self, device_type):
        super().__init__()
        self.on_cpu, self.live, self.peak, self.storages = device_type == 'cpu', 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flat, spec = tree_flatten((args, kwargs or {}))
        wrappers = {id(t.meta): t for t in flat if isinstance(t, _NoData)}
        args, kwargs = tree_unflatten([t.meta if isinstance(t, _NoData) else t for t in flat], spec)
        if 'device' in kwargs:
            kwargs['device'] = torch.device('meta')
        if func.overloadpacket.__name__.startswith('_fused_'):  # updates in place, which not all have for meta tensors
            return None
        out = func(*args, **kwargs)
        return tree_map(lambda t: self._record(t, wrappers) if isinstance(t, torch.Tensor) else t, out)

    def _record(self, tensor, wrappers):
        """Count a tensor that an operation returned; return what the caller gets in its place."""
        storage = tensor.untyped_storage()
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages.add(key)
            self.live += n_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, n_bytes)
        if not self.on_cpu or not tensor.is_meta:
            return tensor
        return wrappers.get(id(tensor)) if id(tensor) in wrappers else _NoData(tensor)  # in-place: the same tensor

    def _release(self, key, n_bytes):
        self.storages.discard(key)
        self.live -= n_bytes


# torch wraps this method to import its compiler on the first call, which takes as long as importing torch
MemoryCount.__torch_dispatch__ = inspect.unwrap(MemoryCount.__torch_dispatch__)


@dataclass
class Footprint:
    """Bytes at the peak of a training step. activations: all tensors that are not one of the others."""
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float = 0.0  # the part of activations that is due to the vocabulary

    @property
    def total(self):
        return self.weights + self.gradients + self.optimizer + self.activations


def _trace(config, batch_size, micro_steps, dtype, optimizer, lora_rank, checkpoint_activations, device_type):
    """Return the Footprint of a model with exactly config.n_layer blocks."""
    device = 'cpu' if device_type == 'cpu' else 'meta'
    with MemoryCount(device_type) as memory, torch.device('meta') if device == 'meta' else nullcontext():
        model = GPT(config, init=False).train()
        if lora_rank:
            lora.adapt(model, lora_rank)
        model.set_compute_dtype(dtype)
        model.checkpoint_activations = checkpoint_activations
        weights = memory.live
        opt = make_optimizer(optimizer, model.param_groups(0.1, muon=optimizer == 'muon'), 1e-3, 1e-2, (0.9, 0.95),
                             device)

        def micro_step(sequences):
            idx = torch.zeros(sequences, config.block_size, dtype=torch.int64)
            model(idx, idx)[1].backward()

        micro_step(1)
        gradients = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        opt.step()  # the first one creates the optimizer's state
        state = memory.live - weights - gradients
        if micro_steps == 1:  # else the micro-step that is counted finds the gradients of those before it
            opt.zero_grad(set_to_none=True)
        memory.peak = 0
        micro_step(batch_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        peak = memory.peak
    return Footprint(weights, gradients, state, max(0, peak - weights - state - gradients))


@functools.cache
def _footprint(config_values, *rest):
    config = GPTConfig(*config_values)
    if config.n_layer <= 2:
        return _trace(config, *rest)
    one, two = (astuple(_trace(replace(config, n_layer=n), *rest)) for n in (1, 2))
    return Footprint(*(a + (config.n_layer - 1) * (b - a) for a, b in zip(one, two)))


def footprint(config, batch_size, micro_steps=1, dtype=torch.float32, optimizer='adamw', lora_rank=0,
              checkpoint_activations=False, device_type='cpu', with_logits=False):
    """Return the Footprint of training a GPTConfig.

    batch_size: sequences of block_size tokens per micro-batch. micro_steps: micro-batches per update on one rank.
    with_logits: also find out what the vocabulary takes. Blocks are alike, so a deep model is extrapolated from one
    and two of them.
    """
    rest = (batch_size, min(2, micro_steps), dtype, optimizer, lora_rank, checkpoint_activations, device_type)
    found = replace(_footprint(astuple(config), *rest))
    if with_logits:
        plain = _footprint(astuple(replace(config, vocab_size=2)), *rest)
        found.logits = max(0, found.activations - plain.activations)
    return found
