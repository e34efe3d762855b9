"""lib/weights/checkpoint.py: what goes in comes out, and which file is resumed."""
import os

import pytest
import torch
from kit import differences, load

from configurator import UserError
from lib.weights import checkpoint
from lib.weights.checkpoint import claim, newest, put_aside, save


def state(iter_num=3, **more):
    return {'model': {'w': torch.arange(5.0)}, 'model_args': {'n_layer': 1}, 'iter_num': iter_num, 'optimizer': {},
            'best_val_loss': 1.5, **more}


def test_what_is_saved_is_loaded(tmp_path):
    saved = state(rng=[{'cpu': torch.get_rng_state()}], config={'a': 1, 'b': 'x', 'c': None, 'd': [True, (2.5,)]})
    save(tmp_path / 'last.pt', saved)
    assert differences(checkpoint.load(tmp_path / 'last.pt'), saved) == []
    assert differences(checkpoint.load(tmp_path / 'last.pt', mmap=True), saved) == []


def test_a_torch_without_this_program_loads_it(tmp_path):
    save(tmp_path / 'last.pt', state())
    assert load(tmp_path / 'last.pt')['iter_num'] == 3


def test_the_file_before_stays_as_prev_and_the_best_may_be_the_same_file(tmp_path):
    for i in (1, 2):
        save(tmp_path / 'last.pt', state(i), keep_previous=True, also=tmp_path / 'ckpt.pt' if i == 1 else None)
    assert [load(tmp_path / n)['iter_num'] for n in ('last.pt', 'last.prev.pt', 'ckpt.pt')] == [2, 1, 1]
    assert os.path.samefile(tmp_path / 'last.prev.pt', tmp_path / 'ckpt.pt')


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError(95, 'Operation not supported')))
    for i in (1, 2):
        save(tmp_path / 'last.pt', state(i), keep_previous=True, also=tmp_path / 'ckpt.pt')
    assert [load(tmp_path / n)['iter_num'] for n in ('last.pt', 'last.prev.pt', 'ckpt.pt')] == [2, 1, 2]


@pytest.mark.parametrize('present, chosen', [
    (['last.pt', 'last.prev.pt', 'ckpt.pt'], 'last.pt'), (['last.prev.pt', 'ckpt.pt'], 'last.prev.pt'),
    (['ckpt.pt'], 'ckpt.pt')])
def test_the_newest_state_is_resumed(tmp_path, present, chosen):
    for name in present:
        save(tmp_path / name, state())
    assert newest(tmp_path)[0] == tmp_path / chosen


def test_no_files_is_no_checkpoint(tmp_path):
    assert newest(tmp_path) is None and newest(tmp_path / 'nowhere') is None


def test_a_model_without_training_state_is_not_resumed(tmp_path):
    save(tmp_path / 'ckpt.pt', {'model': {}, 'model_args': {}})
    with pytest.raises(UserError, match='has no optimizer and no iter_num'):
        newest(tmp_path)


@pytest.mark.parametrize('value', [{1, 2}, b'bytes', object(), 1j, torch.float32, torch.nn.Module])
def test_only_tensors_and_plain_values_are_saved(tmp_path, value):
    with pytest.raises(UserError, match='only tensors and plain values'):
        save(tmp_path / 'last.pt', state(extra=value))


def test_a_claimed_folder_is_free_again_when_the_lock_is_closed(tmp_path):
    claim(tmp_path / 'a' / 'b').close()
    lock = claim(tmp_path / 'a' / 'b')
    with pytest.raises(UserError, match='in use by pid'):
        claim(tmp_path / 'a' / 'b')
    lock.close()
    claim(tmp_path / 'a' / 'b').close()


def test_runs_put_aside_are_numbered_and_nothing_else_moves(tmp_path):
    for expected in ('old-1', 'old-2'):
        save(tmp_path / 'last.pt', state())
        (tmp_path / 'notes.txt').touch()
        assert put_aside(tmp_path).name == expected
    assert put_aside(tmp_path) is None and (tmp_path / 'notes.txt').exists()


def test_a_platform_without_fcntl_or_folder_sync_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'fcntl', None)
    monkeypatch.delattr(os, 'O_DIRECTORY')
    claim(tmp_path).close()
    save(tmp_path / 'last.pt', state(), keep_previous=True)
    assert newest(tmp_path)[1]['iter_num'] == 3


def test_a_second_path_that_cannot_be_written_is_named_and_the_first_is_written(tmp_path):
    (tmp_path / 'ckpt.pt').mkdir()
    with pytest.raises(UserError, match=r'could not write .*ckpt.pt \(.*last.pt is written'):
        checkpoint.save(tmp_path / 'last.pt', {'model': {}, 'model_args': {}}, also=tmp_path / 'ckpt.pt')
    assert checkpoint.load(tmp_path / 'last.pt')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'last.pt']
