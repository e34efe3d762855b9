"""sweep.py with lib/training/sweep.py, sweep_results.py, law.py and sweep_plot.py."""
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import REPO, TINY
from kit import python

from configurator import UserError
from lib.training import law as laws
from lib.training import sweep, sweep_plot, sweep_results

# Stands for train.py in most tests: writes the same log in no time. The loss falls with the updates, and is lower for
# a wider model; the seed moves it a little. A learning rate of 9 fails. It stops and resumes as train.py does.
STAND_IN = '''
import json, os, signal, sys, time
flags = dict(word[2:].split('=', 1) for word in sys.argv[1:] if word.startswith('--'))
if flags.get('learning_rate') == '9':
    sys.exit('error: learning_rate=9 is too much\\na line of some library after it')
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
path, wait = flags['out_dir'] + '/log.jsonl', float(os.environ.get('WAIT', 0))
lines = open(path, encoding='utf-8').read().splitlines() if os.path.exists(path) else []
begin = json.loads(lines[-1])['step'] + 1 if lines else 0
with open(flags['out_dir'] + '/starts', 'a', encoding='utf-8') as file:
    print(begin, os.environ.get('OMP_NUM_THREADS'), sorted(os.sched_getaffinity(0)), file=file)
n = int(flags['max_iters'])
for step in range(begin, n + 1):
    time.sleep(wait)
    loss = 3 - 0.01 * int(flags['n_embd']) - step / n + 0.001 * (int(flags.get('seed', 0)) % 3)
    record = {'step': step, 'val_loss': loss, 'tokens': 64 * step, 'minutes': step / 60}
    if step == n:
        record.update(whole_val_loss=loss, whole_val_bpb=loss / 2)
    with open(path, 'a', encoding='utf-8') as file:
        print(json.dumps(record), file=file)
'''
GRID = [*[flag for flag in TINY if 'n_embd' not in flag and 'max_iters' not in flag], '--max_iters=10',
        '--n_embd=16,32,48']


@pytest.fixture
def stand_in(workdir, monkeypatch):
    (workdir / 'stand_in.py').write_text(STAND_IN, encoding='utf-8')
    monkeypatch.setattr(sweep, 'TRAIN', workdir / 'stand_in.py')

    def sleep(seconds):  # a stand-in ends at once unless it waits
        time.sleep(seconds if 'WAIT' in os.environ else seconds / 10)
    monkeypatch.setattr(sweep, 'time', SimpleNamespace(**{**vars(time), 'sleep': sleep}))


def rows(folder='out-sweep'):
    return sweep_results.read_tsv(f'{folder}/results.tsv')


def starts():
    """Return what each start of a stand-in noted, by the name of its folder."""
    return {path.parent.name: path.read_text(encoding='utf-8').splitlines()
            for path in sorted(sweep.Path('out-sweep').glob('*/starts'))}


# the grid

def test_a_comma_makes_a_grid_in_every_form_of_a_flag():
    rest, grid = sweep.split_grid(['c.py', '--n_embd=64,96', '--muon-lr', '0.1,0.2', '--out_dir=a,b', '--bias'],
                                  {'n_embd', 'muon_lr', 'bias'})
    assert rest == ['c.py', '--out_dir=a,b', '--bias']
    assert grid == {'n_embd': ['64', '96'], 'muon_lr': ['0.1', '0.2']}


def test_a_single_run_is_called_no_comparison_and_still_carried_out(run, stand_in):
    done = run('sweep.py', *GRID[:-1], '--n_embd=16')
    assert done.out.startswith('1 run in out-sweep\nnote: ') and 'commas' in done.out and len(rows()) == 1
    assert '1 of 1 run was finished before' in run('sweep.py', *GRID[:-1], '--n_embd=16').out


def test_seeds_of_one_setting_are_a_comparison(run, stand_in):
    assert 'note: ' not in run('sweep.py', *GRID[:-1], '--n_embd=16', '--seeds=2').out


def test_help_lists_each_setting_once(run):
    names = [line.split()[0] for line in run('sweep.py', '--help').out.splitlines() if line.startswith('  --')]
    assert '--out_dir' in names and len(names) == len(set(names))


def test_every_combination_and_seed_is_a_row_with_the_columns_of_the_contract(run, stand_in):
    assert run('sweep.py', *GRID, '--dropout=0,0.1', '--seeds=2').status == 0
    found = rows()
    assert len(found) == 12 and list(found[0]) == ['n_embd', 'dropout', 'seed', 'n_params', 'tokens', 'seconds',
                                                   'val_loss', 'val_bpb', 'error']
    assert {row['seed'] for row in found} == {'1337', '1338'} and found[0]['tokens'] == '640'


def test_the_table_is_best_first(run, stand_in):
    out = run('sweep.py', *GRID).out.splitlines()
    head = next(i for i, line in enumerate(out) if 'val loss' in line and 'params' in line)
    assert [line.split()[0] for line in out[head + 1:head + 4]] == ['48', '32', '16']


def test_a_failing_setting_is_a_row_with_its_error(run, stand_in):
    found = run('sweep.py', *[flag for flag in GRID if 'learning_rate' not in flag], '--learning_rate=0.1,9')
    assert found.status == 0
    failed = [row for row in rows() if row['error']]
    assert len(failed) == 3 and {row['error'] for row in failed} == {'learning_rate=9 is too much'}
    assert 'n_embd=16 learning_rate=9: learning_rate=9 is too much' in found.out


def test_a_wrong_value_ends_the_sweep_before_any_run(run, stand_in):
    found = run('sweep.py', *GRID, '--dropout=0,much')
    assert found.status == 2 and 'dropout=much' in found.err and not sweep.Path('out-sweep').exists()


@pytest.mark.parametrize('flags, told', [(['--seeds=0'], 'seeds'), (['--jobs=1000'], 'jobs=1000'),
                                         (['--flops=many'], 'flops=many'), (['--n_embed=1,2'], 'n_embd')])
def test_mistakes_are_reported_in_one_line(run, stand_in, flags, told):
    found = run('sweep.py', *GRID, *flags)
    assert found.status in (1, 2) and told in found.err and 'Traceback' not in found.err


def test_a_run_of_so_many_flops_gets_the_updates_that_they_buy(run, stand_in, workdir):
    grid = [flag for flag in GRID if 'max_iters' not in flag]
    assert run('sweep.py', *grid, '--flops=1e8,2e8').status == 0
    tokens = {(row['n_embd'], row['flops']): int(row['tokens']) for row in rows()}
    assert tokens['16', '2e8'] == pytest.approx(2 * tokens['16', '1e8'], rel=0.02)
    assert tokens['48', '1e8'] < tokens['32', '1e8'] < tokens['16', '1e8']


# known, killed and resumed runs

def test_the_same_command_runs_nothing_again(run, stand_in):
    run('sweep.py', *GRID)
    before = rows()
    found = run('sweep.py', *GRID)
    assert '3 of 3 runs were finished before' in found.out and rows() == before
    assert all(len(lines) == 1 for lines in starts().values())


def test_a_larger_grid_keeps_the_runs_of_the_smaller(run, stand_in):
    run('sweep.py', *GRID)
    assert '3 of 4 runs were finished before' in run('sweep.py', *GRID, '--n_embd=16,32,48,64').out


@pytest.mark.parametrize('change', ['code', 'setting', 'data'])
def test_a_run_of_other_code_settings_or_data_is_another_run(run, stand_in, workdir, monkeypatch, change):
    run('sweep.py', *GRID)
    if change == 'code':
        monkeypatch.setattr(sweep, 'code_version', lambda: 'another')
    if change == 'data':
        (workdir / 'data/tiny/meta.json').write_text((workdir / 'data/tiny/meta.json').read_text() + ' ')
    found = run('sweep.py', *GRID, *['--beta2=0.9'] * (change == 'setting'))
    assert 'finished before' not in found.out and len(starts()) == 6


def test_where_a_log_goes_does_not_make_another_run(run, stand_in):
    run('sweep.py', *GRID)
    assert '3 of 3 runs were finished before' in run('sweep.py', *GRID, '--wandb_project=x', '--log_interval=7').out


SWEEP = ('import sys, runpy; from pathlib import Path; from lib.training import sweep; '
         'sweep.TRAIN = Path("stand_in.py").resolve(); runpy.run_path(sys.argv[1], run_name="__main__")')


@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends the runs with the sweep')
def test_after_kill_9_the_same_command_gives_the_same_table(run, stand_in, workdir):
    run('sweep.py', *GRID, '--out_dir=whole')
    process = python(SWEEP.replace('sys.argv[1]', repr(str(REPO / 'sweep.py'))), *GRID, env={'WAIT': '0.1'})
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in workdir.glob('out-sweep/n_embd=32*/log.jsonl')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)
    log = next(workdir.glob('out-sweep/n_embd=32*/log.jsonl'))
    size = log.stat().st_size
    time.sleep(0.4)
    assert log.stat().st_size == size  # the run ended with the sweep
    run('sweep.py', *GRID)
    assert rows() == rows('whole')
    begins = {name.partition('-')[0]: lines for name, lines in starts().items()}
    assert len(begins['n_embd=16']) == 1 and len(begins['n_embd=32']) == 2
    assert int(begins['n_embd=32'][1].split()[0]) > 0  # resumed, not begun again


@pytest.mark.skipif(len(getattr(os, 'sched_getaffinity', lambda _: [0])(0)) < 2, reason='needs two CPUs')
def test_two_jobs_use_half_of_the_cpus_each_and_give_the_same_rows(run, stand_in, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    run('sweep.py', *GRID, '--out_dir=one')
    monkeypatch.setenv('WAIT', '0.03')
    assert run('sweep.py', *GRID, '--jobs=2').status == 0
    assert rows() == rows('one')
    half = len(os.sched_getaffinity(0)) // 2
    found = [line.split(' ', 2)[1:] for lines in starts().values() for line in lines]
    assert {threads for threads, _ in found} == {str(half)} and len({cpus for _, cpus in found}) == 2
    assert all(len(json.loads(cpus)) in (half, len(os.sched_getaffinity(0))) for _, cpus in found)


def test_halving_stops_the_worse_half_after_a_third(run, stand_in, monkeypatch):
    monkeypatch.setenv('WAIT', '0.05')
    grid = [flag for flag in GRID if 'max_iters' not in flag]
    found = run('sweep.py', *grid, '--n_embd=16,32,48,64', '--max_iters=30', '--halving')
    by_width = {row['n_embd']: row['error'] for row in rows()}
    assert found.status == 0 and by_width['48'] == by_width['64'] == ''
    assert all('stopped by halving' in by_width[width] for width in ('16', '32'))
    stopped = [name for name, lines in starts().items() if len(lines) == 1]
    assert len(stopped) == 2  # the better half was continued, not begun again


# what is more than chance

def result(setting, seed, loss, error=''):
    return {'n_embd': setting, 'seed': seed, 'n_params': 1000, 'tokens': 5000, 'seconds': 1, 'val_loss': loss,
            'val_bpb': '', 'error': error}


def test_least_difference_is_students_t_with_pooled_variance():
    found = [result('a', s, x) for s, x in enumerate((1.0, 1.1, 1.2))] + [
        result('b', s, x) for s, x in enumerate((2.0, 2.1, 2.2))]
    least, freedom = sweep_results.least_difference(sweep_results.grouped(found))
    assert freedom == 4 and least == pytest.approx(2.776 * (2 * 0.01 / 3)**0.5)


@pytest.mark.parametrize('second, told', [(1.15, 'no setting is better'), (3.0, 'is better than all others')])
def test_the_verdict_follows_the_spread_over_seeds(second, told):
    found = [result('a', s, 1.0 + x) for s, x in enumerate((0.0, 0.1, 0.2))] + [
        result('b', s, second + x) for s, x in enumerate((0.0, 0.1, 0.2))]
    assert told in sweep_results.verdict(found)


def test_differences_of_equal_settings_are_rarely_called_more_than_chance():
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        found = [result(name, s, rng.normal()) for name in 'ab' for s in range(3)]
        wrong += 'better than all' in sweep_results.verdict(found)
    assert 0.02 < wrong / 400 < 0.09


def test_one_seed_gives_no_verdict():
    assert '--seeds=3' in sweep_results.verdict([result('a', 0, 1.0), result('b', 0, 2.0)])


# scaling laws

def synthetic(noise=0.0):
    truth = laws.Law(1.2, 20.0, 60.0, 0.35, 0.3, 0.0)
    points = [(c, n, c / 6 / n) for c in (1e12, 3e12, 1e13) for n in (2e4, 5e4, 1e5, 2e5, 5e5)]
    rng = np.random.default_rng(0)
    return truth, [(c, n, d, float(truth.loss(n, d)) * (1 + noise * rng.normal())) for c, n, d in points]


def fitted(points):
    c, n, d, loss = zip(*points)
    return laws.fit(n, d, loss, c)


def test_the_fit_recovers_known_constants():
    truth, points = synthetic()
    law = fitted(points)
    for name in ('E', 'A', 'B', 'a', 'b', 'flops_per'):
        assert getattr(law, name) == pytest.approx(getattr(truth, name), rel=0.02), name


def test_with_noise_the_fit_predicts_a_larger_run_within_three_percent():
    truth, points = synthetic(noise=0.003)
    n, d = 2e6, 1e8
    assert float(fitted(points).loss(n, d)) == pytest.approx(float(truth.loss(n, d)), rel=0.03)


def test_the_best_size_is_the_lowest_loss_along_equal_flops():
    truth, _ = synthetic()
    sizes = np.geomspace(1e4, 1e7, 2000)
    best = sizes[np.argmin(truth.loss(sizes, 1e13 / 6 / sizes))]
    n, d = truth.best_size(1e13)
    assert n == pytest.approx(best, rel=0.01) and 6 * n * d == pytest.approx(1e13)


def test_isoflop_minima_are_near_the_best_sizes():
    truth, points = synthetic()
    minima = laws.minima(points)
    assert len(minima) == 3
    for flops, n, _ in minima:
        assert n == pytest.approx(truth.best_size(flops)[0], rel=0.3)


def test_there_is_no_minimum_outside_the_sizes_tried():
    assert np.isnan(laws.minimum([1e4, 2e4, 4e4], [3.0, 2.0, 1.2])[0])


def test_too_few_runs_are_an_error_that_tells_how_many_it_takes():
    with pytest.raises(UserError, match='six runs'):
        laws.fit([1, 2, 3], [1, 2, 3], [1, 2, 3])


def test_the_law_is_printed_with_advice_and_drawn(tmp_path):
    _, points = synthetic()
    lines = laws.report(fitted(points), points, [1e14])
    assert any(line.startswith('1e+14 FLOPs') and 'parameters' in line for line in lines)
    assert sweep_plot.draw_law(fitted(points), points, tmp_path / 'law.png').stat().st_size > 10_000


def test_plot_py_draws_a_sweep(run, stand_in):
    run('sweep.py', *GRID)
    sweep.Path('out-sweep/sweep.png').unlink()
    assert 'wrote out-sweep/sweep.png' in run('plot.py', 'out-sweep').out
    assert sweep.Path('out-sweep/sweep.png').stat().st_size > 5_000


# with train.py itself

@pytest.mark.slow
def test_the_winner_is_that_of_runs_by_hand_and_two_jobs_find_the_same(run, workdir):
    flags = [*TINY, '--max_iters=30', '--learning_rate=0.1,0.01,0.0001']
    assert run('sweep.py', *flags).status == 0
    assert run('sweep.py', *flags, '--jobs=2', '--out_dir=two').status == 0
    by_hand = {}
    for rate in ('0.1', '0.01', '0.0001'):
        assert run('train.py', *TINY, '--max_iters=30', f'--learning_rate={rate}', '--out_dir=hand').status == 0
        log = [json.loads(line) for line in open('hand/log.jsonl', encoding='utf-8')]
        by_hand[rate] = next(record['whole_val_loss'] for record in log if 'whole_val_loss' in record)
    for folder in ('out-sweep', 'two'):
        found = {row['learning_rate']: float(row['val_loss']) for row in rows(folder)}
        assert found == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='only Linux ends the runs with the sweep')
def test_a_training_that_is_killed_with_the_sweep_is_resumed_to_the_same_loss(run, workdir):
    flags = [*TINY, '--max_iters=400', '--eval_interval=20', '--n_embd=16,32']
    run('sweep.py', *flags, '--out_dir=whole')
    process = python(f'import runpy; runpy.run_path({str(REPO / "sweep.py")!r}, run_name="__main__")', *flags)
    while not any(workdir.glob('out-sweep/n_embd=32*/last.pt')):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(0.5)
    run('sweep.py', *flags)
    assert [row['val_loss'] for row in rows()] == [row['val_loss'] for row in rows('whole')]


@pytest.mark.slow
def test_a_setting_that_train_py_refuses_is_a_row(run, workdir):
    assert run('sweep.py', *TINY, '--n_embd=16,17').status == 0
    good, bad = rows()
    assert good['error'] == '' and int(good['n_params']) > 1000 and 'n_embd=17' in bad['error']


def test_a_results_tsv_of_another_program_is_not_overwritten(tmp_path):
    import sweep as script
    (tmp_path / 'results.tsv').write_text('name\tscore\nmine\t5\n', encoding='utf-8')
    with pytest.raises(UserError, match='is not a results.tsv of sweep.py'):
        script.carry_out([], {'out_dir': str(tmp_path), 'halving': False, 'jobs': 1})
    assert (tmp_path / 'results.tsv').read_text(encoding='utf-8') == 'name\tscore\nmine\t5\n'
