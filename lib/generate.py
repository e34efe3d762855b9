"""From a model to text: the rules that pick a token, generation with a KV cache, and text that is safe to print.

Shapes: B samples, all of one prompt, V tokens the tokenizer knows (a model may be padded with more), K candidates.
"""
import codecs
from itertools import islice

import torch

from configurator import UserError
from model import KVCache

KEEP = 1 / 2  # share of a full context that stays when it slides; 3/4 and 7/8 are slower and save no nats
GLANCE = 16  # tokens between two looks at what came out, since each look waits for the device


def penalize(logits, seen, penalty):
    """Make the tokens in `seen` (B, V), bool, less likely where penalty > 1: CTRL, arXiv:1909.05858, section 4.1.

    Negative logits are multiplied; the paper's division would make those tokens likelier.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def narrow(logits, top_k, top_p):
    """Return what top-k, then top-p leave of logits (B, V) as (logits, ids), both (B, K), the likeliest first.

    top_p keeps the smallest set whose probabilities reach it (nucleus sampling, arXiv:1904.09751), so one at least,
    and sets the rest to -inf. With both off (0 or at least V; 1) the logits return as they are and ids is None.
    """
    ids = None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    if top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
    return logits, ids


def draw(logits, generator):
    """Draw an index (B,) from each row of logits (B, K): one uniform number a row, looked up in the cumulated sum."""
    cdf = logits.softmax(-1).cumsum(-1)
    u = torch.rand(len(cdf), 1, device=cdf.device, generator=generator) * cdf[:, -1:]  # below the last entry
    return (cdf <= u).sum(-1)  # never an index of probability 0, whose entry equals the one before


def pick(logits, seen=None, generator=None, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """Return the next ids (B,) by logits (B, V), -1 in a row that holds a NaN or overflowed.

    seen: (B, V) bool, the tokens so far, which only the penalty needs. temperature 0 is greedy; top_k 0, top_p 1
    and repetition_penalty 1 are off.
    """
    if seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    best, ids = logits.max(-1)
    if temperature > 0:
        logits, candidates = narrow(logits / temperature, top_k, top_p)
        ids = draw(logits, generator)
        if candidates is not None:
            ids = candidates.gather(1, ids[:, None])[:, 0]
    return ids.masked_fill(~best.isfinite(), -1)


def _read_once(model, prompt, num_samples, dtype):
    """Let the model read prompt (1, T) a single time; return (logits (1, 1, V), a KVCache of num_samples rows)."""
    one = KVCache(model.config, 1, prompt.device, dtype)
    logits, _ = model(prompt, cache=one)
    if num_samples == 1:
        return logits, one
    cache = KVCache(model.config, num_samples, prompt.device, dtype)
    for kept, read in zip(cache.k + cache.v, one.k + one.v):  # (B, nh, S, hs) and (1, nh, S, hs), of each layer
        kept[:, :, :one.pos] = read[:, :, :one.pos]
    cache.pos, previous = one.pos, one.prev_embedding
    cache.prev_embedding = None if previous is None else previous.expand(num_samples, -1, -1)
    return logits, cache


@torch.inference_mode()
def generate(model, prompt, num_samples, max_new_tokens, *, valid_vocab=None, seed=1337, **rules):
    """Yield the next token of all samples, (B,) ids on the model's device, max_new_tokens times; see `pick` for rules.

    model: a GPT in eval mode. prompt: a list of at least one id, of which the model reads the last block_size.
    valid_vocab: ids from here on are never picked. seed: of these samples alone. When the context is full, its newest
    KEEP is read anew, and so on. Nothing waits for the device; a -1 says that the model's output is not a number.
    """
    device, block_size = model.lm_head.weight.device, model.config.block_size
    dtype = torch.float32 if device.type == 'cpu' else model.dtype  # one query in bfloat16 is slower on a CPU
    generator = torch.Generator(device).manual_seed(seed)
    T, kept = len(prompt), max(1, int(KEEP * block_size))
    idx = torch.zeros(num_samples, T + max_new_tokens, dtype=torch.long, device=device)  # (B, T + new)
    idx[:, :T] = torch.tensor(prompt, device=device)
    seen, cache = None, None
    if rules.get('repetition_penalty', 1.0) != 1:
        V = valid_vocab or model.config.vocab_size
        seen = torch.zeros(num_samples, V, dtype=torch.bool, device=device).scatter_(1, idx[:, :T], True)
    for end in range(T, T + max_new_tokens):
        if cache is None:
            logits, cache = _read_once(model, idx[:1, max(0, T - block_size):T], num_samples, dtype)
        elif cache.pos < block_size:
            logits, _ = model(idx[:, end - 1:end], cache=cache)
        else:
            cache.pos = 0
            logits, _ = model(idx[:, end - kept:end], cache=cache)
        logits = logits[:, -1, :valid_vocab].float().expand(num_samples, -1)  # (B, V)
        ids = pick(logits, seen, generator, **rules)
        idx[:, end] = ids.clamp(min=0)
        if seen is not None:
            seen.scatter_(1, idx[:, end:end + 1], True)
        yield ids


class Tail:
    """The text of one sample as it grows: whole characters only, and nothing of the stop string."""

    def __init__(self, tok, stop=''):
        self.tok, self.stop, self.done = tok, stop, False
        self.utf8, self.held = codecs.getincrementaldecoder('utf-8')('replace'), ''

    def feed(self, ids, last=False):
        """Return the text that is now certain; sets `done` at the stop string, at end-of-text, or if `last`."""
        self.done = last
        if self.tok.eot in ids:
            ids, self.done = ids[:ids.index(self.tok.eot)], True
        text = self.held + self.utf8.decode(self.tok.decode_bytes(ids))
        if self.stop and self.stop in text:
            text, self.done = text[:text.index(self.stop)], True
        may_stop = 0  # length of the longest end of the text that begins the stop string
        if not self.done:
            lengths = range(min(len(self.stop) - 1, len(text)), 0, -1)
            may_stop = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        self.held = text[len(text) - may_stop:]
        return text[:len(text) - may_stop]


def complete(model, tok, prompt, num_samples, max_new_tokens, *, stop='', live=False, **rules):
    """Yield (sample, new text, whether it is its last) until every sample is done; see `generate` for the rules.

    prompt: ids. stop: text that ends a sample and is left out, as is a character cut off at the end; '' is none.
    live: look at each token as it comes. UserError where the model's output is not a number.
    """
    tails, left = [Tail(tok, stop) for _ in range(num_samples)], max_new_tokens
    tokens = generate(model, prompt, num_samples, max_new_tokens, valid_vocab=tok.vocab_size, **rules)
    while not all(tail.done for tail in tails):
        steps = list(islice(tokens, 1 if live else GLANCE))
        left -= len(steps)
        rows = torch.stack(steps, dim=1).tolist() if steps else [[]] * num_samples
        for i, (tail, ids) in enumerate(zip(tails, rows)):
            if tail.done:
                continue
            if -1 in ids:
                raise UserError(f'the model computes NaN or infinity in {model.dtype} on '
                                f'{model.lm_head.weight.device}; try --dtype=float32 or --device=cpu')
            yield i, tail.feed(ids, last=left == 0), tail.done
