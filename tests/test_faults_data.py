"""Faults 25 to 36, the reading side: what is wrong with a dataset is said before a model is built."""
import json
import os
import pickle

import numpy as np
import pytest
from conftest import TINY, write_dataset
from kit import load

from configurator import UserError
from lib.text import data_folder, dataset


def refused(run, *flags):
    """Run train.py; return the last line of its error, having checked that it ended before the model was built."""
    done = run('train.py', *TINY, *flags)
    assert done.status in (1, 2) and 'number of parameters' not in done.out and 'Traceback' not in done.err
    return done.last_error


@pytest.fixture
def tiny(workdir):
    return workdir / 'data' / 'tiny'


def without_meta(folder, chars='abcdefghijklmnop'):
    """Turn a dataset into nanoGPT's."""
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars))}))


def test_a_dataset_nobody_prepared_names_the_command(run, workdir):  # fault 25
    assert 'data/shuixu_full/prepare.py' in refused(run, '--dataset=shuixu_full')


def test_an_unknown_dataset_lists_the_known(run, workdir):  # fault 25
    error = refused(run, '--dataset=nope')
    assert 'no dataset data/nope' in error and 'shakespeare_char' in error and ' text,' not in error
    assert 'data/text/prepare.py --input=YOUR_TEXT --name=nope' in error


@pytest.mark.parametrize('file, said', [('train.bin', 'train.bin not found'),
                                         ('UNFINISHED', 'prepare was interrupted there')])
def test_a_dataset_without_a_script_of_its_own_names_the_one_that_made_it(run, tiny, file, said):  # fault 25
    (tiny / file).unlink(missing_ok=True) if file == 'train.bin' else (tiny / file).touch()
    error = refused(run)
    assert said in error and 'data/text/prepare.py --input=YOUR_TEXT --name=tiny' in error


def test_text_is_the_name_of_no_dataset(run, workdir):  # fault 25
    (workdir / 'data' / 'text').mkdir()
    (workdir / 'data' / 'text' / 'prepare.py').touch()
    error = refused(run, '--dataset=text')
    assert 'dataset=text: ' in error and 'data/text/prepare.py --input=YOUR_TEXT --name=NAME' in error


def test_an_empty_bin_is_named(run, tiny):  # fault 26
    (tiny / 'train.bin').write_bytes(b'')
    assert 'train.bin is empty; run prepare.py again' in refused(run)


def test_half_a_token_is_named_with_the_size(run, tiny):  # fault 27
    with open(tiny / 'train.bin', 'ab') as f:
        f.write(b'\0')
    assert 'train.bin has 4001 bytes, not a multiple of 2: truncated?' in refused(run)


def test_a_bin_cut_short_is_told_from_what_prepare_wrote(run, tiny):  # fault 28
    os.truncate(tiny / 'train.bin', 3000)
    assert 'train.bin has 1500 tokens, prepare wrote 2000' in refused(run)


def test_an_unfinished_prepare_is_refused(run, tiny):  # fault 29
    (tiny / 'UNFINISHED').touch()
    assert 'is unfinished: prepare was interrupted there; run it again' in refused(run)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('n_tokens', [5, 8])
def test_a_split_shorter_than_a_window_and_its_target_is_refused(run, workdir, split, n_tokens):  # fault 30
    ids = {'train': range(16), 'val': range(16), split: [0] * n_tokens}
    write_dataset(workdir / 'data' / 'short', list(ids['train']), list(ids['val']))
    assert f'{split}.bin has {n_tokens} tokens; block_size=8 needs at least 9' in refused(run, '--dataset=short')


@pytest.mark.parametrize('n_tokens', [9, 10])
def test_a_split_of_one_window_trains(run, workdir, n_tokens):  # fault 30: the least that works
    write_dataset(workdir / 'data' / 'short', list(range(n_tokens)))
    done = run('train.py', *TINY, '--dataset=short')
    assert done.status == 0, done.err


@pytest.mark.parametrize('legacy', [False, True])
def test_one_token_outside_the_vocabulary_is_found_where_it_stands(run, tiny, legacy):  # fault 31
    ids = np.fromfile(tiny / 'train.bin', '<u2')
    ids[-1] = 40
    write_dataset(tiny, ids, ids[:400])
    if legacy:
        without_meta(tiny)
    assert 'train.bin contains token 40 at position 1999, vocab_size is 16' in refused(run)


def test_a_large_file_is_checked_batch_by_batch(run, tiny, monkeypatch):  # fault 31
    without_meta(tiny)
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)  # so that it is mapped, not scanned
    ids = np.fromfile(tiny / 'train.bin', '<u2')
    ids[7::8] = 40
    ids.tofile(tiny / 'train.bin')
    done = run('train.py', *TINY)
    assert done.status == 1 and 'train.bin contains token 40 at position' in done.last_error


def test_meta_of_another_text_is_refused(run, tiny):  # fault 33
    ids = np.fromfile(tiny / 'train.bin', '<u2')
    ids[5] ^= 1
    ids.tofile(tiny / 'train.bin')
    assert 'meta.json does not match its sha256' in refused(run)


def test_a_bin_cut_short_while_training_ends_in_a_line(run, tiny, monkeypatch):  # fault 35
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)
    real, calls = dataset.Split.batch, []

    def batch(self, *args):
        calls.append(self)
        if len(calls) == 6:
            os.truncate(tiny / 'train.bin', 100)
        return real(self, *args)
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    done = run('train.py', *TINY)
    assert done.status == 1 and 'train.bin was truncated while it was being read' in done.last_error
    assert load('out/last.pt')['iter_num'] == 0


def test_an_llm_c_file_is_recognised(run, tiny):  # fault 36
    without_meta(tiny)
    header = np.zeros(256, '<i4')
    header[:3] = 20240520, 1, 100
    (tiny / 'train.bin').write_bytes(header.tobytes() + bytes(200))
    assert 'train.bin looks like an llm.c file (magic 20240520)' in refused(run)


def test_an_npy_file_is_recognised(run, tiny):  # fault 36
    without_meta(tiny)
    with open(tiny / 'train.bin', 'wb') as f:
        np.save(f, np.arange(100, dtype='<u2') % 16)
    assert 'train.bin is a NumPy .npy file' in refused(run)


def test_uint32_ids_without_meta_are_recognised(run, tiny):  # fault 36
    without_meta(tiny)
    (np.arange(1000, dtype='<u4') % 16).tofile(tiny / 'train.bin')
    assert 'train.bin looks like uint32 ids' in refused(run)


@pytest.mark.parametrize('change', [
    lambda m: m.update(dtype='uint17'), lambda m: m.pop('splits'), lambda m: m.update(vocab_size='many'),
    lambda m: m['splits']['val'].pop('max_id'), lambda m: m['splits']['train'].update(n_tokens='2000'),
    lambda m: m.update(tokenizer={'kind': 'chars'}), lambda m: m.update(tokenizer=None), lambda m: m.update(dtype=7),
    lambda m: m.update(tokenizer={'kind': 'char', 'chars': 'ab'}), lambda m: m.update(vocab_size=0)])
def test_a_meta_json_with_a_value_amiss_is_named(run, tiny, change):  # fault 33
    meta = json.loads((tiny / 'meta.json').read_text(encoding='utf-8'))
    change(meta)
    (tiny / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    assert 'data/tiny/' in refused(run)


def test_uint32_ids_are_read_as_meta_says(run, workdir):  # fault 32: what prepare writes past 65,536 ids
    folder = write_dataset(workdir / 'data' / 'big', list(range(16)) * 20)
    meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
    for split in ('train', 'val'):
        np.arange(70_000 - 320, 70_000, dtype='<u4').tofile(folder / f'{split}.bin')
        meta['splits'][split].update(max_id=69_999, sha256='')
    meta.update(vocab_size=70_000, dtype='uint32', tokenizer={'kind': 'char', 'chars': ''.join(
        map(chr, (*range(0xd800), *range(0xe000, 0xe000 + 70_000 - 0xd800))))})
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    with pytest.raises(UserError, match='sha256'):
        dataset.open_dataset('big', 8)
    for split in ('train', 'val'):
        meta['splits'][split]['sha256'] = data_folder.hashlib.sha256((folder / f'{split}.bin').read_bytes()).hexdigest()
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    assert dataset.open_dataset('big', 8).train.batch(np.array([0]), 8)[0][0, 0] == 69_680
