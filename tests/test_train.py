"""train.py: one run from start to end, and what it leaves behind."""
import torch
from conftest import TINY


def test_a_run_makes_exactly_max_iters_updates_and_ends_saved(run, workdir):
    done = run('train.py', '--dataset=tiny', '--max_iters=7', '--eval_interval=5', *[a for a in TINY if 'iters=6' not in a])
    assert done.status == 0, done.err
    assert torch.load('out/last.pt', weights_only=True)['iter_num'] == 7


def test_resuming_equals_not_stopping_bit_for_bit(run, workdir):
    flags = ['--dataset=tiny', *TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--eval_interval=4', '--decay_lr=False']
    run('train.py', *flags, '--out_dir=whole')
    run('train.py', *flags, '--out_dir=halves', '--max_iters=3')
    resumed = run('train.py', *flags, '--out_dir=halves', '--init_from=resume')
    assert 'resuming from iter 3' in resumed.out, resumed.err
    whole, halves = (torch.load(f'{d}/last.pt', weights_only=True) for d in ('whole', 'halves'))
    assert all(torch.equal(whole['model'][k], halves['model'][k]) for k in whole['model'])
