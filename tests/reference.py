"""The GPT written a second time, from its papers and without a line of model.py: what the tests compare with."""
import math

import torch

OPTIONS = {'bias': (True, False), 'pos': ('learned', 'rope'), 'norm': ('layernorm', 'rmsnorm'),
           'mlp': ('gelu', 'gelu_tanh', 'relu2', 'swiglu'), 'qk_norm': (False, True), 'tie_weights': (True, False),
           'softcap': (0.0, 2.0), 'smear': (False, True), 'window': (0, 3)}


def pairwise():
    """Return option dicts in which every two values of two different options occur together at least once."""
    names = list(OPTIONS)
    missing = {(a, va, b, vb) for i, a in enumerate(names) for b in names[i + 1:] for va in OPTIONS[a]
               for vb in OPTIONS[b]}
    rows = []
    while missing:
        a, va, b, vb = min(missing, key=str)
        row = {a: va, b: vb}
        for name in names:
            if name not in row:  # the value that covers the most missing pairs with what is chosen so far
                row[name] = max(OPTIONS[name], key=lambda value: sum(
                    (x, row[x], name, value) in missing or (name, value, x, row[x]) in missing for x in row))
        missing -= {(x, row[x], y, row[y]) for x in names for y in names}
        rows.append({name: row[name] for name in names})
    return rows


def logits(w, config, idx):
    """Return the logits (B, T, V) of token ids idx (B, T), for weights w: {nanoGPT's parameter name: tensor}."""
    T, hs = idx.size(1), config.n_embd // config.n_head

    def linear(x, name):
        y = x @ w[f'{name}.weight'].T
        return y + w[f'{name}.bias'] if f'{name}.bias' in w else y

    def rms(x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1.1920928955078125e-07).sqrt()

    def norm(x, name):
        if config.norm == 'rmsnorm':
            return rms(x)
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f'{name}.weight'] + w.get(f'{name}.bias', 0)

    def rotated(x):  # the pair (i, i + hs / 2) of position t is a complex number, turned by t * 10000^(-2 i / hs)
        pair = torch.complex(x[..., :hs // 2], x[..., hs // 2:])
        angle = torch.arange(T, dtype=x.dtype)[:, None] * 10000 ** (-torch.arange(0, hs, 2, dtype=x.dtype) / hs)
        pair = pair * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pair.real, pair.imag], -1)

    def attention(x, name):
        q, k, v = linear(x, f'{name}.c_attn').split(config.n_embd, -1)
        heads = []
        for h in range(config.n_head):
            qh, kh, vh = (t[..., h * hs:(h + 1) * hs] for t in (q, k, v))  # (B, T, hs) each
            if config.qk_norm:
                qh, kh = rms(qh), rms(kh)
            if config.pos == 'rope':
                qh, kh = rotated(qh), rotated(kh)
            out = []
            for t in range(T):
                seen = slice(max(0, t + 1 - config.window) if config.window else 0, t + 1)
                weight = ((kh[:, seen] * qh[:, t:t + 1]).sum(-1) / math.sqrt(hs)).softmax(-1)  # (B, positions seen)
                out.append((weight[..., None] * vh[:, seen]).sum(1))
            heads.append(torch.stack(out, 1))
        return linear(torch.cat(heads, -1), f'{name}.c_proj')

    def mlp(x, name):
        h = linear(x, f'{name}.c_fc')
        if config.mlp == 'swiglu':
            gate, value = h.split(h.size(-1) // 2, -1)
            h = gate / (1 + torch.exp(-gate)) * value
        elif config.mlp == 'relu2':
            h = h.clamp(min=0) ** 2
        elif config.mlp == 'gelu_tanh':
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
        else:
            h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
        return linear(h, f'{name}.c_proj')

    x = w['transformer.wte.weight'][idx]
    if config.smear:
        x = torch.stack([x[:, 0], *(x[:, t] + w['smear'] * x[:, t - 1] for t in range(1, T))], 1)
    if config.pos == 'learned':
        x = x + w['transformer.wpe.weight'][:T]
    for layer in range(config.n_layer):
        block = f'transformer.h.{layer}'
        x = x + attention(norm(x, f'{block}.ln_1'), f'{block}.attn')
        x = x + mlp(norm(x, f'{block}.ln_2'), f'{block}.mlp')
    head = w['transformer.wte.weight'] if config.tie_weights else w['lm_head.weight']
    y = norm(x, 'transformer.ln_f') @ head.T
    return config.softcap * torch.tanh(y / config.softcap) if config.softcap else y


def loss(w, config, idx, targets):
    """Return the mean cross-entropy in nats over the targets (B, T) that are not -1."""
    logp = logits(w, config, idx).log_softmax(-1)
    kept = targets >= 0
    return -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0][kept].mean()
