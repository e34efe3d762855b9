"""Which device and dtype to use, and how fast the device is."""
import contextlib
import functools
import re
import sys
import time
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

from lib.machine.cpus import physical_memory

ONEDNN = torch.backends.mkldnn.enabled  # what without_onednn restores; another thread may have switched it off
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Peak of dense matrix products in TFLOP/s: (float16 and bfloat16 with float32 accumulation, float32). Sources: data
# sheets and architecture white papers. The first key found in the device's name is used, so longer keys come first.
PEAK_TFLOPS = {
    'B200': (2250, 75), 'GH200': (989, 67), 'H200': (989, 67), 'H800 PCIe': (756, 51), 'H800': (989, 67),
    'H100 PCIe': (756, 51), 'H100 NVL': (835, 60), 'H100': (989, 67),
    'H20': (148, 44), 'A100': (312, 19.5), 'A800': (312, 19.5), 'A40': (150, 37.4), 'L40S': (362, 91.6),
    'L40': (181, 90.5), 'RTX 6000 Ada': (364, 91.1), 'A6000': (155, 38.7), 'L20': (119.5, 59.8), 'L4': (121, 30.3),
    'A10G': (70, 35), 'A10': (125, 31.2), 'T4': (65, 8.1),
    'V100': (125, 15.7), 'MI300X': (1307, 163.4),
    'GTX 1080 Ti': (11.3, 11.3), 'GTX 1080': (8.9, 8.9), 'GTX 1070 Ti': (8.2, 8.2), 'GTX 1070': (6.5, 6.5),
    'GTX 1060': (4.4, 4.4), 'GTX 1050 Ti': (2.1, 2.1), 'GTX 1050': (1.9, 1.9),
    'RTX 2080 Ti': (53.8, 13.4), 'RTX 2080 SUPER': (44.6, 11.2), 'RTX 2080': (40.3, 10.1),
    'RTX 2070 SUPER': (36.3, 9.1), 'RTX 2070': (29.9, 7.5), 'RTX 2060 SUPER': (28.7, 7.2), 'RTX 2060': (25.8, 6.5),
    'RTX 3090 Ti': (80, 40), 'RTX 3090': (71, 35.6), 'RTX 3080 Ti': (68.2, 34.1), 'RTX 3080': (59.5, 29.8),
    'RTX 3070 Ti': (43.5, 21.7), 'RTX 3070': (40.6, 20.3), 'RTX 3060 Ti': (32.4, 16.2), 'RTX 3060': (25.5, 12.7),
    'RTX 4090 D': (147.1, 73.5), 'RTX 4090': (165.2, 82.6), 'RTX 4080 SUPER': (104.4, 52.2), 'RTX 4080': (97.5, 48.7),
    'RTX 4070 Ti SUPER': (88.2, 44.1), 'RTX 4070 Ti': (80.2, 40.1), 'RTX 4070 SUPER': (71, 35.5),
    'RTX 4070': (58.3, 29.1), 'RTX 4060 Ti': (44.1, 22.1), 'RTX 4060': (30.2, 15.1),
    'RTX 5090': (209.5, 104.8), 'RTX 5080': (112.6, 56.3), 'RTX 5070 Ti': (87.9, 43.9), 'RTX 5070': (61.7, 30.9),
    'RTX 5060 Ti': (47.4, 23.7), 'RTX 5060': (38.4, 19.2),
}


def pick_device():
    """Return the best kind of device this machine has: cuda, mps or cpu."""
    if torch.cuda.is_available():
        if has_kernels(torch.cuda.get_device_capability(), torch.cuda.get_arch_list()):
            return 'cuda'
        print(f'using the CPU, since {no_kernels(torch.cuda.get_device_capability())}', file=sys.stderr)
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def has_kernels(capability, architectures):
    """Return whether this torch can run on a GPU of `capability`, such as (8, 6).

    architectures: what torch was compiled for, as ['sm_80', 'sm_90a', 'compute_90']: machine code for a capability of
    the same major number and a minor one that is not above, or PTX for all that are not below. AMD's have other names.
    """
    major, minor = capability
    known = [re.fullmatch(r'(sm|compute)_(\d+)(\d)[a-z]?', name) for name in architectures]
    if not any(known):
        return True
    return any((int(found[2]), int(found[3])) <= capability and (found[1] == 'compute' or int(found[2]) == major)
               for found in known if found)


def no_kernels(capability):
    """Return the sentence for a GPU that this torch has no kernels for: PyPI's wheels leave older GPUs out."""
    return (f'torch {torch.__version__} has no kernels for compute capability {capability[0]}.{capability[1]}; older '
            'GPUs need pip install torch --index-url https://download.pytorch.org/whl/cu126')


def device_problem(name):
    """Return why `name` cannot be used as a device on this machine, or '' if it can."""
    try:
        device = torch.device(name)
    except RuntimeError:
        return f'device={name}: expected cpu, mps, cuda or cuda:N'
    if device.type == 'cuda' and not torch.cuda.is_available():
        return f'device={name}: no CUDA here; use --device=cpu' + ' or mps' * torch.backends.mps.is_available()
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        return f'device={name}: this machine has {torch.cuda.device_count()} CUDA devices, counted from 0'
    if device.type == 'cuda' and not has_kernels(capability := torch.cuda.get_device_capability(device),
                                                 torch.cuda.get_arch_list()):
        return f'device={name}: {no_kernels(capability)}'
    if device.type == 'mps' and not torch.backends.mps.is_available():
        return 'device=mps: no MPS here; use --device=cpu' + ' or cuda' * torch.cuda.is_available()
    return ''


@contextlib.contextmanager
def without_cudnn_attention():
    """Keep cuDNN's attention off in this block: it builds a plan for each length, in generation for each token."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextlib.contextmanager
def without_onednn():
    """Keep oneDNN off, in the whole process, while this block runs.

    It packs a bfloat16 matrix anew for each product. For a single row torch's own loop takes a third of the time.
    """
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = ONEDNN


def native_bf16():
    """Return whether this CPU has bfloat16 instructions. Without them torch emulates bfloat16, which is slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def fast_bf16(device):
    """Return whether matrix products in bfloat16 are fast on `device`, a torch.device."""
    if device.type == 'cuda':
        return pick_dtype(device)[0] == 'bfloat16'
    return device.type == 'cpu' and native_bf16()


def pick_dtype(device):
    """Return (name of the fastest safe dtype on `device`, the reason).

    bfloat16 needs compute capability 8.0. Below that, torch.cuda.is_bf16_supported() is still True, but bfloat16 is
    emulated there and slower than float32.
    """
    if device.type == 'cuda':
        if torch.version.hip:
            return 'bfloat16', 'ROCm'
        major, minor = torch.cuda.get_device_capability(device)
        name = 'bfloat16' if major >= 8 else 'float16' if major == 7 else 'float32'
        return name, f'compute capability {major}.{minor}'
    if device.type == 'cpu' and native_bf16():
        return 'bfloat16', 'this CPU has bfloat16 instructions'
    return 'float32', f'safe on {device.type}'


def peak_memory(device):
    """Return the most bytes that this process has held so far, on CUDA those of the device; 0 if unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_reserved(device)
    if device.type == 'cpu' and resource:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    return 0


def gpu_memory(indices):
    """Return the smallest memory, in bytes, of the CUDA devices with these indices, of those that exist."""
    return min(torch.cuda.get_device_properties(i).total_memory for i in indices if i < torch.cuda.device_count())


def free_memory(device):
    """Return the bytes that training can use on this machine's device; 0 if the system does not report them."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[1]
    try:
        lines = Path('/proc/meminfo').read_text(encoding='utf-8').splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
        return min(free, physical_memory() or free)  # less in a container
    except (OSError, StopIteration):
        return 0


def measured_flops(device, dtype, n=4096):
    """Return the FLOP/s of n x n x n matrix products on a GPU: the best of five series of eight.

    Launching a product takes about 10 us and computing one of n = 4096 at least 70 us, also on the fastest GPU.
    """
    generator = torch.Generator().manual_seed(0)  # its own, so that training's random numbers do not change
    repeats, best = 8, float('inf')
    a = torch.randn(n, n, generator=generator).to(device, dtype)
    for _ in range(5):
        float(a[0, 0])  # reading a number waits for the device
        began = time.perf_counter()
        for _ in range(repeats):
            b = a @ a
        float(b[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 * repeats / best


def peak_flops(runtime, override=0.0):
    """Return the device's peak in FLOP/s for the dtype in use; 0 if there is none to compare with.

    It is `override` (in TFLOP/s) if that is not 0, else from PEAK_TFLOPS, else measured. A CPU has none: its speed
    changes with its clock, its threads and other processes, so that a fraction of it would not compare with any other.
    """
    if override:
        return override * 1e12
    if runtime.device.type == 'cpu':
        return 0.0
    if runtime.device.type == 'cuda':
        name = torch.cuda.get_device_name(runtime.device)
        for known, (half, full) in PEAK_TFLOPS.items():
            if re.search(rf'\b{known}\b', name):
                return (full if runtime.dtype == torch.float32 else half) * 1e12
    return measured_flops(runtime.device, runtime.dtype)
