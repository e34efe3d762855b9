"""Faults 43 and 46 to 48 in one process: a signal ends or saves a run at a step's boundary, and nothing is lost."""
import os
import signal

import pytest
import torch
from conftest import TINY
from kit import differences, load, python, trained_part

from lib.text import dataset
from lib.weights import checkpoint

FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--eval_interval=100', '--lr_decay_iters=6']


@pytest.fixture
def signal_at(monkeypatch):
    """signal_at(number, batch) sends this process a signal while it reads that training batch, counted from 0."""
    def install(number, batch_number):
        real, calls = dataset.Split.batch, []

        def batch(self, *args):
            if torch.is_grad_enabled():
                calls.append(0)
                if len(calls) == batch_number + 1:
                    os.kill(os.getpid(), number)
            return real(self, *args)
        monkeypatch.setattr(dataset.Split, 'batch', batch)
    return install


@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGINT', 130)])
def test_term_and_int_finish_the_step_save_and_resume_exactly(run, workdir, signal_at, name, status):  # faults 43, 47
    run('train.py', *FLAGS, '--out_dir=whole')
    signal_at(getattr(signal, name), 5)  # in the third update of two micro-steps
    done = run('train.py', *FLAGS)
    assert done.status == status and f'{name}: saved iter 3 to out' in done.out and '--init_from=resume' in done.out
    assert load('out/last.pt')['iter_num'] == load('out/ckpt.pt')['iter_num'] == 3
    run('train.py', *FLAGS, '--init_from=resume')
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


def test_usr1_saves_and_training_goes_on_unchanged(run, workdir, signal_at):  # fault 48
    run('train.py', *FLAGS, '--out_dir=whole')
    signal_at(signal.SIGUSR1, 5)
    done = run('train.py', *FLAGS)
    assert done.status == 0 and 'SIGUSR1: saved iter 3 to out' in done.out
    assert load('out/last.prev.pt')['iter_num'] == 3
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


def test_a_signal_during_a_save_lets_it_finish(run, workdir, monkeypatch):  # fault 46
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    done = run('train.py', *FLAGS)
    assert done.status == 143
    assert [checkpoint.load(f'out/{name}')['iter_num'] for name in ('last.prev.pt', 'last.pt')] == [0, 1]
    assert not list((workdir / 'out').glob('*.tmp.*'))


def test_a_save_on_a_signal_that_fails_is_an_error(run, workdir, signal_at, monkeypatch):  # fault 2
    run('train.py', *FLAGS, '--max_iters=1')
    monkeypatch.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    signal_at(signal.SIGTERM, 3)
    done = run('train.py', *FLAGS, '--init_from=resume')
    assert done.status == 1 and 'could not write out/last.pt' in done.last_error
    assert checkpoint.load('out/last.pt')['iter_num'] == 1


TWICE = """
import os, runpy, signal, sys
from lib.text import dataset
real, calls = dataset.Split.batch, []
def batch(self, *args):
    calls.append(0)
    if len(calls) in (7, 8):
        os.kill(os.getpid(), signal.SIGINT)
    return real(self, *args)
dataset.Split.batch = batch
sys.argv[0] = 'train.py'
runpy.run_path(sys.argv.pop(1), run_name='__main__')
"""


def test_a_second_interrupt_quits_at_once_and_the_last_save_is_whole(run, workdir):  # fault 47
    from kit import REPO
    child = python(TWICE, REPO / 'train.py', *FLAGS, '--gradient_accumulation_steps=9', cwd=workdir)
    out, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGINT and 'press Ctrl-C again to quit without saving' in err
    assert checkpoint.load(workdir / 'out' / 'last.pt')['iter_num'] == 0
