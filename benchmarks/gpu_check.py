"""Check a GPU in ten minutes: is what it computes right, and how fast is it? docs/machines.md says what to send in.

    python benchmarks/gpu_check.py                    all checks; a line that ends in BAD is an error
    python benchmarks/gpu_check.py parity decode      some of parity, guards, sync, decode, speed

Without a GPU it runs on the CPU with tiny models, which tests the checks and not the machine.
"""
import contextlib
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib import decode as decoding
from lib.generate import generate
from lib.training.optim import make_optimizer
from model import GPT, GPTConfig

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
FULL = dict(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768, bias=False)
SMALL = dict(block_size=256, vocab_size=4096, n_layer=4, n_head=4, n_embd=256, bias=False)
if not CUDA:
    FULL = SMALL = dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32, bias=False)
MODERN = dict(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, tie_weights=False, softcap=15.0)


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def make_model(size, **options):
    """Return a model in which no matrix is zero, so that every gradient is there."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**size, **options})).to(DEVICE)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02)
    return model


def make_batch(size, batch_size):
    """Return random (idx, targets), (B, T) each."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size['vocab_size'], (batch_size, size['block_size'] + 1), generator=generator).to(DEVICE)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def compiled(model):
    return torch.compile(model, dynamic=False) if CUDA else model


def make_update(kind, model):
    opt = make_optimizer(kind, model.param_groups(0.1, kind == 'muon'), 1e-3, 0.02, (0.9, 0.95), DEVICE)

    def update(network, idx, targets, poison=False):
        network(idx, targets)[1].backward()
        if poison:
            next(p for p in model.parameters() if p.dim() == 2).grad[0, 0] = math.nan
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.found_inf = (~torch.isfinite(norm)).float()
        opt.step()
        opt.zero_grad(set_to_none=True)
    return update


def parity():
    """Gradients in bfloat16, eager and compiled, against float32 with the plain attention."""
    for name, options in (('classic', {}), ("GPT-2's bias and gelu_tanh", dict(bias=True, mlp='gelu_tanh')),
                          ('modern', MODERN), ('modern, smear, swiglu', {**MODERN, 'mlp': 'swiglu', 'smear': True})):
        model, found = make_model(SMALL, **options), {}
        for how, dtype in (('float32', torch.float32), ('eager', torch.bfloat16), ('compiled', torch.bfloat16),
                           ('compiled with bf16_residual', torch.bfloat16)):
            model.set_compute_dtype(dtype, bf16_residual='residual' in how)
            model.zero_grad(set_to_none=True)
            plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
            with plain if how == 'float32' else contextlib.nullcontext():
                loss = (compiled(model) if 'compiled' in how else model)(*make_batch(SMALL, 8))[1]
                loss.backward()
            found[how] = float(loss.detach()), {n: p.grad.float().clone() for n, p in model.named_parameters()}
            torch._dynamo.reset()
        for how in list(found)[1:]:
            worst = max((float((found[how][1][n] - g).norm() / (g.norm() + 1e-12)), n)
                        for n, g in found['float32'][1].items())
            print(f'parity, {name}, {how}: loss off by {found[how][0] - found["float32"][0]:+.1e}, '
                  f'worst gradient off by {worst[0]:.1e} ({worst[1]})', '' if worst[0] < 0.06 else 'BAD')


def guards():
    """A poisoned update changes nothing, any other changes every tensor."""
    for kind in ('adamw', 'muon'):
        model = make_model(SMALL, **MODERN)
        update, batch = make_update(kind, model), make_batch(SMALL, 4)
        for poison in (False, True, False):
            before = [p.detach().clone() for p in model.parameters()]
            update(model, *batch, poison=poison)
            moved = sum(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
            print(f'guards, {kind}, poisoned {poison}: {moved} of {len(before)} tensors changed',
                  '' if (moved == 0) == poison else 'BAD')


def sync():
    """An update never waits for the device; torch raises an error if it does."""
    for kind in ('adamw', 'muon') if CUDA else ():
        model = make_model(SMALL, **MODERN)
        model.set_compute_dtype(torch.bfloat16)
        network, update, batch = compiled(model), make_update(kind, model), make_batch(SMALL, 4)
        for i in range(3):
            torch.cuda.set_sync_debug_mode(2 if i == 2 else 0)
            update(network, *batch)
        torch.cuda.set_sync_debug_mode(0)
        print(f'sync, {kind}: none')


def decode():
    """The text of the CUDA graph against that without; tokens/s of one sequence, with and without cuDNN's attention.

    Each length is new the first time, and not the second.
    """
    model, texts = make_model(SMALL, **MODERN).eval(), []
    for devices in (decoding.DEVICES, ()):
        decoding.DEVICES, before = devices, decoding.DEVICES
        steps = list(generate(model, [1], 3, 2 * SMALL['block_size'], temperature=0))
        texts.append(torch.stack(steps).tolist())
        decoding.DEVICES = before
    print('decode, graph: the text', 'is equal' if texts[0] == texts[1] else 'differs BAD')
    model = make_model(FULL).eval().to(DEVICE, torch.bfloat16 if CUDA else torch.float32)
    n_tokens = 200 if CUDA else 10
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for turn in ('first', 'second'):
            synchronize()
            began = time.perf_counter()
            list(generate(model, [1] * (5 if cudnn else 6), 1, n_tokens, temperature=0.8, top_k=20))
            synchronize()
            speed = n_tokens / (time.perf_counter() - began)
            print(f'decode, cuDNN allowed {cudnn}, {turn} time: {speed:,.0f} tokens/s')


def speed():
    """Training tokens/s, memory and seconds to compile, by micro-batch, and the time of the optimizer."""
    sizes = [(16, False), (32, False), (32, True), (64, False)] if CUDA else [(2, False), (2, True)]
    for name, options, kind in (('classic', {}, 'adamw'), ('modern', MODERN, 'muon')):
        for batch_size, bf16_residual in sizes:
            model = make_model(FULL, **options)
            model.set_compute_dtype(torch.bfloat16, bf16_residual)
            network, update, batch = compiled(model), make_update(kind, model), make_batch(FULL, batch_size)
            began = time.perf_counter()
            update(network, *batch)
            synchronize()
            first, seconds = time.perf_counter() - began, {}
            for what in ('micro-batch', 'update'):
                for i in range(24 if CUDA else 2):
                    if i == (4 if CUDA else 1):
                        synchronize()
                        began = time.perf_counter()
                    if what == 'update':
                        update(network, *batch)
                    else:
                        network(*batch)[1].backward()
                synchronize()
                seconds[what] = (time.perf_counter() - began) / (20 if CUDA else 1)
                model.zero_grad(set_to_none=True)
            micro = seconds['micro-batch']
            peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0
            print(f'speed, {name}{", bf16_residual" * bf16_residual}, {batch_size} sequences: '
                  f'{batch_size * FULL["block_size"] / micro:,.0f} tokens/s, {1e3 * micro:.1f} ms per micro-batch, '
                  f'{1e3 * (seconds["update"] - micro):.1f} ms for clipping and {kind}, {peak:.1f} GiB, '
                  f'{first:.0f} s for the first call', flush=True)
            del network, update, model
            torch._dynamo.reset()
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()


CHECKS = {'parity': parity, 'guards': guards, 'sync': sync, 'decode': decode, 'speed': speed}


def main(names):
    if unknown := [name for name in names if name not in CHECKS]:
        raise SystemExit(f'error: no check {unknown[0]}; expected some of {", ".join(CHECKS)}')
    print(torch.__version__, torch.version.cuda, torch.backends.cudnn.version(),
          torch.cuda.get_device_name() if CUDA else 'no GPU', torch.cuda.get_arch_list() if CUDA else '')
    for name in names or CHECKS:
        CHECKS[name]()


if __name__ == '__main__':
    main(sys.argv[1:])
