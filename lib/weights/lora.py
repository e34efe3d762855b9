"""Low-rank adapters: fine-tuning with the matrices frozen, so that they need no gradients and no optimizer state.

train.py adapts a model if lora_rank is set. In last.pt, `model` then holds the unchanged base weights and the adapters'
`lora_a` and `lora_b`, which is what resuming needs. ckpt.pt holds the merged model, an ordinary GPT. No other file
deals with adapters, except load_model, which adds them to a model before it loads such a checkpoint.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from model import Linear

ALPHA = 32  # an adapter's output is scaled by ALPHA / rank; the paper's value for GPT-2


class LoRALinear(Linear):
    """x W^T + bias with W frozen, plus a trained x A^T B^T of rank r (Hu et al. 2021, arXiv:2106.09685).

    W is cast once, when `compute_dtype` is set; a checkpoint keeps it as it was.
    """
    _compute_dtype = None

    def __init__(self, base, rank):
        super().__init__(base.in_features, base.out_features, bias=False, device='meta')
        self.weight, self.bias, self.scale = base.weight, base.bias, ALPHA / rank
        self.register_buffer('frozen', None, persistent=False)  # W in compute_dtype, if that is another dtype
        like = dict(device=base.weight.device)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **like) * base.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # zeros: begins as the base

    @property
    def compute_dtype(self):
        return self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype):
        self._compute_dtype = dtype
        self.frozen = None if dtype in (None, self.weight.dtype) else self.weight.detach().to(dtype)

    def forward(self, x):
        weight = self.weight if self.frozen is None else self.frozen
        x, bias = x.to(weight.dtype), None if self.bias is None else self.bias.to(weight.dtype)
        low = F.linear(x, self.lora_a.to(x.dtype)) * self.scale  # (B, T, r)
        return kernels.linear(x, weight, bias) + F.linear(low, self.lora_b.to(x.dtype))


def adapt(model, rank):
    """Freeze `model`, a GPT, and add a trainable adapter of this rank to every matrix in its blocks."""
    model.requires_grad_(False)
    for parent in list(model.transformer.h.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, LoRALinear(layer, rank))


def rank_of(tensors):
    """Return the rank of the adapters in a state dict, 0 if it has none."""
    return next((len(tensor) for name, tensor in tensors.items() if name.endswith('.lora_a')), 0)


@torch.no_grad()
def merged(tensors):
    """Return the state dict, on the CPU, of the plain GPT that computes the same as the adapted model of `tensors`."""
    plain = {}
    for name, tensor in tensors.items():
        stem, _, leaf = name.rpartition('.')
        if leaf in ('lora_a', 'lora_b'):
            continue
        if leaf == 'weight' and f'{stem}.lora_a' in tensors:
            a, b = tensors[f'{stem}.lora_a'], tensors[f'{stem}.lora_b']
            tensor = torch.addmm(tensor, b, a, alpha=ALPHA / len(a))
        plain[name] = tensor.cpu()
    return plain
