"""What torch.compile would run on an H100, found without one: python fake_cuda.py LIBRARY [PART ...] prints it as JSON.

The parts are those of PARTS; all of them, unless some are named. LIBRARY is fake_cuda.cpp, compiled. It gives torch a
CUDA device on which tensors have a shape and no memory. Inductor then plans the kernels that it would run, and what it
plans is counted here. test_cuda_graphs.py has the claims.
"""
import ctypes
import json
import sys
import sysconfig
import types
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
T, V, B = 1024, 50304, 16
MODERN = dict(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, tie_weights=False, softcap=15.0)


def load(library):
    """Load the fake device; torch looks for CUDA when it is imported, so this comes first."""
    lib = next(path for path in (Path(p, 'torch', 'lib') for p in {sysconfig.get_path('platlib'), *sys.path})
               if path.is_dir())
    for path in [*sorted(lib.glob('libgomp*')), lib / 'libc10.so', lib / 'libtorch_cpu.so', Path(library)]:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def pretend():
    """Let torch and Inductor find an H100 with Triton, and keep them from computing anything on it."""
    import torch
    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.fx_passes.fuse_attention as attention
    import torch._inductor.fx_passes.misc_patterns as misc
    import torch._inductor.fx_passes.pad_mm as padding
    import torch._inductor.scheduler
    from torch._dynamo.device_interface import CudaInterface
    card = types.SimpleNamespace(
        name='GPU', major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32, uuid='x',
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 << 20, gcnArchName='', is_integrated=False, clock_rate=1980000, memory_clock_rate=2619000,
        memory_bus_width=5120)
    state = torch.zeros(16, dtype=torch.uint8)
    answers = dict(is_available=True, is_initialized=True, _lazy_init=None, current_device=0, device_count=1,
                   get_device_properties=card, get_device_capability=(9, 0), get_device_name='GPU', synchronize=None,
                   get_arch_list=['sm_90'], set_device=None, get_rng_state=state, set_rng_state=None,
                   is_bf16_supported=True, exchange_device=0, maybe_exchange_device=0, _exchange_device=0,
                   _maybe_exchange_device=0, get_compute_capability=90, get_raw_stream=0, is_triton_capable=True,
                   raise_if_triton_unavailable=None)
    for name, answer in answers.items():
        def reply(*args, answer=answer, **options):
            return answer
        for owner in (torch.cuda, CudaInterface, CudaInterface.Worker):
            if hasattr(owner, name):
                setattr(owner, name, reply if owner is torch.cuda else staticmethod(reply))
    for name in 'getCurrentRawStream getDevice exchangeDevice maybeExchangeDevice setDevice getDeviceCount'.split():
        setattr(torch._C, f'_cuda_{name}', lambda *args: 0)
    torch.version.cuda = '13.0'
    torch._inductor.scheduler.has_triton = lambda: True
    torch._functorch.config.enable_autograd_cache = False
    torch._functorch.config.force_non_lazy_backward_lowering = True
    config = torch._inductor.config
    config.fx_graph_cache, config.compile_threads, config.joint_graph_constant_folding = False, 1, False
    for module, name in ((attention, '_sfdp_init'), (misc, '_misc_patterns_init'), (padding, '_pad_mm_init')):
        setattr(module, name, lambda *args, **options: None)  # these measure on the device


def catch_graphs():
    """Return a list to which Inductor adds [is backward, library calls, Triton kernels, their bytes] of each graph."""
    from torch._inductor.graph import GraphLowering
    graphs = []

    def plan(self):
        self.init_wrapper_code()
        self._update_scheduler()  # fuses operations into kernels
        sizes = [node.get_read_write_buffers_sizes() for node in self.scheduler.nodes
                 if 'Extern' not in type(node).__name__]
        graphs.append([bool(self.is_backward), len(self.scheduler.nodes) - len(sizes), len(sizes), sum(sizes)])
        return types.SimpleNamespace(call=lambda args: None, __file__='x')
    GraphLowering.compile_to_module = plan
    return graphs


def catch_attention():
    """Let attention be CUDA's fused kernels; return a set to which the dtypes of flash attention's inputs are added."""
    import torch

    import kernels
    dtypes = set()

    def attend(q, k, v, dropout_p=0.0, window=0, mask=None):
        if mask is not None:
            mask = mask.expand(*q.shape[:3], k.size(2))
            return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False)[0]
        dtypes.update(str(t.dtype) for t in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, True)[0]
    kernels.causal_attention = attend
    return dtypes


def make_model(bf16_residual=False, **options):
    import torch

    from model import GPT, GPTConfig
    model = GPT(GPTConfig(**{'block_size': T, 'vocab_size': V, 'bias': False, **options}), init=False)
    model.set_compute_dtype(torch.bfloat16, bf16_residual)
    return model


def make_batch(length):
    import torch
    return [torch.randint(V, (B, length)) for _ in 'xy']


def micro_step(graphs, **options):
    """Return [library calls, kernels, bytes] of the forward and of the backward pass of one micro-batch."""
    import torch
    torch._dynamo.reset()
    graphs.clear()
    torch.compile(make_model(**options), dynamic=False, fullgraph=True)(*make_batch(T))
    assert [graph[0] for graph in graphs] == [False, True]
    return [graph[1:] for graph in graphs]


def all_shapes(graphs, **options):
    """Return how many graphs each of these compiles: three contexts, an evaluation, and the last two once more."""
    import torch
    torch._dynamo.reset()
    model, counts = make_model(n_layer=1, **options), []
    network = torch.compile(model, dynamic=False, fullgraph=True)  # fullgraph: a break of the graph is an error
    for length, trains in ((T // 4, True), (T // 2, True), (T, True), (T, False), (T, True), (T, False)):
        graphs.clear()
        model.train(trains)
        with torch.set_grad_enabled(trains):
            network(*make_batch(length))
        counts.append(len(graphs))
    return counts


def update(kind, graphs):
    """Run two updates as train.py does, uncompiled; reading a tensor of the device is an error. Returns True."""
    import torch

    from lib.training.guard import Guard
    from lib.training.optim import clip_grad_norm_, make_optimizer
    torch._fused_sgd_ = lambda *args, **options: None  # one kernel, which torch cannot plan without memory
    model = make_model(n_layer=2, **MODERN)
    opt = make_optimizer(kind, model.param_groups(0.1, kind == 'muon'), 1e-3, 0.02, (0.9, 0.95), 'cuda')
    scaler = types.SimpleNamespace(is_enabled=lambda: False)
    guard = Guard(types.SimpleNamespace(device=torch.device('cuda')), scaler, 'out', 0)
    for _ in range(2):
        total_loss = 0.0
        for _ in range(2):
            loss = model(*make_batch(T))[1] / 2
            loss.backward()
            total_loss = total_loss + loss.detach()
        grad_norm = clip_grad_norm_(model.parameters(), 1.0)
        if guard.allows(opt, total_loss, grad_norm):
            opt.step()
        opt.zero_grad(set_to_none=True)
    return True


def decoding(graphs):
    """Return how many operations that do work a recorded token of GPT-2 (124M) takes."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks.operations import NO_WORK
    from lib import decode
    from lib.weights.gpt2 import uninitialized
    from model import GPTConfig
    counts = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == 'aten' and func.__name__.partition('.')[0] not in NO_WORK:
                counts.append(func.__name__)
            return func(*args, **(kwargs or {}))
    model = uninitialized(GPTConfig(mlp='gelu_tanh', vocab_size=50257), torch.bfloat16).eval()
    cache = decode.make_cache(model, 1, torch.bfloat16)
    assert isinstance(cache, decode.StaticCache)
    with torch.no_grad(), Count():
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache, positions=cache.at)
    return len(counts)


def layers(graphs, **options):
    return [micro_step(graphs, n_layer=n, **options) for n in (1, 2)]


def attention(graphs):
    """Return the dtypes that flash attention gets, as strings."""
    import torch
    dtypes = catch_attention()
    for options in ({}, MODERN):
        with torch.no_grad():
            make_model(n_layer=1, **options)(*make_batch(T))
    return sorted(dtypes)


PARTS = {
    'classic': layers,
    'modern': partial(layers, **MODERN),
    'classic, bf16_residual': partial(layers, bf16_residual=True),
    'modern, bf16_residual': partial(layers, bf16_residual=True, **MODERN),
    'shapes of modern': partial(all_shapes, **MODERN, smear=True),
    'shapes of dropout': partial(all_shapes, dropout=0.1),
    'attention': attention,
    'update by adamw': partial(update, 'adamw'),
    'update by muon': partial(update, 'muon'),
    'decoding': decoding,
}


def main(library, *names):
    load(library)
    sys.path[0] = str(REPO)
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    pretend()
    graphs, found = catch_graphs(), {}
    catch_attention()
    for name in names or PARTS:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda:0'):
            found[name] = PARTS[name](graphs)
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == '__main__':
    main(*sys.argv[1:])
