"""How much of a generated text is copied from the training text: n-grams and the longest copied span.

Some overlap is normal: a text by the same author also shares n-grams with the training text. So the same numbers are
computed for held-out text, as a reference. Everything works on token ids, numpy only.
"""
import numpy as np

N_GRAMS = (5, 10, 20)  # tokens
MOST = 50_000_000  # training tokens that are compared with, from the beginning
_CHUNK = 1 << 21  # training tokens hashed at a time
_BASE = np.uint64(0x9e3779b97f4a7c15)  # odd, so it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(0x9e3779b97f4a7c15, -1, 1 << 64))


class Hashes:
    """Hashes of all windows of `tokens`, of any length, each in a constant number of numpy operations.

    The hash of a window is a polynomial in _BASE of its scrambled ids, modulo 2^64, from prefix sums.
    """

    def __init__(self, tokens):
        ids = np.asarray(tokens).astype(np.uint64)
        with np.errstate(over='ignore'):
            ids = (ids + np.uint64(1)) * np.uint64(0xbf58476d1ce4e5b9)
            ids ^= ids >> np.uint64(29)
            powers = np.multiply.accumulate(np.full(len(ids), _BASE))
            self.inverse = np.multiply.accumulate(np.full(len(ids), _INVERSE))
            self.prefix = np.concatenate([np.zeros(1, np.uint64), np.add.accumulate(ids * powers)])

    def of(self, length):
        """Return the hashes (len(tokens) - length + 1,) of the windows with this many tokens; none if too short."""
        n = len(self.prefix) - length
        if n <= 0:
            return np.zeros(0, np.uint64)
        with np.errstate(over='ignore'):
            return (self.prefix[length:] - self.prefix[:n]) * self.inverse[:n]


class TrainingText:
    """The training tokens, as something to look windows up in."""

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens[:MOST])
        # consecutive chunks overlap by a chunk's length, so a window of up to _CHUNK tokens is whole in one of them
        starts = range(0, max(1, len(self.tokens) - _CHUNK), _CHUNK) if len(self.tokens) > 2 * _CHUNK else [0]
        self.chunks = [(start, Hashes(self.tokens[start:start + 2 * _CHUNK])) for start in starts]

    def found(self, hashes, length):
        """Return which of `hashes` (K,) of windows of `length` tokens occur in the training text, (K,) bool."""
        found = np.zeros(len(hashes), bool)
        table = np.zeros(1 << 20, bool)  # of the first 20 bits: rules out nearly all of the training text quickly
        table[hashes >> np.uint64(44)] = True
        for _, chunk in self.chunks:
            windows = chunk.of(length)
            found |= np.isin(hashes, windows[table[windows >> np.uint64(44)]])
        return found

    def position(self, window):
        """Return where the training text has exactly `window` (T,) for the first time, -1 if nowhere."""
        wanted = Hashes(window).of(len(window))[0]
        for start, chunk in self.chunks:
            for at in np.flatnonzero(chunk.of(len(window)) == wanted):
                if np.array_equal(self.tokens[start + at:start + at + len(window)], window):  # not only the hash
                    return int(start + at)
        return -1


def copied_fraction(texts, training, n):
    """Return the fraction of the n-grams of `texts` that occur in the training text; nan if there are none.

    texts: arrays of token ids. training: a TrainingText.
    """
    hashes = np.concatenate([Hashes(text).of(n) for text in texts] or [np.zeros(0, np.uint64)])
    return float(training.found(hashes, n).mean()) if len(hashes) else float('nan')


def longest_copied(texts, training):
    """Return (length, number of the text, where in it, where in the training text) of the longest copied span.

    Lengths and places in tokens; (0, 0, 0, 0) if not a single token is copied. A binary search: if a span is copied,
    each shorter part of it is copied too.
    """
    hashes, best = [Hashes(text) for text in texts], (0, 0, 0, 0)
    low, high = 0, max((len(text) for text in texts), default=0)
    while low < high:
        length = (low + high + 1) // 2
        of_each = [h.of(length) for h in hashes]
        found = np.flatnonzero(training.found(np.concatenate(of_each), length))
        if not len(found):
            high = length - 1
            continue
        ends = np.cumsum([len(windows) for windows in of_each])
        number = int(np.searchsorted(ends, found[0], side='right'))
        at = int(found[0] - (ends[number - 1] if number else 0))
        place = training.position(np.asarray(texts[number][at:at + length]))
        low, best = length, (length, number, at, place)
    return best


def report(samples, held_out, tokens, decode):
    """Return lines that say how much of `samples` is copied from the training `tokens`, next to held-out real text.

    samples, held_out: arrays of token ids. decode: from ids to text, for the longest span.
    """
    training = TrainingText(tokens)
    lines = ['copied from the training text    samples   real held-out text']
    for n in N_GRAMS:
        of_samples, of_real = (copied_fraction(texts, training, n) for texts in (samples, held_out))
        lines.append(f'  sequences of {n:>2} tokens         {of_samples:>8.1%}   {of_real:>8.1%}')
    spans = [longest_copied(texts, training) for texts in (samples, held_out)]
    lines.append(f'  longest span, in tokens        {spans[0][0]:>8,}   {spans[1][0]:>8,}')
    length, number, at, place = spans[0]
    if length:
        text = decode(np.asarray(samples[number][at:at + length]))
        lines.append(f'longest span: sample {number + 1} from token {at:,}, training text from token {place:,}:')
        lines.append(f'  {text[:200]!r}' + f' ... ({len(text):,} characters)' * (len(text) > 200))
    if len(tokens) > MOST:
        lines.append(f'compared with the first {MOST:,} of {len(tokens):,} training tokens')
    return lines
