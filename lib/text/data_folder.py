"""The folder of a prepared dataset, data/NAME/: written whole, and verified when it is read.

    train.bin, val.bin   token ids without a header, little-endian uint16 or uint32
    train.mask, val.mask only if the data has answers: one byte per token, 1 if it is a target of the loss, else 0
    meta.json            written last: the tokenizer, the dtype, size and sha256 of each file, the marks of dialogues
    UNFINISHED           exists while prepare renames its files; a folder that still contains it is refused

A folder with .bin files and no meta.json is nanoGPT's: uint16 ids of the characters in meta.pkl, else of GPT-2's BPE.
Nothing here needs torch.
"""
import hashlib
import json
import os
from pathlib import Path

import numpy as np

from configurator import REPO, UserError
from lib.machine import files
from lib.machine.files import sync
from lib.text import dialogue
from lib.text.schema import nanogpt_chars, read_json
from lib.text.tokenizer import CharTokenizer, TextError, from_spec

IN_MEMORY = 256 * 2**20  # bytes; a smaller .bin file is read whole and its sha256 checked, a larger one is mapped
LLM_C_MAGIC = 20240520
SPLITS = ('train', 'val')
FILES = ('train.bin', 'val.bin', 'train.mask', 'val.mask', 'meta.json')


def folder(name):
    """Return the folder of dataset `name`: data/NAME in the working directory if it exists, else in the repository."""
    here = Path('data') / name
    return here if here.is_dir() else REPO / 'data' / name


def prepare_command(path):
    """Return the command that prepares the dataset in folder `path`."""
    if (path / 'prepare.py').exists() and path.name != 'text':
        return f'python {path / "prepare.py"}'
    name = 'NAME' if path.name == 'text' else path.name
    return f'python {folder("text") / "prepare.py"} --input=YOUR_TEXT --name={name}'


# Reading

def digest(meta):
    """Return the sha256 of everything in meta.json except its own key 'sha256'."""
    rest = {key: value for key, value in meta.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(path):
    """Return the contents of meta.json in folder `path`, validated, or None if there is no such file.

    UserError if anything in it is missing or wrong.
    """
    try:
        meta = read_json(path / 'meta.json')
        for split in SPLITS:
            for key, kind in (('n_tokens', int), ('n_bytes', int), ('max_id', int), ('sha256', str)):
                value = meta['splits'][split][key]
                right = type(value) is kind and (kind is str or 0 <= value < 2**53)
                if not right and not (key == 'n_bytes' and value is None):  # None: unknown
                    raise ValueError(f'{key} of {split} is {value!r}')
        if type(meta.get('source', '')) is not str:
            raise ValueError('source is not text')
        if meta['dtype'] not in ('uint16', 'uint32'):
            raise ValueError(f'dtype is {meta["dtype"]!r}')
        vocab_size = from_spec(meta['tokenizer']).vocab_size
        if meta['vocab_size'] != vocab_size:
            raise ValueError(f'vocab_size is {meta["vocab_size"]!r}, its tokenizer has {vocab_size}')
        if meta.get('sha256', digest(meta)) != digest(meta):  # another program may leave it out
            raise ValueError('it was changed since prepare wrote it: its sha256 differs')
        if 'chat' in meta:
            dialogue.check_meta(meta)
        return meta
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path / "meta.json"} is damaged ({type(error).__name__}: {error}); '
                        'run prepare.py again') from error


def from_nanogpt_meta(path):
    """Return the character tokenizer in nanoGPT's meta.pkl in folder `path`; TextError if it is anything else."""
    path = Path(path) / 'meta.pkl'
    try:
        chars = nanogpt_chars(path.read_bytes())
    except ValueError as error:
        raise TextError(f'{path} {error}') from None
    return CharTokenizer(chars)


def tokenizer_spec(path):
    """Return the tokenizer spec of the dataset in folder `path`: from meta.json, else meta.pkl, else GPT-2's."""
    meta = read_meta(path)
    if meta:
        return meta['tokenizer']
    if (path / 'meta.pkl').exists():
        return from_nanogpt_meta(path).spec
    return {'kind': 'gpt2'}


def _check_contents(path, dtype, expected):
    """Raise UserError if the file is empty, truncated, or of another kind than the ids that `dtype` announces."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(f'{path} is empty; run prepare.py again')
    with open(path, 'rb') as file:
        start = file.read(8192 // dtype.itemsize * dtype.itemsize)
    words = np.frombuffer(start[:size // 4 * 4], dtype='<u4')
    if len(words) and words[0] == LLM_C_MAGIC:
        raise UserError(f'{path} looks like an llm.c file (magic {LLM_C_MAGIC}); '
                        'a .bin file here contains token ids without a header')
    if start.startswith(b'\x93NUM'):
        raise UserError(f'{path} is a NumPy .npy file; write raw token ids with ids.tofile(...)')
    if size % dtype.itemsize:
        raise UserError(f'{path} has {size} bytes, not a multiple of {dtype.itemsize}: truncated? Run prepare.py again')
    # small uint32 ids, read as uint16, have a 0 in every second place
    if not expected and len(words) >= 8 and words.max() < 2**16 and words.std() > 0:
        raise UserError(f'{path} looks like uint32 ids; without a meta.json, .bin files contain uint16')
    n_tokens = size // dtype.itemsize
    if expected and n_tokens != expected['n_tokens']:
        raise UserError(f'{path} has {n_tokens} tokens, prepare wrote {expected["n_tokens"]}: '
                        'meta.json does not match it; run prepare.py again')


def _read_ids(path, dtype, expected, vocab_size):
    """Return (ids, sha256) of a .bin file; the sha256 of a mapped file is that of meta.json, '' without one.

    expected: what meta.json says about this file, {} without a meta.json.
    """
    if not path.exists():
        raise UserError(f'{path} not found. Run: {prepare_command(path.parent)}')
    _check_contents(path, dtype, expected)
    mapped = path.stat().st_size >= IN_MEMORY
    if mapped:
        ids = dialogue.mapped(path, dtype)
        sha256 = expected.get('sha256', '')
        max_id = expected.get('max_id', 0)  # Split.batch checks every batch, so this file need not be scanned
    else:
        raw = path.read_bytes()
        ids, sha256 = np.frombuffer(raw, dtype=dtype), hashlib.sha256(raw).hexdigest()
        max_id = int(ids.max())
        if expected and sha256 != expected['sha256']:
            raise UserError(f'{path} was changed since prepare wrote it: meta.json does not match its sha256; '
                            'run prepare.py again')
    if max_id >= vocab_size:
        where = '' if mapped else f' at position {int(np.argmax(ids >= vocab_size))}'
        raise UserError(f'{path.name} contains token {max_id}{where}, vocab_size is {vocab_size}; run prepare.py again')
    return ids, sha256


def read(name):
    """Return (tokenizer spec, vocab_size, {'train': (path, ids, n_bytes, sha256, mask), 'val': ...}, marks).

    ids: (n_tokens,) uint16 or uint32. mask: (n_tokens,) uint8, or None if every token is a target. n_bytes: the UTF-8
    bytes of the text, or of its answers if there is a mask; 0 if unknown. marks: those of dialogues, else None. Sizes
    and the largest id are always checked, the sha256 of files under 256 MB. UserError names the file, what is wrong,
    and what to do.
    """
    path = folder(name)
    if not path.is_dir():
        known = sorted({p.parent.name for p in (REPO / 'data').glob('*/prepare.py')} - {'text'})
        raise UserError(f'no dataset data/{name}: expected one of {", ".join(known)}, or your own text: '
                        f'{prepare_command(path)}')
    if name == 'text' and not (path / 'train.bin').exists():
        raise UserError('dataset=text: data/text only prepares your own texts, under the names that you choose. Run: '
                        f'{prepare_command(path)}, then pass --dataset=NAME')
    if (path / 'UNFINISHED').exists():
        raise UserError(f'{path} is unfinished: prepare was interrupted there; run it again ({prepare_command(path)})')
    meta = read_meta(path)
    if meta:
        spec, dtype, facts = meta['tokenizer'], np.dtype(meta['dtype']).newbyteorder('<'), meta['splits']
    else:
        spec, dtype, facts = tokenizer_spec(path), np.dtype('<u2'), {}
    marks = meta and meta.get('chat')
    vocab_size, files = from_spec(spec).vocab_size, {}
    for split in SPLITS:
        bin_path, expected = path / f'{split}.bin', facts.get(split, {})
        ids, sha256 = _read_ids(bin_path, dtype, expected, vocab_size)
        mask, n_bytes = None, expected.get('n_bytes') or 0
        if marks:
            mask, n_bytes = dialogue.read_mask(path / f'{split}.mask', expected, IN_MEMORY), expected['answer_bytes']
            sha256 += f' {expected["mask_sha256"]}'
        elif (path / f'{split}.mask').exists():
            raise UserError(f'{path / f"{split}.mask"} is not mentioned in meta.json, so nobody knows whether it '
                            'belongs to the data; remove it, or run prepare.py again')
        files[split] = bin_path, ids, n_bytes, sha256, mask
    return spec, vocab_size, files, marks


def describe_existing(path):
    """Return (meta.json, description) of the dataset in folder `path`; {} without a valid meta.json, '' if none."""
    try:
        meta = read_meta(path)
    except (UserError, OSError):
        meta = None  # unreadable: treat it as absent, preparing again replaces it
    if meta:
        n_tokens = sum(meta['splits'][split]['n_tokens'] for split in SPLITS)
        source = f" of {meta['source']}" if meta.get('source') else ''
        return meta, f"{n_tokens:,} tokens ({meta['tokenizer']['kind']}){source}"
    train = path / 'train.bin'
    if train.exists():
        return {}, f'a train.bin of {train.stat().st_size:,} bytes without a valid meta.json'
    return {}, ''


# Writing

class _SplitWriter:
    """A growing .bin file under a temporary name, and the facts about it that go into meta.json."""

    def __init__(self, path):
        self.temp, self.hash = files.temporary_name(path), hashlib.sha256()
        self.n_tokens, self.n_bytes, self.max_id = 0, 0, 0
        self.file = open(self.temp, 'wb')

    def add(self, ids, n_bytes):
        if ids.size:
            self.max_id = max(self.max_id, int(ids.max()))
        self.file.write(ids)
        self.hash.update(ids)
        self.n_tokens, self.n_bytes = self.n_tokens + ids.size, self.n_bytes + n_bytes

    def finish(self):
        """Write everything to the disk and return the facts."""
        self.file.flush()
        sync(self.file.fileno())
        self.file.close()
        return {'n_tokens': self.n_tokens, 'n_bytes': self.n_bytes, 'max_id': self.max_id,
                'sha256': self.hash.hexdigest()}


def write(path, tokenizer, chunks, source='', marks=None):
    """Write train.bin, val.bin, their masks if there are marks, and meta.json to folder `path`, all of them or none.

    chunks: an iterable of (split, ids, n_chars, n_bytes), with marks also mask, answer_bytes. source: the name of the
    text, as the user gave it. Returns (meta.json, n_chars). UserError if a split is empty or the folder is in use.
    """
    path.mkdir(parents=True, exist_ok=True)
    try:
        with files.alone_in(path, FILES):
            return _write(path, tokenizer, chunks, source, marks)
    except BlockingIOError:
        raise UserError(f'another process is preparing {path}; wait for it, or choose another --name=...') from None


def _write(path, tokenizer, chunks, source, marks):
    temp_meta, n_chars, writers = files.temporary_name(path / 'meta.json'), 0, {}
    try:
        for split in SPLITS:
            writers[f'{split}.bin'] = _SplitWriter(path / f'{split}.bin')
            if marks:
                writers[f'{split}.mask'] = _SplitWriter(path / f'{split}.mask')
        for split, ids, chars, n_bytes, *masked in chunks:
            writers[f'{split}.bin'].add(ids, n_bytes)
            if masked:
                writers[f'{split}.mask'].add(*masked)
            n_chars += chars
        meta = {'format': 1, 'tokenizer': tokenizer.spec, 'vocab_size': tokenizer.vocab_size,
                'dtype': 'uint16' if tokenizer.dtype == '<u2' else 'uint32', 'source': source,
                'splits': {split: writers[f'{split}.bin'].finish() for split in SPLITS}}
        if marks:
            meta['chat'] = marks
        for split, facts in meta['splits'].items():
            if facts['n_tokens'] < 2:  # a token and the next one, its target
                raise UserError(f'the {split} split {"has one token" if facts["n_tokens"] else "is empty"}: {n_chars:,}'
                                ' characters are too few to divide; give more text, or change --val_fraction')
            assert facts['max_id'] < tokenizer.vocab_size, (facts, tokenizer.vocab_size)
            if marks:
                mask = writers[f'{split}.mask'].finish()
                facts.update(mask_sha256=mask['sha256'], answer_bytes=mask['n_bytes'])
        meta['sha256'] = digest(meta)
        with open(temp_meta, 'w', encoding='utf-8', newline='') as file:
            json.dump(meta, file)
            file.flush()
            sync(file.fileno())
        unfinished = path / 'UNFINISHED'
        unfinished.touch()
        for name, file in writers.items():
            os.replace(file.temp, path / name)
        if not marks:  # those of dialogues that were there before
            for split in SPLITS:
                (path / f'{split}.mask').unlink(missing_ok=True)
        os.replace(temp_meta, path / 'meta.json')
        unfinished.unlink()
    finally:
        for file in writers.values():
            file.file.close()
            file.temp.unlink(missing_ok=True)
        temp_meta.unlink(missing_ok=True)
    return meta, n_chars
