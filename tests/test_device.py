"""lib/machine/device.py and cpus.py: which device, which dtype, how fast, how many CPUs."""
import math
import os

import pytest
import torch
from kit import REPO, python

from lib.machine import cpus, device
from lib.machine.runtime import Runtime

CPU = Runtime(torch.device('cpu'), torch.float32, False, '')


PYPI = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120', 'compute_120']  # of torch 2.13's wheel


def fake_cuda(monkeypatch, capability, name='NVIDIA X', hip=None):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: PYPI)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index=None: name)
    monkeypatch.setattr(torch.version, 'hip', hip)


@pytest.mark.parametrize('capability, dtype', [((9, 0), 'bfloat16'), ((8, 0), 'bfloat16'), ((7, 5), 'float16'),
                                               ((7, 0), 'float16'), ((6, 1), 'float32'), ((5, 2), 'float32')])
def test_bfloat16_is_chosen_only_on_gpus_that_have_it(monkeypatch, capability, dtype):
    fake_cuda(monkeypatch, capability)
    assert device.pick_dtype(torch.device('cuda'))[0] == dtype


def test_amd_gpus_use_bfloat16(monkeypatch):
    fake_cuda(monkeypatch, (9, 4), hip='6.2')
    assert device.pick_dtype(torch.device('cuda'))[0] == 'bfloat16'


def test_mps_uses_float32():
    assert device.pick_dtype(torch.device('mps'))[0] == 'float32'


@pytest.mark.parametrize('capability, served', [((6, 1), False), ((7, 0), False), ((7, 5), True), ((8, 6), True),
                                                ((8, 9), True), ((9, 0), True), ((12, 0), True), ((12, 1), True)])
def test_a_gpu_without_kernels_in_this_torch_is_left_for_the_cpu(monkeypatch, capsys, capability, served):
    fake_cuda(monkeypatch, capability)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert device.pick_device() == ('cuda' if served else 'cpu')
    problem, line = device.device_problem('cuda'), capsys.readouterr().err
    assert bool(problem) == bool(line) == (not served)
    if not served:
        assert f'compute capability {capability[0]}.{capability[1]}' in problem and 'whl/cu126' in problem
        assert line.startswith('using the CPU, since torch') and line.count('\n') == 1


def test_the_names_of_amds_architectures_are_not_compared():
    assert device.has_kernels((9, 4), ['gfx90a', 'gfx942'])


def test_a_gpu_is_measured_with_enough_work_for_its_speed(monkeypatch):
    sizes, products = [], []

    class Fake:
        def to(self, *args):
            return self

        def __getitem__(self, at):
            return 0.0

        def __matmul__(self, other):
            products.append(1)
            return self
    monkeypatch.setattr(torch, 'randn', lambda n, m, **more: sizes.append(n) or Fake())
    device.measured_flops(torch.device('cuda'), torch.bfloat16)
    assert 2 * sizes[0]**3 * 8 >= 5e11 and len(products) == 5 * 8  # eight in a row before the clock is read


@pytest.mark.parametrize('has_cuda, has_mps, kind', [(True, False, 'cuda'), (False, True, 'mps'),
                                                     (False, False, 'cpu'), (True, True, 'cuda')])
def test_cuda_is_picked_before_mps_and_cpu(monkeypatch, has_cuda, has_mps, kind):
    if has_cuda:
        fake_cuda(monkeypatch, (9, 0))
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
    assert device.pick_device() == kind


@pytest.mark.parametrize('name, problem', [('cuda', 'no CUDA here'), ('cuda:1', 'no CUDA here'), ('mps', 'no MPS here'),
                                           ('gpu', 'expected cpu'), ('', 'expected cpu'), ('cpu', '')])
def test_a_missing_device_is_reported(monkeypatch, name, problem):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    found = device.device_problem(name)
    assert problem in found and bool(problem) == bool(found)


@pytest.mark.parametrize('name, has_cuda, has_mps, told', [
    ('cuda', False, False, 'device=cuda: no CUDA here; use --device=cpu'),
    ('cuda', False, True, 'device=cuda: no CUDA here; use --device=cpu or mps'),
    ('mps', False, False, 'device=mps: no MPS here; use --device=cpu'),
    ('mps', True, False, 'device=mps: no MPS here; use --device=cpu or cuda'),
    ('gpu', False, False, 'device=gpu: expected cpu, mps, cuda or cuda:N')])
def test_only_devices_that_are_there_are_recommended(monkeypatch, name, has_cuda, has_mps, told):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: has_mps)
    assert device.device_problem(name) == told


@pytest.mark.parametrize('name, half, full', [
    ('NVIDIA A100-SXM4-80GB', 312, 19.5), ('NVIDIA H100 80GB HBM3', 989, 67), ('NVIDIA H100 PCIe', 756, 51),
    ('NVIDIA H200', 989, 67), ('NVIDIA L4', 121, 30.3), ('NVIDIA L40S', 362, 91.6), ('Tesla T4', 65, 8.1),
    ('NVIDIA A800-SXM4-80GB', 312, 19.5), ('NVIDIA H800', 989, 67), ('NVIDIA H20', 148, 44),
    ('NVIDIA L20', 119.5, 59.8),
    ('NVIDIA RTX A6000', 155, 38.7), ('NVIDIA RTX 6000 Ada Generation', 364, 91.1), ('NVIDIA A40', 150, 37.4),
    ('NVIDIA GH200 480GB', 989, 67), ('NVIDIA GeForce RTX 4090 D', 147.1, 73.5),
    ('NVIDIA GeForce RTX 4090', 165.2, 82.6),
    ('NVIDIA GeForce RTX 4070 Ti SUPER', 88.2, 44.1), ('NVIDIA GeForce RTX 4070', 58.3, 29.1),
    ('NVIDIA GeForce GTX 1060 6GB', 4.4, 4.4), ('AMD Instinct MI300X', 1307, 163.4), ('NVIDIA A10G', 70, 35)])
def test_a_known_gpu_has_the_peak_of_its_data_sheet(monkeypatch, name, half, full):
    fake_cuda(monkeypatch, (8, 0), name)
    for dtype, peak in ((torch.bfloat16, half), (torch.float32, full)):
        rt = Runtime(torch.device('cuda'), dtype, False, '')
        assert device.peak_flops(rt) == peak * 1e12


def test_peak_tflops_overrides_the_table():
    assert device.peak_flops(CPU, 2.5) == 2.5e12


def test_a_cpu_has_no_peak_to_compare_with():
    assert device.peak_flops(CPU) == 0


def test_an_unknown_gpu_is_measured_by_its_matrix_products():
    assert 1e7 < device.measured_flops(torch.device('cpu'), torch.float32, n=128) < 1e14


def test_a_gpu_whose_name_contains_a_known_name_is_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'NVIDIA RTX A1000')
    monkeypatch.setattr(device, 'measured_flops', lambda *args: 7.0)
    rt = Runtime(torch.device('cuda', 0), torch.float32, False, '')
    assert device.peak_flops(rt) == 7.0


def test_measuring_does_not_change_the_random_state():
    before = torch.get_rng_state()
    device.measured_flops(torch.device('cpu'), torch.float32, n=16)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_cpu_uses_bfloat16_only_with_the_instructions(monkeypatch):
    for native, name in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(device, 'native_bf16', lambda native=native: native)
        assert device.pick_dtype(torch.device('cpu'))[0] == name


def test_cuda_is_called_only_in_lib_machine():
    allowed = {'workloads.py', 'gpu_check.py'}  # they ask first whether there is a GPU
    files = [*REPO.glob('*.py'), *REPO.glob('lib/**/*.py'), *REPO.glob('benchmarks/*.py')]
    assert len(files) > 25
    for path in files:
        if path.parent.name != 'machine' and path.name not in allowed:
            assert 'torch.cuda.' not in path.read_text(encoding='utf-8'), path


def cgroup(tmp_path, proc, files):
    """Return the quota for a made-up /proc/self/cgroup and files below /sys/fs/cgroup."""
    for name, text in files.items():
        (tmp_path / 'sys' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'sys' / name).write_text(text, encoding='utf-8')
    (tmp_path / 'proc').write_text(proc, encoding='utf-8')
    return cpus._cgroup_quota(tmp_path / 'proc', tmp_path / 'sys')


@pytest.mark.parametrize('proc, files, quota', [
    ('0::/', {'cpu.max': '200000 100000\n'}, 2),  # version 2 in a container
    ('0::/', {'cpu.max': 'max 100000\n'}, math.inf),
    ('0::/', {}, math.inf),
    ('0::/a/b', {'a/b/cpu.max': 'max 100000', 'a/cpu.max': '50000 100000'}, 0.5),  # a parent's quota holds too
    ('0::/a/b', {'a/b/cpu.max': '100000 100000', 'a/cpu.max': '300000 100000'}, 1),
    ('0::/docker/1f0c', {'cpu.max': '150000 100000'}, 1.5),  # the host's path, which the container does not see
    ('4:cpu,cpuacct:/docker/1f0c\n3:memory:/x', {'cpu,cpuacct/cpu.cfs_quota_us': '400000\n',
                                                 'cpu,cpuacct/cpu.cfs_period_us': '100000\n'}, 4),  # version 1
    ('4:cpu:/', {'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, math.inf),
    ('2:cpuset:/', {'cpuset/cpu.cfs_quota_us': '100000', 'cpuset/cpu.cfs_period_us': '100000'}, math.inf),
    ('0::/../..', {'cpu.max': '100000 100000'}, 1), ('', {}, math.inf), ('rubbish', {}, math.inf),
    ('0::/', {'cpu.max': 'rubbish'}, math.inf), ('0::/', {'cpu.max': '100000 0'}, math.inf)])
def test_the_quota_of_a_container_is_read(tmp_path, proc, files, quota):
    assert cgroup(tmp_path, proc, files) == quota


def test_a_system_without_cgroups_has_no_quota(tmp_path):
    assert cpus._cgroup_quota(tmp_path / 'nothing', tmp_path) == math.inf


@pytest.mark.parametrize('affinity, quota, usable', [(64, 2, 2), (64, 1.5, 2), (4, math.inf, 4), (1, 8, 1),
                                                     (8, 0.1, 1)])
def test_usable_cpus_are_bounded_by_affinity_and_quota(monkeypatch, affinity, quota, usable):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(affinity)), raising=False)
    monkeypatch.setattr(cpus, '_cgroup_quota', lambda: quota)
    assert cpus.usable_cpus() == usable


def test_a_system_without_affinity_counts_its_cpus(monkeypatch):
    monkeypatch.delattr(os, 'sched_getaffinity', raising=False)
    monkeypatch.setattr(cpus, '_cgroup_quota', lambda: math.inf)
    monkeypatch.setattr(os, 'cpu_count', lambda: 3)
    assert cpus.usable_cpus() == 3


def test_counting_cpus_imports_no_torch():
    out, err = python('import sys, lib.machine.cpus; print("torch" in sys.modules)').communicate()
    assert out == 'False\n', err


@pytest.mark.parametrize('proc, files, limit', [
    ('0::/a/b', {'a/b/memory.max': 'max', 'a/memory.max': '1000000'}, 10**6),
    ('4:memory:/docker/x', {'memory/memory.limit_in_bytes': '2000000\n'}, 2 * 10**6)])
def test_the_memory_of_a_container_is_its_limit(tmp_path, proc, files, limit):
    (tmp_path / 'proc').write_text(proc, encoding='utf-8')
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding='utf-8')
    assert cpus.physical_memory(tmp_path / 'proc', tmp_path) == limit


def test_the_memory_of_a_machine_without_a_limit_is_all_of_it(tmp_path):
    assert cpus.physical_memory(tmp_path / 'nothing', tmp_path) == os.sysconf('SC_PHYS_PAGES') * os.sysconf(
        'SC_PAGE_SIZE')
