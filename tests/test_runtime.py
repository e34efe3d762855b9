"""lib/machine/runtime.py: device rules, peaks, signals and random states."""
import os
import signal

import pytest
import torch

from configurator import Settings
from lib.machine import runtime
from lib.machine.runtime import Runtime, Signals


def cpu(**more):
    return Runtime(torch.device('cpu'), torch.float32, **{'compile': False, 'why': '', **more})


def fake_cuda(monkeypatch, capability, name='NVIDIA X', hip=None):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: name)
    monkeypatch.setattr(torch.version, 'hip', hip)


@pytest.mark.parametrize('capability, dtype', [((9, 0), 'bfloat16'), ((8, 0), 'bfloat16'), ((7, 5), 'float16'),
                                               ((7, 0), 'float16'), ((6, 1), 'float32'), ((5, 2), 'float32')])
def test_bf16_is_chosen_only_where_it_is_native(monkeypatch, capability, dtype):
    fake_cuda(monkeypatch, capability)
    assert runtime.pick_dtype(torch.device('cuda'))[0] == dtype


def test_amd_gpus_take_bf16(monkeypatch):
    fake_cuda(monkeypatch, (9, 4), hip='6.2')
    assert runtime.pick_dtype(torch.device('cuda'))[0] == 'bfloat16'


def test_mps_takes_float32():
    assert runtime.pick_dtype(torch.device('mps'))[0] == 'float32'


@pytest.mark.parametrize('has_cuda, has_mps, device', [(True, False, 'cuda'), (False, True, 'mps'),
                                                       (False, False, 'cpu'), (True, True, 'cuda')])
def test_the_best_device_is_picked(monkeypatch, has_cuda, has_mps, device):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
    assert runtime.pick_device() == device


@pytest.mark.parametrize('name, told', [('cuda', 'no CUDA here'), ('cuda:1', 'no CUDA here'), ('mps', 'no MPS here'),
                                        ('gpu', 'expected cpu'), ('', 'expected cpu'), ('cpu', '')])
def test_a_device_that_is_not_there_is_told(monkeypatch, name, told):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    problem = runtime.device_problem(name)
    assert told in problem and bool(told) == bool(problem)


@pytest.mark.parametrize('name, half, full', [
    ('NVIDIA A100-SXM4-80GB', 312, 19.5), ('NVIDIA H100 80GB HBM3', 989, 67), ('NVIDIA H100 PCIe', 756, 51),
    ('NVIDIA H200', 989, 67), ('NVIDIA L4', 121, 30.3), ('NVIDIA L40S', 362, 91.6), ('Tesla T4', 65, 8.1),
    ('NVIDIA GeForce RTX 4070 Ti SUPER', 88.2, 44.1), ('NVIDIA GeForce RTX 4070', 58.3, 29.1),
    ('NVIDIA GeForce GTX 1060 6GB', 4.4, 4.4), ('AMD Instinct MI300X', 1307, 163.4), ('NVIDIA A10G', 70, 35)])
def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch, name, half, full):
    fake_cuda(monkeypatch, (8, 0), name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float32, full)):
        rt = Runtime(torch.device('cuda'), dtype, False, '')
        assert runtime.peak_flops(rt) == peak * 1e12


def test_peak_tflops_overrides_the_table():
    assert runtime.peak_flops(cpu(), 2.5) == 2.5e12


def test_an_unknown_machine_is_measured():
    assert 1e8 < runtime.peak_flops(cpu()) < 1e14


def test_measuring_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    runtime.measured_flops(torch.device('cpu'), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compile_that_fails_falls_back_with_one_line(monkeypatch, capfd):
    net = torch.nn.Linear(2, 2)

    def broken(model):
        raise RuntimeError('no C++ compiler\nand forty more lines')
    monkeypatch.setattr(torch, 'compile', lambda model, dynamic: model)
    state = torch.get_rng_state()
    fast = runtime.compile_or_fall_back(net, cpu(compile=True), False, lambda m: (torch.rand(1), broken(m)))
    assert fast is net and torch.equal(torch.get_rng_state(), state)
    assert capfd.readouterr().err == 'compile failed (RuntimeError: no C++ compiler); going on without it\n'


def test_random_states_of_a_checkpoint_are_restored():
    states, drawn = cpu().rng_states(), torch.rand(3)
    assert cpu().set_rng_state(states) and torch.equal(torch.rand(3), drawn)


@pytest.mark.parametrize('states', [None, [], [{}]])
def test_missing_random_states_are_reported(states):
    assert cpu().set_rng_state(states) is False


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize('name', ['SIGUSR1', 'SIGINT', 'SIGTERM'])
def test_a_signal_is_remembered_and_the_handlers_come_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with Signals() as signals:
        send(number)
        assert signals.name(signals.level) == name and signals.number(signals.level) == number
    assert signal.getsignal(number) == before


def test_the_most_urgent_signal_counts():
    with Signals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
        assert signals.name(signals.level) == 'SIGTERM'


def test_a_second_interrupt_quits_at_once(capfd):
    with Signals() as signals:
        send(signal.SIGINT)
        assert signals.level == 2 and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert 'press Ctrl-C again to quit without saving' in capfd.readouterr().err


def test_outside_the_main_thread_no_signal_is_caught_and_nothing_breaks(monkeypatch):
    monkeypatch.setattr(signal, 'signal', lambda *args: (_ for _ in ()).throw(ValueError('main thread only')))
    with Signals() as signals:
        assert signals.level == 0


def test_the_start_of_the_process_is_before_now():
    import time
    assert 0 < time.time() - runtime.process_start() < 86400


def settings(**values):
    s = Settings({'device': 'cpu', 'dtype': 'auto', 'compile': True, 'seed': 1, 'backend': 'nccl', 'dist_timeout': 60.0,
                  **values})
    s.origins.update({name: f'--{name}' for name in values})
    return s


def test_on_cpu_nothing_is_compiled_unless_asked():
    assert not runtime.start(settings()).compile and runtime.start(settings(compile=True)).compile


def test_float32_products_follow_what_was_asked_for():
    assert runtime.start(settings(dtype='float32')).dtype == torch.float32
    assert 'as asked' in runtime.start(settings(dtype='float32')).why


def test_the_cpu_takes_bfloat16_only_where_it_has_the_instructions(monkeypatch):
    for native, name in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(runtime, 'native_bf16', lambda native=native: native)
        assert runtime.pick_dtype(torch.device('cpu'))[0] == name


def test_one_process_agrees_with_itself():
    rt = cpu()
    assert rt.maximum(1, 2.5) == (1, 2.5) and rt.total(3) == (3,) and rt.master


def test_late_reads_at_once_on_a_cpu():
    assert runtime.Late(cpu())(torch.tensor([1.5, 2.0])) == [1.5, 2.0]


def test_nothing_cuda_only_is_called_outside_the_runtime():
    from kit import REPO
    for path in (*REPO.glob('*.py'), *(p for p in REPO.glob('lib/*.py') if p.name != 'runtime.py')):
        text = path.read_text(encoding='utf-8')
        assert 'torch.cuda.' not in text or path.name == 'timed.py', path  # bench's, which asks first


def test_start_gives_cuda_an_index(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch._C, '_cuda_setDevice', chosen.append, raising=False)
    monkeypatch.setattr(runtime, 'pick_dtype', lambda device: ('float32', 'stand-in'))
    settings = Settings({'device': 'cuda', 'dtype': 'float32', 'compile': False, 'seed': 1})
    monkeypatch.setattr(torch, 'manual_seed', lambda seed: None)
    assert runtime.start(settings).device == torch.device('cuda', 0) and chosen == [0]


def test_another_card_whose_name_contains_a_known_one_is_not_taken_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'NVIDIA RTX A1000')
    monkeypatch.setattr(runtime, 'measured_flops', lambda device, dtype: 7.0)
    rt = runtime.Runtime(torch.device('cuda', 0), torch.float32, False, '')
    assert runtime.peak_flops(rt) == 7.0
