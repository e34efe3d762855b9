"""The model: GPT-2 by default, today's variants by a few options, each resolved once when the model is built.

Letters in shapes: B batch, T time (tokens), C = n_embd channels, nh heads, hs = C / nh head size, V vocabulary.
With default options parameter names and shapes are nanoGPT's, so either program reads the other's checkpoints.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

CHOICES = {'pos': ('learned', 'rope'), 'norm': ('layernorm', 'rmsnorm'),
           'mlp': ('gelu', 'gelu_tanh', 'relu2', 'swiglu')}
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
GPT2_SIZES = {
    'gpt2': dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    'gpt2-medium': dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    'gpt2-large': dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    'gpt2-xl': dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}


@dataclass
class GPTConfig:
    block_size: int = 1024  # T at most: the context
    vocab_size: int = 50304  # V: GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as GPT-2 has them
    pos: str = 'learned'  # learned | rope
    norm: str = 'layernorm'  # layernorm | rmsnorm (without gain; its models start with silent output projections)
    mlp: str = 'gelu'  # gelu | gelu_tanh (as OpenAI's GPT-2 computes it) | relu2 | swiglu
    qk_norm: bool = False
    tie_weights: bool = True  # one matrix embeds tokens and scores them
    softcap: float = 0.0  # logits stay within +-softcap; 0 off
    smear: bool = False  # add to each token's embedding a share, learned for each channel, of the one before

    def problems(self):
        """Return what is wrong with these values, a line each; an empty list when a model can be built."""
        found = [f'{name} must be at least 1, got {getattr(self, name)}'
                 for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if getattr(self, name) < 1]
        if not found and self.n_embd % self.n_head:
            found.append(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        elif not found and self.pos == 'rope' and self.n_embd // self.n_head % 2:
            found.append(f'pos=rope turns pairs: n_embd / n_head must be even, got {self.n_embd // self.n_head}')
        if not 0 <= self.dropout < 1:
            found.append(f'dropout must be at least 0 and below 1, got {self.dropout}')
        if self.softcap < 0:
            found.append(f'softcap must be 0 (off) or more, got {self.softcap}')
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                found.append(f'{name} must be one of {", ".join(choices)}; got {getattr(self, name)!r}')
        return found

    def model_args(self):
        """Return what a checkpoint stores: nanoGPT's seven keys, and an option only where it is not the default."""
        values, default = asdict(self), asdict(GPTConfig())
        return {k: v for k, v in values.items() if k in NANOGPT_ARGS or v != default[k]}


def linear(x, weight, bias):
    """Return F.linear(x, weight, bias): x (..., in), weight (out, in), bias (out,) or None.

    Few rows by a large matrix, as in writing text, are limited by reading the matrix, which MKL does on a CPU with
    one thread; dealt out in shares of its rows, all threads read, in half the time on two cores.
    """
    n_rows = x.numel() // x.size(-1)
    few = x.is_cpu and x.dtype == torch.float32 and 0 < n_rows <= 64 and weight.numel() >= 2**17
    if not few or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    shares = 2 * torch.get_num_threads()
    rest = len(weight) % shares
    dealt = weight[:len(weight) - rest].view(shares, -1, x.size(-1)).mT  # (shares, in, out / shares)
    y = torch.bmm(x.reshape(1, n_rows, -1).expand(shares, -1, -1), dealt).transpose(0, 1).reshape(*x.shape[:-1], -1)
    if rest:
        y = torch.cat([y, F.linear(x, weight[-rest:])], -1)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """nn.Linear that multiplies in `compute_dtype`, whatever its weights are kept in (see GPT.compute_in).

    It leaves its weights to GPT's own initialisation, so that none is drawn twice or in vain.
    """
    compute_dtype = None  # as the weights are

    def reset_parameters(self):
        pass

    def forward(self, x):
        dtype = self.compute_dtype or self.weight.dtype
        if x.dtype == self.weight.dtype == dtype:  # no casts to call: a twentieth of the time of a small model's token
            return linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear(x.to(dtype), self.weight.to(dtype), bias)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its weights to GPT's own initialisation."""

    def reset_parameters(self):
        pass


class LayerNorm(nn.Module):
    """Layer normalisation whose bias may be left out, which nn.LayerNorm(bias=False) names otherwise."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def dropout(x, p):
    """Return x with each element zeroed with probability p and the rest scaled by 1 / (1 - p).

    On a CPU 16 random bits an element decide, four elements a random number: torch's own draws a whole one for each
    and takes as long as a matrix product. p is then rounded to a multiple of 1 / 65536.
    """
    if p == 0 or not x.is_cpu:
        return F.dropout(x, p)
    below, n = round(p * 65536), x.numel()
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n].view(x.shape)
    return x * (bits >= below - 32768).to(x.dtype).mul_(65536 / (65536 - below))


def cross_entropy(logits, targets, reduction='mean'):
    """Return the cross-entropy in nats of logits (n, V) by targets (n,), -1 where none counts; computed in float32."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-1, reduction=reduction)


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


class RootMeanSquare(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) over the last dimension, in half of the passes that F.rms_norm takes on a CPU."""

    @staticmethod
    def forward(ctx, x, eps):
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        y, scale = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1).mul_(scale), None


class RMSNorm(nn.Module):
    """x / rms(x) without a gain (Zhang and Sennrich 2019, arXiv:1910.07467): the next matrix can learn one."""

    def forward(self, x):
        if x.is_cpu and x.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return RootMeanSquare.apply(x, torch.finfo(x.dtype).eps)
        return F.rms_norm(x, x.shape[-1:])


def make_norm(config):
    return RMSNorm() if config.norm == 'rmsnorm' else LayerNorm(config)


class KVCache:
    """Keys and values of the tokens a model has read, so that each is computed once.

    The model writes the new tokens behind `pos`, then moves `pos`; nobody else does, except to start over with
    `pos = 0`. Holds 2 * n_layer * B * n_embd * block_size numbers.
    """

    def __init__(self, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k, self.v = ([torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)] for _ in 'kv')
        self.before = None  # (B, 1, C) the newest token's embedding, where the model smears
        self.pos = 0

    def extend(self, layer, k, v):
        """Store k and v (B, nh, T, hs) of a layer behind `pos`; return all of its so far (B, nh, pos + T, hs)."""
        T = k.size(2)
        for kept, new in ((self.k[layer], k), (self.v[layer], v)):
            kept.narrow(2, self.pos, T).copy_(new)
        return self.k[layer].narrow(2, 0, self.pos + T), self.v[layer].narrow(2, 0, self.pos + T)


def rope_table(block_size, hs):
    """Return (2, block_size, hs): cosines, and signed sines, of each position's angles (Su et al. 2021, 2104.09864)."""
    angle = torch.outer(torch.arange(block_size).float(), 10000.0 ** (-torch.arange(0, hs, 2).float() / hs))
    return torch.stack([torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)])


def rotate(x, rope):
    """Turn the pairs (i, i + hs / 2) of each head of x (B, nh, T, hs) by the angles in rope (2, T, hs)."""
    cos, sin = rope.to(x.dtype)
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def attend(q, k, v, p):
    """Return causal attention (B, nh, T, hs) of the last T of S positions: q (B, nh, T, hs), k and v (B, nh, S, hs).

    p: dropout. torch's fused kernel, except for short contexts on a CPU in bfloat16, where it takes 2.5 times as long
    as the products written out, or with dropout, which it lacks there: torch's own way takes 1.4 times as long.
    """
    shape, T, S = q.shape, q.size(2), k.size(2)
    if q.is_cpu and (q.dtype == torch.bfloat16 or p) and T == S <= 512:
        mask = torch.full((T, T), -math.inf, dtype=q.dtype).triu(1)
        q, k, v = (t.reshape(-1, T, t.size(-1)) for t in (q, k, v))  # (B nh, T, hs) each
        weights = torch.baddbmm(mask, q, k.mT, alpha=q.size(-1) ** -0.5).softmax(-1)  # (B nh, T, T)
        return (dropout(weights, p) @ v).view(shape)
    # is_causal aligns to the upper left, so fewer queries than keys need the mask spelt out
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=1 < T == S, dropout_p=p)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.qk_norm = RMSNorm() if config.qk_norm else None

    def forward(self, x, rope=None, cache=None):
        B, T, C = x.size()
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, nh, T, hs) each
        if self.qk_norm is not None:
            q, k = self.qk_norm(q), self.qk_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, nh, pos + T, hs)
            q = q.to(k.dtype)  # the cache may be kept in another
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, nh, T, hs)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


def gelu_tanh(x):
    """GELU by its tanh formula, off by up to 5e-4: what OpenAI's GPT-2 was trained with."""
    return F.gelu(x, approximate='tanh')


class ReLUSquared(torch.autograd.Function):
    """relu(x)^2, whose gradient 2 relu(x) takes two passes over memory; those of ReLU and square in turn take five."""

    @staticmethod
    def forward(ctx, x):
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        r, = ctx.saved_tensors
        return (dy * r).mul_(2)


def relu2(x):
    """ReLU squared (So et al. 2021, arXiv:2109.08668)."""
    return ReLUSquared.apply(x) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else F.relu(x).square()


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.act = {'gelu': F.gelu, 'gelu_tanh': gelu_tanh, 'relu2': relu2}[config.mlp]
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, arXiv:2002.05202), 8/3 as wide inside so that it costs what MLP costs."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-8 * config.n_embd // 3 // 8) * 8  # a multiple of 8, which the hardware likes
        self.c_fc = Linear(config.n_embd, 2 * hidden, bias=config.bias)
        self.c_proj = Linear(hidden, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        gate, value = self.c_fc(x).chunk(2, dim=-1)  # (B, T, hidden) each
        return self.dropout(self.c_proj(F.silu(gate) * value))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.mlp == 'swiglu' else MLP(config)

    def forward(self, x, rope=None, cache=None):
        x = x + self.attn(self.ln_1(x), rope, cache)
        return x + self.mlp(self.ln_2(x))


class ChunkedLoss(torch.autograd.Function):
    """Summed loss of many tokens, of which few have their logits in memory at a time.

    The gradients are found chunk by chunk on the way forward, so nothing is computed twice (as Liger Kernel does,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(ctx, loss_of, x, weight, targets, rows):
        """loss_of(logits, targets) is the summed loss of logits (n, V), which are x (n, C) by weight (V, C).

        n is at most rows. x is in the dtype to multiply in; weight's gradient is summed in that of weight.
        """
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[2] else None
        recorded, total = dx is not None or dw is not None, torch.zeros((), device=x.device)
        w = weight.to(x.dtype)
        for at in range(0, len(x), rows):
            part = x[at:at + rows]
            with torch.set_grad_enabled(recorded):
                logits = F.linear(part.detach(), w.detach()).requires_grad_(recorded)
                loss = loss_of(logits, targets[at:at + rows])
            total += loss.detach()
            if recorded:
                d, = torch.autograd.grad(loss, logits)  # (n, V)
            if dx is not None:
                dx[at:at + rows] = d @ w
            if dw is not None and dw.dtype == d.dtype:
                dw.addmm_(d.mT, part)
            elif dw is not None:
                dw += d.mT @ part
        ctx.found = dx, dw
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        (dx, dw), ctx.found = ctx.found, None
        dx, dw = (found if found is None else found.mul_(scale) for found in (dx, dw))
        return None, dx, dw, None, None


class GPT(nn.Module):
    """The language model. `init=False` leaves the weights undefined, for a caller who fills them all."""
    CHUNK = 2**24  # logits in memory at a time, where only the loss is asked for: 64 MiB in float32

    def __init__(self, config, init=True):
        super().__init__()
        if config.problems():
            raise ValueError('; '.join(config.problems()))
        self.config = config
        self.checkpoint_activations = False  # recompute each block in the backward pass instead of keeping it
        self.transformer = nn.ModuleDict({'wte': Embedding(config.vocab_size, config.n_embd)})
        if config.pos == 'learned':
            self.transformer['wpe'] = Embedding(config.block_size, config.n_embd)
        self.smear = nn.Parameter(torch.zeros(config.n_embd)) if config.smear else None
        self.transformer['drop'] = Dropout(config.dropout)
        self.transformer['h'] = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer['ln_f'] = make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        rope = rope_table(config.block_size, config.n_embd // config.n_head) if config.pos == 'rope' else None
        self.register_buffer('rope', rope, persistent=False)
        if init:
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        """GPT-2's: normal with std 0.02, the 2 n_layer projections that write to the residual stream scaled down.

        Models with RMSNorm start these projections, and an untied head, at zero: each block begins as the identity
        (modded-nanogpt's record 5 and 8).
        """
        modern = self.config.norm == 'rmsnorm'
        for name, p in self.named_parameters():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.0 if modern else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif name == 'lm_head.weight' and modern:
                nn.init.zeros_(p)
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, cache=None, loss_only=False):
        """Score the next token at every position of idx.

        idx: (B, T) token ids. targets: (B, T) the ids to predict, -1 where none counts. cache: a KVCache holding
        what came before idx; it grows by T. Returns (logits, loss): with targets all logits (B, T, V) and their mean
        cross-entropy in nats, else the last position's logits (B, 1, V) and None. loss_only: None for the logits,
        which then need not all be in memory. ValueError past block_size.
        """
        T, start = idx.size(1), cache.pos if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f'{start + T} tokens do not fit block_size={self.config.block_size}')
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.smear is not None:
            x = self._smear(x, cache)
        rope = None
        if self.rope is not None:
            rope = self.rope[:, start:start + T]
        else:
            x = x + self.transformer.wpe.weight[start:start + T]
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.pos += T
        if targets is None:
            return self._head(x[:, -1:]), None
        if loss_only:
            return None, self._loss(x.flatten(0, 1), targets.flatten())
        logits = self._head(x)
        return logits, cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _smear(self, x, cache):
        """Add to each embedding in x (B, T, C) its share of the one before (modded-nanogpt's record 34, ungated).

        The token before decides most of what follows; without this a first layer has to learn to look there.
        """
        before = cache.before if cache is not None and cache.pos else torch.zeros_like(x[:, :1])
        if cache is not None:
            cache.before = x[:, -1:]
        return x + self.smear * torch.cat([before, x[:, :-1]], dim=1)

    def _head(self, x):
        return self._cap(self.lm_head(x))

    def _cap(self, logits):
        cap = self.config.softcap
        return cap * torch.tanh(logits.float() / cap) if cap else logits

    def _loss(self, x, targets):
        """Return the mean loss of x (n, C) by targets (n,), in chunks where the logits would be many."""
        rows = max(1, self.CHUNK // self.config.vocab_size)
        # compiled kernels keep fewer copies of the logits; gradients in float16 have to be scaled from the start
        if len(x) <= rows or torch.compiler.is_compiling() or self.dtype == torch.float16:
            return cross_entropy(self._head(x), targets)

        def loss_of(logits, targets):
            return cross_entropy(self._cap(logits), targets, 'sum')

        weight = self.lm_head.weight if torch.is_grad_enabled() else self.lm_head.weight.detach()
        summed = ChunkedLoss.apply(loss_of, x.to(self.dtype), weight, targets, rows)
        return summed / (targets != -1).sum()

    def compute_in(self, dtype):
        """Multiply matrices in `dtype`; weights, residual stream and norms stay as they are, which is float32."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.compute_dtype = dtype

    @property
    def dtype(self):
        """The dtype of matrix products, so of keys and values too."""
        return self.lm_head.compute_dtype or self.lm_head.weight.dtype

    def num_params(self, without_positions=True):
        """Return how many parameters there are; nanoGPT's count leaves the position table out."""
        count = sum(p.numel() for p in self.parameters())
        if without_positions and self.config.pos == 'learned':
            count -= self.transformer.wpe.weight.numel()
        return count

    def flops_per_token(self, context=None):
        """Return the FLOPs of one token's forward and backward pass in contexts of `context` tokens, or full ones.

        6 N + 12 L C T (PaLM, arXiv:2204.02311, appendix B): N the parameters that multiply, so no position table and
        no embedding beside an untied head; 12 L C T the two attention products, counted without the causal half.
        """
        c = self.config
        table = 0 if c.tie_weights else self.transformer.wte.weight.numel()
        return 6 * (self.num_params() - table) + 12 * c.n_layer * c.n_embd * (context or c.block_size)

    def mfu(self, tokens_per_second, peak_flops, context=None):
        """Return the share of `peak_flops` (FLOP/s of the device in the dtype used) that training puts to use."""
        return self.flops_per_token(context) * tokens_per_second / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the context, for instance of GPT-2's 1024 tokens, to `block_size`; ValueError if it would grow."""
        if block_size > self.config.block_size:
            raise ValueError(f'block_size={block_size} but the model has {self.config.block_size} positions')
        self.config.block_size = block_size
        if self.config.pos == 'rope':
            self.rope = self.rope[:, :block_size]
        else:
            self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].clone())
            self.transformer.wpe.num_embeddings = block_size

    def param_groups(self, weight_decay, matrices_apart=False):
        """Return optimizer groups: 2-D parameters decayed, then the rest not, in nanoGPT's order.

        matrices_apart: the blocks' matrices come first, as a group of their own, {'matrices': True}, for Muon.
        """
        params = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        inner = [p for name, p in params if matrices_apart and p.dim() == 2 and name.startswith('transformer.h.')]
        apart = {id(p) for p in inner}
        decayed = [p for _, p in params if p.dim() >= 2 and id(p) not in apart]
        plain = [p for _, p in params if p.dim() < 2]
        groups = [dict(params=inner, weight_decay=weight_decay, matrices=True),
                  dict(params=decayed, weight_decay=weight_decay, matrices=False),
                  dict(params=plain, weight_decay=0.0, matrices=False)]
        return [group for group in groups if group['params']]

    @classmethod
    def empty(cls, config, dtype=torch.float32):
        """Return a GPT with weights of `dtype` that are undefined, for a caller who fills them all."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return cls(config, init=False)
        finally:
            torch.set_default_dtype(before)

    @classmethod
    @torch.no_grad()
    def from_pretrained(cls, source, dropout=0.0, block_size=0, dtype=torch.float32):
        """Return the GPT-2 of `source`, on the CPU: one of GPT2_SIZES, or a folder in Hugging Face's GPT-2 layout.

        block_size: the context to crop it to; 0 keeps all. dtype: of the weights. The files are mapped and copied one
        tensor at a time, so memory holds the model once. ValueError says which file or tensor is missing or wrong.
        """
        config = gpt2_config(source)
        config.dropout = dropout
        model = cls.empty(config, dtype)
        left = dict(model.named_parameters())
        for path in gpt2_files(source):
            for name, tensor in read_safetensors(path):
                stem, _, leaf = name.removeprefix('transformer.').rpartition('.')
                if stem.endswith('.attn') or stem == 'lm_head':
                    continue  # buffers of the causal mask; the head, which is the embedding
                target = left.pop(f'transformer.{stem}.{leaf}', None)
                if target is None:
                    raise ValueError(f'{path}: unexpected tensor {name}; is config.json its own?')
                tensor = tensor.to(dtype)  # before it is turned: torch turns quickly where the dtypes agree
                if stem.startswith('h.') and leaf == 'weight':
                    tensor = tensor.t()  # Conv1D keeps (in, out), Linear (out, in); a vector stays
                if target.shape != tensor.shape:
                    raise ValueError(f'{path}: {name} makes {tuple(tensor.shape)}, expected {tuple(target.shape)}; '
                                     'is config.json its own?')
                target.copy_(tensor)
        if left:
            raise ValueError(f'{path} lacks {len(left)} tensors of the model, e.g. {next(iter(left))}')
        if block_size:
            model.crop_block_size(block_size)
        return model


def gpt2_config(source):
    """Return the GPTConfig of a name in GPT2_SIZES, or of the config.json in a folder in Hugging Face's GPT-2 layout.

    ValueError where there is none, or where it asks for what this GPT cannot compute.
    """
    if source in GPT2_SIZES:
        return GPTConfig(vocab_size=50257, mlp='gelu_tanh', **GPT2_SIZES[source])
    path = Path(source) / 'config.json'
    try:
        have = json.loads(path.read_text(encoding='utf-8'))
        sizes = {'block_size': 1024, 'vocab_size': 50257, **GPT2_SIZES['gpt2']}  # what GPT2Config assumes
        sizes = {ours: int(have.get({'block_size': 'n_positions'}.get(ours, ours), n)) for ours, n in sizes.items()}
    except FileNotFoundError:
        raise ValueError(f'{path} not found; the folder must hold config.json and model.safetensors') from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is damaged ({error})') from None
    only = {'model_type': ('gpt2',), 'layer_norm_epsilon': (1e-5,), 'n_inner': (None, 4 * sizes['n_embd']),
            'activation_function': ('gelu_new', 'gelu_pytorch_tanh', 'gelu'), 'tie_word_embeddings': (True,),
            'scale_attn_weights': (True,), 'scale_attn_by_inverse_layer_idx': (False,), 'add_cross_attention': (False,)}
    for key, values in only.items():
        if have.get(key, values[0]) not in values:
            raise ValueError(f'{path}: {key}={have[key]!r}; this program computes {values[0]!r} only')
    config = GPTConfig(mlp='gelu' if have.get('activation_function') == 'gelu' else 'gelu_tanh', **sizes)
    if config.problems():
        raise ValueError(f'{path}: {"; ".join(config.problems())}')
    return config


def gpt2_files(source):
    """Return the safetensors files of a name in GPT2_SIZES (from the hub or its cache), or of a folder.

    ValueError where they cannot be had, with what to do.
    """
    if source in GPT2_SIZES:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.utils.logging import set_verbosity_error
        for repository in (f'openai-community/{source}', source):  # its name now, and in older caches
            found = try_to_load_from_cache(repository, 'model.safetensors')
            if isinstance(found, str):
                return [found]
        set_verbosity_error()  # its six tries say a line each
        try:
            return [hf_hub_download(f'openai-community/{source}', 'model.safetensors')]
        except Exception as error:  # network, hub, proxy and disk have their own kinds each
            reason = (str(error).strip().splitlines() or [''])[0]
            raise ValueError(
                f'cannot fetch {source}, and it is not cached ({type(error).__name__}: {reason[:80]}); where there '
                f'is a connection, save config.json and model.safetensors of huggingface.co/openai-community/{source} '
                'to a folder, copy it here and say --init_from=FOLDER, or set HF_HOME to a cache that has it') from None
    folder = Path(source)
    index = folder / 'model.safetensors.index.json'
    try:
        names = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
    except FileNotFoundError:
        names = ['model.safetensors']
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{index} is damaged ({type(error).__name__}: {error})') from None
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(f'{folder / absent[0]} not found; put it there, from where config.json came')
    return [folder / name for name in names]


def read_safetensors(path):
    """Yield (name, tensor) of a safetensors file, whose tensors are mapped, not read; ValueError where it is cut."""
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework='pt') as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework='pt') as file:  # anew each time, so that what was read leaves memory
                tensor = file.get_tensor(name)
            yield name, tensor
    except (SafetensorError, OSError) as error:
        size = Path(path).stat().st_size
        try:  # eight bytes give the length of a JSON header, which gives each tensor's place behind it
            with open(path, 'rb') as file:
                start = 8 + int.from_bytes(file.read(8), 'little')
                header = json.loads(file.read(min(start - 8, size)))
            ends = {name: start + entry['data_offsets'][1] for name, entry in header.items() if name != '__metadata__'}
            name = next(name for name, end in sorted(ends.items(), key=lambda item: item[1]) if end > size)
            what = f'is cut off in {name} ({size:,} of {max(ends.values()):,} bytes)'
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
            what = f'is no whole safetensors file ({size:,} bytes; {error})'
        raise ValueError(f'{path} {what}; fetch it again') from None
