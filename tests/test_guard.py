"""lib/training/guard.py: nothing that is not finite reaches the weights or a checkpoint (faults 38 to 42)."""
import contextlib
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, write_dataset
from kit import load

from lib.machine.runtime import Runtime
from lib.text import dataset
from lib.training import guard
from lib.training.guard import Guard
from lib.training.log import read_log
from lib.training.optim import make_optimizer
from lib.weights import checkpoint
from model import GPT, GPTConfig


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
    """nan_at(i, n): the loss of n updates from number i on is NaN, as from a broken kernel."""
    def install(update, n=1):
        real_starts, real_forward, updates = dataset.train_starts, GPT.forward, []

        def forward(self, idx, targets=None, *args, **kwargs):
            logits, loss = real_forward(self, idx, targets, *args, **kwargs)
            if self.training and update < len(updates) <= update + n:
                loss = loss * float('nan')
            return logits, loss
        monkeypatch.setattr(dataset, 'train_starts', lambda *args: updates.append(1) or real_starts(*args))
        monkeypatch.setattr(GPT, 'forward', forward)
    return install


def test_nan_between_logged_updates_stops_at_its_own_update(run, workdir, nan_at):  # fault 40
    nan_at(3)
    done = run('train.py', *TINY, '--log_interval=10')
    assert done.status == 1 and 'the loss is nan' in done.last_error and ' at iter 3;' in done.last_error
    assert load('out/last.pt')['iter_num'] == 0


def test_where_the_host_learns_of_it_one_update_late_the_weights_are_unchanged(run, workdir, nan_at, monkeypatch):
    class OneCallLate:  # as on CUDA
        delay, previous = 1, [0.0, 0.0]

        def __call__(self, tensor):
            late, self.previous = self.previous, tensor.tolist()
            return late
    monkeypatch.setattr(guard, 'DelayedReader', lambda device: OneCallLate())
    nan_at(3)
    real, weights = Guard.allows, []

    def allows(self, opt, *args):
        weights.append(opt.param_groups[0]['params'][0].detach().clone())
        return real(self, opt, *args)
    monkeypatch.setattr(Guard, 'allows', allows)
    done = run('train.py', *TINY, '--eval_interval=100')
    assert done.status == 1 and 'the loss is nan' in done.last_error and ' at iter 3;' in done.last_error
    assert len(weights) == 5 and torch.equal(weights[3], weights[4]) and not torch.equal(weights[2], weights[3])


def test_float16_skips_updates_that_overflow_and_stops_after_twenty(run, workdir, nan_at, monkeypatch):  # fault 38
    real = torch.amp.GradScaler  # preflight allows float16 on CUDA only; the scaler itself works on the CPU
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: real(device, init_scale=2.0**20))
    nan_at(2)
    assert run('train.py', *TINY).status == 0
    assert load('out/last.pt')['scaler']['scale'] == 2.0**19
    nan_at(0, 100)
    done = run('train.py', *TINY, '--max_iters=100', '--eval_interval=100')
    assert done.status == 1 and ' at iter 20;' in done.last_error


@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_an_update_marked_as_not_finite_changes_no_weight_and_no_moment(kind):  # fault 38
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 16, 1, 2, 16))
    opt = make_optimizer(kind, model.param_groups(0.1, muon=kind == 'muon'), 1e-2, 1e-2, (0.9, 0.95), 'cpu')
    idx = torch.randint(16, (2, 8))

    def step(found_inf):
        model(idx, idx)[1].backward()
        opt.found_inf = torch.tensor(found_inf)
        opt.step()
        opt.zero_grad()
        return [t.clone() for p in model.parameters() for t in (p, *opt.state[p].values())]
    before, masked, after = step(0.0), step(1.0), step(0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, masked))
    assert not any(torch.equal(a, b) for a, b in zip(before, after) if a.dim() > 1)


@pytest.mark.parametrize('loss', [1.0, math.nan])
def test_on_metal_a_bad_update_is_skipped_and_the_host_waits_once(loss):
    reads = []

    class OnMetal(torch.Tensor):
        def cpu(self):
            reads.append('cpu')
            return self.as_subclass(torch.Tensor)

        def tolist(self):
            reads.append('tolist')
            return super().tolist()

        def __bool__(self):
            reads.append('bool')
            return bool(self.as_subclass(torch.Tensor))
    rt = Runtime(torch.device('mps'), torch.float32, False, '')
    watch = Guard(rt, torch.amp.GradScaler('cpu', enabled=False), 'out', saved_iter=5)
    numbers = [torch.tensor(x).as_subclass(OnMetal) for x in (loss, 2.0)]
    assert watch.allows(SimpleNamespace(), *numbers) == math.isfinite(loss)
    with contextlib.nullcontext() if math.isfinite(loss) else pytest.raises(SystemExit, match='the loss is nan'):
        watch.check(6)
    assert reads == ['cpu']


@pytest.mark.parametrize('losses', [[math.inf, 1.0], [1.0, math.nan]])
def test_an_evaluation_that_is_not_finite_ends_the_run(losses):  # fault 41
    rt = Runtime(torch.device('cpu'), torch.float32, False, '')
    watch = Guard(rt, torch.amp.GradScaler('cpu', enabled=False), 'out', saved_iter=5)
    watch.check_losses([1.0, 2.0], 7)
    with pytest.raises(SystemExit, match=f'the losses are {losses[0]} and {losses[1]} at iter 7; .* is of iter 5'):
        watch.check_losses(losses, 7)


def test_an_evaluation_that_is_not_finite_is_never_best_nor_saved(run, trained, monkeypatch):  # fault 41
    real = GPT.forward

    def forward(self, *args, **kwargs):
        logits, loss = real(self, *args, **kwargs)
        return logits, loss if self.training else loss * math.inf
    monkeypatch.setattr(GPT, 'forward', forward)
    before = {name: (trained / name).read_bytes() for name in ('last.pt', 'ckpt.pt')}
    done = run('train.py', *TINY, '--init_from=resume', '--max_iters=9')
    assert done.status == 1 and 'the losses are inf and inf at iter 8' in done.last_error
    assert {name: (trained / name).read_bytes() for name in before} == before


def test_a_spike_is_clipped_and_logged_and_training_continues(run, workdir):  # fault 42
    ids = np.arange(4000) % 16  # easy to learn, but for one stretch of tokens in random order
    ids[2000:2024] = np.random.default_rng(1).integers(0, 16, 24)
    write_dataset(workdir / 'data' / 'tiny', ids, ids[:400])
    done = run('train.py', *TINY, '--max_iters=260', '--eval_interval=260', '--batch_size=2', '--grad_clip=0.1')
    assert done.status == 0 and 'nan' not in done.out, done.err
    records = [r for r in read_log('out/log.jsonl') if 'iter' in r]
    assert len(records) == 260
    norms = [r['grad_norm'] for r in records[100:]]
    assert max(norms) > 10 * np.median(norms) and max(norms) > 1  # before clipping
    spike = 100 + norms.index(max(norms))
    assert spike < 255 and np.mean([r['loss'] for r in records[-5:]]) < records[spike]['loss'] / 2
