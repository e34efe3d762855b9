"""bench.py, benchmarks/train_losses.py and benchmarks/results_page.py: they run, and say what was measured."""
import json
import runpy

import pytest
from conftest import REPO

from benchmarks import harness

ENTRY = {'what': 'training', 'command': 'python bench.py --rows=train', 'machine': {'cpu': 'abacus'},
         'sides': {'ours': {'ms an update': harness.summary([9.0, 10.0, 12.0]), 'val loss': harness.summary([1.5])},
                   'nanoGPT': {'ms an update': harness.summary([30.0]), 'val loss': harness.summary([1.6])}}}


def test_bench_measures_a_row_in_the_program_itself_and_adds_it_to_the_file(run, workdir):
    harness.add('bench.json', {'other': ENTRY})
    outcome = run('bench.py', '--rows=train_small', '--turns=1', '--seconds=0.01', '--json=bench.json', '--label=-a')
    assert outcome.status == 0, outcome.err
    found = json.loads((workdir / 'bench.json').read_text(encoding='utf-8'))
    assert list(found) == ['other', 'train_small-a']
    sides = found['train_small-a']['sides']
    assert list(sides) == ['ours'] and 0 < sides['ours']['ms an update']['median'] < 60_000
    assert sides['ours']['MiB at peak']['median'] > 100
    assert '| training 0.8M, 12 x 64 a | ms an update | ' in outcome.out
    assert sorted(path.name for path in workdir.iterdir()) == ['bench.json', 'data']  # the rest was in a scratch folder


def test_a_row_that_does_not_exist_and_a_folder_that_is_no_nanogpt_are_told_together(run, workdir):
    outcome = run('bench.py', '--rows=train_smal', '--vs=nowhere')
    assert outcome.status == 2
    assert 'rows: there is no train_smal' in outcome.err and 'vs=nowhere' in outcome.err


def test_a_command_that_fails_is_named_with_its_last_words(workdir):
    try:
        harness.watch(['python', '-c', 'raise SystemExit("no such luck")'])
    except harness.UserError as error:
        assert 'status 1: no such luck' in error.message
    else:
        raise AssertionError


def test_growth_is_fitted_and_drawn(run, workdir):
    pytest.importorskip('matplotlib')
    exponent = run('bench.py', '--rows=list').scope['exponent']
    assert abs(exponent([1, 2, 4], [3, 12, 48]) - 2) < 1e-9
    ours = {f'us a token, {what} {size}': size / 4 for what in ('layers', 'width', 'context') for size in (4, 8, 16)}
    ours |= {f'exponent of {kind} a token in {what}': 1.0 for kind in ('time', 'FLOPs')
             for what in ('layers', 'width', 'context')}
    ours |= {'exponent of memory in text': 0.0, 'MiB at peak, 2 MB of text': 90, 'MiB at peak, 20 MB of text': 91}
    entry = {**ENTRY, 'machine': {'cpu': 'abacus', 'isa': 'beads'},
             'sides': {'ours': {unit: harness.summary([value]) for unit, value in ours.items()}}}
    runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['draw_growth'](entry, 'growth.png')
    assert (workdir / 'growth.png').read_bytes().startswith(b'\x89PNG')


def test_measure_trains_and_evaluates_what_the_program_keeps(run, workdir):
    flags = '--device=cpu --dtype=float32 --n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --max_iters=2 ' \
            '--eval_interval=1 --eval_iters=1 --gradient_accumulation_steps=1 --batch_size=4'
    outcome = run('benchmarks/train_losses.py', '--name=tiny', '--dataset=tiny', f'--ours={flags}', '--seeds=3',
                  '--json=t.json')
    assert outcome.status == 0, outcome.err
    entry = json.loads((workdir / 't.json').read_text(encoding='utf-8'))['tiny']
    assert 2 < entry['sides']['ours']['val loss']['median'] < 3.5  # ln 16 = 2.77
    assert len(entry['histories']['ours'][0]) == 3


def test_tables_say_median_spread_and_how_many_times_better():
    lines = harness.table({'train': ENTRY})
    assert '| training | ms an update | 10 (9 to 12) | 30 | 3 x |' in lines
    assert '| training | val loss | 1.5 | 1.6 |  |' in lines  # a ratio of losses means nothing


def test_more_than_two_sides_have_a_table_of_their_own():
    more = {**ENTRY, 'sides': {**ENTRY['sides'], 'bare': {'ms an update': harness.summary([5.0])}}}
    lines = harness.table({'train': more})
    assert '| training | ours | nanoGPT | bare |' in lines
    assert '| ms an update | 10 (9 to 12) | 30; ours 3 x | 5; ours 0.5 x |' in lines


def test_the_page_gets_what_its_markers_name_and_invents_nothing(tmp_path):
    fill = runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['fill']
    harness.add(tmp_path / 'bench.json', {'train_small': ENTRY, 'sample': {**ENTRY, 'what': 'sampling'}})
    page = 'before\n<!-- table bench.json: train_* -->\nold\n<!-- end -->\nbetween\n' \
           '<!-- table none.json: train_* -->\nold\n<!-- end -->\nafter\n'
    once = fill(page, tmp_path)
    assert '| training | ms an update |' in once and 'sampling' not in once and 'old' not in once
    assert 'python bench.py --rows=train' in once and 'cpu abacus' in once
    assert once.count('Not measured yet.') == 1 and once.endswith('after\n')
    assert fill(once, tmp_path) == once
    assert 'ms an update' not in fill(page.replace('train_* -->', 'train_* only val loss -->'), tmp_path)


def test_runs_by_the_clock_are_drawn(workdir):
    pytest.importorskip('matplotlib')
    entry = {'what': 'characters, 45 s', 'machine': {'cpu': 'abacus', 'isa': 'beads'},
             'histories': {'ours': [[[2, 4.2], [40, 1.7]], [[2, 4.2], [41, 1.8]]], 'nanoGPT': [[[3, 4.2], [60, 2.0]]]}}
    runpy.run_path(str(REPO / 'benchmarks/results_page.py'))['draw_minutes']([entry], 'minutes.png')
    assert (workdir / 'minutes.png').read_bytes().startswith(b'\x89PNG')
