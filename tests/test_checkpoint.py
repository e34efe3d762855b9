"""lib/weights/checkpoint.py: saving, loading, which file is resumed, and what happens when saving fails."""
import errno
import os
import pickle
import random
import re
import resource
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from kit import REPO, break_call, differences, flip, inside, load, python, shorten

from configurator import UserError
from lib.machine.runtime import Runtime
from lib.weights import checkpoint, lora
from lib.weights.checkpoint import archive_old_run, find_latest, lock_out_dir, save, save_run
from model import GPT, GPTConfig


def state(iter_num=3, **more):
    return {'model': {'w': torch.arange(5.0)}, 'model_args': {'n_layer': 1}, 'iter_num': iter_num, 'optimizer': {},
            'best_val_loss': 1.5, **more}


def test_a_saved_checkpoint_is_loaded_unchanged(tmp_path):
    saved = state(rng=[{'cpu': torch.get_rng_state()}], config={'a': 1, 'b': 'x', 'c': True, 'd': 2.5})
    save(tmp_path / 'last.pt', saved)
    assert differences(checkpoint.load(tmp_path / 'last.pt'), saved) == []
    assert differences(checkpoint.load(tmp_path / 'last.pt', mmap=True), saved) == []


def test_a_torch_without_this_program_loads_it(tmp_path):
    save(tmp_path / 'last.pt', state())
    assert load(tmp_path / 'last.pt')['iter_num'] == 3


def test_the_previous_file_stays_as_prev_and_ckpt_is_a_link(tmp_path):
    for i in (1, 2):
        save(tmp_path / 'last.pt', state(i), keep_previous=True, link_as=tmp_path / 'ckpt.pt' if i == 1 else None)
    assert [load(tmp_path / n)['iter_num'] for n in ('last.pt', 'last.prev.pt', 'ckpt.pt')] == [2, 1, 1]
    assert os.path.samefile(tmp_path / 'last.prev.pt', tmp_path / 'ckpt.pt')


def test_a_previous_file_is_kept_only_on_request(tmp_path):
    for i in (1, 2):
        save(tmp_path / 'last.pt', state(i))
    assert [p.name for p in tmp_path.iterdir()] == ['last.pt']


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'link', lambda *args: (_ for _ in ()).throw(OSError(95, 'Operation not supported')))
    for i in (1, 2):
        save(tmp_path / 'last.pt', state(i), keep_previous=True, link_as=tmp_path / 'ckpt.pt')
    assert [load(tmp_path / n)['iter_num'] for n in ('last.pt', 'last.prev.pt', 'ckpt.pt')] == [2, 1, 2]


@pytest.mark.parametrize('present, chosen', [
    (['last.pt', 'last.prev.pt', 'ckpt.pt'], 'last.pt'), (['last.prev.pt', 'ckpt.pt'], 'last.prev.pt'),
    (['ckpt.pt'], 'ckpt.pt')])
def test_the_newest_state_is_resumed(tmp_path, present, chosen):
    for name in present:
        save(tmp_path / name, state())
    assert find_latest(tmp_path)[0] == tmp_path / chosen


def test_no_files_is_no_checkpoint(tmp_path):
    assert find_latest(tmp_path) is None and find_latest(tmp_path / 'nowhere') is None


def test_a_model_without_training_state_is_not_resumed(tmp_path):
    save(tmp_path / 'ckpt.pt', {'model': {}, 'model_args': {}})
    with pytest.raises(UserError, match='has no optimizer and no iter_num'):
        find_latest(tmp_path)


@pytest.mark.parametrize('value', [{1, 2}, b'bytes', object(), 1j, torch.float32, torch.nn.Module])
def test_only_tensors_and_plain_values_are_saved(tmp_path, value):
    with pytest.raises(UserError, match='only tensors and plain values'):
        save(tmp_path / 'last.pt', state(extra=value))


def test_a_value_in_a_list_that_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(UserError, match=r"checkpoint\['extra'\]\[1\]\['a'\] is a set: a checkpoint holds only"):
        save(tmp_path / 'last.pt', state(extra=[0, {'a': {2}}]))


def test_a_locked_folder_is_free_again_when_the_lock_is_closed(tmp_path):
    lock_out_dir(tmp_path / 'a' / 'b').close()
    lock = lock_out_dir(tmp_path / 'a' / 'b')
    with pytest.raises(UserError, match='in use by pid'):
        lock_out_dir(tmp_path / 'a' / 'b')
    lock.close()
    lock_out_dir(tmp_path / 'a' / 'b').close()


def test_the_lock_names_its_newest_owner_only(tmp_path):
    (tmp_path / '.lock').write_text('pid 123456789 on host of-an-earlier-run\n', encoding='utf-8')
    lock_out_dir(tmp_path).close()
    assert (tmp_path / '.lock').read_text(encoding='utf-8') == f'pid {os.getpid()} on host {socket.gethostname()}\n'


def test_archived_runs_are_numbered_and_no_other_file_moves(tmp_path):
    for expected in ('old-1', 'old-2'):
        save(tmp_path / 'last.pt', state())
        (tmp_path / 'notes.txt').touch()
        assert archive_old_run(tmp_path).name == expected
    assert archive_old_run(tmp_path) is None and (tmp_path / 'notes.txt').exists()


def test_a_platform_without_fcntl_saves_too(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'fcntl', None)
    (tmp_path / 'last.pt.tmp.123').touch()  # another run may be writing it now
    lock_out_dir(tmp_path).close()
    assert (tmp_path / 'last.pt.tmp.123').exists()
    save(tmp_path / 'last.pt', state(), keep_previous=True)
    assert find_latest(tmp_path)[1]['iter_num'] == 3


def test_a_link_that_cannot_be_written_is_named_and_the_file_is_written(tmp_path):
    (tmp_path / 'ckpt.pt').mkdir()
    with pytest.raises(UserError, match=r'could not write .*ckpt.pt \(Is a directory\);.*last.pt is written'):
        checkpoint.save(tmp_path / 'last.pt', {'model': {}, 'model_args': {}}, link_as=tmp_path / 'ckpt.pt')
    assert checkpoint.load(tmp_path / 'last.pt')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['ckpt.pt', 'last.pt']


def model_and_state(rank=0, iter_num=3):
    """Return a small GPT, with adapters of this rank, and its checkpoint."""
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=4))
    if rank:
        lora.adapt(model, rank)
    return model, state(iter_num, model=model.state_dict())


class Master:
    """A Runtime of one rank of two whose other rank reports `other`: 1 where something failed there, else 0."""

    def __init__(self, other=0, is_master=True):
        self.other, self.is_master = other, is_master

    def all_reduce_max(self, number):
        return (max(number, self.other),)


ONE = Runtime(torch.device('cpu'), torch.float32, False, '')


@pytest.mark.parametrize('as_best', [True, False])
def test_a_run_is_saved_as_last_and_where_it_is_best_as_ckpt(tmp_path, as_best):
    model, saved = model_and_state()
    lines, warnings = [], []
    assert save_run(ONE, tmp_path, saved, model, as_best=as_best, required=False, say=lines.append,
                    warn=warnings.append) is True
    assert lines == [f'saving checkpoint to {tmp_path}'] and not warnings
    assert differences(load(tmp_path / 'last.pt'), saved) == []
    assert (tmp_path / 'ckpt.pt').exists() == as_best
    assert not as_best or os.path.samefile(tmp_path / 'ckpt.pt', tmp_path / 'last.pt')


def test_a_run_with_adapters_keeps_them_in_last_and_is_merged_in_ckpt(tmp_path):
    model, saved = model_and_state(rank=2)
    assert save_run(ONE, tmp_path, saved, model, as_best=True, required=True)
    assert lora.rank_of(load(tmp_path / 'last.pt')['model']) == 2
    merged = load(tmp_path / 'ckpt.pt')['model']
    assert merged.keys() == model_and_state()[1]['model'].keys()
    (tmp_path / 'ckpt.pt').unlink()
    assert save_run(ONE, tmp_path, saved, model, as_best=False, required=True) and not (tmp_path / 'ckpt.pt').exists()


def test_adapters_of_rank_1_are_merged_too(tmp_path):
    model, saved = model_and_state(rank=1)
    assert save_run(ONE, tmp_path, saved, model, as_best=True, required=True)
    assert load(tmp_path / 'ckpt.pt')['model'].keys() == model_and_state()[1]['model'].keys()


def test_a_loaded_checkpoint_does_not_change_with_the_file(tmp_path):
    model, saved = model_and_state()
    save_run(ONE, tmp_path, saved, model, as_best=False, required=True)
    loaded = checkpoint.load(tmp_path / 'last.pt')
    with open(tmp_path / 'last.pt', 'r+b') as file:  # in place: a file that is mapped would change
        file.write(bytes(file.seek(0, 2) - file.seek(0)))
    assert differences(loaded, saved) == []


def test_the_merged_model_of_a_run_with_adapters_is_no_training_state(tmp_path):
    """Its optimizer has the state of the adapters, which the merged model lacks."""
    model, saved = model_and_state(rank=2)
    save_run(ONE, tmp_path, {**saved, 'optimizer': {}, 'best_val_loss': 1.0}, model, as_best=True, required=True)
    (tmp_path / 'last.pt').unlink()
    with pytest.raises(UserError, match='ckpt.pt has no optimizer: a model, but not a training state'):
        checkpoint.find_latest(tmp_path)


def test_a_run_that_begins_with_the_model_of_its_own_folder_keeps_it(run, trained):
    done = run('train.py', *TINY, '--init_from=out', '--out_dir=out', '--max_iters=1', '--learning_rate=0')
    assert done.status == 0 and 'its files are now in out/old-1' in done.out
    before, now = (load(f'out/{name}')['model'] for name in ('old-1/ckpt.pt', 'ckpt.pt'))
    assert differences(before, now) == []


def test_only_rank_0_writes(tmp_path):
    model, saved = model_and_state()
    assert save_run(Master(is_master=False), tmp_path, saved, model, as_best=True, required=True)
    assert not list(tmp_path.iterdir())


def test_two_saves_of_one_state_are_equal_byte_for_byte(tmp_path):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        save(tmp_path / name / 'last.pt', state())
    assert (tmp_path / 'a' / 'last.pt').read_bytes() == (tmp_path / 'b' / 'last.pt').read_bytes()


# Faults

LOOP = """
import sys, torch
from lib.weights import checkpoint
size = int(sys.argv[2])
for i in range(10**6):
    state = {'model': {'w': torch.full((size,), float(i))}, 'model_args': {}, 'iter_num': i}
    print('saving', i, flush=True)
    checkpoint.save(sys.argv[1] + '/last.pt', state, keep_previous=True, link_as=sys.argv[1] + '/ckpt.pt')
    print('saved', i, flush=True)
"""


def kill_inside_saves(folder, wanted):
    """SIGKILL a saving process over and over; returns (kills inside a save, what was found wrong afterwards)."""
    inside_a_save, wrong, pause = 0, [], random.Random(0)
    while inside_a_save < wanted:
        child = python(LOOP, folder, 2_000_000)
        first = int(child.stdout.readline().split()[1])
        while not child.stdout.readline().startswith('saved'):
            pass
        time.sleep(pause.random() * 0.05)
        child.kill()
        lines = ['saving 0', 'saved 0', *child.communicate()[0].split('\n')]
        whole = [line for line in lines if line.startswith('sav')]
        inside_a_save += whole[-1].startswith('saving')
        done = max(int(line.split()[1]) for line in whole if line.startswith('saved'))
        for name in ('last.pt', 'ckpt.pt'):
            state = checkpoint.load(folder / name)
            if not (done <= state['iter_num'] + first <= done + 1 and (state['model']['w'] == state['iter_num']).all()):
                wrong.append((name, done, state['iter_num']))
        lock_out_dir(folder).close()
        wrong += list(folder.glob('*.tmp.*'))
    return inside_a_save, wrong


def test_a_kill_inside_a_save_leaves_the_old_or_the_new_file_whole(tmp_path):  # fault 1
    inside_a_save, wrong = kill_inside_saves(tmp_path, wanted=1)
    assert not wrong


@pytest.mark.slow
def test_ten_kills_inside_a_save_leave_the_old_or_the_new_file_whole(tmp_path):  # fault 1
    inside_a_save, wrong = kill_inside_saves(tmp_path, wanted=10)
    assert inside_a_save == 10 and not wrong


@pytest.fixture
def file_size_limit():
    """Limits the size of files, which fails like a full disk does; undone at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def resume(run, *flags):
    return run('train.py', *TINY, '--init_from=resume', '--max_iters=9', *flags)


def test_a_full_disk_at_a_periodic_save_warns_and_training_goes_on(run, trained, monkeypatch):  # fault 2
    real, calls = torch.save, []

    def save(*args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(28, 'No space left on device')
        return real(*args)
    monkeypatch.setattr(torch, 'save', save)
    done = run('train.py', *TINY, '--init_from=resume', '--max_iters=12')
    assert (done.status, load(trained / 'last.pt')['iter_num']) == (0, 12)
    assert 'warning: could not write out/last.pt: it needs about' in done.err


def test_a_full_disk_at_the_last_save_is_an_error_and_the_old_file_stays(run, trained, file_size_limit):  # fault 2
    file_size_limit(20_000)
    done = resume(run)
    file_size_limit(resource.RLIM_INFINITY)
    assert done.status == 1
    assert 'error: could not write out/last.pt' in done.last_error and 'What last.pt held before' in done.last_error
    assert checkpoint.load(trained / 'last.pt')['iter_num'] == 6
    assert not list(trained.glob('*.tmp.*'))


def test_a_log_that_cannot_be_written_does_not_end_the_run(run, trained, monkeypatch):  # fault 2
    from lib.training import log
    break_call(monkeypatch, log.json, 'dumps', OSError(28, 'No space left on device'), lambda r: r.get('iter') == 7)
    done = resume(run)
    assert done.status == 0 and done.err.count('No space left on device') == 1


def test_a_value_that_cannot_be_stored_is_named_and_the_old_file_stays(tmp_path):  # fault 3
    path = tmp_path / 'last.pt'
    checkpoint.save(path, {'model': {}, 'model_args': {}})
    with pytest.raises(UserError, match=r"\['config'\]\['f'\] is a function"):
        checkpoint.save(path, {'model': {}, 'model_args': {}, 'config': {'f': lambda: 0}})
    assert checkpoint.load(path) and [p.name for p in tmp_path.iterdir()] == ['last.pt']


def test_any_failure_inside_a_save_leaves_no_temporary_file(tmp_path, monkeypatch):  # fault 3
    break_call(monkeypatch, torch, 'save', MemoryError())
    with pytest.raises(UserError, match='MemoryError'):
        checkpoint.save(tmp_path / 'last.pt', {'model': {}})
    assert not list(tmp_path.iterdir())


def test_an_out_dir_that_is_a_file_is_refused_before_the_model_is_built(run, workdir):  # fault 4
    (workdir / 'out').touch()
    done = run('train.py', *TINY)
    assert done.status in (1, 2) and "out_dir 'out' is not a writable folder" in done.last_error
    assert 'number of parameters' not in done.out


@pytest.mark.parametrize('cut', [1, 5000])
def test_a_truncated_checkpoint_is_skipped_for_the_previous_one(run, trained, cut):  # faults 5 and 9
    shorten(trained / 'last.pt', cut)
    done = resume(run)
    assert done.status == 0 and 'resuming from iter 4 (out/last.prev.pt)' in done.out
    assert 'warning: out/last.pt is incomplete' in done.err and 'using out/last.prev.pt (iter 4)' in done.err


def test_an_empty_checkpoint_is_skipped_for_the_previous_one(run, trained):  # faults 6 and 9
    (trained / 'last.pt').write_bytes(b'')
    done = resume(run)
    assert 'resuming from iter 4' in done.out and 'warning: out/last.pt is empty; using out/last.prev.pt' in done.err


def test_a_flipped_bit_in_a_weight_is_noticed(trained):  # fault 7
    flip(trained / 'ckpt.pt', inside(trained / 'ckpt.pt', 'data/0') + 5)
    with pytest.raises(UserError, match='ckpt.pt is corrupt: checksum mismatch in .*/data/0'):
        checkpoint.load(trained / 'ckpt.pt')


@pytest.mark.parametrize('content', [b'<html>404</html>', b'version https://git-lfs.github.com/spec/v1', b'\x80.'])
def test_a_file_of_another_kind_is_refused(run, trained, content):  # fault 8
    for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'):
        (trained / name).unlink()
    (trained / 'ckpt.pt').write_bytes(content)
    done = resume(run)
    assert done.status and 'out/ckpt.pt is not a checkpoint of this program' in done.last_error
    assert 'weights_only' not in done.err


def test_no_whole_checkpoint_is_an_error_for_auto_too(run, trained):  # fault 9
    for path in trained.glob('*.pt'):
        path.write_bytes(b'')
    done = run('train.py', *TINY, '--init_from=auto')
    assert done.status and 'no whole checkpoint is left to resume from' in done.last_error


def test_files_that_a_killed_run_left_incomplete_are_removed(run, trained):  # fault 10
    stale = trained / 'last.pt.tmp.123'
    stale.write_bytes(b'half')
    done = resume(run)
    assert done.status == 0 and not stale.exists() and 'removed out/last.pt.tmp.123' in done.err


def test_a_second_run_in_the_same_out_dir_is_refused(run, workdir):  # fault 11
    lock = lock_out_dir('out')
    done = run('train.py', *TINY)
    lock.close()
    assert done.status and f"out_dir 'out' is in use by pid {os.getpid()} on host" in done.last_error


def test_starting_over_archives_the_earlier_run(run, trained):  # fault 12
    done = run('train.py', *TINY, '--max_iters=2')
    assert 'out held an earlier run' in done.out and 'out/old-1' in done.out
    assert (load(trained / 'old-1' / 'last.pt')['iter_num'], load(trained / 'last.pt')['iter_num']) == (6, 2)


def test_a_failed_rename_leaves_every_file_readable(run, trained, monkeypatch):
    break_call(monkeypatch, os, 'replace', OSError(5, 'Input/output error'), lambda a, b: str(b).endswith('last.pt'))
    done = resume(run)
    assert done.status == 1 and 'could not write out/last.pt' in done.last_error
    # the model is named first: the training state is never newer than it, and a resumed run saves it again
    assert [checkpoint.load(trained / n)['iter_num'] for n in ('last.pt', 'ckpt.pt')] == [6, 9]


def test_starting_over_leaves_no_checkpoint_of_the_earlier_run_to_resume(run, trained):
    assert (trained / 'last.prev.pt').exists()
    assert run('train.py', *TINY, '--max_iters=0').status == 0
    shorten(trained / 'last.pt', 5000)
    (trained / 'ckpt.pt').unlink()
    done = resume(run)
    assert done.status and 'no whole checkpoint is left' in done.last_error


@pytest.mark.parametrize('name', ['thesis.tmp.docx', 'last.pt.tmp.docx', 'notes.tmp.1', 'x.tmp.d/file'])
def test_locking_a_folder_removes_no_file_of_others(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('mine', encoding='utf-8')
    lock_out_dir(tmp_path).close()
    assert (tmp_path / name).read_text(encoding='utf-8') == 'mine'


@pytest.mark.parametrize('number', [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_used_with_one_warning(tmp_path, monkeypatch, capsys, number):
    break_call(monkeypatch, checkpoint.fcntl, 'flock', OSError(number, 'no locks here'))
    (tmp_path / 'last.pt.tmp.123').touch()  # another run may be writing it now
    lock_out_dir(tmp_path).close()
    err = capsys.readouterr().err
    assert err.count('\n') == 1 and f'warning: the file system of {tmp_path} has no locks (no locks here)' in err
    assert (tmp_path / 'last.pt.tmp.123').exists()


@pytest.mark.parametrize('number', [errno.EWOULDBLOCK, errno.EAGAIN])
def test_only_a_lock_that_is_held_means_in_use(tmp_path, monkeypatch, number):
    break_call(monkeypatch, checkpoint.fcntl, 'flock', OSError(number, 'held'))
    with pytest.raises(UserError, match='is in use by another run; choose another --out_dir'):
        lock_out_dir(tmp_path)


def test_a_full_disk_does_not_prevent_locking(tmp_path, monkeypatch):
    break_call(monkeypatch, os, 'write', OSError(errno.ENOSPC, 'No space left on device'))
    lock_out_dir(tmp_path).close()


def test_an_incomplete_file_that_cannot_be_removed_does_not_prevent_locking(tmp_path, monkeypatch):
    (tmp_path / 'last.pt.tmp.123').touch()
    break_call(monkeypatch, checkpoint.Path, 'unlink', PermissionError(errno.EPERM, 'Operation not permitted'))
    lock_out_dir(tmp_path).close()


def test_an_out_dir_that_disappears_is_an_error_of_one_line(tmp_path):
    with pytest.raises(UserError, match=r'could not write .*gone/last.pt \(.*No such file or directory'):
        save(tmp_path / 'gone' / 'last.pt', state())


def test_a_periodic_save_that_fails_is_a_warning_and_not_saved(tmp_path):
    model, saved = model_and_state()
    warnings = []
    (tmp_path / 'gone').touch()  # a file, where the folder was
    assert save_run(ONE, tmp_path / 'gone', saved, model, as_best=True, required=False, warn=warnings.append) is False
    assert len(warnings) == 1 and 'could not write' in warnings[0]


def test_an_out_dir_that_was_renamed_is_created_again_and_nothing_is_lost(tmp_path):
    model, saved = model_and_state()
    warnings = []
    assert save_run(ONE, tmp_path / 'gone' / 'run', saved, model, as_best=True, required=True, warn=warnings.append)
    assert len(warnings) == 1 and 'created again' in warnings[0]
    assert checkpoint.load(tmp_path / 'gone' / 'run' / 'last.pt')['iter_num'] == saved['iter_num']


@pytest.mark.parametrize('number', [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV])
def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch, number):
    break_call(monkeypatch, os, 'link', OSError(number, 'no links here'))
    for _ in range(2):
        save(tmp_path / 'last.pt', state(), keep_previous=True, link_as=tmp_path / 'ckpt.pt')
    assert all(checkpoint.load(tmp_path / name) for name in ('last.pt', 'last.prev.pt', 'ckpt.pt'))


def test_a_previous_file_that_cannot_be_kept_does_not_prevent_the_new_one(tmp_path, monkeypatch):
    save(tmp_path / 'last.pt', state(1), keep_previous=True)
    break_call(monkeypatch, checkpoint, '_link', OSError(errno.ENOSPC, 'No space left on device'))
    with pytest.raises(UserError, match=r'last.prev.pt \(No space left on device\).*last.pt is written'):
        save(tmp_path / 'last.pt', state(2), keep_previous=True)
    assert checkpoint.load(tmp_path / 'last.pt')['iter_num'] == 2


@pytest.mark.parametrize('number', [errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EHOSTDOWN])
def test_a_checkpoint_that_a_network_does_not_deliver_is_one_line(tmp_path, monkeypatch, number):
    save(tmp_path / 'last.pt', state())
    break_call(monkeypatch, checkpoint.Path, 'is_file', OSError(number, os.strerror(number)))
    with pytest.raises(UserError, match=f'last.pt cannot be read .{os.strerror(number)}'):
        checkpoint.load(tmp_path / 'last.pt')


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'full'), OSError(errno.EDQUOT, 'full'),
                                   OSError(errno.EFBIG, 'full'), RuntimeError('unexpected pos 64')])
def test_an_error_about_space_says_what_is_needed_and_free(tmp_path, monkeypatch, error):
    # torch's zip writer reports a full disk as a RuntimeError
    def expanded(n):
        return torch.zeros(1, dtype=torch.float16).expand(n)  # needs no memory here
    big = state(extra={'a': [expanded(2**28), (expanded(2**29),)], 'b': 5})
    break_call(monkeypatch, torch, 'save', error)
    monkeypatch.setattr(checkpoint.shutil, 'disk_usage', lambda path: SimpleNamespace(free=3 * 2**30))
    with pytest.raises(UserError, match='it needs about 1.50 GiB, 3.00 GiB are free'):
        save(tmp_path / 'last.pt', big)
    break_call(monkeypatch, checkpoint.shutil, 'disk_usage', OSError(errno.EIO, 'Input/output error'))
    with pytest.raises(UserError, match=f'it needs about 1.50 GiB, {tmp_path} cannot be read: Input/output error'):
        save(tmp_path / 'last.pt', big)


def test_the_size_of_a_checkpoint_is_that_of_its_tensors():
    half = torch.zeros(3, dtype=torch.float16)
    assert checkpoint.n_bytes({'a': torch.zeros(2, 5), 'b': [half, (half, 'text', {'c': half})], 'd': 7}) == 40 + 3 * 6


def test_an_error_that_is_not_about_space_says_nothing_about_space(tmp_path, monkeypatch):
    break_call(monkeypatch, os, 'replace', OSError(errno.ESTALE, 'Stale file handle'))
    with pytest.raises(UserError) as caught:
        save(tmp_path / 'last.pt', state())
    assert 'Stale file handle' in caught.value.message and 'GiB' not in caught.value.message


def test_a_lock_file_of_another_user_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'open', open, raising=False)
    break_call(monkeypatch, checkpoint, 'open', PermissionError(errno.EACCES, 'Permission denied', '.lock'))
    with pytest.raises(UserError, match=r'\.lock: Permission denied'):
        lock_out_dir(tmp_path)


def test_an_earlier_run_that_cannot_be_moved_is_one_line(tmp_path, monkeypatch):
    save(tmp_path / 'last.pt', state())
    break_call(monkeypatch, os, 'replace', OSError(errno.EBUSY, 'Device or resource busy'))
    with pytest.raises(UserError, match='cannot be moved .*Device or resource busy'):
        checkpoint.archive_old_run(tmp_path)


def test_a_folder_that_access_denies_perhaps_wrongly_is_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'access', lambda *args: False)
    assert checkpoint.folder_problem(tmp_path / 'out') == ''
    break_call(monkeypatch, checkpoint.tempfile, 'TemporaryFile', PermissionError(errno.EACCES, 'Permission denied'))
    assert 'is not a writable folder (Permission denied)' in checkpoint.folder_problem(tmp_path / 'out')


def test_a_save_that_must_succeed_and_fails_is_an_error(tmp_path):
    model, saved = model_and_state()
    (tmp_path / 'gone').touch()
    with pytest.raises(UserError, match='could not write'):
        save_run(ONE, tmp_path / 'gone', saved, model, as_best=False, required=True)


def test_a_save_that_fails_on_rank_0_is_known_to_the_others(tmp_path):
    model, saved = model_and_state()
    failing = Master(is_master=False)
    answers = iter([(0,), (1,)])  # no NaN anywhere; rank 0 could not write
    failing.all_reduce_max = lambda number: next(answers)
    assert save_run(failing, tmp_path, saved, model, as_best=True, required=False) is False


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_not_finite_are_not_written(tmp_path, value):
    model, saved = model_and_state()
    with torch.no_grad():
        model.transformer.wte.weight[2, 1] = value
    with pytest.raises(UserError, match='the weights of iter 3 are not finite; they were not saved'):
        save_run(ONE, tmp_path, saved, model, as_best=True, required=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
def test_large_weights_are_finite_also_where_their_sum_is_not(dtype):
    model = model_and_state()[0].to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(30_000)
    assert not checkpoint.has_nan(model)
    model.transformer.wte.weight.data[0, 0] = float('nan')
    assert checkpoint.has_nan(model)


def test_weights_that_are_not_finite_on_another_rank_are_not_written(tmp_path):
    model, saved = model_and_state()
    assert save_run(Master(other=1), tmp_path, saved, model, as_best=True, required=False) is False
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_never_replace_those_on_disk(run, trained):
    state = load(trained / 'last.pt')
    state['model']['lm_head.weight'][0, 0] = float('nan')
    before = checkpoint.load(trained / 'ckpt.pt')['iter_num']
    for name in ('last.pt', 'last.prev.pt'):
        torch.save(state, trained / name)
    done = resume(run)
    assert done.status == 1 and 'neither the update nor a checkpoint of it was kept' in done.last_error
    assert checkpoint.load(trained / 'ckpt.pt')['iter_num'] == before


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def harm(tmp_path):
    return tmp_path / 'harmed'


READERS = {
    'train.py resume': ['train.py', *TINY, '--init_from=resume'],
    'train.py auto': ['train.py', *TINY, '--init_from=auto'],
    'train.py eval_only': ['train.py', *TINY, '--init_from=resume', '--eval_only=True'],
    'sample.py': ['sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=1'],
}


@pytest.mark.parametrize('trust', ['0', '1'])
@pytest.mark.parametrize('reader', READERS)
def test_a_checkpoint_with_a_payload_is_refused_by_every_reader(run, workdir, harm, monkeypatch, reader, trust):
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', trust)  # faults 54 and 55
    (workdir / 'out').mkdir()
    torch.save({'model': {}, 'model_args': {}, 'config': Payload(harm)}, workdir / 'out' / 'ckpt.pt')
    done = run(*READERS[reader])
    assert done.status and not harm.exists()
    assert 'out/ckpt.pt holds Python objects other than tensors and plain values; refusing' in done.last_error


def test_the_payload_works_so_that_the_tests_here_mean_something(harm):
    pickle.loads(pickle.dumps(Payload(harm)))
    assert harm.exists()


def test_a_torch_that_cannot_load_safely_is_refused(tmp_path, monkeypatch):  # fault 58
    path = tmp_path / 'ckpt.pt'
    checkpoint.save(path, {'model': {}, 'model_args': {}})
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    with pytest.raises(UserError, match='torch 2.5.1 cannot load checkpoints safely .*; upgrade to >= 2.10'):
        checkpoint.load(path)


def programs():
    """Return the paths of all programs but the tests."""
    found = [path for part in ('*.py', 'lib/**/*.py', 'data/*/*.py', 'benchmarks/*.py') for path in REPO.glob(part)]
    assert len(found) > 30
    return found


def test_no_file_of_the_project_loads_objects():  # faults 54 to 57
    unsafe = re.compile(r'pickle\.loads?\(|weights_only\s*=\s*False|(?<!\w)eval\(|allow_pickle\s*=\s*True|'
                        r'distributed\.checkpoint\b(?!\.state_dict)')
    found = [f'{path.name}: {line.strip()}' for path in programs() for line
             in path.read_text(encoding='utf-8').splitlines() if unsafe.search(line)]
    assert not [line for line in found if '.eval()' not in line]


def test_every_torch_load_is_safe_by_its_own_argument():  # fault 55
    texts = [path.read_text(encoding='utf-8') for path in programs()]
    calls = [call for text in texts for call in re.findall(r'torch\.load\([^\n]*', text)]
    assert calls and all('weights_only=True' in call for call in calls), calls
