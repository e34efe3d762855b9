"""train.py: one run from start to end, and what it leaves behind."""
import json
import math

import pytest
import torch
from conftest import TINY
from kit import load

from lib.text.dataset import open_dataset, train_starts
from model import GPT


def test_a_run_makes_exactly_max_iters_updates_and_ends_saved(run, workdir):
    done = run('train.py', *TINY, '--max_iters=7', '--eval_interval=5')
    assert done.status == 0, done.err
    assert load('out/last.pt')['iter_num'] == 7


def test_a_finished_run_says_so_and_what_to_raise(run, workdir):
    assert 'nothing left to do' not in run('train.py', *TINY).out
    done = run('train.py', *TINY, '--init_from=resume')
    assert done.status == 0 and 'nothing left to do at iter 6: to train longer raise --max_iters' in done.out


def test_resuming_equals_not_stopping_bit_for_bit(run, workdir):
    flags = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False']
    run('train.py', *flags, '--out_dir=whole')
    run('train.py', *flags, '--out_dir=halves', '--max_iters=3')
    resumed = run('train.py', *flags, '--out_dir=halves', '--init_from=resume')
    assert 'resuming from iter 3' in resumed.out, resumed.err
    whole, halves = load('whole/last.pt')['model'], load('halves/last.pt')['model']
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def nanogpt_rate(it, warmup, decay, peak, low):
    """nanoGPT's schedule from its documentation: linear warm-up, cosine to min_lr at lr_decay_iters, then flat."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    share = min(1.0, (it - warmup) / max(1, decay - warmup))
    return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2


def rates(out_dir='out'):
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as f:
        return [r['lr'] for r in map(json.loads, f) if 'lr' in r]


@pytest.mark.parametrize('warmup, decay', [(0, 12), (4, 12), (4, 8), (2, 20), (20, 40)])
def test_the_learning_rate_is_nanogpts(run, workdir, warmup, decay):
    done = run('train.py', *TINY, '--max_iters=12', f'--warmup_iters={warmup}', f'--lr_decay_iters={decay}',
               '--learning_rate=0.01', '--min_lr=0.002')
    assert done.status == 0
    assert rates() == pytest.approx([nanogpt_rate(it, warmup, decay, 0.01, 0.002) for it in range(12)])


def test_decay_follows_max_iters_and_ends_near_a_tenth_unless_told(run, workdir):
    run('train.py', *TINY, '--max_iters=30', '--learning_rate=0.01')
    assert rates() == pytest.approx([nanogpt_rate(it, 2, 30, 0.01, 0.001) for it in range(30)])


def test_wsd_is_flat_and_then_falls_in_a_line(run, workdir):
    run('train.py', *TINY, '--max_iters=22', '--lr_schedule=wsd', '--cooldown_frac=0.5', '--learning_rate=0.01',
        '--min_lr=0')
    lr = rates()
    assert lr[2:13] == pytest.approx([0.01] * 11) and lr[21] == pytest.approx(0.001)
    assert [a - b for a, b in zip(lr[12:], lr[13:])] == pytest.approx([0.001] * 9)


def test_who_gives_max_iters_gets_whole_contexts_in_spite_of_a_config(run, workdir):
    (workdir / 'short.py').write_text('context_warmup = 0.6\n', encoding='utf-8')
    run('train.py', 'short.py', *TINY, '--max_iters=6')
    with open('out/log.jsonl', encoding='utf-8') as f:
        assert [r['tokens'] for r in map(json.loads, f) if 'iter' in r] == [32, 64, 96, 128, 160, 192]


def test_while_the_context_warms_up_every_token_is_still_read_once(run, workdir):
    done = run('train.py', *TINY, '--context_warmup=0.6', '--max_iters=50')
    with open('out/log.jsonl', encoding='utf-8') as f:
        tokens = [0] + [r['tokens'] for r in map(json.loads, f) if 'iter' in r]
    contexts, read = [], set()
    for i in range(50):
        first, column, context = done.scope['next_windows'](i / 50, tokens[i], 4, 0.6)
        new = {(first + row, column + n) for row in range(4) for n in range(context)}
        assert not new & read and tokens[i + 1] - tokens[i] == len(new) == 4 * context
        read |= new
        contexts.append(context)
    assert contexts == [2] * 16 + [4] * 14 + [8] * 20  # of 8; the first to change finishes its windows
    assert read == {(window, n) for window in range(max(window for window, _ in read) + 1) for n in range(8)}


def test_a_compiled_model_is_saved_under_the_same_names(run, workdir, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **more: real(model, backend='eager'))  # no compiler is needed
    run('train.py', *TINY, '--max_iters=2', '--out_dir=plain')
    done = run('train.py', *TINY, '--max_iters=2', '--out_dir=compiled', '--compile=True')
    assert done.status == 0 and 'compile on' in done.out
    plain, compiled = load('plain/last.pt')['model'], load('compiled/last.pt')['model']
    assert list(plain) == list(compiled) and all(torch.allclose(plain[n], compiled[n]) for n in plain)


@pytest.mark.parametrize('batch_size', [1, 2, 4, 8])
def test_total_batch_tokens_keeps_the_update_whatever_the_micro_batch(run, workdir, batch_size):
    flags = ['--total_batch_tokens=64', '--max_iters=3', '--learning_rate=1e-3']
    run('train.py', *TINY, *flags, '--batch_size=8', '--out_dir=one')
    done = run('train.py', *TINY, *flags, f'--batch_size={batch_size}')
    assert 'tokens per iteration: 64 ' in done.out
    one, other = load('one/last.pt')['model'], load('out/last.pt')['model']
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_too_little_memory_names_what_takes_less(run, workdir, monkeypatch):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB\nand more')
    monkeypatch.setattr(GPT, 'forward', forward)
    done = run('train.py', *TINY)
    assert done.status == 1 and 'Tried to allocate 20.00 GiB' in done.last_error
    assert all(flag in done.last_error for flag in ('--batch_size', '--total_batch_tokens', '--checkpoint_activations'))


def plain_loss(w, idx, targets, n_layer, n_head):
    """GPT-2's loss by the weights w, in plain float32: no kernel that fuses, no cast, no chunk."""
    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f'{name}.weight']

    def heads(x):
        return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, nh, T, hs)
    T = idx.size(1)
    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:T]
    for h in (f'transformer.h.{layer}' for layer in range(n_layer)):
        q, k, v = map(heads, (norm(x, f'{h}.ln_1') @ w[f'{h}.attn.c_attn.weight'].T).chunk(3, -1))
        scores = (q @ k.mT / math.sqrt(q.size(-1))).masked_fill(~torch.ones(T, T).tril().bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2) @ w[f'{h}.attn.c_proj.weight'].T
        inner = norm(x, f'{h}.ln_2') @ w[f'{h}.mlp.c_fc.weight'].T
        x = x + inner * (1 + torch.erf(inner / math.sqrt(2))) / 2 @ w[f'{h}.mlp.c_proj.weight'].T
    logp = (norm(x, 'transformer.ln_f') @ w['transformer.wte.weight'].T).log_softmax(-1)
    return -logp.gather(-1, targets[..., None]).mean()


def test_float32_is_plain_float32_arithmetic(run, workdir, monkeypatch):
    monkeypatch.setattr(GPT, 'CHUNK', 100)  # so that the loss comes in chunks
    run('train.py', *TINY, '--max_iters=0', '--out_dir=first')
    done = run('train.py', *TINY, '--max_iters=20', '--gradient_accumulation_steps=2', '--learning_rate=1e-3',
               '--warmup_iters=0', '--decay_lr=False', '--grad_clip=0.5', '--beta1=0.9', '--beta2=0.99',
               '--weight_decay=0.1')
    assert done.status == 0, done.err
    assert load('first/ckpt.pt')['iter_num'] == 0
    w = {name: p.requires_grad_() for name, p in load('first/ckpt.pt')['model'].items() if name != 'lm_head.weight'}
    data = open_dataset('tiny', 8).train
    m, v = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in 'mv')
    for step in range(1, 21):
        starts = train_starts(1337, len(data), 8, (step - 1) * 8, 8)
        idx, targets = data.batch(starts, 8)
        grads = torch.autograd.grad(plain_loss(w, idx, targets, 2, 2), list(w.values()))
        norm = sum(g.square().sum() for g in grads).sqrt()
        with torch.no_grad():
            for (name, p), g in zip(w.items(), grads):
                g = g * min(1.0, 0.5 / (float(norm) + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.99 * v[name] + 0.01 * g * g
                p.mul_(1 - 1e-3 * 0.1 if p.dim() > 1 else 1.0)
                p.sub_(1e-3 * m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8))
    trained = load('out/last.pt')['model']
    for name, p in w.items():
        torch.testing.assert_close(trained[name], p.detach(), atol=2e-5, rtol=1e-4)
