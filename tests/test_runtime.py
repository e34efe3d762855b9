"""lib/machine/runtime.py: start, the clock, torch.compile, random states """
import time

import pytest
import torch
from kit import python

from configurator import Origin, Settings
from lib.machine import runtime
from lib.machine.runtime import Runtime


def cpu(**more):
    return Runtime(torch.device('cpu'), torch.float32, **{'compile': False, 'description': '', **more})


def settings(**values):
    s = Settings({'device': 'cpu', 'dtype': 'auto', 'compile': True, 'seed': 1, 'backend': 'nccl', 'dist_timeout': 60.0,
                  **values})
    s.origins.update({name: Origin('flag', f'--{name}') for name in values})
    return s


def test_a_cpu_compiles_only_if_asked_to():
    assert not runtime.start(settings()).compile and runtime.start(settings(compile=True)).compile


def test_an_explicit_dtype_wins():
    assert runtime.start(settings(dtype='float32')).dtype == torch.float32
    assert 'as asked' in runtime.start(settings(dtype='float32')).description


def test_start_gives_cuda_an_index(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    monkeypatch.setattr(runtime, 'pick_dtype', lambda device: ('float32', 'stand-in'))
    chosen_settings = Settings({'device': 'cuda', 'dtype': 'float32', 'compile': False, 'seed': 1})
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert runtime.start(chosen_settings).device == torch.device('cuda', 0) and chosen == [0]


@pytest.fixture
def start_on_cuda(monkeypatch):
    """start_on_cuda(trains=False, **values of settings) starts on a made-up CUDA device."""
    monkeypatch.setattr(torch._C, '_cuda_setDevice', lambda index: None, raising=False)
    monkeypatch.setattr(runtime, 'pick_dtype', lambda device: ('bfloat16', 'stand-in'))
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (9, 0))
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    torch.set_float32_matmul_precision('highest')
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield lambda trains=False, **values: runtime.start(settings(**{'device': 'cuda', **values}), trains)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cuda.enable_cudnn_sdp(before[1])


@pytest.mark.parametrize('trains', [True, False])
def test_cudnn_attention_is_off_where_text_is_generated(start_on_cuda, trains):
    start_on_cuda(trains)
    assert torch.backends.cuda.cudnn_sdp_enabled() is trains


@pytest.mark.parametrize('values, precision', [({}, 'high'), ({'dtype': 'bfloat16'}, 'high'),
                                               ({'dtype': 'float32'}, 'highest')])
def test_tf32_is_used_unless_float32_was_asked_for(start_on_cuda, values, precision):
    start_on_cuda(**values)
    assert torch.get_float32_matmul_precision() == precision


def test_random_states_of_a_checkpoint_are_restored():
    states, drawn = cpu().rng_states(), torch.rand(3)
    assert cpu().set_rng_state(states) and torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize('states', [None, [], [{}]])
def test_missing_random_states_are_reported(states):
    assert cpu().set_rng_state(states) is False


def test_with_one_process_reducing_returns_the_numbers():
    rt = cpu()
    assert rt.all_reduce_max(1, 2.5) == (1, 2.5) and rt.all_reduce_sum(3) == (3,) and rt.is_master


# The clock

def test_minutes_running_begin_with_the_process_and_not_with_the_import():
    child = python('import time; time.sleep(0.6)\n'
                   'from lib.machine import runtime\nprint(60 * runtime.minutes_running())')
    began = time.monotonic()
    out, err = child.communicate()
    assert 0.6 <= float(out) <= time.monotonic() - began + 0.3, err  # the start is known to a hundredth of a second


def test_minutes_running_advance_as_time_does():
    before = runtime.minutes_running()
    time.sleep(0.06)
    assert 0.001 <= runtime.minutes_running() - before < 0.1


@pytest.mark.parametrize('hours', [1, -1])
def test_a_wall_clock_that_jumps_changes_no_minutes(monkeypatch, hours):
    before, real = runtime.minutes_running(), time.time
    monkeypatch.setattr(time, 'time', lambda: real() + 3600 * hours)
    assert 0 <= runtime.minutes_running() - before < 0.1


@pytest.mark.parametrize('stat', ['', 'rubbish', '1 (a) b) ' + '0 ' * 19 + '99999999999999'])
def test_a_system_that_does_not_tell_the_age_of_a_process_counts_from_the_import(monkeypatch, tmp_path, stat):
    (tmp_path / 'stat').write_text(stat, encoding='utf-8')
    monkeypatch.setattr('builtins.open', lambda *args, real=open, **more: real(tmp_path / 'stat', encoding='utf-8'))
    assert runtime._age() == 0.0


# Threads

@pytest.mark.parametrize('variable, threads', [(None, 1), ('OMP_NUM_THREADS', 2), ('MKL_NUM_THREADS', 2)])
def test_torch_uses_no_more_threads_than_the_container_allows_unless_asked(monkeypatch, variable, threads):
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, '2')
    chosen = [2]
    monkeypatch.setattr(torch, 'get_num_threads', lambda: chosen[-1])
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setattr(runtime, 'usable_cpus', lambda: 1)
    runtime.start(settings())
    assert chosen[-1] == threads
