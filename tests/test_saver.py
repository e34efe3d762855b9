"""lib/weights/saver.py: a file that is written while training goes on is the state of when it was asked for."""
import threading

import pytest
import torch
from kit import Ranks, load

from configurator import UserError
from lib.machine.runtime import Runtime
from lib.weights import checkpoint, saver
from lib.weights.saver import Saver, on_host

CUDA = Runtime(torch.device('cuda'), torch.float32, False, '')  # tensors stay on the CPU, only the writing differs


def state_of(model, iter_num, history=()):
    return {'model': model.state_dict(), 'model_args': {}, 'iter_num': iter_num, 'history': list(history)}


@pytest.fixture
def model():
    return torch.nn.Linear(3, 3)


@pytest.fixture
def slow(monkeypatch):
    """Writing waits until slow.set() is called."""
    gate, real = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, 'save', lambda *args, **options: (gate.wait(30), real(*args, **options))[1])
    monkeypatch.setattr(saver, 'free_memory', lambda device: 2**40)
    yield gate
    gate.set()


def test_training_goes_on_while_the_state_of_before_is_written(tmp_path, model, slow):
    ours, history = Saver(CUDA, tmp_path, None, 0), [[0, 1.0, 1.0]]
    before, state = model.weight.detach().clone(), state_of(model, 5)
    state['history'] = history
    assert ours.save(state, model, as_best=True, required=False, wait=False) == 5
    assert not (tmp_path / 'last.pt').exists()
    with torch.no_grad():
        model.weight.zero_()
    history.append([5, 1.0, 1.0])
    slow.set()
    ours.finish()
    written = load(tmp_path / 'last.pt')
    assert torch.equal(written['model']['weight'], before) and written['history'] == [[0, 1.0, 1.0]]
    assert load(tmp_path / 'ckpt.pt')['iter_num'] == 5


@pytest.mark.parametrize('how', [dict(required=True, wait=False), dict(required=False, wait=True)])
def test_a_save_that_waits_comes_after_the_one_that_is_being_written(tmp_path, model, slow, how):
    ours = Saver(CUDA, tmp_path, None, 0)
    ours.save(state_of(model, 5), model, as_best=False, required=False, wait=False)
    threading.Timer(0.2, slow.set).start()
    assert ours.save(state_of(model, 6), model, as_best=False, **how) == 6
    assert load(tmp_path / 'last.pt')['iter_num'] == 6 and load(tmp_path / 'last.prev.pt')['iter_num'] == 5


def test_a_full_disk_is_a_warning_and_the_checkpoint_before_counts_as_the_newest(tmp_path, model, slow, monkeypatch):
    warnings, ours = [], Saver(CUDA, tmp_path, None, 3)
    ours.warn = warnings.append
    monkeypatch.setattr(torch, 'save', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    slow.set()
    ours.save(state_of(model, 5), model, as_best=False, required=False, wait=False)
    ours.finish()
    assert ours.saved_iter == 3 and len(warnings) == 1 and 'could not write' in warnings[0]
    assert 'No space left' in warnings[0] and not (tmp_path / 'last.pt').exists()
    with pytest.raises(UserError, match='No space left'):
        ours.save(state_of(model, 6), model, as_best=False, required=True)


def test_a_mistake_of_the_program_in_the_thread_is_a_warning_too(tmp_path, model, slow, monkeypatch):
    warnings, ours = [], Saver(CUDA, tmp_path, None, 0)
    ours.warn = warnings.append
    monkeypatch.setattr(checkpoint, 'save', lambda *args, **options: 1 / 0)
    ours.save(state_of(model, 5), model, as_best=False, required=False, wait=False)
    ours.finish()
    assert ours.saved_iter == 0 and 'ZeroDivisionError' in warnings[0]


@pytest.mark.parametrize('case', ['CPU', 'little memory', 'large state'])
def test_elsewhere_the_file_is_written_at_once(tmp_path, model, slow, monkeypatch, case):
    if case == 'little memory':
        monkeypatch.setattr(saver, 'free_memory', lambda device: 100)
    if case == 'large state':
        monkeypatch.setattr(saver, 'LARGEST', 47)
    slow.set()
    rt = Runtime(torch.device('cpu'), torch.float32, False, '') if case == 'CPU' else CUDA
    monkeypatch.setattr(threading, 'Thread', None)
    assert Saver(rt, tmp_path, None, 0).save(state_of(model, 5), model, as_best=False, required=False, wait=False) == 5
    assert load(tmp_path / 'last.pt')['iter_num'] == 5


ENDS = """
import time, torch
from lib.machine.runtime import Runtime
from lib.weights import checkpoint, saver
saver.free_memory = lambda device: 2**40
real = checkpoint.save
checkpoint.save = lambda *args, **options: (time.sleep(0.5), real(*args, **options))
model, rt = torch.nn.Linear(3, 3), Runtime(torch.device('cuda'), torch.float32, False, '')
state = {'model': model.state_dict(), 'model_args': {}, 'iter_num': 5}
saver.Saver(rt, 'out', None, 0).save(state, model, as_best=False, required=False, wait=False)
raise SystemExit(3)
"""


def test_a_program_that_ends_with_an_error_finishes_the_file_first(tmp_path):
    assert Ranks(1, 'train.py', cwd=tmp_path, hook=ENDS).wait()[0][0] == 3
    assert load(tmp_path / 'out' / 'last.pt')['iter_num'] == 5


def test_a_copy_keeps_what_is_tied_and_plain_values():
    weight = torch.arange(6.0)
    value = {'a': weight, 'b': [weight, (weight.view(2, 3)[1], 'text', None)], 'c': 1}
    copy = on_host(value)
    assert copy['a'] is copy['b'][0] and copy['a'].data_ptr() != weight.data_ptr()
    assert torch.equal(copy['b'][1][0], weight[3:]) and copy['b'][1][1:] == ('text', None) and copy['c'] == 1
