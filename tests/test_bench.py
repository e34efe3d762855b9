"""bench.py and benchmarks/: measurements, counted operations, tables and pictures."""
import json
import re
import runpy
import sys

import pytest
import torch
from conftest import REPO, TINY

import bench
from benchmarks import harness, operations

ENTRY = {'what': 'training', 'command': 'python bench.py --rows=train', 'machine': {'cpu': 'abacus'},
         'sides': {'ours': {'ms per update': harness.summary([9.0, 10.0, 12.0]), 'val loss': harness.summary([1.5])},
                   'nanoGPT': {'ms per update': harness.summary([30.0]), 'val loss': harness.summary([1.6])}}}


def test_a_row_runs_the_program_itself_and_is_added_to_the_file(run, workdir):
    harness.add('bench.json', {'other': ENTRY})
    outcome = run('bench.py', '--rows=train_small', '--repeats=1', '--seconds=0.01', '--json=bench.json', '--label=-a')
    assert outcome.status == 0, outcome.err
    found = json.loads((workdir / 'bench.json').read_text(encoding='utf-8'))
    assert list(found) == ['other', 'train_small-a']
    assert {'what', 'command', 'commit', 'machine', 'sides'} == set(found['train_small-a'])
    sides = found['train_small-a']['sides']
    assert list(sides) == ['ours'] and 0 < sides['ours']['ms per update']['median'] < 60_000
    assert sides['ours']['MiB at peak']['median'] > 100
    assert '| training 0.8M, 12 x 64 a | ms per update | ' in outcome.out
    assert sorted(path.name for path in workdir.iterdir()) == ['bench.json', 'data']  # the rest was temporary


def test_on_cuda_a_row_has_the_memory_of_the_gpu_and_counts_the_batch_that_was_trained(tmp_path, monkeypatch):
    (tmp_path / 'nvidia-smi').write_text('#!/bin/sh\nprintf "10\\n2345\\n"\n', encoding='utf-8')  # of two GPUs
    (tmp_path / 'nvidia-smi').chmod(0o755)
    (tmp_path / 'trained').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')

    def run_and_parse(command, pattern, enough):
        found = [(float(i), re.search(pattern, f'iter {i}: loss 1.0, time 10.00ms')) for i in range(5)]
        assert '--batch_size=64' in command and enough(found)
        return found, 5.0, 99.0
    for name, value in (('device', 'cuda'), ('extra_args', '--batch_size=64'), ('seconds', 1.0),
                        ('run_and_parse', run_and_parse)):
        monkeypatch.setattr(bench, name, value)
    row = bench.training(bench.SMALL, 'ours')
    assert row['MiB at peak on the GPU'] == 2345 and 'MiB at peak' not in row
    assert row['tokens/s'] == pytest.approx(100 * 64 * 64)  # 64 sequences of SMALL's 64 tokens, 100 times a second


# counted operations

def profiled(job):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        job()
    return operations.by_kind(profile.events())


def test_views_shape_changes_and_allocations_do_not_count():
    x = torch.ones(4, 4)
    assert profiled(lambda: x.view(2, 8).t()[1:].unsqueeze(0).expand(3, -1, -1).detach()) == {}
    assert profiled(lambda: (torch.empty(3), torch.zeros(3), x.reshape(16))) == {}


def test_a_composite_operation_counts_as_the_operations_that_it_calls():
    x = torch.ones(4, 4)
    assert profiled(lambda: torch.nn.functional.linear(x, x)) == {'mm': 1}
    assert profiled(lambda: x.t().contiguous()) == {'copy_': 1}


def test_a_cast_is_one_copy():
    assert profiled(lambda: torch.ones(2, 2).bfloat16()) == {'copy_': 1}


def test_a_list_operation_without_a_fused_kernel_counts_each_tensor():
    tensors = [torch.ones(3) for _ in range(5)]
    found = profiled(lambda: torch._foreach_mul_(tensors, 2.0))
    assert '_foreach_mul_' not in found and max(found.values()) == 5


def test_operations_of_an_update_are_equal_every_time(workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    argv = [*TINY, '--n_layer=1', '--eval_interval=1000']
    # the first run of a process also loads what later ones have
    _, once, again = (operations.per_unit(str(REPO / 'train.py'), argv, '--max_iters', 2, 4) for _ in range(3))
    assert once == again and once['_fused_adamw_'] == 2 and sum(once.values()) > 50


@pytest.mark.slow
def test_the_kernels_row_counts_updates_and_tokens(run, workdir):
    outcome = run('bench.py', '--rows=kernels', '--json=k.json')
    assert outcome.status == 0, outcome.err
    counts = json.loads((workdir / 'k.json').read_text(encoding='utf-8'))['kernels']['sides']['CPU recipe, bfloat16']
    total = counts['operations per update']['median']
    assert total == sum(each['median'] for kind, each in counts.items() if kind.endswith('per update')) / 2
    assert total > counts['operations per token']['median'] > 20


# tables and pictures

def test_growth_is_fitted_and_drawn(run, workdir):
    pytest.importorskip('matplotlib')
    exponent = run('bench.py', '--rows=list').scope['exponent']
    assert abs(exponent([1, 2, 4], [3, 12, 48]) - 2) < 1e-9
    ours = {f'us per token, {what} {size}': size / 4 for what in ('layers', 'width', 'context') for size in (4, 8, 16)}
    ours |= {f'exponent of {kind} per token in {what}': 1.0 for kind in ('time', 'FLOPs')
             for what in ('layers', 'width', 'context')}
    ours |= {'exponent of memory in text': 0.0, 'MiB at peak, 2 MB of text': 90, 'MiB at peak, 20 MB of text': 91}
    entry = {**ENTRY, 'machine': {'cpu': 'abacus', 'isa': 'beads'},
             'sides': {'ours': {unit: harness.summary([value]) for unit, value in ours.items()}}}
    runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['draw_growth'](entry, 'growth.png')
    assert (workdir / 'growth.png').read_bytes().startswith(b'\x89PNG')


def test_train_losses_evaluates_the_checkpoint_that_the_program_keeps(run, workdir):
    flags = '--device=cpu --dtype=float32 --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --max_iters=2 ' \
            '--eval_interval=1 --eval_iters=1 --gradient_accumulation_steps=1 --batch_size=4'
    outcome = run('benchmarks/train_losses.py', '--name=tiny', '--dataset=tiny', f'--ours={flags}', '--seeds=3',
                  '--json=t.json')
    assert outcome.status == 0, outcome.err
    entry = json.loads((workdir / 't.json').read_text(encoding='utf-8'))['tiny']
    assert 2 < entry['sides']['ours']['val loss']['median'] < 3.5  # ln 16 = 2.77
    assert len(entry['histories']['ours'][0]) == 3


def test_tables_have_the_median_the_spread_and_the_gain():
    lines = harness.table({'train': ENTRY})
    assert '| training | ms per update | 10 (9 to 12) | 30 | 3 x |' in lines
    assert '| training | val loss | 1.5 | 1.6 |  |' in lines  # a ratio of losses means nothing


def test_an_entry_with_more_than_two_sides_has_its_own_table():
    more = {**ENTRY, 'sides': {**ENTRY['sides'], 'bare': {'ms per update': harness.summary([5.0])}}}
    lines = harness.table({'train': more})
    assert '| training | ours | nanoGPT | bare |' in lines
    assert '| ms per update | 10 (9 to 12) | 30; ours 3 x | 5; ours 0.5 x |' in lines


def test_the_page_gets_the_entries_that_its_markers_name(tmp_path):
    fill = runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['fill']
    harness.add(tmp_path / 'bench.json', {'train_small': ENTRY, 'sample': {**ENTRY, 'what': 'sampling'}})
    page = 'before\n<!-- table bench.json: train_* -->\nold\n<!-- end -->\nbetween\n' \
           '<!-- table none.json: train_* -->\nold\n<!-- end -->\nafter\n'
    once = fill(page, tmp_path)
    assert '| training | ms per update |' in once and 'sampling' not in once and 'old' not in once
    assert 'python bench.py --rows=train' in once and 'cpu abacus' in once
    assert once.count('Not measured yet.') == 1 and once.endswith('after\n')
    assert fill(once, tmp_path) == once
    assert 'ms per update' not in fill(page.replace('train_* -->', 'train_* only val loss -->'), tmp_path)


def test_runs_with_time_limits_are_drawn(workdir):
    pytest.importorskip('matplotlib')
    entry = {'what': 'characters, 45 s', 'machine': {'cpu': 'abacus', 'isa': 'beads'},
             'histories': {'ours': [[[2, 4.2], [40, 1.7]], [[2, 4.2], [41, 1.8]]], 'nanoGPT': [[[3, 4.2], [60, 2.0]]]}}
    runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['draw_minutes']([entry], 'minutes.png')
    assert (workdir / 'minutes.png').read_bytes().startswith(b'\x89PNG')


# Faults

def test_all_wrong_settings_of_bench_are_reported_together(run, workdir):
    outcome = run('bench.py', '--rows=train_smal', '--vs=nowhere', '--repeats=0')
    assert outcome.status == 2
    assert 'rows: there is no train_smal' in outcome.err and 'vs=nowhere' in outcome.err
    assert 'repeats must be at least 1' in outcome.err


def test_a_command_that_fails_is_named_with_its_last_line(workdir):
    with pytest.raises(harness.UserError) as caught:
        harness.run_and_parse(['python', '-c', 'raise SystemExit("no such luck")'])
    assert 'status 1: no such luck' in caught.value.message
