"""Faults 38 to 42: nothing that is not finite reaches the weights or a checkpoint."""
import json

import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset
from kit import differences, load

import model as model_file
from lib.machine import runtime
from lib.training.optim import make_optimizer
from lib.weights import checkpoint


def all_finite(path):
    return all(torch.isfinite(p).all() for p in checkpoint.load(path)['model'].values())


@pytest.mark.parametrize('flags', [['--eval_interval=100'], ['--eval_interval=1'], ['--log_interval=10'],
                                   ['--optimizer=muon', '--muon_lr=1e30']])
def test_a_learning_rate_of_1e30_ends_the_run_and_keeps_the_good_checkpoint(run, workdir, flags):  # fault 38
    done = run('train.py', *TINY, '--learning_rate=1e30', '--max_iters=60', '--warmup_iters=0', *flags)
    assert done.status == 1 and 'Traceback' not in done.err
    assert ' at iter 1;' in done.last_error and 'out is of iter 0' in done.last_error
    assert 'Lower learning_rate' in done.last_error
    assert all(load(f'out/{name}')['iter_num'] == 0 and all_finite(f'out/{name}') for name in ('ckpt.pt', 'last.pt'))


@pytest.fixture
def nan_at(monkeypatch):
    """nan_at(i): the loss of training update number i (no accumulation) is NaN, as from a broken kernel."""
    def install(update, times=1):
        real, calls = model_file.GPT.forward, []

        def forward(self, idx, targets=None, cache=None, return_logits=False):
            logits, loss = real(self, idx, targets, cache)
            if self.training and loss is not None:
                calls.append(0)
                if update < len(calls) <= update + times:
                    loss = loss * float('nan')
            return logits, loss
        monkeypatch.setattr(model_file.GPT, 'forward', forward)
    return install


def test_nan_between_logged_updates_stops_at_its_own_update(run, workdir, nan_at):  # fault 40
    nan_at(3)
    done = run('train.py', *TINY, '--log_interval=10')
    assert done.status == 1 and 'the loss is nan' in done.last_error and ' at iter 3;' in done.last_error
    assert load('out/last.pt')['iter_num'] == 0


def test_where_the_host_learns_of_it_late_the_weights_have_stayed_as_they_were(run, workdir, nan_at, monkeypatch):
    class OneCallLate:  # as on CUDA
        calls, seen = 1, [0.0, 0.0, 0.0]

        def __call__(self, tensor):
            late, self.seen = self.seen, tensor.tolist()
            return late
    monkeypatch.setattr(runtime, 'DelayedReader', lambda rt: OneCallLate())
    nan_at(3)
    poisoned, weights = model_file.GPT.forward, []

    def forward(self, *args, **kwargs):
        weights.extend([self.lm_head.weight.detach().clone()] if self.training else [])
        return poisoned(self, *args, **kwargs)
    monkeypatch.setattr(model_file.GPT, 'forward', forward)
    done = run('train.py', *TINY, '--eval_interval=100')
    assert done.status == 1 and 'the loss is nan' in done.last_error and ' at iter 3;' in done.last_error
    assert len(weights) == 5 and torch.equal(weights[3], weights[4]) and not torch.equal(weights[2], weights[3])


def test_float16_skips_updates_that_overflow_and_stops_after_twenty(run, workdir, nan_at, monkeypatch):  # fault 38
    real = torch.amp.GradScaler  # preflight keeps float16 off the CPU; the scaler itself works there
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: real(device, init_scale=2.0**20))
    nan_at(2)
    assert run('train.py', *TINY).status == 0
    assert load('out/last.pt')['scaler']['scale'] == 2.0**19
    nan_at(0, times=100)
    done = run('train.py', *TINY, '--max_iters=100', '--eval_interval=100')
    assert done.status == 1 and ' at iter 20;' in done.last_error


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_an_update_marked_as_not_finite_changes_no_weight_and_no_moment(kind):  # fault 38
    torch.manual_seed(0)
    net = model_file.GPT(model_file.GPTConfig(8, 16, 1, 2, 16))
    opt = make_optimizer(kind, net.param_groups(0.1, muon=kind == 'muon'), 1e-2, 1e-2, (0.9, 0.95), 'cpu')
    idx = torch.randint(16, (2, 8))

    def step(found_inf):
        net(idx, idx)[1].backward()
        opt.found_inf = torch.tensor(found_inf)
        opt.step()
        opt.zero_grad()
        return [t.clone() for p in net.parameters() for t in (p, *opt.state[p].values())]
    before, masked, after = step(0.0), step(1.0), step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, masked))
    assert not any(torch.equal(a, b) for a, b in zip(before, after) if a.dim() > 1)


def test_an_evaluation_that_is_not_finite_is_never_best_nor_saved(run, workdir, monkeypatch):  # fault 41
    real = model_file.GPT.forward

    def forward(self, idx, targets=None, cache=None, return_logits=False):
        logits, loss = real(self, idx, targets, cache)
        return logits, loss if self.training or next(self.parameters()).grad is None and not seen else loss * np.inf
    seen = []
    monkeypatch.setattr(model_file.GPT, 'forward', forward)
    run('train.py', *TINY, '--max_iters=2')
    seen.append(1)
    before = (workdir / 'out' / 'last.pt').read_bytes()
    done = run('train.py', *TINY, '--init_from=resume')
    assert done.status == 1 and 'the losses are inf and inf at iter 4' in done.last_error
    assert (workdir / 'out' / 'last.pt').read_bytes() == before


def test_evaluating_no_batch_is_refused(run, workdir):  # fault 41
    done = run('train.py', *TINY, '--eval_iters=0')
    assert done.status == 2 and 'eval_iters must be at least 1, got 0' in done.last_error


def spiky(workdir):
    """A dataset that is easy to learn but for one stretch of tokens in an order of its own."""
    ids = np.arange(4000) % 16
    ids[2000:2024] = np.random.default_rng(1).integers(0, 16, 24)
    write_dataset(workdir / 'data' / 'tiny', ids, ids[:400])


@pytest.mark.parametrize('skip', [0, 6])
def test_a_spike_is_skipped_and_logged_only_where_asked_for(run, workdir, skip):  # fault 42
    spiky(workdir)
    done = run('train.py', *TINY, '--max_iters=300', '--eval_interval=300', '--learning_rate=1e-2', '--batch_size=2',
               '--grad_clip=0', f'--spike_skip={skip}', '--log_interval=50')
    assert done.status == 0, done.err
    run('train.py', *TINY, '--max_iters=300', '--eval_interval=300', '--learning_rate=1e-2', '--batch_size=2',
        '--grad_clip=0', '--log_interval=50', '--out_dir=plain')
    same = not differences(load('plain/last.pt')['model'], load('out/last.pt')['model'])
    told = [line for line in done.err.splitlines() if 'update skipped' in line]
    records = [json.loads(line) for line in (workdir / 'out' / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    assert bool(told) == bool(skip) == any('skipped' in r for r in records) == (not same)
    assert all('grad norm' in line and 'z=' in line for line in told)
