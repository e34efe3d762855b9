"""Faults 1 to 12: checkpoints are written whole, damage is noticed, and one run does not harm another."""
import os
import random
import resource
import time

import pytest
import torch
from conftest import TINY
from kit import break_call, flip, inside, load, python, shorten

from configurator import UserError
from lib.weights import checkpoint

LOOP = """
import sys, torch
from lib.weights import checkpoint
size = int(sys.argv[2])
for i in range(10**6):
    state = {'model': {'w': torch.full((size,), float(i))}, 'model_args': {}, 'iter_num': i}
    print('saving', i, flush=True)
    checkpoint.save(sys.argv[1] + '/last.pt', state, keep_previous=True, also=sys.argv[1] + '/ckpt.pt')
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
        checkpoint.claim(folder).close()
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
def trained(run, workdir):
    """A finished run of 6 updates in out/, evaluated at 0, 4 and 6."""
    assert run('train.py', *TINY).status == 0
    return workdir / 'out'


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


def test_what_cannot_be_stored_is_named_and_the_old_file_stays(tmp_path):  # fault 3
    path = tmp_path / 'last.pt'
    checkpoint.save(path, {'model': {}, 'model_args': {}})
    with pytest.raises(UserError, match=r"\['config'\]\['f'\] is a function"):
        checkpoint.save(path, {'model': {}, 'model_args': {}, 'config': {'f': lambda: 0}})
    assert checkpoint.load(path) and [p.name for p in tmp_path.iterdir()] == ['last.pt']


def test_any_failure_inside_a_save_leaves_no_temporary_file(tmp_path, monkeypatch):  # fault 3
    break_call(monkeypatch, torch, 'save', MemoryError())
    with pytest.raises(MemoryError):
        checkpoint.save(tmp_path / 'last.pt', {'model': {}})
    assert not list(tmp_path.iterdir())


def test_an_out_dir_that_is_a_file_is_refused_before_the_model_is_built(run, workdir):  # fault 4
    (workdir / 'out').touch()
    done = run('train.py', *TINY)
    assert done.status in (1, 2) and "out_dir 'out' is not a writable folder" in done.last_error
    assert 'number of parameters' not in done.out


@pytest.mark.parametrize('cut', [1, 5000])
def test_a_truncated_checkpoint_is_passed_over_for_the_one_before(run, trained, cut):  # faults 5 and 9
    shorten(trained / 'last.pt', cut)
    done = resume(run)
    assert done.status == 0 and 'resuming from iter 4 (out/last.prev.pt)' in done.out
    assert 'warning: out/last.pt is incomplete' in done.err and 'using out/last.prev.pt (iter 4)' in done.err


def test_an_empty_checkpoint_is_passed_over_for_the_one_before(run, trained):  # faults 6 and 9
    (trained / 'last.pt').write_bytes(b'')
    done = resume(run)
    assert 'resuming from iter 4' in done.out and 'warning: out/last.pt is empty; using out/last.prev.pt' in done.err


def test_one_flipped_bit_in_a_weight_is_noticed(trained):  # fault 7
    flip(trained / 'ckpt.pt', inside(trained / 'ckpt.pt', 'data/0') + 5)
    with pytest.raises(UserError, match='ckpt.pt is corrupt: checksum mismatch in .*/data/0'):
        checkpoint.load(trained / 'ckpt.pt')


@pytest.mark.parametrize('content', [b'<html>404</html>', b'version https://git-lfs.github.com/spec/v1', b'\x80.'])
def test_a_file_of_another_kind_is_called_that(run, trained, content):  # fault 8
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


def test_what_a_killed_run_left_half_written_is_removed(run, trained):  # fault 10
    stale = trained / 'last.pt.tmp.123'
    stale.write_bytes(b'half')
    done = resume(run)
    assert done.status == 0 and not stale.exists() and 'removing out/last.pt.tmp.123' in done.err


def test_a_second_run_in_the_same_out_dir_is_refused(run, workdir):  # fault 11
    lock = checkpoint.claim('out')
    done = run('train.py', *TINY)
    lock.close()
    assert done.status and f"out_dir 'out' is in use by pid {os.getpid()} on host" in done.last_error


def test_starting_over_moves_the_earlier_run_aside(run, trained):  # fault 12
    done = run('train.py', *TINY, '--max_iters=2')
    assert 'out held an earlier run' in done.out and 'out/old-1' in done.out
    assert (load(trained / 'old-1' / 'last.pt')['iter_num'], load(trained / 'last.pt')['iter_num']) == (6, 2)


def test_a_failed_rename_leaves_every_file_readable(run, trained, monkeypatch):
    break_call(monkeypatch, os, 'replace', OSError(5, 'Input/output error'), lambda a, b: str(b).endswith('last.pt'))
    done = resume(run)
    assert done.status == 1 and 'could not write out/last.pt' in done.last_error
    # the model is named first: the training state is never newer than it, and a resumed run saves it again
    assert [checkpoint.load(trained / n)['iter_num'] for n in ('last.pt', 'ckpt.pt')] == [6, 9]


def test_a_checkpoint_is_on_disk_before_its_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ('fsync', 'replace'):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    checkpoint.save(tmp_path / 'last.pt', {'model': {}})
    assert calls == ['fsync', 'replace', 'fsync']  # the file, its name, the folder


def test_weights_that_are_not_finite_never_replace_those_on_disk(run, trained):
    state = load(trained / 'last.pt')
    state['model']['lm_head.weight'][0, 0] = float('nan')
    before = checkpoint.load(trained / 'ckpt.pt')['iter_num']
    for name in ('last.pt', 'last.prev.pt'):
        torch.save(state, trained / name)
    done = resume(run)
    assert done.status == 1 and 'no such update or checkpoint was kept' in done.last_error
    assert checkpoint.load(trained / 'ckpt.pt')['iter_num'] == before
