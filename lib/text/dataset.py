"""From .bin files to batches, in an order that is a pure function.

Which tokens training sample number g contains depends on (seed, g) only: not on the number of ranks, resumes or
evaluations, nor on a library's random state. So there is no reading position that could be lost.
"""
import math
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from configurator import UserError
from lib.text import data_folder, dialogue
from lib.text.tokenizer import from_spec


@dataclass
class Dialogues:
    """Where the windows of a split with dialogues begin and end: each reads one dialogue, or its first tokens.

    A dialogue without a target among its first block_size + 1 tokens has no window.
    """
    starts: np.ndarray  # (n,) int64
    ends: np.ndarray  # (n,) int64, of the token after each
    n_targets: np.ndarray  # (n,) int64, within the window
    n_cut: int  # dialogues that are longer than a window
    n_unused: int  # dialogues without a window
    n_lost: int  # targets that no window reads

    @classmethod
    def find(cls, tokens, mask, after, block_size):
        """Return the Dialogues in the arrays of a data folder; after: the token that follows each dialogue."""
        starts = dialogue.starts(tokens, mask, after)
        ends = np.append(starts[1:], len(tokens)) - 1
        stops = np.minimum(ends, starts + block_size + 1)
        n_targets = np.add.reduceat(mask, np.stack([starts, stops], 1).ravel(), dtype=np.int64)[::2]
        used = n_targets > 0
        return cls(starts[used], ends[used], n_targets[used], int((ends > stops)[used].sum()), int((~used).sum()),
                   int(mask.sum(dtype=np.int64) - n_targets.sum()))


@dataclass
class Split:
    """One .bin file, and its mask if it has dialogues. n_bytes: the UTF-8 bytes of its text, 0 if unknown."""
    path: Path
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    n_bytes: int  # with a mask, of the answers
    sha256: str
    vocab_size: int
    mask: np.ndarray | None = None  # (n_tokens,) uint8, 1 = a target of the loss; None: every token is one
    dialogues: Dialogues | None = None  # where windows begin; None: anywhere

    def __len__(self):
        return len(self.tokens)

    @cached_property
    def n_targets(self):
        """The number of targets in a pass over the whole split."""
        return len(self) - 1 if self.mask is None else int(self.mask.sum(dtype=np.int64))

    def epoch_tokens(self, block_size):
        """Return how many tokens of windows an epoch has; with dialogues these are partly empty."""
        return len(self) if self.dialogues is None else len(self.dialogues.starts) * block_size

    def describe(self, block_size):
        """Return a line on how the dialogues fit into windows of block_size tokens."""
        found, n = self.dialogues, len(self.dialogues.starts)
        used = np.minimum(found.ends - found.starts, block_size).sum() / (n * block_size)
        line = f'dialogues: {n:,}, one per window of {block_size} tokens, which are {used:.0%} full'
        if found.n_cut:
            line += (f'; {found.n_cut:,} are longer and are cut there, {found.n_unused:,} more have no answer there: '
                     f'{found.n_lost:,} of {self.n_targets:,} targets are not read')
        return line

    def prompt(self, number):
        """Return the ids of a dialogue up to its first answer; number: which one, modulo their number."""
        start = self.dialogues.starts[number % len(self.dialogues.starts)]
        end = self.dialogues.ends[number % len(self.dialogues.starts)]
        return self.tokens[start:start + int(np.argmax(self.mask[start:end]))].tolist()

    def weights(self, starts, n_parts):
        """Return n_parts weights with mean 1 for the mean losses of a batch that is processed in that many parts.

        starts: those of the whole batch. The weighted mean is then the mean over all targets of the batch, of which
        the parts have different numbers if there is a mask.
        """
        if self.dialogues is None:
            return np.ones(n_parts)
        counts = self.dialogues.n_targets[np.searchsorted(self.dialogues.starts, starts)].reshape(n_parts, -1).sum(1)
        return counts / counts.mean()

    def batch(self, starts, block_size):
        """Return (idx, targets), each (B, T) int64, of the windows that begin at `starts` (B,).

        idx: block_size tokens from each start. targets: the same, shifted by one. UserError if a token is outside the
        vocabulary, or if the file was truncated since it was opened.
        """
        if isinstance(self.tokens, np.memmap) and _size(self.path, self.tokens.nbytes) < self.tokens.nbytes:
            raise UserError(f'{self.path} was truncated while it was being read; prepare the dataset again')
        at = starts[:, None] + np.arange(block_size + 1)  # (B, T + 1)
        if self.dialogues is not None:
            ends = self.dialogues.ends[np.searchsorted(self.dialogues.starts, starts)][:, None]  # (B, 1)
            at = np.minimum(at, ends)  # repeats the token after the dialogue, which is no target
        ids = self.tokens[at]
        if ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise UserError(f'{self.path.name} contains token {ids[row, column]} at position {starts[row] + column}, '
                            f'vocab_size is {self.vocab_size}; prepare the dataset again')
        ids = torch.from_numpy(ids.astype(np.int64))
        idx, targets = ids[:, :-1], ids[:, 1:]
        if self.mask is not None:
            targets = targets.masked_fill(torch.from_numpy(self.mask[at[:, 1:]] == 0), -1)
        return idx, targets

    def bits_per_byte(self, loss, n_targets=None):
        """Return `loss` in bits per byte of the text, or of the answers in it; None if their size is unknown.

        loss: mean nats per target. n_targets: how many targets the loss stands for; self.n_targets after a pass over
        the whole split, None for a sample of it, which then uses the split's average bytes per token.
        """
        if n_targets is None:
            n_targets = len(self) if self.mask is None else self.n_targets
        return loss * n_targets / (math.log(2) * self.n_bytes) if self.n_bytes else None


def _size(path, otherwise):
    """Return the size of a file in bytes, or `otherwise` if the system does not say: a mapped file may be renamed."""
    try:
        return os.stat(path).st_size
    except OSError:
        return otherwise


@dataclass
class Dataset:
    name: str
    tokenizer: dict  # the tokenizer's spec
    vocab_size: int
    train: Split
    val: Split
    marks: dict | None = None  # of questions and answers, if the data is dialogues

    def fingerprint(self):
        """Return what a checkpoint stores to recognise the data that it was trained on."""
        return {'name': self.name, 'vocab_size': self.vocab_size,
                'train': [len(self.train), self.train.sha256], 'val': [len(self.val), self.val.sha256]}


def open_dataset(name, block_size, any_length=False):
    """Return the Dataset in data/NAME, verified by data_folder.read.

    UserError names the file, what is wrong with it, and what to do; also, unless any_length, if a split is shorter than
    a window of block_size tokens and its last target.
    """
    spec, vocab_size, files, marks = data_folder.read(name)
    train, val = (Split(*files[split][:4], vocab_size, files[split][4]) for split in data_folder.SPLITS)
    for split in (train, val):
        if marks:
            split.dialogues = Dialogues.find(split.tokens, split.mask, dialogue.separator(from_spec(spec)), block_size)
            if not len(split.dialogues.starts):
                raise UserError(f'no dialogue in {split.path} has an answer within block_size={block_size} tokens; '
                                'raise block_size')
        elif any_length:
            continue
        elif len(split) < block_size + 1:
            raise UserError(f'{split.path} has {len(split)} tokens; block_size={block_size} needs at least '
                            f'{block_size + 1}: lower block_size, or prepare more text')
    return Dataset(name, spec, vocab_size, train, val, marks)


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


def train_starts(seed, n_tokens, block_size, first, count, dialogues=None):
    """Return the starts (count,) of training samples number first, first + 1, ... as int64.

    Every window of the split is read once per epoch; each epoch shifts the window boundaries and shuffles the
    windows anew. dialogues: where windows begin instead, each once per epoch.
    """
    number = np.arange(first, first + count, dtype=np.uint64)
    seeded = _splitmix64(np.full(1, seed, dtype=np.uint64) + np.uint64(0x9e3779b97f4a7c15))
    if dialogues is not None:
        n = np.uint64(len(dialogues.starts))
        epoch, index = np.divmod(number, n)
        return dialogues.starts[_permute(index, n, _splitmix64(seeded ^ _splitmix64(epoch + np.uint64(1))))]
    n_windows = max(1, (n_tokens - 1) // block_size - 1)  # this many fit after any offset below block_size
    n_offsets = n_tokens - n_windows * block_size  # as many as fit, so that the last tokens are read too
    epoch, index = np.divmod(number, np.uint64(n_windows))
    key = _splitmix64(seeded ^ _splitmix64(epoch + np.uint64(1)))
    offset = _splitmix64(key) % np.uint64(n_offsets)
    return (_permute(index, n_windows, key) * np.uint64(block_size) + offset).astype(np.int64)


def next_windows(tokens_seen, sequences, block_size, fraction=0.0, context_warmup=0.0):
    """Return (first, offset, context): the next update reads `context` tokens from `offset` on in each of its windows.

    Its windows are numbers first to first + sequences. fraction: how much of the run is over. context_warmup: the
    fraction of the run with short contexts. Early on a model learns local patterns, so short contexts are enough and
    give more updates per token (Li et al. 2021, arXiv:2108.06084). A window that was begun is read to its end, so an
    epoch still reads all of the text once.
    """
    if fraction < context_warmup / 2:
        context = block_size // 4
    elif fraction < context_warmup:
        context = block_size // 2
    else:
        context = block_size
    shortest = block_size // 4 if context_warmup else block_size
    position = tokens_seen // sequences % block_size  # in the present windows
    offset = position // shortest * shortest
    while offset % context:
        context //= 2
    return (tokens_seen - offset * sequences) // block_size, offset, context


def eval_starts(n_tokens, block_size, n_batches, batch_size, dialogues=None):
    """Return starts (n_batches, batch_size) spread evenly over a split, the same at every evaluation."""
    if dialogues is not None:
        index = np.linspace(0, len(dialogues.starts) - 1, n_batches * batch_size).astype(np.int64)
        return dialogues.starts[index].reshape(n_batches, batch_size)
    starts = np.linspace(0, n_tokens - block_size - 1, n_batches * batch_size)
    return starts.astype(np.int64).reshape(n_batches, batch_size)


class Batches:
    """The (idx, targets) at each (starts, length) of a list, read from a split one by one; len() is their number."""

    def __init__(self, split, places):
        self.split, self.places = split, places

    def __len__(self):
        return len(self.places)

    def __iter__(self):
        return (self.split.batch(*place) for place in self.places)


def split_batches(split, block_size, batch_size, rank=0, world_size=1, max_targets=None):
    """Return this rank's Batches, (B, T) each, of a whole split: windows of block_size tokens from token 0.

    Every token but the first is a target once, and the last window is shorter. Batches are dealt to the ranks one
    after the other. max_targets: of a longer split read only about this many targets, in full windows spread evenly.
    With dialogues, a window is one of them, and max_targets counts every token.
    """
    n_targets = len(split) - 1
    if split.dialogues is not None:
        starts = split.dialogues.starts
        if max_targets and n_targets > max_targets:
            n_windows = min(len(starts), max(1, max_targets // block_size))
            starts = starts[np.linspace(0, len(starts) - 1, n_windows).astype(np.int64)]
        batches = [(starts[i:i + batch_size], block_size) for i in range(0, len(starts), batch_size)]
        return Batches(split, batches[rank::world_size])
    full = np.arange(0, n_targets - block_size + 1, block_size)
    rest = n_targets % block_size
    if max_targets and n_targets > max_targets:
        n_windows = max(1, max_targets // block_size)
        full, rest = full[np.linspace(0, len(full) - 1, n_windows).astype(np.int64)], 0
    batches = [(full[i:i + batch_size], block_size) for i in range(0, len(full), batch_size)]
    if rest:
        batches.append((np.array([n_targets - rest]), rest))
    return Batches(split, batches[rank::world_size])


def sliding_windows(n_tokens, block_size, stride):
    """Yield (start, length, n_scored) of windows over a text: first token, length, and how many last targets to score.

    The other targets were scored in an earlier window, so every token but the first is scored once. A stride below
    block_size gives each token a longer context: block_size - stride tokens or more, after the first window.
    """
    done = start = 0
    while done < n_tokens - 1:
        end = min(start + block_size, n_tokens - 1)
        yield start, end - start, end - done
        done, start = end, start + stride
