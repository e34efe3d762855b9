"""From .bin files to batches, in an order that is a pure function.

Which tokens training sample number g contains depends on (seed, g) only: not on the number of ranks, resumes or
evaluations, nor on a library's random state. So there is no reading position that could be lost.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from lib.text import data_folder


@dataclass
class Split:
    """One .bin file. n_bytes: the UTF-8 bytes of its text, 0 if unknown."""
    path: Path
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    n_bytes: int
    sha256: str
    vocab_size: int

    def __len__(self):
        return len(self.tokens)

    def batch(self, starts, block_size):
        """Return (idx, targets), each (B, T) int64, of the windows that begin at `starts` (B,).

        idx: block_size tokens from each start. targets: the same, shifted by one. UserError if a token is outside the
        vocabulary, or if the file was truncated since it was opened.
        """
        if isinstance(self.tokens, np.memmap) and self.path.stat().st_size < self.tokens.nbytes:
            raise UserError(f'{self.path} was truncated while it was being read; prepare the dataset again')
        ids = self.tokens[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
        if ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise UserError(f'{self.path.name} contains token {ids[row, column]} at position {starts[row] + column}, '
                            f'vocab_size is {self.vocab_size}; prepare the dataset again')
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def bits_per_byte(self, loss, n_targets):
        """Return `loss` in bits per byte of the text, or None if its size in bytes is unknown.

        loss: mean nats per target. n_targets: how many targets the loss stands for; len(self) - 1 after a pass over
        the whole split, len(self) for a sample of it, which then uses the split's average bytes per token.
        """
        return loss * n_targets / (math.log(2) * self.n_bytes) if self.n_bytes else None


@dataclass
class Dataset:
    name: str
    tokenizer: dict  # the tokenizer's spec
    vocab_size: int
    train: Split
    val: Split

    def fingerprint(self):
        """Return what a checkpoint stores to recognise the data that it was trained on."""
        return {'name': self.name, 'vocab_size': self.vocab_size,
                'train': [len(self.train), self.train.sha256], 'val': [len(self.val), self.val.sha256]}


def open_dataset(name, block_size):
    """Return the Dataset in data/NAME, verified by data_folder.read.

    UserError names the file, what is wrong with it, and what to do; also if a split is shorter than a window of
    block_size tokens and its last target.
    """
    spec, vocab_size, files = data_folder.read(name)
    data = Dataset(name, spec, vocab_size, Split(*files['train'], vocab_size), Split(*files['val'], vocab_size))
    for split in (data.train, data.val):
        if len(split) < block_size + 1:
            raise UserError(f'{split.path} has {len(split)} tokens; block_size={block_size} needs at least '
                            f'{block_size + 1}: lower block_size, or prepare more text')
    return data


def _splitmix64(x):
    """Scramble uint64s, one to one (the last step of splitmix64: Steele, Lea and Flood 2014)."""
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
        return x ^ (x >> np.uint64(31))


def _permute(index, n, key):
    """Map each index in range(n) to its position in a shuffled order, one to one for one key; all uint64 arrays.

    A four-round Feistel network over the next power of four, applied again while the result is >= n (Black and
    Rogaway 2002). There is no table, so it needs no memory for any number of windows.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, todo = index.copy(), np.arange(len(index))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for round_ in range(1, 5):
            left, right = right, left ^ (_splitmix64(right ^ _splitmix64(key[todo] + np.uint64(round_))) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out


def train_starts(seed, n_tokens, block_size, first, count):
    """Return the starts (count,) of training samples number first, first + 1, ... as int64.

    Every window of the split is read once per epoch; each epoch shifts the window boundaries and shuffles the
    windows anew.
    """
    number = np.arange(first, first + count, dtype=np.uint64)
    seeded = _splitmix64(np.full(1, seed, dtype=np.uint64) + np.uint64(0x9e3779b97f4a7c15))
    n_windows = max(1, (n_tokens - 1) // block_size - 1)  # this many fit after any offset below block_size
    n_offsets = min(block_size, n_tokens - n_windows * block_size)
    epoch, index = np.divmod(number, np.uint64(n_windows))
    key = _splitmix64(seeded ^ _splitmix64(epoch + np.uint64(1)))
    offset = _splitmix64(key) % np.uint64(n_offsets)
    return (_permute(index, n_windows, key) * np.uint64(block_size) + offset).astype(np.int64)


def eval_starts(n_tokens, block_size, n_batches, batch_size):
    """Return starts (n_batches, batch_size) spread evenly over a split, the same at every evaluation."""
    starts = np.linspace(0, n_tokens - block_size - 1, n_batches * batch_size)
    return starts.astype(np.int64).reshape(n_batches, batch_size)


def split_batches(split, block_size, batch_size, rank=0, world_size=1, max_targets=None):
    """Yield this rank's (idx, targets), (B, T) each, of a whole split: windows of block_size tokens from token 0.

    Every token but the first is a target once, and the last window is shorter. Batches are dealt to the ranks one
    after the other. max_targets: of a longer split read only about this many targets, in full windows spread evenly.
    """
    n_targets = len(split) - 1
    full = np.arange(0, n_targets - block_size + 1, block_size)
    rest = n_targets % block_size
    if max_targets and n_targets > max_targets:
        n_windows = max(1, max_targets // block_size)
        full, rest = full[np.linspace(0, len(full) - 1, n_windows).astype(np.int64)], 0
    batches = [(full[i:i + batch_size], block_size) for i in range(0, len(full), batch_size)]
    if rest:
        batches.append((np.array([n_targets - rest]), rest))
    for starts, length in batches[rank::world_size]:
        yield split.batch(starts, length)
