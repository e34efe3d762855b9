"""What the page shows: next-token probabilities, generated text, surprise, attention, chat.

Shapes: B rows, T tokens, V tokens that the tokenizer knows. lib/generate.py picks the tokens.
"""
import codecs
import math
import time

import torch

from configurator import UserError
from lib import generate
from lib.chat import open_conversation
from lib.play import attention
from lib.text import dialogue
from lib.text.dataset import sliding_windows
from lib.text.prompt import encode_text

BARS = 20  # tokens of `likely`
OTHERS = 8  # alternatives reported with each written token
FLUSH = 0.08  # seconds between two parts of a streamed text; each part costs about one token of a small model
MOST_LOOK = 192  # tokens of an attention map


def encode(opened, text, drop_unknown=False):
    """Return the ids of a text; '<|endoftext|>' in it becomes that token if the tokenizer has it.

    drop_unknown: leave out characters that a character tokenizer lacks instead of raising TextError.
    """
    tok = opened.tok
    if drop_unknown and tok.kind == 'char':
        text = ''.join(c for c in text if c in tok.chars)
    return encode_text(text, tok)


def prompt_ids(opened, prompt, after):
    """Return the ids of a prompt, as in sample.py, followed by `after`; UserError if an id in it is unknown."""
    ids = encode(opened, prompt) or opened.tok.start_ids
    wrong = [i for i in after if not 0 <= i < opened.tok.vocab_size]
    if wrong:
        raise UserError(f'token id {wrong[0]} is outside the vocabulary of {opened.tok.vocab_size:,}')
    return ids + after


def label(opened, i):
    """Return the text of token i, or its bytes in hexadecimal if they are an incomplete character."""
    labels = opened.cache.setdefault('labels', {})
    if i not in labels:
        raw = opened.tok.decode_bytes([i])
        try:
            labels[i] = opened.tok.separator if i == opened.tok.eot else raw.decode('utf-8')
        except UnicodeDecodeError:
            labels[i] = f'<{raw.hex(" ").upper()}>'
    return labels[i]


class Pieces:
    """Groups tokens into pieces of whole characters; a byte or BPE token may be a part of a character."""

    def __init__(self, opened):
        self.opened, self.utf8 = opened, codecs.getincrementaldecoder('utf-8')('replace')
        self.text, self.tokens = '', []

    def add(self, i, about):
        """Add token i; return (text, [about of each of its tokens]) when the characters are complete, else None."""
        mark = i == self.opened.tok.eot
        self.text += self.utf8.decode(b'' if mark else self.opened.tok.decode_bytes([i]), final=mark)
        self.tokens.append(about)
        if self.utf8.getstate()[0]:
            return None
        whole, self.text, self.tokens = (self.text, self.tokens), '', []
        return whole

    def rest(self):
        """Return a last, incomplete piece with U+FFFD as its text; None if the last character is complete."""
        text, tokens = self.text + self.utf8.decode(b'', final=True), self.tokens
        self.text, self.tokens = '', []
        return (text, tokens) if tokens else None


def probabilities(logits, seen, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0):
    """Return (before, drawn, in_k), each (B, V): the distributions that lib/generate.py makes of logits (B, V).

    before: after penalty and temperature (0 counts as 1). drawn: also after top-k and top-p; the one to draw from. Rows
    of both sum to 1. in_k: bool, the tokens that top-k keeps. seen: (B, V) bool, the tokens to penalise, or None.
    """
    if seen is not None:
        logits = generate.apply_repetition_penalty(logits, seen, repetition_penalty)
    scaled = logits / (temperature or 1.0)
    before = scaled.softmax(-1)
    if temperature == 0:
        drawn = torch.zeros_like(before).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
        return before, drawn, drawn > 0
    left, ids = generate.filter_top_k_top_p(scaled, top_k, top_p)
    if ids is None:
        return before, before, torch.ones_like(before, dtype=torch.bool)
    drawn = torch.zeros_like(before).scatter_(1, ids, left.softmax(-1))
    return before, drawn, torch.zeros_like(before, dtype=torch.bool).scatter_(1, ids, True)


def _seen(ids, V, rules, device):
    """Return the tokens in `ids` as (1, V) bool, or None if there is no repetition penalty."""
    if rules.get('repetition_penalty', 1.0) == 1:
        return None
    return torch.zeros(1, V, dtype=torch.bool, device=device).scatter_(1, torch.tensor([ids], device=device), True)


@torch.inference_mode()
def likely(opened, prompt, after, rules):
    """Return {'bars', 'rest', ...}: the BARS likeliest next tokens, and the sum of all others.

    In a bar, p is the probability to draw the token, `before` is its probability before top-k and top-p, and cut names
    the rule that excludes it, or is ''. All p, that of `rest` included, sum to 1. Logits are reused while only the
    rules change.
    """
    model, V = opened.model, opened.tok.vocab_size
    device = model.lm_head.weight.device
    ids = prompt_ids(opened, prompt, after)
    context = tuple(ids[-model.config.block_size:])
    if opened.cache.get('context') != context:
        logits, _ = model(torch.tensor([context], device=device))
        opened.cache['context'], opened.cache['logits'] = context, logits[:, -1, :V].float()
    before, drawn, in_k = probabilities(opened.cache['logits'], _seen(ids, V, rules, device), **rules)
    if not bool(before.isfinite().all()):
        raise UserError('the model computes NaN or infinity; try --dtype=float32')
    top = before[0].topk(min(BARS, V)).indices
    rows = zip(top.tolist(), before[0, top].tolist(), drawn[0, top].tolist(), in_k[0, top].tolist())
    second = 'temperature' if rules.get('temperature') == 0 else 'top_k'
    bars = [{'id': i, 'text': label(opened, i), 'before': b, 'p': p, 'end': i == opened.tok.eot,
             'cut': '' if p > 0 else 'top_p' if k else second} for i, b, p, k in rows]
    rest = torch.ones(V, dtype=torch.bool, device=device).index_fill_(0, top, False)
    return {'bars': bars, 'context': len(context), 'tokens': len(ids), 'version': opened.version,
            'rest': {'count': int(rest.sum()), 'p': float(drawn[0, rest].sum()), 'before': float(before[0, rest].sum()),
                     'kept': int((drawn[0, rest] > 0).sum())}}


def write(opened, prompt, after, max_new_tokens, seed, rules):
    """Yield {'pieces': [(text, tokens)]} as the text grows, then {'done': ...}. It is the text that sample.py writes.

    A token is [id, p, [[id, text, before, p] of the OTHERS likeliest tokens]], with `before` and p as in `likely`. The
    tokens in `after` come first, as [id]. A hook records the logits, so that generate() draws as it does in sample.py.
    """
    tok, model, began = opened.tok, opened.model, time.perf_counter()
    ids, logits = prompt_ids(opened, prompt, after), []
    seen = _seen(ids, tok.vocab_size, rules, model.lm_head.weight.device)
    pieces, count, ended = Pieces(opened), 0, False
    steps = generate.generate(model, ids, 1, max_new_tokens, valid_vocab=tok.vocab_size, seed=seed, **rules)
    hook = model.register_forward_hook(lambda module, args, out: logits.append(out[0][:, -1, :tok.vocab_size]))
    try:
        given = [pieces.add(i, [i]) for i in after]
        yield {'version': opened.version, 'prompt_tokens': len(ids), 'pieces': _whole(given)}
        while not ended:
            new, until = [], time.perf_counter() + FLUSH
            for step in steps:
                new.append(step)
                if time.perf_counter() > until:
                    break
            if not new:
                break
            new = torch.stack(new, 1)  # (1, n)
            found = []
            for i, about in zip(new[0].tolist(), _beside(opened, torch.cat(logits).float(), seen, new, rules)):
                count += 1
                if i == tok.eot:
                    ended = True
                    break
                found.append(pieces.add(i, about))
            logits.clear()
            yield {'pieces': _whole(found)}
    finally:
        hook.remove()
        steps.close()
    yield {'done': {'tokens': count, 'ended': ended, 'seconds': time.perf_counter() - began}}


@torch.inference_mode()
def _beside(opened, logits, seen, new, rules):
    """Return `write`'s record of each token of `new` (1, n), drawn from logits (n, V); update `seen` (1, V)."""
    if not bool(logits.isfinite().any(-1).all()) or int(new.min()) < 0:
        raise UserError(f'the model computes NaN or infinity in {opened.model.dtype}; try --dtype=float32')
    rows = seen
    if seen is not None:
        rows = seen.repeat(new.size(1), 1)
        for row, i in enumerate(new[0].tolist()):
            rows[row + 1:, i] = True
        seen.scatter_(1, new, True)
    before, drawn, _ = probabilities(logits, rows, **rules)
    likeliest, top = before.topk(min(OTHERS, before.size(-1)))
    kept = drawn.gather(1, top).tolist()
    own = drawn.gather(1, new.T)[:, 0].tolist()
    return [[i, round(p, 5), [[j, label(opened, j), round(b, 5), round(d, 5)] for j, b, d in zip(*row)]]
            for i, p, *row in zip(new[0].tolist(), own, top.tolist(), likeliest.tolist(), kept)]


def read(opened, text, drop_unknown=False):
    """Yield {'pieces': [(text, [(id, bits) of its tokens])]} over a text, then {'done': totals}.

    bits: the surprise, -log2 of the probability of the token; None for the first, which is not predicted. Windows are
    those of evaluate.py --stride=block_size / 2, so a token has at least half a context before it.
    """
    ids = encode(opened, text, drop_unknown)
    if not ids:
        raise UserError('there is no text to read')
    device, total, pieces = opened.model.lm_head.weight.device, 0.0, Pieces(opened)
    yield {'version': opened.version, 'tokens': len(ids), 'pieces': _whole([pieces.add(ids[0], (ids[0], None))])}
    block_size = opened.model.config.block_size
    for start, length, fresh in sliding_windows(len(ids), block_size, max(1, block_size // 2)):
        part = torch.tensor([ids[start:start + length + 1]], device=device)
        bits = _surprise(opened.model, part[:, :-1], part[:, 1:], fresh)
        if not all(map(math.isfinite, bits)):
            raise UserError('the model computes NaN or infinity; try --dtype=float32')
        total += sum(bits)
        fresh_ids = ids[start + length + 1 - fresh:start + length + 1]
        yield {'pieces': _whole([pieces.add(i, (i, round(b, 3))) for i, b in zip(fresh_ids, bits)])}
    n_bytes = len(opened.tok.decode_bytes(ids)) if drop_unknown else len(text.encode('utf-8'))
    yield {'pieces': _whole([pieces.rest()])}
    yield {'done': {'tokens': len(ids), 'bytes': n_bytes, 'bits': total, 'bpb': total / n_bytes if n_bytes else None}}


def _whole(pieces):
    return [piece for piece in pieces if piece]


@torch.inference_mode()
def _surprise(model, idx, targets, fresh):
    """Return the surprise in bits of the last `fresh` of targets (1, T), as a list."""
    logits = model(idx, targets, return_logits=True)[0][0, -fresh:].float()  # (fresh, V)
    nats = torch.nn.functional.cross_entropy(logits, targets[0, -fresh:], reduction='none')
    return (nats / math.log(2)).tolist()


def look(opened, text, layer, head, drop_unknown=False):
    """Return {'tokens', 'weights', 'maps'}: the attention of a head over a text's first MOST_LOOK tokens.

    weights: (T, T), rows sum to 1, as base64 of float32. maps: thumbnails of all heads, (n_layer, n_head, side, side),
    as base64 of bytes.
    """
    config = opened.model.config
    ids = encode(opened, text, drop_unknown)
    most = min(MOST_LOOK, config.block_size)
    if not ids:
        raise UserError('there is no text to look at')
    if not (0 <= layer < config.n_layer and 0 <= head < config.n_head):
        raise UserError(f'layer {layer} and head {head}: this model has {config.n_layer} layers of {config.n_head} '
                        'heads, counted from 0')
    shown = ids[:most]
    key = ('attention', tuple(shown))
    if opened.cache.get('look') != key:
        opened.cache['weights'], opened.cache['look'] = attention.weights(opened.model, shown), key
    found = opened.cache['weights']  # (n_layer, nh, T, T)
    return {'tokens': [label(opened, i) for i in shown], 'left_out': len(ids) - len(shown), 'layer': layer,
            'head': head, 'layers': config.n_layer, 'heads': config.n_head, 'version': opened.version,
            'weights': attention.packed(found[layer, head]), **attention.maps(found)}


def chat(opened, turns, max_new_tokens, seed, rules):
    """Yield {'text': ...} as the answer grows, then {'done': ...}: what sample.py --chat answers at this turn.

    turns: [(role, text)], user and assistant alternating, user last.
    """
    conversation = open_conversation(opened.model, opened.tok, opened.state, max_new_tokens=max_new_tokens, seed=seed,
                                     **rules)
    said = [dialogue.clean(text) for _, text in turns]
    conversation.exchanges = [pair for pair in zip(said[:-1:2], said[1::2]) if pair[1]]
    conversation.n_answers = len(turns) // 2
    yield {'version': opened.version}
    for text in conversation.answer(said[-1]):
        if text:
            yield {'text': text}
    yield {'done': {'dropped': conversation.dropped}}
