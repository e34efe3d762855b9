"""Faster forms of a few torch.nn.functional expressions, most of them for CPUs only.

You need not read this file to understand the model: each function computes the plain formula in the first line of
its docstring, and on other devices, under torch.compile, or with ENABLED = False it calls exactly that formula. One
exception: linear_cross_entropy also saves memory on a GPU.
"""
import functools
import math

import torch
import torch.nn.functional as F

ENABLED = True  # False: always the plain formula
ONEDNN = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')  # see linear
CHUNK = 2**24  # logits in memory at a time in linear_cross_entropy: 64 MiB in float32; on CUDA 8 times as many


def _fast(x):
    """True if the fast forms apply to `x`; under torch.compile the plain formulas compile to better code."""
    return ENABLED and x.is_cpu and not torch.compiler.is_compiling()


def linear(x, weight, bias=None):
    """F.linear(x, weight, bias): x (..., in), weight (out, in), bias (out,) or None; returns (..., out).

    During generation a few rows multiply a large matrix, so memory bandwidth is the limit. Where torch has MKL,
    F.linear calls it, and it reads the matrix with one thread. oneDNN reads it with all of them (up to twice as fast on
    two cores).
    """
    n_rows = x.numel() // x.size(-1)
    few = 0 < n_rows <= 64 and weight.numel() >= 2**17 and x.dtype == torch.float32
    if not few or not ONEDNN or not _fast(x) or torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class CastTogetherFunction(torch.autograd.Function):
    """[w.to(dtype) for w in weights] in two operations, and the backward pass in two."""

    @staticmethod
    def forward(ctx, dtype, *weights):
        ctx.shapes, ctx.dtype = [w.shape for w in weights], weights[0].dtype
        return CastTogetherFunction.parts(weights, dtype, ctx.shapes)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return None, *CastTogetherFunction.parts(grads, ctx.dtype, ctx.shapes)

    @staticmethod
    def parts(tensors, dtype, shapes):
        flat = torch.cat([t.flatten() for t in tensors]).to(dtype)
        return tuple(part.view(s) for part, s in zip(flat.split([s.numel() for s in shapes]), shapes))


def prepare_casts(layers, dtype):
    """Cast the weights of all `layers` together, for one call of `cast` each; nothing in a large model.

    In a small model the overhead of one cast per weight costs more than the cast. A weight keeps its cast as an
    attribute until it is used.
    """
    weights = [layer.weight for layer in layers]
    small = weights and weights[0].dtype != dtype and sum(w.numel() for w in weights) <= 2**24
    if small and _fast(weights[0]) and all(type(w) is torch.nn.Parameter for w in weights):  # FSDP's are not
        for weight, prepared in zip(weights, CastTogetherFunction.apply(dtype, *weights)):
            weight.prepared_cast = prepared


def cast(weight, dtype):
    """weight.to(dtype): the one that prepare_casts has made, once, else a new one."""
    prepared = weight.__dict__.pop('prepared_cast', None) if _fast(weight) else None
    return weight.to(dtype) if prepared is None else prepared


def _dropout_mask(x, p):
    """Return a tensor like x that holds 0 with probability p, else 1 / (1 - p); p is rounded to k / 65536.

    One 64-bit random number serves four elements (16 bits each).
    """
    threshold, n = min(round(p * 65536), 65535), x.numel()  # never all
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n].view(x.shape)
    return (bits >= threshold - 32768).to(x.dtype).mul_(65536 / (65536 - threshold))


def dropout(x, p, training):
    """F.dropout(x, p, training), with other random numbers.

    torch draws one random number per element on a CPU, which takes as long as a matrix product.
    """
    if p == 0 or not training:
        return x
    return x * _dropout_mask(x, p) if _fast(x) else F.dropout(x, p, training)


class RMSNormFunction(torch.autograd.Function):
    """RMS normalisation with half as many passes over memory as F.rms_norm on a CPU."""

    @staticmethod
    def forward(ctx, x, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # summed in float32 in any dtype
        scale = torch.addcmul(_constant(eps), norm, norm, value=1 / x.size(-1)).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        y, scale = ctx.saved_tensors
        dot = (dy * y).sum(-1, keepdim=True)
        return torch.addcmul(dy, y, dot, value=-1 / y.size(-1)).mul_(scale), None


@functools.cache
def _constant(value):
    return torch.tensor(value)


def rms_norm(x):
    """F.rms_norm(x, x.shape[-1:]): x / sqrt(mean(x^2) + eps) over the last dimension."""
    eps = torch.finfo(torch.float32).eps  # explicit, because torch's default differs between devices and versions
    if _fast(x) and torch.is_grad_enabled():
        return RMSNormFunction.apply(x, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


class RotateFunction(torch.autograd.Function):
    """Rotation in three passes over memory; its gradient is rotated back by the same angles."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        B, T, n, nh, hs = x.shape
        y = x.new_empty(n, B, nh, T, hs).permute(1, 3, 0, 2, 4)  # so attention need not copy its queries and keys
        first, second = x.chunk(2, -1)
        return torch.mul(x, cos, out=y).addcmul_(torch.cat([second, first], -1), sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (cos, sin), (first, second) = ctx.saved_tensors, dy.chunk(2, -1)
        return (dy * cos).addcmul_(torch.cat([second, first], -1), sin, value=-1), None, None


def rotate(x, cos, sin):
    """x * cos + x.roll(x.size(-1) // 2, -1) * sin, where sin has opposite signs in the two halves.

    x: (B, T, n, nh, hs): queries and keys, say, of which n = 2. cos, sin: broadcast to x.
    """
    if _fast(x) and torch.is_grad_enabled():
        return RotateFunction.apply(x, cos, sin)
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


class ReLUSquaredFunction(torch.autograd.Function):
    """relu(x)^2 whose backward is one operation; autograd's takes five."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        r, = ctx.saved_tensors
        return torch.addcmul(_constant(0.0), dy, r, value=2)


def relu_squared(x):
    """F.relu(x).square() (So et al. 2021, arXiv:2109.08668)."""
    return ReLUSquaredFunction.apply(x) if _fast(x) and torch.is_grad_enabled() else F.relu(x).square()


class CausalAttentionFunction(torch.autograd.Function):
    """Attention written out as matrix products: forward 2, backward 4. See _attend for the arguments."""

    @staticmethod
    def forward(ctx, q, k, v, mask, n_blocks, dropout_p):
        if n_blocks:
            k, v = _with_block_before(k, v)
        scores = torch.baddbmm(mask, q, k.mT, alpha=q.size(-1) ** -0.5)  # (N, T, S)
        if n_blocks:  # the first block of each sequence has no block before it
            scores[::n_blocks, :, :q.size(1)].fill_(-math.inf)
        p = scores.softmax(-1)
        keep = _dropout_mask(p, dropout_p) if dropout_p else None
        dropped = p if keep is None else p * keep
        ctx.save_for_backward(q, k, v, p, dropped, keep)
        ctx.n_blocks = n_blocks
        return dropped @ v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (q, k, v, p, dropped, keep), scale = ctx.saved_tensors, dy.size(-1) ** -0.5
        dv, dp = dropped.mT @ dy, dy @ v.mT
        ds = torch._softmax_backward_data(dp if keep is None else dp * keep, p, -1, p.dtype)
        dq = torch.baddbmm(q, ds, k, beta=0, alpha=scale)  # scale * ds @ k
        dk = torch.baddbmm(k, ds.mT, q, beta=0, alpha=scale)
        if ctx.n_blocks:
            dk, dv = _add_to_block_before(dk, dv)
        return dq, dk, dv, None, None, None


def _with_block_before(k, v):
    """Return k and v, blocks (N, T, hs) each, as (N, 2 T, hs): each block after the block before it.

    They go through one tensor, which takes half as many operations. What the first block of a sequence gets from
    another sequence is masked.
    """
    N, T, hs = k.shape
    both = torch.cat([k.new_zeros(1, T, hs), k, v])  # (1 + 2 N, T, hs)
    return both.as_strided((2 * N, 2 * T, hs), (T * hs, hs, 1)).contiguous().chunk(2)


def _add_to_block_before(dk, dv):
    """Return the gradients of _with_block_before's arguments; dk, dv: (N, 2 T, hs), those of what it returned."""
    before, own = torch.cat([dk, dv]).chunk(2, 1)
    own[:-1].add_(before[1:])
    return own.chunk(2)


@functools.lru_cache(maxsize=8)
def _mask(T, S, window, dtype, device):
    """Return (T, S): 0 for the keys that the last T of S positions see, -inf for the others; window: 0 = all."""
    ones = torch.ones(T, S, dtype=torch.bool, device=device)
    hidden = ones.triu(S - T + 1)
    if window:
        hidden |= ones.tril(S - T - window)
    return torch.zeros(T, S, dtype=dtype, device=device).masked_fill(hidden, -math.inf)


def _products_are_faster(q, dropout_p):
    """True if attention is to be written out as products; torch's fused kernel is for the rest."""
    return _fast(q) and (q.dtype == torch.bfloat16 or dropout_p or torch.is_grad_enabled())


def _attend(q, k, v, mask, n_blocks, dropout_p):
    """softmax(q k^T / sqrt(hs) + mask) v for q, k and v (N, T, hs).

    n_blocks: 0, or how many of the N are the blocks of one sequence. Each block then also sees the keys of the block
    before it, and mask is (T, 2 T) instead of (T, T).
    """
    if _products_are_faster(q, dropout_p):
        return CausalAttentionFunction.apply(q, k, v, mask, n_blocks, dropout_p)
    if n_blocks:
        k, v = (torch.cat([F.pad(t, (0, 0, 0, 0, 1, -1)), t], 1) for t in (k, v))  # (N, 2 T, hs)
        first = mask.masked_fill(torch.arange(mask.size(1), device=mask.device) < q.size(1), -math.inf)
        mask = torch.stack([first, *[mask] * (n_blocks - 1)]).repeat(len(q) // n_blocks, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


def _window_attention(q, k, v, dropout_p, window):
    """Attention of each position to the last `window` positions: q, k, v (B, nh, T, hs) with T > window.

    The sequence is cut into blocks of `window` positions. A block attends to itself and to the block before it, so the
    cost grows with T * window instead of T^2.
    """
    B, nh, T, hs = q.shape
    if T % window:
        q, k, v = (F.pad(t, (0, 0, 0, -T % window)) for t in (q, k, v))
    n_blocks, mask = q.size(2) // window, _mask(window, 2 * window, window, q.dtype, q.device)
    y = _attend(*(t.reshape(-1, window, hs) for t in (q, k, v)), mask, n_blocks, dropout_p)
    return y.view(B, nh, -1, hs)[:, :, :T]


def causal_attention(q, k, v, dropout_p=0.0, window=0, mask=None):
    """softmax(q k^T / sqrt(hs) + mask) v: the last T of S positions attend to themselves and those before them.

    q: (B, nh, T, hs). k, v: (B, nh, S, hs). Returns (B, nh, T, hs). window: attend only to the last `window`
    positions, itself included; 0 = to all. mask: one to add in place of these two rules, (T, S). Uses torch's fused
    kernel, except on a CPU with T = S <= 512 in training, in bfloat16 or with dropout: there the products written out
    are faster.
    """
    if mask is not None:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p)
    T, S = q.size(2), k.size(2)
    if 0 < window < T == S:
        return _window_attention(q, k, v, dropout_p, window)
    if 0 < window < S and T == 1:
        k, v, window = k[:, :, -window:], v[:, :, -window:], 0
    if T == S <= 512 and _products_are_faster(q, dropout_p):
        flat = (t.reshape(-1, T, t.size(-1)) for t in (q, k, v))  # (B nh, T, hs) each
        return CausalAttentionFunction.apply(*flat, _mask(T, T, 0, q.dtype, q.device), 0, dropout_p).view(q.shape)
    # is_causal aligns to the top left, so fewer queries than keys (a KV cache) need an explicit mask
    mask = _mask(T, S, window, q.dtype, q.device) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == S, dropout_p=dropout_p)


def softcap(logits, cap):
    """cap * tanh(logits / cap) in float32; the logits unchanged if cap is 0."""
    return cap * torch.tanh(logits.float() / cap) if cap else logits


def cross_entropy(logits, targets, reduction='mean'):
    """F.cross_entropy in float32, in nats: logits (n, V), targets (n,) with -1 where no loss is wanted."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction=reduction)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy, computed in chunks so that only one chunk of logits is in memory.

    The gradients are found chunk by chunk in the forward pass, so nothing is computed twice (as Liger Kernel does,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, n_rows):
        """x: (n, C) in the dtype of the products. weight: (V, C). n_rows: rows per chunk. Returns a scalar."""
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        recorded, total = dx is not None or dw is not None, torch.zeros((), device=x.device)
        w = weight.to(x.dtype)
        for start in range(0, len(x), n_rows):
            part = x[start:start + n_rows]
            with torch.set_grad_enabled(recorded):
                logits = F.linear(part.detach(), w.detach()).requires_grad_(recorded)
                loss = cross_entropy(softcap(logits, cap), targets[start:start + n_rows], 'sum')
            total += loss.detach()
            if recorded:
                d, = torch.autograd.grad(loss, logits)  # (rows, V)
            if dx is not None:
                dx[start:start + n_rows] = d @ w
            if dw is not None and dw.dtype == d.dtype:
                dw.addmm_(d.mT, part)
            elif dw is not None:
                dw += d.mT @ part
        ctx.grads = dx, dw
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        (dx, dw), ctx.grads = ctx.grads, None
        dx, dw = (grad if grad is None else grad.mul_(scale) for grad in (dx, dw))
        return dx, dw, None, None, None


def linear_cross_entropy(x, weight, targets, cap=0.0):
    """cross_entropy(softcap(F.linear(x, weight), cap), targets), the mean over targets that are not -1.

    x: (n, C). weight: (V, C), cast to x's dtype. targets: (n,). In chunks where the logits would be many, on any
    device; not under torch.compile, whose kernels keep fewer copies of the logits, and not in float16, whose
    gradients have to be scaled from the start.
    """
    n_rows = max(1, (8 * CHUNK if x.is_cuda else CHUNK) // len(weight))  # small chunks would leave a GPU idle
    if len(x) <= n_rows or not ENABLED or torch.compiler.is_compiling() or x.dtype == torch.float16:
        return cross_entropy(softcap(linear(x, weight.to(x.dtype)), cap), targets)
    weight = weight if torch.is_grad_enabled() else weight.detach()
    return ChunkedCrossEntropy.apply(x, weight, targets, cap, n_rows) / (targets != -1).sum()
