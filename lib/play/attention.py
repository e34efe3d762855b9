"""Attention weights, recomputed outside the model, because its fused kernels never store them.

A hook takes the input of each CausalSelfAttention and computes softmax(q k^T / sqrt(hs)) from it, as model.py does.
"""
import base64
import math

import torch
import torch.nn.functional as F

from model import apply_rotary_emb

SIDE = 24  # width of a thumbnail in points, at most


def recompute(attn, x, rope):
    """Return the weights (nh, T, T) of an attention layer for its input x (1, T, C), in float32; rows sum to 1."""
    B, T, C = x.shape
    qk = attn.c_attn(x).view(B, T, 3, attn.n_head, C // attn.n_head)[:, :, :2]  # (1, T, 2, nh, hs)
    if attn.qk_norm is not None:
        qk = attn.qk_norm(qk)
    if rope is not None:
        qk = apply_rotary_emb(qk, rope)
    q, k = qk.unbind(2)  # (1, T, nh, hs) each
    q, k = q[0].transpose(0, 1).float(), k[0].transpose(0, 1).float()  # (nh, T, hs) each
    scores = q @ k.mT / math.sqrt(q.size(-1))  # (nh, T, T)
    position = torch.arange(T, device=x.device)
    distance = position[:, None] - position  # to the position that is attended to
    seen = (distance >= 0) & (distance < (attn.window or T))
    return scores.masked_fill(~seen, -math.inf).softmax(-1)


@torch.inference_mode()
def weights(model, ids):
    """Return the attention weights (n_layer, nh, T, T) of every layer and head over `ids`, on the CPU."""
    found = []

    def note(attn, args, kwargs):
        x, rope = (*args, None, None)[:2]
        found.append(recompute(attn, x, kwargs.get('rope', rope)).cpu())
    hooks = [block.attn.register_forward_pre_hook(note, with_kwargs=True) for block in model.transformer.h]
    try:
        model(torch.tensor([ids], device=model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def packed(tensor):
    """Return a tensor as base64 of its little-endian numbers."""
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode('ascii')


def maps(found):
    """Return {'side', 'maps'}: a thumbnail of each head of weights (n_layer, nh, T, T), one byte per point."""
    T = found.size(-1)
    side = min(SIDE, T)
    small = F.adaptive_max_pool2d(found.flatten(0, 1)[:, None], side)[:, 0]  # a mean would blur single bright points
    return {'side': side, 'maps': packed((small.clamp(0, 1).sqrt() * 255).to(torch.uint8))}
