"""From any text to data/NAME/: train.bin and val.bin (raw token ids) and meta.json, in bounded memory.

A data/NAME/prepare.py says what is special about its text and calls `prepare`. The text flows through as pieces
(text, ends), see lib/text/read_text.py, and is never in memory as a whole.
"""
import hashlib
import json
import os
import re
import signal
import sys
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path

import numpy as np

from configurator import REPO, UserError, configure, describe, find_path
from lib.text import read_text
from lib.text import tokenizer as tok
from lib.text.tokenizer import encoded

# --- settings of every data/NAME/prepare.py -------------------------------------------------------------------------
# Text
input = ''  # files, folders, globs, https://... or hub:NAME#SPLIT; repeat the flag or list several
val_input = ''  # a validation text of its own, named in the same way ('' splits the input)
val_fraction = 0.1  # share of the input that becomes the validation split
text_key = 'text'  # key of the text in JSON lines and parquet; several are joined: title,content
encoding = 'utf-8'  # of text files, for example gb18030
# Result
name = ''  # write to data/NAME/ of the repository ('' the script's own folder; data/text: named after the input)
tokenizer = 'char'  # char | byte | gpt2 | bpe (trained on this text)
vocab_size = 4096  # ids of a trained bpe
num_proc = 0  # processes that tokenize BPE (0 one a core); the bytes do not depend on it
# --------------------------------------------------------------------------------------------------------------------

_WINDOW = 10_000  # characters at the end of a chunk among which a harmless cut is looked for
_SAMPLE = 20_000_000  # bytes of text that a BPE is trained on, at most
_TINY = 5_000  # characters; a text of fewer is warned about
KINDS = ('char', 'byte', 'gpt2', 'bpe')


# From pieces to splits and jobs

def _survey(pieces, limit):
    """Return (characters, documents, distinct characters, an even sample of the text), of `limit` documents at most."""
    n_chars = n_docs = count = size = 0
    seen, sample, every = np.zeros(0x110000, bool), [], 1
    for text, ends in pieces:
        seen[np.frombuffer(encoded(text, 'utf-32-le'), '<u4')] = True
        n_chars += len(text)
        n_docs += ends
        for start in range(0, len(text), 1 << 16):
            if count % every == 0:
                sample.append(text[start:start + (1 << 16)])
                size += len(encoded(sample[-1]))
            count += 1
            if size > _SAMPLE:  # keep every second and go on at that pace, so that the sample stays even
                sample, every = sample[::2], 2 * every
                size = sum(len(encoded(part)) for part in sample)
        if n_docs >= limit:
            break
    return n_chars, n_docs, ''.join(map(chr, np.flatnonzero(seen))), sample


def _by_document(pieces, fraction):
    """Spread validation documents evenly: at a fraction of 0.1 every tenth one."""
    number, split = 0, 'train'
    for text, ends in pieces:
        yield split, text, ends
        if ends:
            number += 1
            split = 'val' if int((number + 1) * fraction) > int(number * fraction) else 'train'


def _by_position(pieces, n_train):
    """The first `n_train` characters train, the rest validates."""
    for text, ends in pieces:
        room = min(n_train, len(text))
        n_train -= room
        if room:
            yield 'train', text[:room], ends and room == len(text)
        if room < len(text):
            yield 'val', text[room:], ends


def _jobs(stream, cut, marks):
    """Gather (split, text, ends) into jobs (split, pieces) of about a chunk, cutting only where ids do not change.

    marks: whether documents end with a mark.
    """
    rest, job, size = {'train': '', 'val': ''}, {'train': [], 'val': []}, {'train': 0, 'val': 0}
    for split, text, ends in stream:
        if rest[split]:
            text, rest[split] = rest[split] + text, ''
        if not ends:
            at = cut(text, len(text) - _WINDOW) if len(text) > _WINDOW else -1
            if at < 0:  # no place to cut: wait for more
                rest[split] = text
                continue
            text, rest[split] = text[:at], text[at:]
        job[split].append((text, ends and marks))
        size[split] += len(text)
        if size[split] >= read_text.CHUNK:
            yield split, job[split]
            job[split], size[split] = [], 0
    for split, pieces in job.items():
        if pieces or rest[split]:
            yield split, pieces + [(rest[split], False)]


# Tokenizing and writing

_worker = None  # the tokenizer of a worker process


def _start_worker(spec):
    global _worker
    _worker = tok.from_spec(spec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _work(split, pieces, coder=None):
    """Return (split, ids, characters, bytes) of a job."""
    text = ''.join([text for text, _ in pieces])
    return split, (coder or _worker).pack(pieces), len(text), len(encoded(text))


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def _tokenize(jobs, coder, processes):
    """Yield the results of the jobs in their order, with at most a few of them in flight."""
    head = list(islice(jobs, 4))
    if processes < 2 or len(head) < 4 or coder.kind in ('char', 'byte'):  # a look-up is faster than sending the text
        for split, pieces in chain(head, jobs):
            yield _work(split, pieces, coder)
        return
    pool = ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(coder.spec,))
    try:
        pending = deque()
        for job in chain(head, jobs):
            pending.append(pool.submit(_work, *job))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError('a worker process died (out of memory?); nothing was changed; try --num_proc=1') from None
    finally:
        pool.shutdown(cancel_futures=True)


class _SplitFile:
    """One growing .bin file under a temporary name, with what meta.json tells of it."""

    def __init__(self, path):
        self.temp, self.hash = Path(f'{path}.tmp'), hashlib.sha256()
        self.n_tokens, self.n_bytes, self.max_id = 0, 0, 0
        self.file = open(self.temp, 'wb')

    def add(self, ids, n_bytes):
        if ids.size:
            self.max_id = max(self.max_id, int(ids.max()))
        self.file.write(ids)
        self.hash.update(ids)
        self.n_tokens, self.n_bytes = self.n_tokens + ids.size, self.n_bytes + n_bytes

    def finish(self):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {'n_tokens': self.n_tokens, 'n_bytes': self.n_bytes, 'max_id': self.max_id,
                'sha256': self.hash.hexdigest()}


def digest(meta):
    """Return the sha256 of what meta.json holds besides this very number, which tells whether it was damaged."""
    rest = {key: value for key, value in meta.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _held(folder):
    """Return (meta.json, a description) of the dataset in `folder`: {} where prepare left none whole, '' for none."""
    try:
        meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
        if meta['sha256'] == digest(meta):
            n_tokens = sum(facts['n_tokens'] for facts in meta['splits'].values())
            source = f" of {meta['source']}" if meta.get('source') else ''
            return meta, f"{n_tokens:,} tokens ({meta['tokenizer']['kind']}){source}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # preparing again is what mends it
    path = folder / 'train.bin'
    return {}, f'a train.bin of {path.stat().st_size:,} bytes and no whole meta.json' if path.exists() else ''


def write(folder, coder, results, source=''):
    """Write `results` (see `_work`) to `folder` as train.bin, val.bin and meta.json; all of it or nothing.

    source: what the user called the text. Returns (meta, characters). A folder in which a renaming was interrupted
    holds the file UNFINISHED.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temp_meta, n_chars, files = folder / 'meta.json.tmp', 0, {}
    try:
        for split in ('train', 'val'):
            files[split] = _SplitFile(folder / f'{split}.bin')
        for split, ids, chars, n_bytes in results:
            files[split].add(ids, n_bytes)
            n_chars += chars
        meta = {'format': 1, 'tokenizer': coder.spec, 'vocab_size': coder.vocab_size,
                'dtype': 'uint16' if coder.dtype == '<u2' else 'uint32', 'source': source,
                'splits': {split: file.finish() for split, file in files.items()}}
        for split, facts in meta['splits'].items():
            if not facts['n_tokens']:
                raise UserError(f'the {split} split is empty: {n_chars:,} characters are too few to divide; '
                                'give more text, or change --val_fraction')
            assert facts['max_id'] < coder.vocab_size, (facts, coder.vocab_size)
        meta['sha256'] = digest(meta)
        with open(temp_meta, 'w', encoding='utf-8', newline='') as file:
            json.dump(meta, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished = folder / 'UNFINISHED'
        unfinished.touch()
        for split, file in files.items():
            os.replace(file.temp, folder / f'{split}.bin')
        os.replace(temp_meta, folder / 'meta.json')
        unfinished.unlink()
    finally:
        for file in files.values():
            file.file.close()
            file.temp.unlink(missing_ok=True)
        temp_meta.unlink(missing_ok=True)
    return meta, n_chars


def _check(settings):
    """Return what is wrong with the settings of a prepare script."""
    problems = []
    if settings['tokenizer'] not in KINDS:
        problems.append(f"tokenizer={settings['tokenizer']}: expected one of {', '.join(KINDS)}")
    if not 0 < settings['val_fraction'] < 1:
        problems.append(f"val_fraction={settings['val_fraction']}: expected more than 0 and less than 1")
    if settings['vocab_size'] < 257:
        problems.append(f"vocab_size={settings['vocab_size']}: a BPE has at least 257 ids, 256 bytes and end-of-text")
    elif settings.given('vocab_size') and settings['tokenizer'] != 'bpe':
        problems.append('vocab_size is for --tokenizer=bpe; the other vocabularies have the size they have')
    if settings['num_proc'] < 0:
        problems.append(f"num_proc={settings['num_proc']}: expected 0 (one a core) or more")
    if settings['name'] and not re.fullmatch(r'\w[\w.-]*', settings['name']):
        problems.append(f"name={settings['name']}: expected a plain folder name of letters, digits, _ - and .")
    return problems + read_text.encoding_problems(settings['encoding'])


def _coder(settings, chars, sample, many):
    """Return the tokenizer that the settings ask for, learned from the text where it has to be."""
    if settings['tokenizer'] == 'char':
        return tok.CharTokenizer(''.join(sorted({*chars, *'\n' * many})))
    if settings['tokenizer'] == 'bpe':
        return tok.train_bpe(sample, settings['vocab_size'])
    coder = tok.from_spec({'kind': settings['tokenizer']})
    coder.encode('')  # missing files are told now, and forked workers inherit what was loaded
    return coder


def _prepare(settings, script, source, val_source, where, delimiter, rewrite, expect):
    words, val_words = settings['input'].splitlines(), settings['val_input'].splitlines()
    said = ' '.join(word if word.startswith('hub:') or '://' in word else str(find_path(word).resolve())
                    for word in words)
    folder, called = script.parent, settings['name']
    derived = bool(words) and folder.name == 'text' and not called
    if derived:
        called = re.sub(r'[^\w.-]', '_', Path(words[0].split('#')[0]).name.split('.')[0]) or '_'
    if called:
        folder = folder.parent / called
        if (folder / 'prepare.py').exists() and (derived or folder != script.parent):
            raise UserError(f'data/{called} has a prepare.py of its own; choose another name with --name=...')
    old, held = _held(folder)
    if derived and held and old.get('source') != said:  # nobody chose to replace it
        raise UserError(f'data/{called} holds {held}; choose another name with --name=..., or replace it with '
                        f'--name={called}')
    own_text = not words and not (folder / 'input.txt').exists()
    if not own_text:
        words = words or [str(folder / 'input.txt')]
    elif source:
        words = source(folder) if callable(source) else [source]
        val_words = val_words or ([val_source] if val_source else [])
    else:
        raise UserError(f'no text to read; name it with --input=PATH, or put it at {folder / "input.txt"}. {where}')
    paths, val_paths = read_text.find('input', words, folder), read_text.find('val_input', val_words, folder)
    if derived and not called.strip('_.'):
        raise UserError(f'--input={words[0]} gives the dataset no name; choose one with --name=...')
    keys = [key.strip() for key in settings['text_key'].split(',')]

    def pieces(paths):
        found = chain.from_iterable(read_text.read(path, settings['encoding'], keys, delimiter) for path in paths)
        return read_text.document(rewrite(''.join(text for text, _ in found))) if rewrite else found

    enough = 3 if val_paths else int(np.ceil(2 / settings['val_fraction']))  # two documents, at least, validate
    limit = np.inf if settings['tokenizer'] in ('char', 'bpe') else enough
    n_chars, n_docs, chars, sample = _survey(chain(pieces(paths), pieces(val_paths)), limit)
    if not n_chars:
        raise UserError(f'{paths[0]} is empty' + f' (and {len(paths) - 1} more)' * (len(paths) > 1))
    many = n_docs > 1 + bool(val_paths)  # a single text has no marks between documents
    coder = _coder(settings, chars, sample, many)
    if val_paths:
        stream = chain((('train', *piece) for piece in pieces(paths)), (('val', *piece) for piece in pieces(val_paths)))
    elif n_docs >= enough:
        stream = _by_document(pieces(paths), settings['val_fraction'])
    else:
        stream = _by_position(pieces(paths), int(n_chars * (1 - settings['val_fraction'])))
    jobs = _jobs(stream, coder.cut, many)
    results = _tokenize(jobs, coder, settings['num_proc'] or _cores())
    meta, n_chars = write(folder, coder, _with_bar(results), said)
    if held and any(old.get(key) != meta[key] for key in ('tokenizer', 'splits')):
        print(f'data/{folder.name} held {held}, which this replaced', file=sys.stderr)
    _report(folder, coder, meta, n_chars)
    if expect and own_text and not any(map(settings.given, ('tokenizer', 'val_fraction'))):
        got = [facts['n_tokens'] for facts in meta['splits'].values()]
        if got != list(expect):
            print(f'warning: expected {expect[0]:,} and {expect[1]:,} tokens: has the text changed at its source?',
                  file=sys.stderr)


def _with_bar(results):
    """Pass results on, showing progress on a terminal."""
    if not sys.stderr.isatty():
        yield from results
        return
    from tqdm import tqdm
    with tqdm(desc='tokenizing', unit='B', unit_scale=True) as bar:
        for result in results:
            yield result
            bar.update(result[3])


def _report(folder, coder, meta, n_chars):
    """Print the counts, a preview that went through the tokenizer and back, and what to type next."""
    splits = meta['splits']
    total = sum(facts['n_tokens'] for facts in splits.values())
    print(f'length of dataset in characters: {n_chars:,}\nvocab size: {coder.vocab_size:,}')
    for split, facts in splits.items():
        print(f"{split} has {facts['n_tokens']:,} tokens")
    print(f'characters per token: {n_chars / total:.2f}\npreview, encoded and decoded again:')
    start = np.fromfile(folder / 'train.bin', coder.dtype, count=1000)
    for line in [line for line in coder.decode(start).replace(tok.EOT, '\n').splitlines() if line.strip()][:3]:
        ids = coder.encode(line[:30])
        print(f'  {ids[:8]}{" ..." * (len(ids) > 8)} -> {coder.decode(ids)}')
    if n_chars < _TINY:
        least = min(splits, key=lambda split: splits[split]['n_tokens'])
        print(f'warning: {n_chars:,} characters are few: a model will learn them by heart, and block_size must be '
              f"below the {splits[least]['n_tokens']:,} tokens of the {least} split", file=sys.stderr)
    # train_* before the others, and the plain name before train_NAME_record
    every = sorted((REPO / 'config').glob('*.py'), key=lambda path: (not path.name.startswith('train_'), path.name))
    configs = [path.name for path in every
               if re.search(rf"^dataset = '{folder.name}'", path.read_text(encoding='utf-8'), re.M)]
    command = f'python train.py config/{[*configs, "train_shakespeare_char.py"][0]}'
    if not configs:
        command += f' --dataset={folder.name} --out_dir=out-{folder.name}'
        fits = min(facts['n_tokens'] for facts in splits.values()) - 1
        if fits < 256:  # that config's context; the largest power of two that both splits can fill
            command += f' --block_size={1 << max(0, fits.bit_length() - 1)}'
    print(f'train with: {command}')


def prepare(script_file, source='', val_source='', where='', delimiter='', rewrite=None, expect=(), **defaults):
    """Do the whole work of data/NAME/prepare.py; a mistake of the user ends the program with one line.

    source: where the text comes from when neither --input nor data/NAME/input.txt gives one: an address, hub:NAME, or
    a function from the folder to a list of paths. val_source: its own validation text. where: a sentence saying where
    a text that is not redistributed is found. delimiter: a string between the documents of a text file. rewrite: a
    function from the whole text to the text to use. expect: known (train, val) token counts of `source`.
    defaults: this dataset's values of the settings above.
    """
    script = Path(script_file).resolve()
    if {'--help', '-h'} & set(sys.argv[1:]):
        block = re.sub(r'^(\w+) = (\S+)', lambda m: f'{m[1]} = {defaults.get(m[1], globals().get(m[1]))!r}',
                       Path(__file__).read_text(encoding='utf-8').split('# ---')[1], flags=re.M)
        doc = script.read_text(encoding='utf-8').split('"""')[1]
        print(describe(f'"""{doc}"""\n{block}', {**globals(), **defaults}))
        raise SystemExit(0)
    settings = configure({**globals(), **defaults, '__file__': __file__}, check=_check, words='input')
    try:
        _prepare(settings, script, source, val_source, where, delimiter, rewrite, expect)
    except OSError as error:
        name = error.filename or script.parent
        raise UserError(f'{name}: {error.strerror or error}; mend that and try again') from None
    except KeyboardInterrupt:
        print('interrupted; run it again', file=sys.stderr)
        raise SystemExit(130) from None
