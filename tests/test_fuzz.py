"""Fuzz: a file with random damage is refused with one line, or it is read without any difference."""
import json
import random

import numpy as np
import pytest
import torch
from conftest import TINY
from kit import differences

from configurator import UserError
from lib.text import dataset
from lib.text.data_folder import digest
from lib.weights import checkpoint


def regions(raw):
    """Return the spans of a zip file: all of it, each local header and its data, the directory, the end."""
    spans, at = [(0, len(raw))], 0
    directory = raw.index(b'PK\x01\x02')
    end = raw.rindex(b'PK\x05\x06')
    while (at := raw.find(b'PK\x03\x04', at)) >= 0 and at < directory:
        name, extra = np.frombuffer(raw[at + 26:at + 30], '<u2').tolist()
        size = int(np.frombuffer(raw[at + 18:at + 22], '<u4')[0])
        body = at + 30 + name + extra
        spans += [(at, body), (body, body + size)]
        at = body
    return [(a, b) for a, b in [*spans, (directory, end), (end, len(raw))] if b > a]


def damage(raw, span, rng):
    """Return `raw` with one random fault at a position that is uniform over `span`."""
    at, raw = rng.randrange(*span), bytearray(raw)
    kind = rng.choice(['bit', 'bit', 'byte', 'zeros', 'cut', 'insert', 'delete', 'repeat'])
    n = rng.choice([1, 2, 64, 4096])
    if kind == 'bit':
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 'byte':
        raw[at] = rng.randrange(256)
    elif kind == 'zeros':
        raw[at:at + n] = bytes(min(n, len(raw) - at))
    elif kind == 'cut':
        del raw[at:]
    elif kind == 'insert':
        raw[at:at] = rng.randbytes(n)
    elif kind == 'delete':
        del raw[at:at + n]
    else:
        raw[at:at] = raw[at:at + n]
    return bytes(raw)


def fuzz(path, spans, read, same, cases, seed):
    """Damage `path` `cases` times; return (refused, unharmed). AssertionError if a case is neither."""
    raw, rng, refused, unharmed = path.read_bytes(), random.Random(seed), 0, 0
    for case in range(cases):
        path.write_bytes(damage(raw, spans[case % len(spans)], rng))
        try:
            found = read()
        except UserError as error:
            assert any(p.name in error.message for p in path.parent.iterdir()), (case, error.message)
            refused += 1
        except Exception as error:
            raise AssertionError(f'case {case}: {type(error).__name__}: {error}') from error
        else:
            assert same(found), f'case {case}: something else was loaded'
            unharmed += 1
    path.write_bytes(raw)
    return refused, unharmed


@pytest.fixture
def trained(run, workdir):
    run('train.py', *TINY, '--max_iters=1', '--n_layer=1', '--n_embd=8')
    return workdir / 'out' / 'last.pt'


def fuzz_checkpoint(path, cases):
    original = checkpoint.load(path)
    return fuzz(path, regions(path.read_bytes()), lambda: checkpoint.load(path),
                lambda found: not differences(found, original), cases, seed=1)


def fuzz_dataset(folder, name, cases):
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    (folder / 'meta.json').write_text(json.dumps({**meta, 'sha256': digest(meta)}), encoding='utf-8')
    original = dataset.open_dataset('tiny', 8)

    def same(found):
        return (found.tokenizer, found.vocab_size, found.fingerprint()) == (
            original.tokenizer, original.vocab_size, original.fingerprint()) and all(
            np.array_equal(a.tokens, b.tokens) and a.n_bytes == b.n_bytes
            for a, b in ((found.train, original.train), (found.val, original.val)))
    path = folder / name
    return fuzz(path, [(0, path.stat().st_size)], lambda: dataset.open_dataset('tiny', 8), same, cases, seed=2)


def test_sixty_damaged_checkpoints_are_refused_or_unharmed(trained):
    refused, unharmed = fuzz_checkpoint(trained, 60)
    assert refused > 36 and unharmed < 24


@pytest.mark.slow
def test_a_thousand_damaged_checkpoints_are_refused_or_unharmed(trained):
    refused, unharmed = fuzz_checkpoint(trained, 1000)
    assert refused > 600 and unharmed < 400


@pytest.mark.parametrize('name, cases', [('meta.json', 60), ('train.bin', 20), ('val.bin', 20)])
def test_damaged_datasets_are_refused_or_unharmed(workdir, name, cases):
    refused, unharmed = fuzz_dataset(workdir / 'data' / 'tiny', name, cases)
    assert refused > 0.9 * cases


@pytest.mark.slow
@pytest.mark.parametrize('name, cases', [('meta.json', 600), ('train.bin', 200), ('val.bin', 200)])
def test_a_thousand_damaged_datasets_are_refused_or_unharmed(workdir, name, cases):
    refused, unharmed = fuzz_dataset(workdir / 'data' / 'tiny', name, cases)
    assert refused > 0.9 * cases


@pytest.mark.slow
def test_a_thousand_damaged_meta_pkls_end_in_a_line_or_a_character_table(workdir):
    import pickle
    folder = workdir / 'data' / 'tiny'
    (folder / 'meta.json').unlink()
    chars = 'abcdefghijklmnop'
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 16, 'itos': dict(enumerate(chars)),
                                                    'stoi': {c: i for i, c in enumerate(chars)}}))
    path = folder / 'meta.pkl'  # it has no checksum, so other characters may come out, but nothing else
    fuzz(path, [(0, path.stat().st_size)], lambda: dataset.open_dataset('tiny', 8),
         lambda found: found.tokenizer['kind'] == 'char' and found.vocab_size == len(found.tokenizer['chars']), 1000, 3)


@pytest.mark.parametrize('read, fault', [
    (lambda path: path.read_bytes(), 'something else was loaded'),
    (lambda path: json.loads(path.read_text(encoding='utf-8')), 'Error')])
def test_negative_control_a_reader_that_checks_too_little_is_noticed(workdir, read, fault):
    path = workdir / 'data' / 'tiny' / 'meta.json'
    original = read(path)
    with pytest.raises(AssertionError, match=fault):
        fuzz(path, [(0, path.stat().st_size)], lambda: read(path), lambda found: found == original, 60, seed=2)


def test_negative_control_a_wrong_weight_is_noticed():
    state, other = ({'model': {'w': torch.ones(3, 2)}, 'iter_num': 1} for _ in range(2))
    assert not differences(state, other)
    other['model']['w'][2, 1] += 1e-6
    assert differences(state, other) == ['/model/w']
