"""train.py: one run from start to end, and what it leaves behind."""
import torch
from conftest import TINY


def load(path):
    return torch.load(path, weights_only=True)


def test_a_run_makes_exactly_max_iters_updates_and_ends_saved(run, workdir):
    done = run('train.py', *TINY, '--max_iters=7', '--eval_interval=5')
    assert done.status == 0, done.err
    assert load('out/last.pt')['iter_num'] == 7


def test_resuming_equals_not_stopping_bit_for_bit(run, workdir):
    flags = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False']
    run('train.py', *flags, '--out_dir=whole')
    run('train.py', *flags, '--out_dir=halves', '--max_iters=3')
    resumed = run('train.py', *flags, '--out_dir=halves', '--init_from=resume')
    assert 'resuming from iter 3' in resumed.out, resumed.err
    whole, halves = load('whole/last.pt')['model'], load('halves/last.pt')['model']
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
