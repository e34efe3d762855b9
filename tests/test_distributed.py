"""Faults 39, 45, 49 to 51 and 53, and the arithmetic of several ranks: gloo on CPU, two processes."""
import json
import time

import pytest
import torch
from conftest import TINY
from kit import Ranks, differences, load, trained_part

from lib.training import optim

FLAGS = [*TINY, '--gradient_accumulation_steps=4', '--max_iters=10', '--eval_interval=5', '--lr_decay_iters=20',
         '--dist_timeout=200', '--eval_iters=3']
BOTH = pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])

# Hooks: code that a rank runs before the script
KEEP_GRADIENTS = """
import torch
from lib.machine import runtime
from lib.training import optim
real, calls = optim.clip_grad_norm_, []
def clip_grad_norm_(params, most):
    params = list(params)
    if not calls:
        calls.append([runtime.whole(p.grad.detach()).clone() for p in params])
        torch.save(calls[0], f'gradients{rank}.pt')
    return real(params, most)
optim.clip_grad_norm_ = clip_grad_norm_
"""
AT_BATCH = """
import os, signal
from lib.text import dataset
import torch
real, calls = dataset.Split.batch, []
def batch(self, *args):
    if torch.is_grad_enabled():
        calls.append(0)
        if rank == {rank} and len(calls) == {n}:
            {do}
    return real(self, *args)
dataset.Split.batch = batch
"""


def at_batch(n, rank, do):
    """Return a hook that does something on one rank while it reads its training batch number n, counted from 1."""
    return AT_BATCH.format(n=n, rank=rank, do=do)


def two(workdir, *flags, wait_for=2, **options):
    """Run train.py as two ranks; returns [(status, out, err), ...]."""
    return Ranks(2, 'train.py', *FLAGS, *flags, cwd=workdir, **options).wait(ranks=wait_for)


def ended_well(outcomes):
    assert [status for status, _, _ in outcomes] == [0, 0], [err for _, _, err in outcomes]


def losses(out_dir):
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    return [r['loss'] for r in records if 'iter' in r], [r['val_loss'] for r in records if 'step' in r]


def alike(a, b):
    """True where two runs logged the same losses to 1e-4."""
    return all(len(x) == len(y) and max(abs(p - q) for p, q in zip(x, y)) < 1e-4
               for x, y in zip(losses(a), losses(b)))


@BOTH
def test_two_ranks_train_as_one_does(run, workdir, parallel):
    run('train.py', *FLAGS, '--out_dir=one')
    ended_well(two(workdir, f'--parallel={parallel}', '--out_dir=two'))
    one, both = load('one/last.pt'), load('two/last.pt')
    assert alike('one', 'two') and len(losses('two')[0]) == 10
    assert one['model'].keys() == both['model'].keys() and one['model_args'] == both['model_args']
    for name, p in one['model'].items():
        torch.testing.assert_close(both['model'][name], p, rtol=1e-3, atol=1e-4)


@BOTH
def test_gradients_of_two_ranks_are_the_mean_over_the_global_batch(run, workdir, parallel, monkeypatch):
    monkeypatch.setattr(optim, 'clip_grad_norm_', optim.clip_grad_norm_)  # undone at the end
    exec(KEEP_GRADIENTS, {'rank': 'alone'})
    run('train.py', *FLAGS, '--max_iters=1', '--out_dir=one')
    chunked = 'import model\nmodel.GPT.CHUNK = 40\n'  # of 16 logits a token
    ended_well(two(workdir, f'--parallel={parallel}', '--max_iters=1', '--out_dir=two', hook=chunked + KEEP_GRADIENTS))
    alone, first, second = (load(f'gradients{rank}.pt') for rank in ('alone', 0, 1))
    for a, b, c in zip(alone, first, second):
        assert float((a - b).norm()) <= 1e-6 * float(a.norm()) and torch.equal(b, c)


@pytest.mark.parametrize('path', [('one', 'fsdp', 'ddp', 'one'), ('one', 'ddp', 'fsdp', 'one')])
def test_a_run_moves_between_one_process_ddp_and_fsdp(run, workdir, path):
    run('train.py', *FLAGS, '--out_dir=straight', '--max_iters=8')
    for i, kind in enumerate(path):
        flags = ['--init_from=auto', f'--max_iters={2 * i + 2}']
        if kind == 'one':
            assert run('train.py', *FLAGS, *flags).status == 0
        else:
            outcomes = two(workdir, *flags, f'--parallel={kind}')
            ended_well(outcomes)
            assert f'resuming from iter {2 * i} (out/last.pt)' in outcomes[0][1]
    assert max(abs(a - b) for a, b in zip(losses('straight')[0], losses('out')[0], strict=True)) < 1e-4


@BOTH
def test_resuming_two_ranks_is_exact_with_dropout(workdir, parallel):
    flags = ['--dropout=0.2', f'--parallel={parallel}', '--max_iters=4']
    ended_well(two(workdir, *flags, '--out_dir=whole'))
    ended_well(two(workdir, *flags, '--max_iters=3'))
    ended_well(two(workdir, *flags, '--init_from=resume'))
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


def test_under_fsdp_a_rank_holds_half_of_the_model(workdir):
    hook = """
from lib.machine import runtime
real = runtime.place
def place(*args):
    model = real(*args)
    print('held', sum(p.to_local().numel() for p in model.parameters()), 'of', model.get_num_params(False), flush=True)
    return model
runtime.place = place
"""
    outcomes = two(workdir, '--parallel=fsdp', '--max_iters=0', hook=hook)
    ended_well(outcomes)
    held = [line.split() for _, out, _ in outcomes for line in out.splitlines() if line.startswith('held')]
    assert sum(int(words[1]) for words in held) == int(held[0][3])
    assert max(int(words[1]) for words in held) < 0.55 * int(held[0][3])


@BOTH
def test_nan_on_one_rank_stops_all_at_the_same_update_and_names_it(workdir, parallel):  # fault 39
    poison = """
import model
real, calls = model.GPT.forward, []
def forward(self, idx, targets=None, cache=None, return_logits=False):
    logits, loss = real(self, idx, targets, cache)
    if self.training and rank == 1:
        calls.append(0)
        if len(calls) == 7:  # in the fourth update of two micro-steps a rank
            loss = loss * float('nan')
    return logits, loss
model.GPT.forward = forward
"""
    outcomes = two(workdir, f'--parallel={parallel}', hook=poison)
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert 'rank 1: the loss is nan' in outcomes[1][2] and 'rank 0: the loss is nan' not in outcomes[0][2]
    assert all(' at iter 3 ' in err and 'Traceback' not in err for _, _, err in outcomes)
    assert load('out/last.pt')['iter_num'] == 0


def test_a_signal_to_one_rank_stops_both_at_one_step_with_one_save(workdir):  # fault 45
    outcomes = two(workdir, '--eval_interval=100', hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGTERM)'))
    assert [status for status, _, _ in outcomes] == [143, 143]
    assert outcomes[0][1].count('SIGTERM: saved iter 3 to out') == 1 and 'saved' not in outcomes[1][1]
    assert load('out/last.pt')['iter_num'] == 3


def test_a_killed_rank_ends_the_others_within_seconds(workdir):  # fault 49
    began = time.monotonic()
    outcomes = two(workdir, hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGKILL)'))
    assert outcomes[0][0] == 1 and time.monotonic() - began < 150  # the time-out is 200 s
    assert 'rank 0: the ranks lost each other' in outcomes[0][2] and 'silent: 1.' in outcomes[0][2]


def test_a_rank_that_raises_is_named_and_ends_the_others(workdir):  # fault 49
    outcomes = two(workdir, hook=at_batch(5, 1, 'raise ZeroDivisionError("a bug")'))
    assert outcomes[1][0] == 1 and 'ZeroDivisionError: a bug' in outcomes[1][2]
    assert outcomes[0][0] == 1 and 'silent: 1.' in outcomes[0][2]


def test_a_stopped_rank_ends_the_others_at_the_time_out(workdir):  # fault 50
    outcomes = two(workdir, '--dist_timeout=8', wait_for=1, hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGSTOP)'))
    assert outcomes[0][0] == 1 and 'silent: 1.' in outcomes[0][2] and 'Traceback' not in outcomes[0][2]


FULL_DISK = """
import torch
real = torch.save
def save(state, f, **options):  # torch's own collectives use it too
    if rank == 0 and isinstance(state, dict) and state.get('iter_num', -1) {when}:
        raise OSError(28, 'No space left on device')
    return real(state, f, **options)
torch.save = save
"""


def test_a_save_that_fails_on_rank_0_ends_no_run_before_the_last_one(workdir):  # fault 51
    ended_well(two(workdir, hook=FULL_DISK.format(when='== 5')))
    outcomes = two(workdir, '--init_from=resume', '--max_iters=12', hook=FULL_DISK.format(when='== 12'))
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert 'rank 0: could not write out/last.pt' in outcomes[0][2] and 'rank 0 could not save' in outcomes[1][2]
    assert load('out/last.pt')['iter_num'] == 10


def test_a_rank_without_the_data_says_so_and_the_others_do_not_wait_for_ever(workdir):  # fault 53
    hide = "import os\nif rank == 1:\n    os.makedirs('elsewhere', exist_ok=True); os.chdir('elsewhere')\n"
    outcomes = two(workdir, '--dist_timeout=3', hook=hide)
    assert outcomes[1][0] == 2 and 'error: rank 1: no dataset data/tiny' in outcomes[1][2]
    assert outcomes[0][0] == 1 and 'rank 0: the ranks lost each other' in outcomes[0][2]


def test_ranks_that_see_different_files_are_refused(workdir):  # a folder that the machines do not share
    ended_well(two(workdir, '--max_iters=2'))
    hide = """
import os, shutil
if rank == 1:
    shutil.copytree('data', 'elsewhere/data'); os.chdir('elsewhere')
"""
    outcomes = two(workdir, '--init_from=auto', hook=hide)
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert "rank 1 has None; every machine must see the same files" in outcomes[0][2]


@pytest.mark.parametrize('flags, told', [(['--optimizer=muon'], 'needs whole matrices'),
                                         (['--lora_rank=2'], 'parallel=ddp only')])
def test_what_fsdp_does_not_combine_with_is_refused_in_a_line(run, workdir, flags, told):
    done = run('train.py', *TINY, '--parallel=fsdp', *flags)
    assert done.status == 2 and told in done.last_error
