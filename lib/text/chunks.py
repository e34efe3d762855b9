"""From pieces of text to token ids, in chunks of about read_text.CHUNK characters and in several processes.

    text --scan--> size, characters, a sample      the first pass, to choose and train the tokenizer
    text --split_by_*--> train, val --gather--> chunks --tokenize--> ids      the second pass

Pieces are (text, is_last), see lib/text/read_text.py. Only a few chunks are in memory at a time.
"""
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice

import numpy as np

from configurator import UserError
from lib.machine.console import reason
from lib.text import dialogue, read_text
from lib.text.tokenizer import TextError, encoded, from_spec

WINDOW = 10_000  # characters: how far back from the end of a chunk to look for a safe place to split
LONGEST = 1 << 22  # characters; a document without a safe place in this many is split anywhere, in bounded memory
LONGEST_WORD = 1000  # characters, in the training of a BPE
SAMPLE = 20_000_000  # bytes: at most this much text trains a BPE


def scan(pieces, max_documents):
    """Return (n_chars, n_documents, distinct characters, parts of the text), reading up to max_documents.

    The parts are an even sample to train a BPE on, an iterator: only a BPE needs the time to look for long words.
    """
    n_chars = n_docs = n_parts = size = 0
    seen, sample, every = np.zeros(0x110000, bool), [], 1
    for text, is_last in pieces:
        seen[np.frombuffer(encoded(text, 'utf-32-le'), '<u4')] = True
        n_chars += len(text)
        n_docs += is_last
        for start in range(0, len(text), 1 << 16):
            if n_parts % every == 0:
                sample.append(text[start:start + (1 << 16)])
                size += len(encoded(sample[-1]))
            n_parts += 1
            if size > SAMPLE:  # drop every second part and sample half as often from now on, so it stays even
                sample, every = sample[::2], 2 * every
                size = sum(len(encoded(part)) for part in sample)
        if n_docs >= max_documents:
            break
    return n_chars, n_docs, ''.join(map(chr, np.flatnonzero(seen))), chain.from_iterable(map(_short, sample))


def _short(text):
    """Return a text to train a BPE on in parts that are short if it has few spaces; one long word takes minutes."""
    if not re.search(f'\\S{{{LONGEST_WORD}}}', text):
        return [text]
    return [text[start:start + LONGEST_WORD] for start in range(0, len(text), LONGEST_WORD)]


def split_by_document(pieces, val_fraction):
    """Yield (split, text, is_last), with validation documents spread evenly: for 0.1 every tenth one."""
    number, split = 0, 'train'
    for text, is_last in pieces:
        yield split, text, is_last
        if is_last:
            number += 1
            split = 'val' if int((number + 1) * val_fraction) > int(number * val_fraction) else 'train'


def split_by_position(pieces, n_train):
    """Yield (split, text, is_last): the first `n_train` characters are for training, the rest for validation."""
    for text, is_last in pieces:
        room = min(n_train, len(text))
        n_train -= room
        if room:
            yield 'train', text[:room], is_last and room == len(text)
        if room < len(text):
            yield 'val', text[room:], is_last


def gather(stream, safe_split, append_separator):
    """Gather (split, text, is_last) into chunks (split, pieces) of about read_text.CHUNK characters.

    A document is split only where that changes no id, see the tokenizer's `safe_split`. In the result, a piece is
    (text, True if a separator follows); append_separator: whether there is one after each document.
    """
    rest, pieces, size = {'train': '', 'val': ''}, {'train': [], 'val': []}, {'train': 0, 'val': 0}
    for split, text, is_last in stream:
        if rest[split]:
            text, rest[split] = rest[split] + text, ''
        if not is_last:
            at = safe_split(text, len(text) - WINDOW) if len(text) > WINDOW else -1
            if at < 0 and len(text) > LONGEST:
                at = len(text)
            if at < 0:  # no safe place yet: wait for more text
                rest[split] = text
                continue
            text, rest[split] = text[:at], text[at:]
        pieces[split].append((text, is_last and append_separator))
        size[split] += len(text)
        if size[split] >= read_text.CHUNK:
            yield split, pieces[split]
            pieces[split], size[split] = [], 0
    for split in ('train', 'val'):
        if pieces[split] or rest[split]:
            yield split, pieces[split] + [(rest[split], False)]


def gather_dialogues(stream):
    """Gather (split, dialogue, True) into chunks (split, dialogues) of about read_text.CHUNK characters."""
    dialogues, size = {'train': [], 'val': []}, {'train': 0, 'val': 0}
    for split, one, _ in stream:
        dialogues[split].append(one)
        size[split] += dialogue.counts([one])[0]
        if size[split] >= read_text.CHUNK:
            yield split, dialogues[split]
            dialogues[split], size[split] = [], 0
    for split in ('train', 'val'):
        if dialogues[split]:
            yield split, dialogues[split]


# From chunks to token ids

_worker_tokenizer = _worker_marks = None  # in a worker process


def _start_worker(spec, marks):
    global _worker_tokenizer, _worker_marks
    _worker_tokenizer, _worker_marks = from_spec(spec), marks
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Wait until the parent process has ended, in whatever way, and end this one, which would wait for it forever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _tokenize_chunk(split, pieces, tokenizer=None, marks=None):
    """Return (split, ids, n_chars, n_bytes) of a chunk, then the mask and the bytes of answers if it has dialogues.

    tokenizer, marks: None in a worker process.
    """
    tokenizer, marks = tokenizer or _worker_tokenizer, marks or _worker_marks
    try:
        if marks:
            ids, mask = dialogue.pack(tokenizer, pieces, marks)
            n_chars, n_bytes, answer_bytes = dialogue.counts(pieces)
            return split, ids, n_chars, n_bytes, mask, answer_bytes
        text = ''.join([text for text, _ in pieces])
        return split, tokenizer.encode_documents(pieces), len(text), len(encoded(text))
    except BaseException as error:  # Rust's panics are no Exception, and cannot be sent from a process
        if type(error).__name__ != 'PanicException':
            raise
        raise TextError(f'tiktoken cannot tokenize this text: {reason(error)}') from None


def tokenize(chunks, tokenizer, n_processes, marks=None):
    """Yield the tokenized chunks in order; only a few of them are in memory at a time. marks: those of dialogues."""
    first = list(islice(chunks, 4))
    # char and byte are table look-ups, faster than sending the text to another process
    if n_processes < 2 or len(first) < 4 or tokenizer.kind in ('char', 'byte'):
        for split, pieces in chain(first, chunks):
            yield _tokenize_chunk(split, pieces, tokenizer, marks)
        return
    try:
        pool = ProcessPoolExecutor(n_processes, initializer=_start_worker, initargs=(tokenizer.spec, marks))
    except (OSError, ImportError, NotImplementedError):  # a container or system without shared memory for semaphores
        yield from tokenize(chain(first, chunks), tokenizer, 1, marks)
        return
    try:
        pending = deque()
        for chunk in chain(first, chunks):
            pending.append(pool.submit(_tokenize_chunk, *chunk))
            if len(pending) > 2 * n_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError('a worker process died (out of memory?); nothing was changed; try --num_proc=1') from None
    finally:
        pool.shutdown(cancel_futures=True)
