"""Low-rank adapters: fine-tuning with the matrices frozen, so that neither gradients nor optimizer state of them exist.

train.py adapts a model when lora_rank is set. What a checkpoint in last.pt holds under `model` is then the untouched
base weights and the adapters' `lora_a` and `lora_b`, all that resuming needs; ckpt.pt holds the merged model, an
ordinary one. Nothing else knows of adapters, except that models.build puts them back.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear

ALPHA = 32  # what an adapter adds is scaled by ALPHA / rank: the paper's value for GPT-2


class LoRALinear(Linear):
    """x W^T + bias with W frozen, plus x A^T B^T of rank r that trains (Hu et al. 2021, arXiv:2106.09685)."""

    def __init__(self, base, rank):
        super().__init__(base.in_features, base.out_features, bias=False, device='meta')
        self.weight, self.bias, self.scale = base.weight, base.bias, ALPHA / rank
        like = dict(device=base.weight.device)
        self.lora_a = nn.Parameter(torch.randn(rank, base.in_features, **like) * base.in_features ** -0.5)
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))  # so it begins as the base does

    def forward(self, x):
        x = x.to(self.compute_dtype or self.weight.dtype)
        low = F.linear(x, self.lora_a.to(x.dtype)) * self.scale  # (B, T, r)
        return super().forward(x) + F.linear(low, self.lora_b.to(x.dtype))


def adapt(model, rank):
    """Freeze `model`, a GPT, and give every matrix in its blocks an adapter of this rank; only those train."""
    model.requires_grad_(False)
    for parent in list(model.transformer.h.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Linear):
                setattr(parent, name, LoRALinear(layer, rank))


def rank_of(tensors):
    """Return the rank of the adapters in a state dict, 0 where there are none."""
    return next((len(tensor) for name, tensor in tensors.items() if name.endswith('.lora_a')), 0)


@torch.no_grad()
def merged(tensors):
    """Return an adapted model's state dict as that of the plain GPT which computes the same; on the CPU."""
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
