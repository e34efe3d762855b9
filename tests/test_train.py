"""train.py: one run from start to end, and what it leaves behind."""
import json
import math

import pytest
import torch
from conftest import TINY
from kit import load

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


def test_a_compiled_model_is_saved_under_the_same_names(run, workdir, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model: real(model, backend='eager'))  # no compiler is needed
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
