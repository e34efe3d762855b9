"""From .bin files to batches: opened, checked against meta.json, and read in an order that is a pure function.

Which tokens make up sample number g of training depends on (seed, g) alone: not on ranks, resumes, evaluations or a
library's random stream, so there is no position to lose. Nothing here writes.
"""
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import REPO, UserError
from lib.text import tokenizer
from lib.text.prepare import digest

IN_MEMORY = 256 * 2**20  # bytes; a smaller file is read whole and its sha256 checked, a larger one is mapped
LLM_C_MAGIC = 20240520


@dataclass
class Split:
    """One .bin file. n_bytes: the UTF-8 bytes of its text, 0 where unknown."""
    path: Path
    tokens: np.ndarray  # (n_tokens,) uint16 or uint32
    n_bytes: int
    sha256: str
    vocab_size: int

    def __len__(self):
        return len(self.tokens)

    def batch(self, starts, block_size):
        """Return (idx, targets), each (B, T) int64: the windows of block_size tokens from `starts` (B,), and one on."""
        if isinstance(self.tokens, np.memmap) and self.path.stat().st_size < self.tokens.nbytes:
            raise UserError(f'{self.path} was cut short while it was being read; prepare the dataset again')
        ids = self.tokens[starts[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
        if ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise UserError(f'{self.path.name} contains token {ids[row, column]} at position {starts[row] + column}, '
                            f'vocab_size is {self.vocab_size}; prepare the dataset again')
        ids = torch.from_numpy(ids.astype(np.int64))
        return ids[:, :-1], ids[:, 1:]


@dataclass
class Dataset:
    name: str
    tokenizer: dict  # the tokenizer's spec
    vocab_size: int
    train: Split
    val: Split

    def fingerprint(self):
        """Return what a checkpoint remembers of the data it was trained on."""
        return {'name': self.name, 'vocab_size': self.vocab_size,
                'train': [len(self.train), self.train.sha256], 'val': [len(self.val), self.val.sha256]}


def folder(name):
    """Return where dataset `name` lies: data/NAME in the working directory, else in the repository."""
    here = Path('data') / name
    return here if here.is_dir() else REPO / 'data' / name


def _command(path):
    """Return what to type to prepare the dataset in folder `path`; one without a script of its own came from text."""
    if (path / 'prepare.py').exists() and path.name != 'text':
        return f'python {path / "prepare.py"}'
    return (f'python {folder("text") / "prepare.py"} --input=YOUR_TEXT '
            f'--name={"NAME" if path.name == "text" else path.name}')


def _meta(path):
    """Return the parsed meta.json of a dataset's folder, or None where nanoGPT or nobody prepared it."""
    try:
        meta = json.loads((path / 'meta.json').read_text(encoding='utf-8'))
        for split in ('train', 'val'):
            {k: meta['splits'][split][k] for k in ('n_tokens', 'n_bytes', 'max_id', 'sha256')}
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype is {meta["dtype"]!r}')
        size = tokenizer.from_spec(meta['tokenizer']).vocab_size
        if meta['vocab_size'] != size:
            raise ValueError(f'vocab_size is {meta["vocab_size"]!r}, its tokenizer has {size}')
        if meta.get('sha256', digest(meta)) != digest(meta):
            raise ValueError('it is not what prepare.py wrote: its sha256 differs')
        return meta
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path / "meta.json"} is damaged ({type(error).__name__}: {error}); '
                        'run prepare.py again') from error


def tokenizer_spec(path):
    """Return the tokenizer spec of the dataset in folder `path`: meta.json's, nanoGPT's meta.pkl's, else GPT-2's."""
    meta = _meta(path)
    if meta:
        return meta['tokenizer']
    if (path / 'meta.pkl').exists():
        return tokenizer.from_nanogpt_meta(path).spec
    return {'kind': 'gpt2'}


def _read(path, dtype, expected, vocab_size):
    """Return the Split in a .bin file; `expected` is its entry in meta.json, {} where there is none."""
    if not path.exists():
        raise UserError(f'{path} not found. Run: {_command(path.parent)}')
    size = path.stat().st_size
    if size == 0:
        raise UserError(f'{path} is empty; run prepare.py again')
    with open(path, 'rb') as f:
        head = np.frombuffer(f.read(8192 // dtype.itemsize * dtype.itemsize)[:size // 4 * 4], dtype='<u4')
    if len(head) and head[0] == LLM_C_MAGIC:
        raise UserError(f'{path} looks like an llm.c file (magic {LLM_C_MAGIC}); '
                        'a .bin here is token ids without a header')
    if len(head) and head[0].tobytes() == b'\x93NUM':
        raise UserError(f'{path} is a NumPy .npy file; write raw token ids with ids.tofile(...)')
    if size % dtype.itemsize:
        raise UserError(f'{path} has {size} bytes, not a multiple of {dtype.itemsize}: truncated? Run prepare.py again')
    if not expected and len(head) >= 8 and head.max() < 2**16 and head.std() > 0:  # every other uint16 would be 0
        raise UserError(f'{path} looks like uint32 ids; without a meta.json a .bin holds uint16')
    n_tokens = size // dtype.itemsize
    if expected and n_tokens != expected['n_tokens']:
        raise UserError(f'{path} holds {n_tokens} tokens, prepare wrote {expected["n_tokens"]}: '
                        'meta.json does not match it; run prepare.py again')
    if size >= IN_MEMORY:
        tokens, digest = np.memmap(path, dtype=dtype, mode='r'), expected.get('sha256', '')
        max_id = expected.get('max_id', 0)
    else:
        raw = path.read_bytes()
        tokens, digest = np.frombuffer(raw, dtype=dtype), hashlib.sha256(raw).hexdigest()
        max_id = int(tokens.max())
        if expected and digest != expected['sha256']:
            raise UserError(f'{path} was changed since prepare wrote it: meta.json does not match its sha256; '
                            'run prepare.py again')
    if max_id >= vocab_size:
        where = f' at position {int(np.argmax(tokens >= vocab_size))}' if size < IN_MEMORY else ''
        raise UserError(f'{path.name} contains token {max_id}{where}, vocab_size is {vocab_size}; run prepare.py again')
    return Split(path, tokens, expected.get('n_bytes') or 0, digest, vocab_size)


def open_dataset(name, block_size):
    """Return the Dataset in data/NAME, checked; UserError names the file, what is wrong with it, and the remedy.

    Sizes, the largest id and block_size are checked always, sha256 for files under 256 MB.
    """
    path = folder(name)
    if not path.is_dir():
        known = sorted({p.parent.name for p in (REPO / 'data').glob('*/prepare.py')} - {'text'})
        raise UserError(f'no dataset data/{name}: expected one of {", ".join(known)}, or a text of your own: '
                        f'{_command(path)}')
    if name == 'text' and not (path / 'train.bin').exists():
        raise UserError('dataset=text: data/text only prepares texts of your own, under names of your own. Run: '
                        f'{_command(path)}, then give --dataset=NAME')
    if (path / 'UNFINISHED').exists():
        raise UserError(f'{path} holds an unfinished prepare: run it again ({_command(path)})')
    meta = _meta(path)
    spec = tokenizer_spec(path)
    if meta:
        vocab_size, dtype, splits = int(meta['vocab_size']), np.dtype(meta['dtype']).newbyteorder('<'), meta['splits']
    else:
        vocab_size, dtype, splits = tokenizer.from_spec(spec).vocab_size, np.dtype('<u2'), {}
    data = Dataset(name, spec, vocab_size, *(_read(path / f'{s}.bin', dtype, splits.get(s, {}), vocab_size)
                                             for s in ('train', 'val')))
    for split in (data.train, data.val):
        if len(split) < block_size + 1:
            raise UserError(f'{split.path} has {len(split)} tokens; block_size={block_size} needs at least '
                            f'{block_size + 1}: lower block_size, or prepare more text')
    return data


def _mix(x):
    """Scramble uint64s, one to one (splitmix64's finaliser: Steele, Lea and Flood 2014)."""
    with np.errstate(over='ignore'):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xbf58476d1ce4e5b9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94d049bb133111eb)
        return x ^ (x >> np.uint64(31))


def _permute(place, n, key):
    """Map each place in range(n) to its place in a shuffled order, one to one for one key; all uint64 arrays.

    A four-round Feistel network over the next power of four, walked again while the result is not below n
    (Black and Rogaway 2002): no table, so any number of windows takes no memory.
    """
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    out, todo = place.copy(), np.arange(len(place))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for round_ in range(1, 5):
            left, right = right, left ^ (_mix(right ^ _mix(key[todo] + np.uint64(round_))) & mask)
        out[todo] = left << half | right
        todo = todo[out[todo] >= n]
    return out


def train_starts(order, seed, n_tokens, block_size, first, count):
    """Return the starts (count,) of training samples number first, first + 1, ...

    order 'epochs': every window of the split once an epoch, cut at an offset and read in an order that are new each
    epoch. 'random': crops from anywhere, with replacement, as nanoGPT draws them.
    """
    number = np.arange(first, first + count, dtype=np.uint64)
    seeded = _mix(np.full(1, seed, dtype=np.uint64) + np.uint64(0x9e3779b97f4a7c15))
    if order == 'random':
        return (_mix(seeded ^ _mix(number)) % np.uint64(n_tokens - block_size)).astype(np.int64)
    n_windows = max(1, (n_tokens - 1) // block_size - 1)  # so many fit from any offset below block_size
    offsets = min(block_size, n_tokens - n_windows * block_size)
    epoch, place = np.divmod(number, np.uint64(n_windows))
    key = _mix(seeded ^ _mix(epoch + np.uint64(1)))
    starts = _permute(place, n_windows, key) * np.uint64(block_size) + _mix(key) % np.uint64(offsets)
    return starts.astype(np.int64)


def eval_starts(n_tokens, block_size, n_batches, batch_size):
    """Return starts (n_batches, batch_size) spread evenly over a split, the same at every evaluation."""
    starts = np.linspace(0, n_tokens - block_size - 1, n_batches * batch_size)
    return starts.astype(np.int64).reshape(n_batches, batch_size)


def eval_windows(split, block_size, batch_size, rank=0, world_size=1, most=None):
    """Yield (idx, targets) over a whole split: windows of block_size from token 0, the last one short.

    Every token but the first is a target once. Ranks take the batches in turns. most: of a split with more tokens
    than this, only so many, in windows spread evenly.
    """
    n_targets = len(split) - 1
    full = np.arange(0, n_targets - block_size + 1, block_size)
    tail = n_targets % block_size
    if most and n_targets > most:
        full, tail = full[np.linspace(0, len(full) - 1, max(1, most // block_size)).astype(np.int64)], 0
    jobs = [(full[i:i + batch_size], block_size) for i in range(0, len(full), batch_size)]
    if tail:
        jobs.append((np.array([n_targets - tail]), tail))
    for starts, length in jobs[rank::world_size]:
        yield split.batch(starts, length)
