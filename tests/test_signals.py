"""lib/machine/signals.py: signals, and the loss of the terminal or of torchrun."""
import errno
import os
import signal

import pytest
import torch
from conftest import TINY
from kit import REPO, differences, load, python, trained_part

from lib.machine import console, runtime
from lib.machine.signals import Signals
from lib.text import dataset
from lib.weights import checkpoint

FLAGS = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--eval_interval=100', '--lr_decay_iters=6']


def send(number):
    os.kill(os.getpid(), number)


def received(signals):
    """Return the name of the most urgent signal, '' if there was none."""
    return signals.name(signals.level) if signals.level else ''


NAMES = [name for name in Signals.NAMES if hasattr(signal, name) and name != 'SIGPIPE']


@pytest.mark.parametrize('name', NAMES)
def test_a_signal_is_remembered_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Signals() as signals, signals.held():
        send(number)
        assert received(signals) == name and signals.number(signals.level) == number
    assert signal.getsignal(number) == before


def test_the_most_urgent_signal_is_remembered():
    with Signals() as signals, signals.held():
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert received(signals) == 'SIGTERM'


def test_a_second_interrupt_quits_at_once(capfd):
    with Signals() as signals, signals.held():
        send(signal.SIGINT)
        assert received(signals) == 'SIGINT' and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert 'press Ctrl-C again to quit without saving' in capfd.readouterr().err


def test_outside_the_main_thread_no_signal_is_caught_and_nothing_breaks(monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *args: (_ for _ in ()).throw(ValueError('main thread only')))
    with Signals() as signals, signals.held():
        assert signals.level == 0


@pytest.mark.parametrize('name', NAMES)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(monkeypatch, name):  # nohup, a background job
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals, signals.held():
            send(number)
            assert signals.level == 0
    finally:
        signal.signal(number, before)


def test_before_training_usr1_is_remembered_and_the_others_keep_their_action():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        send(signal.SIGUSR1)
        assert received(signals) == 'SIGUSR1' and signal.getsignal(signal.SIGTERM) == before


def test_a_rank_notices_that_torchrun_is_gone(monkeypatch):
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'x')
    with Signals() as signals:
        assert signals.level == 0
        monkeypatch.setattr(os, 'getppid', lambda: 1)
        assert received(signals) == 'SIGTERM'


def test_without_torchrun_a_parent_that_ends_is_no_signal(monkeypatch):
    monkeypatch.delenv('TORCHELASTIC_RUN_ID', raising=False)
    with Signals() as signals:
        monkeypatch.setattr(os, 'getppid', lambda: 1)
        assert signals.level == 0


@pytest.mark.parametrize('error, name', [(errno.EPIPE, 'SIGPIPE'), (errno.EIO, 'SIGHUP'), (errno.ENXIO, 'SIGHUP')])
def test_the_loss_of_stdout_is_a_signal(monkeypatch, error, name):
    monkeypatch.setitem(console._lost, 1, OSError(error, 'gone'))
    with Signals() as signals, signals.held():
        assert received(signals) == name


def test_the_loss_of_stdout_is_no_signal_under_nohup(monkeypatch):
    monkeypatch.setitem(console._lost, 1, OSError(errno.EIO, 'gone'))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals, signals.held():
            assert signals.level == 0
    finally:
        signal.signal(signal.SIGHUP, before)


# Faults

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


UNINTERRUPTED = []


def uninterrupted(run):
    """Return what must be equal to a run without signals, which is trained once."""
    if not UNINTERRUPTED:
        run('train.py', *FLAGS, '--out_dir=whole')
        UNINTERRUPTED.append(trained_part(load('whole/last.pt')))
    return UNINTERRUPTED[0]


@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGINT', 130), ('SIGHUP', 129), ('SIGUSR2', 140),
                                          ('SIGXCPU', 152), ('SIGQUIT', 131)])
def test_term_and_int_finish_the_step_save_and_resume_exactly(run, workdir, signal_at, name, status):  # faults 43, 47
    expected = uninterrupted(run)
    signal_at(getattr(signal, name), 5)  # in the third update of two micro-steps
    done = run('train.py', *FLAGS)
    assert done.status == status and f'{name}: saved iter 3 to out' in done.out and '--init_from=resume' in done.out
    assert load('out/last.pt')['iter_num'] == load('out/ckpt.pt')['iter_num'] == 3
    run('train.py', *FLAGS, '--init_from=resume')
    assert differences(expected, trained_part(load('out/last.pt'))) == []


def test_usr1_saves_and_training_goes_on_unchanged(run, workdir, signal_at):  # fault 48
    expected = uninterrupted(run)
    signal_at(signal.SIGUSR1, 5)
    done = run('train.py', *FLAGS)
    assert done.status == 0 and 'SIGUSR1: saved iter 3 to out' in done.out
    assert load('out/last.prev.pt')['iter_num'] == 3
    assert differences(expected, trained_part(load('out/last.pt'))) == []


def test_a_signal_after_the_second_evaluation_leaves_the_best_model_in_ckpt(run, workdir, signal_at):
    signal_at(signal.SIGTERM, 5)
    assert run('train.py', *FLAGS, '--eval_interval=2').status == 143
    assert [load(f'out/{name}.pt')['iter_num'] for name in ('ckpt', 'last')] == [2, 3]


def test_a_signal_during_a_save_lets_it_finish(run, workdir, monkeypatch):  # fault 46
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(signal.getsignal(signal.SIGTERM) != signal.SIG_DFL)  # while training
        if calls.count(True) == 1 and calls[-1]:
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
    child = python(TWICE, REPO / 'train.py', *FLAGS, '--gradient_accumulation_steps=9', cwd=workdir)
    out, err = child.communicate(timeout=120)
    assert child.returncode == -signal.SIGINT and 'press Ctrl-C again to quit without saving' in err
    assert checkpoint.load(workdir / 'out' / 'last.pt')['iter_num'] == 0


@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGPIPE', 141)])
def test_a_signal_during_an_evaluation_ends_it_and_it_is_repeated_on_resume(run, workdir, monkeypatch, name, status):
    """The last evaluation reads the whole validation split, which may take longer than a scheduler waits."""
    run('train.py', *FLAGS, '--out_dir=whole')
    real, calls = dataset.Split.batch, []

    def batch(self, *args):
        if not torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == 8 and name == 'SIGPIPE':
                monkeypatch.setitem(console._lost, 1, OSError(errno.EPIPE, 'gone'))
            elif len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args)
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    done = run('train.py', *FLAGS)  # two splits of two batches in each evaluation; the last one reads more
    assert done.status == status and len(calls) < 10
    assert name == 'SIGPIPE' or 'SIGTERM: saved iter 6 to out' in done.out
    monkeypatch.delitem(console._lost, 1, raising=False)
    assert load('out/last.pt')['history'] == load('whole/last.pt')['history'][:1]
    assert run('train.py', *FLAGS, '--init_from=resume').status == 0
    assert differences(*(load(f'{folder}/last.pt')['model'] for folder in ('whole', 'out'))) == []
    assert load('out/last.pt')['history'] == load('whole/last.pt')['history']


def test_usr1_during_an_evaluation_lets_it_finish(run, workdir, monkeypatch):
    real, calls, asked = dataset.Split.batch, [], []

    def batch(self, *args):
        if not torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == 8:
                os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, *args)

    def minutes_running():
        asked.append(0)
        assert len(asked) < 100, 'the evaluation is repeated without end'
        return len(asked) / 60
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    monkeypatch.setattr(runtime, 'minutes_running', minutes_running)
    done = run('train.py', *FLAGS)
    assert done.status == 0 and [step for step, _, _ in load('out/last.pt')['history']] == [0, 6], done.err


def test_when_stdout_is_lost_before_an_evaluation_the_run_is_saved_without_it(run, workdir, monkeypatch):
    real, calls = dataset.Split.batch, []

    def batch(self, *args):
        if torch.is_grad_enabled():
            calls.append(0)
            if len(calls) == 12:  # in the last of six updates
                monkeypatch.setitem(console._lost, 1, OSError(errno.EPIPE, 'gone'))
        assert torch.is_grad_enabled() or len(calls) < 12, 'evaluated'
        return real(self, *args)
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    assert run('train.py', *FLAGS).status == 141
    state = load('out/last.pt')
    assert state['iter_num'] == 6 and [step for step, _, _ in state['history']] == [0]
