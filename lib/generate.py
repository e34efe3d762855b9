"""From a model to text: rules for choosing a token, generation with a KV cache, and decoding as the text grows.

Shapes: B samples of the same prompt, V tokens of the tokenizer (the model may be padded to more), K candidates.
"""
import codecs
import math
from itertools import islice

import numpy as np
import torch

from configurator import UserError
from lib.decode import Reader, make_cache
from lib.machine import device

KEEP_ON_SLIDE = 1 / 2  # fraction of a full context that is kept when it slides; more is slower and no more accurate
SYNC_EVERY = 16  # tokens between two reads of the output; each read synchronises with the GPU


def apply_repetition_penalty(logits, seen, penalty):
    """Make the tokens in `seen` (B, V), bool, less likely if penalty > 1 (CTRL, arXiv:1909.05858, section 4.1).

    Negative logits are multiplied; the paper's division would make those tokens more likely.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_top_k_top_p(logits, top_k, top_p):
    """Apply top-k, then top-p to logits (B, V); return (logits, ids), both (B, K), the most likely first.

    top_p keeps the smallest set whose probabilities sum to it (nucleus sampling, arXiv:1904.09751), at least one
    token, and sets the rest to -inf. With both off (0 or >= V; 1) the logits are unchanged and ids is None.
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


def filter_min_p(logits, min_p):
    """Set the tokens whose probability is below min_p times that of the most likely one to -inf (arXiv:2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -torch.inf)


def forbid_repeated_ngrams(logits, idx, n):
    """Set the tokens that would complete an n-gram of `idx` a second time to -inf.

    logits: (B, V). idx: (B, T), the tokens so far. If that forbids every token, the row is unchanged.
    """
    if idx.size(1) < n:
        return logits
    ngrams = idx.unfold(1, n, 1)  # (B, T - n + 1, n)
    newest = idx[:, None, idx.size(1) - n + 1:]  # (B, 1, n - 1): what the next token would complete
    repeats = (ngrams[:, :, :-1] == newest).all(-1)  # (B, T - n + 1)
    forbidden = torch.zeros_like(logits).scatter_add_(1, ngrams[:, :, -1], repeats.to(logits.dtype)) > 0
    return logits.masked_fill(forbidden & ~forbidden.all(-1, keepdim=True), -torch.inf)


def sample_index(logits, uniform):
    """Return an index (B,) drawn from each row of logits (B, K) with one number in [0, 1) per row: uniform (B,)."""
    cdf = logits.softmax(-1).cumsum(-1)
    u = uniform[:, None] * cdf[:, -1:]  # below the last entry
    return (cdf <= u).sum(-1).clamp(max=logits.size(-1) - 1)  # an entry of probability 0 equals the previous one


def sample_next_token(logits, uniform=None, seen=None, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
                      repetition_penalty=1.0):
    """Return the next ids (B,) for logits (B, V); -1 in a row that holds NaN or overflowed.

    uniform: (B,), see sample_index. seen: (B, V) bool, the tokens so far, for the penalty. temperature 0 is greedy;
    top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off.
    """
    if seen is not None:
        logits = apply_repetition_penalty(logits, seen, repetition_penalty)
    best, ids = logits.max(-1)
    if temperature > 0:
        logits = logits / temperature
        if min_p > 0:
            logits = filter_min_p(logits, min_p)
        logits, candidates = filter_top_k_top_p(logits, top_k, top_p)
        ids = sample_index(logits, uniform)
        if candidates is not None:
            ids = candidates.gather(1, ids[:, None])[:, 0]
    return ids.masked_fill(~best.isfinite(), -1)


def random_numbers(seed, num_samples, n):
    """Return uniform numbers (num_samples, n) in [0, 1). Row i depends on (seed, i) only, not on the other samples."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, i]).random(n, np.float32)
                                      for i in range(num_samples)]))


def prefill(model, prompt, num_samples, dtype):
    """Let the model read prompt (1, T) once; return (logits (1, 1, V), a KVCache of num_samples rows)."""
    one = make_cache(model, 1, dtype)
    logits, _ = model(prompt, cache=one)
    if num_samples == 1:
        return logits, one
    cache = make_cache(model, num_samples, dtype)
    for target, source in zip(cache.k + cache.v, one.k + one.v):  # (B, nh, S, hs) and (1, nh, S, hs) of each layer
        target[:, :, :one.pos] = source[:, :, :one.pos]
    cache.pos = one.pos
    if one.prev_embedding is not None:
        cache.prev_embedding = one.prev_embedding.expand(num_samples, -1, -1)
    return logits, cache


@torch.inference_mode()
def generate(model, prompt, num_samples, max_new_tokens, *, valid_vocab=None, seed=1337, no_repeat_ngram=0, **rules):
    """Yield the next token of all samples, (B,) ids on the model's device, max_new_tokens times.

    model: a GPT in eval mode. prompt: a list of at least one id; the model reads the last block_size. valid_vocab:
    ids from here on are never chosen. no_repeat_ngram: no sequence of this many tokens occurs twice, prompt included;
    0 = off. rules: see sample_next_token. When the context is full, its newest
    KEEP_ON_SLIDE is read again. Nothing synchronises with the device; a -1 means that the model's output is not finite.
    """
    device, block_size = model.lm_head.weight.device, model.config.block_size
    dtype = torch.float32 if device.type == 'cpu' else model.dtype  # a single query in bfloat16 is slower on a CPU
    uniform = random_numbers(seed, num_samples, max_new_tokens).to(device)
    T, kept = len(prompt), max(1, int(KEEP_ON_SLIDE * block_size))
    idx = torch.zeros(num_samples, T + max_new_tokens, dtype=torch.long, device=device)  # (B, T + new)
    idx[:, :T] = torch.tensor(prompt, device=device)
    seen, cache = None, None
    if rules.get('repetition_penalty', 1.0) != 1:
        V = valid_vocab or model.config.vocab_size
        seen = torch.zeros(num_samples, V, dtype=torch.bool, device=device).scatter_(1, idx[:, :T], True)
    for end in range(T, T + max_new_tokens):
        if cache is None:
            logits, cache = prefill(model, idx[:1, max(0, T - block_size):T], num_samples, dtype)
            read = Reader(model, cache)
        elif cache.pos < block_size:
            logits = read(idx[:, end - 1:end])
        else:
            cache.pos = 0
            logits = read(idx[:, end - kept:end])
        logits = logits[:, -1, :valid_vocab].float().expand(num_samples, -1)  # (B, V)
        if no_repeat_ngram:
            logits = forbid_repeated_ngrams(logits, idx[:, :end], no_repeat_ngram)
        ids = sample_next_token(logits, uniform[:, end - T], seen, **rules)
        idx[:, end] = ids.clamp(min=0)
        if seen is not None:
            seen.scatter_(1, idx[:, end:end + 1], True)
        yield ids


class StreamDecoder:
    """The text of one sample as it grows: only whole characters, and nothing of the stop string."""

    def __init__(self, tok, stop=''):
        self.tok, self.stop, self.done = tok, stop, False
        self.utf8, self.pending = codecs.getincrementaldecoder('utf-8')('replace'), ''

    def feed(self, ids, last=False):
        """Return the text that is now certain; sets `done` at the stop string, at end-of-text, or if `last`."""
        self.done = last
        if self.tok.eot in ids:
            ids, self.done = ids[:ids.index(self.tok.eot)], True
        text = self.pending + self.utf8.decode(self.tok.decode_bytes(ids))
        if self.stop and self.stop in text:
            text, self.done = text[:text.index(self.stop)], True
        n_pending = 0  # the longest end of the text that may be the beginning of the stop string
        if not self.done:
            lengths = range(min(len(self.stop) - 1, len(text)), 0, -1)
            n_pending = next((n for n in lengths if text.endswith(self.stop[:n])), 0)
        self.pending = text[len(text) - n_pending:]
        return text[:len(text) - n_pending]


def generate_text(model, tok, prompt, num_samples, max_new_tokens, *, stop='', live=False, **rules):
    """Yield (sample, new text, whether it is its last) until every sample is done; see `generate` for the rules.

    prompt: ids. stop: a text that ends a sample and is not part of it; '' = none. A character that the end of the
    sample cuts off is left out. live: read each token as it comes. UserError if the model's output is not finite.
    """
    decoders, left = [StreamDecoder(tok, stop) for _ in range(num_samples)], max_new_tokens
    tokens = generate(model, prompt, num_samples, max_new_tokens, valid_vocab=tok.vocab_size, **rules)
    while not all(decoder.done for decoder in decoders):
        steps = list(islice(tokens, 1 if live else SYNC_EVERY))
        left -= len(steps)
        rows = torch.stack(steps, dim=1).tolist() if steps else [[]] * num_samples
        for i, (decoder, ids) in enumerate(zip(decoders, rows)):
            if decoder.done:
                continue
            if -1 in ids:
                raise UserError(f'the model computes NaN or infinity in {model.dtype} on '
                                f'{model.lm_head.weight.device}; try --dtype=float32 or --device=cpu')
            yield i, decoder.feed(ids, last=left == 0), decoder.done


def sample_text(model, tok, data, number, seed, warn):
    """Return 200 generated tokens as text for the log of a training run; '' after a warning if the model cannot.

    If the data is dialogues: validation dialogue `number` up to its first answer, and the model's answer. Uses its own
    random numbers, so training is unaffected. The model is in training mode before and after.
    """
    prompt, shown, stop = tok.start_ids, '', ''
    if data.marks:
        prompt, stop = data.val.prompt(number), data.marks['end']
        shown = tok.decode(prompt)
    model.eval()
    try:
        with device.without_cudnn_attention():
            pieces = generate_text(model, tok, prompt, 1, 200, stop=stop, seed=seed, temperature=0.8, top_k=200)
            return shown + ''.join(text for _, text, _ in pieces)
    except UserError as error:
        warn(f'no sample: {error.message}')
        return ''
    finally:
        model.train()
