"""GPT-2 and today's variants of it, to be read from top to bottom.

Letters in shapes: B batch, T time (positions), S keys: T and those of the KV cache, C = n_embd channels, nh heads,
hs = C / nh head size, V vocabulary. Calls to kernels compute the formula beside them; you need not open kernels.py.
With default options parameter names and shapes are nanoGPT's, so either program reads the other's checkpoints.
To use the model elsewhere, copy model.py and kernels.py.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

import kernels

CHOICES = {'pos': ('learned', 'rope'), 'norm': ('layernorm', 'rmsnorm'),
           'mlp': ('gelu', 'gelu_tanh', 'relu2', 'swiglu')}
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


@dataclass
class GPTConfig:
    """The architecture. A new option is one line here and a setting in train.py; a string also needs CHOICES."""
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm, as in GPT-2
    pos: str = 'learned'  # learned | rope
    norm: str = 'layernorm'  # layernorm | rmsnorm (also initialises output projections and an untied head to zero)
    mlp: str = 'gelu'  # gelu | gelu_tanh (OpenAI's GPT-2) | relu2 | swiglu
    qk_norm: bool = False  # normalise queries and keys
    tie_weights: bool = True  # the embedding matrix is also the output head
    softcap: float = 0.0  # keep logits within +-softcap; 0 = off
    window: int = 0  # positions that attention sees, the present one included; 0 = all before it
    smear: bool = False  # add a learned fraction (one per channel) of the previous token's embedding

    def validate(self):
        """Return a list of error messages; empty if the config is valid."""
        errors = [f'{name} must be at least 1, got {getattr(self, name)}'
                  for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if getattr(self, name) < 1]
        if not errors and self.n_embd % self.n_head:
            errors.append(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}')
        elif not errors and self.pos == 'rope' and self.n_embd // self.n_head % 2:
            errors.append(f'pos=rope rotates pairs: n_embd / n_head must be even, got {self.n_embd // self.n_head}')
        if not 0 <= self.dropout < 1:
            errors.append(f'dropout must be at least 0 and below 1, got {self.dropout}')
        errors += [f'{name} must be 0 (off) or more, got {getattr(self, name)}'
                   for name in ('softcap', 'window') if getattr(self, name) < 0]
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                errors.append(f'{name} must be one of {", ".join(choices)}; got {getattr(self, name)!r}')
        return errors

    def model_args(self):
        """Return what a checkpoint stores: nanoGPT's seven keys, and each other option that is not the default."""
        values, default = asdict(self), asdict(GPTConfig())
        return {k: v for k, v in values.items() if k in NANOGPT_ARGS or v != default[k]}


class LayerNorm(nn.Module):
    """Layer normalisation with an optional bias."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x):
        return F.layer_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.bias, 1e-5)


class RMSNorm(nn.Module):
    """x / rms(x) (Zhang and Sennrich 2019, arXiv:1910.07467), without a gain: the next linear layer can absorb it."""

    def forward(self, x):
        return kernels.rms_norm(x)  # F.rms_norm(x, x.shape[-1:])


def make_norm(config):
    return RMSNorm() if config.norm == 'rmsnorm' else LayerNorm(config)


def precompute_rope(block_size, hs):
    """Return (2, block_size, hs): cosines and signed sines of each position's angles (Su et al. 2021, 2104.09864)."""
    angle = torch.outer(torch.arange(block_size).float(), 10000.0 ** (-torch.arange(0, hs, 2).float() / hs))
    return torch.stack([torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)])


def apply_rotary_emb(x, rope):
    """Rotate the pairs (i, i + hs / 2) of each head of x (B, T, 2, nh, hs) by the angles in rope (2, T, hs)."""
    cos, sin = rope.to(x.dtype)[:, :, None, None]  # (T, 1, 1, hs) each
    return kernels.rotate(x, cos, sin)  # x * cos + x.roll(x.size(-1) // 2, -1) * sin


class KVCache:
    """Keys and values of the positions a model has read, so that each is computed once.

    The model writes new positions after `pos` and then advances `pos`; set `pos = 0` to start over. Holds
    2 * n_layer * B * n_embd * block_size numbers.
    """

    def __init__(self, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.prev_embedding = None  # (B, 1, C) of the newest token, if the model smears
        self.pos = 0

    def update(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of a layer after `pos`; return all keys and values (B, nh, S, hs), and a mask."""
        end = self.pos + k.size(2)
        self.k[layer][:, :, self.pos:end] = k
        self.v[layer][:, :, self.pos:end] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end], None  # None: causal


class Linear(nn.Linear):
    """nn.Linear that multiplies in `compute_dtype`; the weights may be stored in another dtype."""
    compute_dtype = None  # None: the dtype of the weights

    def reset_parameters(self):
        pass  # GPT._init_weights does it

    def forward(self, x):
        dtype = self.compute_dtype or self.weight.dtype
        if x.dtype == self.weight.dtype == dtype:  # skip no-op casts: they are 5% of a small model's time per token
            return kernels.linear(x, self.weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return kernels.linear(x.to(dtype), kernels.cast(self.weight, dtype), bias)  # self.weight.to(dtype)


class Embedding(nn.Embedding):
    reset_parameters = Linear.reset_parameters  # GPT._init_weights does it


class Dropout(nn.Dropout):
    def forward(self, x):
        return kernels.dropout(x, self.p, self.training)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout, self.window = layer, config.n_head, config.dropout, config.window
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values in one
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)
        self.qk_norm = RMSNorm() if config.qk_norm else None

    def forward(self, x, rope=None, cache=None):
        B, T, C = x.size()
        qk, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).split([2, 1], dim=2)  # (B, T, 2, nh, hs)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        if rope is not None:
            qk = apply_rotary_emb(qk, rope)
        (q, k), v = qk.unbind(2), v.squeeze(2)
        q, k, v, mask = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None  # (B, nh, T, hs) each
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)  # (B, nh, S, hs)
            q = q.contiguous().to(k.dtype)  # contiguous: Metal's kernel of torch < 2.12 misreads other layouts
        # softmax(q k^T / sqrt(hs)) v, where a position sees only itself and those before it
        y = kernels.causal_attention(q, k, v, self.dropout if self.training else 0.0, self.window, mask)  # as q
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.resid_dropout(self.c_proj(y))


def gelu_tanh(x):
    """The tanh approximation of GELU, off by up to 5e-4; OpenAI's GPT-2 was trained with it."""
    return F.gelu(x, approximate='tanh')


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.act = {'gelu': F.gelu, 'gelu_tanh': gelu_tanh, 'relu2': kernels.relu_squared}[config.mlp]
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, arXiv:2002.05202) with hidden size 8/3 n_embd, so that it costs as much as MLP."""

    def __init__(self, config):
        super().__init__()
        hidden = -(-8 * config.n_embd // 3 // 8) * 8  # a multiple of 8 for speed
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


class GPT(nn.Module):
    """The language model. With init=False the weights are undefined and the caller fills them all."""

    def __init__(self, config, init=True):
        super().__init__()
        if errors := config.validate():
            raise ValueError('; '.join(errors))
        self.config = config
        self.linears = []  # of the blocks, once set_compute_dtype has been called
        self.residual_dtype = None  # None: that of the embeddings
        self.checkpoint_activations = False  # recompute each block in the backward pass instead of storing it
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
        rope = precompute_rope(config.block_size, config.n_embd // config.n_head) if config.pos == 'rope' else None
        self.register_buffer('rope', rope, persistent=False)
        if init:
            self._init_weights()

    @torch.no_grad()
    def _init_weights(self):
        """GPT-2's initialisation: normal, std 0.02; projections into the residual stream divided by sqrt(2 n_layer).

        With RMSNorm these projections and an untied head start at zero, so that each block begins as the identity
        (modded-nanogpt's records 5 and 8).
        """
        zero = self.config.norm == 'rmsnorm'
        for name, p in self.named_parameters():
            if name.endswith('bias') or (name == 'lm_head.weight' and zero):
                nn.init.zeros_(p)
            elif name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.0 if zero else 0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, idx, targets=None, cache=None, return_logits=False, positions=None):
        """Predict the next token at every position of idx (B, T); return (logits, loss).

        Training: targets (B, T), -1 where no loss is wanted, give (None, mean cross-entropy in nats); all logits
        (B, T, V) need not be in memory then. return_logits=True returns them, too. Generation: without targets,
        (logits of the last position (B, 1, V), None). cache: a KVCache with the positions before idx; it grows by T.
        positions: those of idx as a tensor (T,), where they are not to be read from cache.pos; see lib/decode.py.
        Raises ValueError if the context is longer than block_size.
        """
        T, start = idx.size(1), cache.pos if cache is not None else 0
        if start + T > self.config.block_size:
            raise ValueError(f'{start + T} tokens are more than block_size={self.config.block_size}')
        kernels.prepare_casts(self.linears, self.dtype)  # makes kernels.cast faster in small models, nothing else
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.smear is not None:
            x = self._smear(x, cache)
        positions = slice(start, start + T) if positions is None else positions
        rope = None if self.rope is None else self.rope[:, positions].to(self.dtype)
        if rope is None:
            x = x + self.transformer.wpe.weight[positions]
        x = self.transformer.drop(x.to(dtype=self.residual_dtype))  # the residual stream
        for block in self.transformer.h:
            if self.checkpoint_activations and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, use_reentrant=False)
            else:
                x = block(x, rope, cache)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.pos += T
        if targets is None:
            return self._logits(x[:, -1:]), None
        if return_logits:
            logits = self._logits(x)
            return logits, kernels.cross_entropy(logits.flatten(0, 1), targets.flatten())
        # cross_entropy(self._logits(x), targets)
        return None, kernels.linear_cross_entropy(x.flatten(0, 1).to(self.dtype), self.lm_head.weight,
                                                  targets.flatten(), self.config.softcap)

    def _smear(self, x, cache):
        """Add to each embedding in x (B, T, C) a learned fraction of the previous one (modded-nanogpt's record 34).

        The previous token decides most of what follows; without smear the first layer has to learn to attend to it.
        """
        previous = cache.prev_embedding if cache is not None and cache.pos else torch.zeros_like(x[:, :1])
        if cache is not None:
            cache.prev_embedding = x[:, -1:]
        return x + self.smear * torch.cat([previous, x[:, :-1]], dim=1)

    def _logits(self, x):
        return kernels.softcap(self.lm_head(x), self.config.softcap)  # cap * tanh(logits / cap); 0 = off

    # ---- not needed to understand the model -------------------------------------------------------------------------

    def set_compute_dtype(self, dtype, bf16_residual=False):
        """Compute matrix products in `dtype`; the rest is float32, the residual stream too unless bf16_residual."""
        self.residual_dtype = dtype if bf16_residual and dtype == torch.bfloat16 else None
        for module in self.modules():
            if isinstance(module, Linear):
                module.compute_dtype = dtype
        self.linears = [m for m in self.transformer.h.modules() if isinstance(m, Linear) and m.weight.requires_grad]

    @property
    def dtype(self):
        """The dtype of matrix products, and so of keys and values."""
        return self.lm_head.compute_dtype or self.lm_head.weight.dtype

    def get_num_params(self, non_embedding=True):
        """Return the number of parameters; like nanoGPT, without the position embeddings by default."""
        count = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.pos == 'learned':
            count -= self.transformer.wpe.weight.numel()
        return count

    def flops_per_token(self, context=None):
        """Return the FLOPs of the forward and backward pass per token, in contexts of `context` tokens (block_size).

        6 N + 12 L C T (PaLM, arXiv:2204.02311, appendix B). N: all parameters but position embeddings
        and an untied input embedding. 12 L C T: both attention products in full, though the mask makes half unneeded.
        """
        c = self.config
        embedding = 0 if c.tie_weights else self.transformer.wte.weight.numel()
        context = min(context or c.block_size, 2 * c.window or math.inf)  # kernels computes two windows per position
        return 6 * (self.get_num_params() - embedding) + 12 * c.n_layer * c.n_embd * context

    def param_groups(self, weight_decay, muon=False):
        """Return optimizer groups in nanoGPT's order: 2-D parameters with weight decay, then the others without.

        muon: the matrices of the blocks come first, with use_muon=True and `splits`: 3 for the stacked c_attn, else 1.
        """
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        is_matrix = {name: muon and p.dim() == 2 and name.startswith('transformer.h.') for name, p in named}
        groups = [
            dict(params=[p for name, p in named if is_matrix[name]], weight_decay=weight_decay, use_muon=True,
                 splits=[3 if 'c_attn' in name else 1 for name, _ in named if is_matrix[name]]),
            dict(params=[p for name, p in named if p.dim() >= 2 and not is_matrix[name]], weight_decay=weight_decay),
            dict(params=[p for _, p in named if p.dim() < 2], weight_decay=0.0)]
        return [{'use_muon': False, **group} for group in groups if group['params']]
