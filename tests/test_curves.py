"""lib/training/curves.py and plot.py: best and overfitting, the picture and its numbers, short and broken logs."""
import json
import sys
import warnings

import pytest

pytest.importorskip('matplotlib')
from conftest import TINY  # noqa: E402
from matplotlib import font_manager, image  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import plot  # noqa: E402
from lib.training import curves  # noqa: E402

pytestmark = pytest.mark.pictures
FALL, RISE = [4.0, 3.0, 2.5, 2.4], [4.0, 3.0, 3.2, 3.5]


def write_run(folder, val, train=FALL, bits=1.44, per_eval=5, whole=None, data=None):
    """Write a log.jsonl with an evaluation for each loss and some updates between; returns the folder.

    whole: the loss over the whole validation split, which the last evaluation of a finished run has. data: the hash of
    the validation split.
    """
    folder.mkdir()
    records = []
    for i, (a, b) in enumerate(zip(train, val)):
        step = i * per_eval
        records.append({'step': step, 'train_loss': a, 'val_loss': b, 'val_bpb': b * bits, 'train_bpb': a * bits,
                        'tokens': step * 32, 'minutes': step / 10, **({'val_data': data} if data else {})})
        records += [{'iter': step + j, 'loss': a, 'lr': 1e-3, 'grad_norm': 1.0, 'tok_s': 5000.0, 'mfu': None,
                     'tokens': (step + j + 1) * 32, 'minutes': (step + j + 1) / 10} for j in range(per_eval)]
    if whole:
        next(r for r in reversed(records) if 'step' in r).update(whole_val_loss=whole)
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    return folder


def loss_axes(runs, axis='iterations'):
    ax = Figure().subplots()
    curves.draw_losses(ax, runs, axis)
    return ax


def labels(ax):
    return ' '.join(ax.get_legend_handles_labels()[1])


def size(path):
    height, width, _ = image.imread(path).shape
    return width, height


def history(*losses):
    """[step, training loss, validation loss] of evaluations every 10 updates from pairs of losses."""
    return [[10 * i, train, val] for i, (train, val) in enumerate(losses)]


# best and overfitting, on hand-made histories

BEST_THEN_WORSE = history((4, 4), (3, 3), (2, 3.1), (1, 3.2))


@pytest.mark.parametrize('n, since', [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)])
def test_patience_counts_the_evaluations_after_the_best_one(n, since):
    assert curves.evaluations_since_best(BEST_THEN_WORSE[:n]) == since


@pytest.mark.parametrize('n, step', [(0, 0), (1, 0), (2, 10), (4, 10)])
def test_the_best_step_has_the_lowest_validation_loss(n, step):
    assert curves.best_step(BEST_THEN_WORSE[:n]) == step


def test_of_equal_losses_the_first_is_the_best():
    assert curves.best_step(history((4, 3), (3, 2), (2, 2))) == 10


@pytest.mark.parametrize('losses, expected', [
    ([(3, 3)], False), ([(3, 3), (2, 2)], False),
    ([(3, 2), (2.9, 2.03)], True),  # 1.5 % above the best
    ([(3, 2), (2.9, 2.01)], False),  # 0.5 %: noise
    ([(3, 2), (3.0, 2.1)], False),  # the training loss did not fall
    ([(3, 2), (3.1, 2.1)], False),
    ([(3, 2), (2, 2.5), (1, 1.9)], False)])  # a new best
def test_overfitting_is_a_worse_validation_loss_with_a_better_training_loss(losses, expected):
    assert curves.overfitting(history(*losses)) is expected


def test_overfitting_starts_once_after_each_best():
    losses = history((4, 4), (3, 3), (2, 3.1), (1.9, 3.0), (1.8, 3.1), (1.7, 2.9), (1.6, 3.0), (1.5, 3.1))
    assert [curves.overfitting_starts(losses[:n + 1]) for n in range(8)] == [
        False, False, True, False, False, False, True, False]


@pytest.mark.parametrize('patience, steps', [(1, [0, 2, 3]), (2, [0, 2, 4, 5])])
def test_patience_ends_training_at_the_update_after_that_many_evaluations(run, workdir, monkeypatch, patience, steps):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('train.py', *TINY, '--eval_interval=2', '--learning_rate=0', '--max_iters=9', f'--patience={patience}')
    assert [int(line.split(':')[0][5:]) for line in done.out.splitlines() if line.startswith('step ')] == steps


# the command

@pytest.mark.parametrize('flag', ['', '--out_dir='])
def test_a_run_becomes_a_picture_in_its_folder(run, tmp_path, flag):
    write_run(tmp_path / 'out-a', FALL)
    assert run('plot.py', f'{flag}{tmp_path}/out-a').status == 0
    assert size(tmp_path / 'out-a' / 'loss.png') == (1000, 700)


def test_several_runs_become_compare_png_in_the_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a', FALL), write_run(tmp_path / 'b', RISE)
    done = run('plot.py', 'a', 'b')
    assert 'wrote compare.png' in done.out and (tmp_path / 'compare.png').exists()


def test_folders_without_a_log_are_left_out_with_a_warning(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a', FALL)
    for name in 'bc':
        (tmp_path / name).mkdir()
    (tmp_path / 'b' / '.lock').touch(), (tmp_path / 'c' / 'log.jsonl').touch()
    done = run('plot.py', 'a', 'b', 'c')
    assert done.status == 0 and 'wrote compare.png' in done.out and 'c: no evaluation in the log yet' in done.out
    assert done.err.startswith('warning: left out: b/log.jsonl') and len(done.err.splitlines()) == 1


def test_several_folders_without_any_log_are_one_error_that_names_all(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run('plot.py', 'a', 'b')
    assert done.status == 1 and len(done.err.splitlines()) == 1 and {'a/log.jsonl:', 'b/log.jsonl:'} <= set(
        done.err.split())


@pytest.mark.parametrize('axis, last', [('iterations', 15), ('tokens', 15 * 32), ('minutes', 1.5)])
def test_the_axis_is_iterations_tokens_or_minutes(tmp_path, axis, last):
    ax = loss_axes([curves.read_run(write_run(tmp_path / 'a', FALL))], axis)
    assert ax.get_xlabel() == axis
    assert [line.get_xdata()[-1] for line in ax.lines if line.get_label() == 'val'] == [last]


def test_an_axis_and_a_file_can_be_chosen(run, tmp_path):
    write_run(tmp_path / 'a', FALL)
    assert run('plot.py', tmp_path / 'a', '--axis=minutes', f'--output={tmp_path}/x.png').status == 0
    assert size(tmp_path / 'x.png') == (1000, 700)


def test_an_unknown_axis_is_refused_with_the_choices(run, tmp_path):
    done = run('plot.py', tmp_path, '--axis=epochs')
    assert done.status == 2 and 'iterations, tokens, minutes' in done.last_error


def test_three_evaluations_without_updates_are_drawn(run, tmp_path):
    (tmp_path / 'log.jsonl').write_text(''.join(
        json.dumps({'step': i, 'train_loss': 3.0 - i, 'val_loss': 3.0 - i}) + '\n' for i in range(3)), encoding='utf-8')
    assert 'best val loss 1.0000 at iter 2' in run('plot.py', tmp_path).out


# the picture

def test_the_best_point_is_marked_at_the_lowest_validation_loss(tmp_path):
    ax = loss_axes([curves.read_run(write_run(tmp_path / 'a', RISE))])
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == 'o'] == [(5, 3.0)]


def test_overfitting_is_shaded_from_the_best_point_on(tmp_path):
    ax = loss_axes([curves.read_run(write_run(tmp_path / 'a', RISE))])
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] == [(5, 15)]


def test_a_run_that_still_improves_is_not_shaded(tmp_path):
    assert not loss_axes([curves.read_run(write_run(tmp_path / 'a', FALL))]).patches


def test_plot_and_train_use_one_definition_of_overfitting(tmp_path):
    run = curves.read_run(write_run(tmp_path / 'a', RISE))
    assert curves.history_of(run) == [[0, 4.0, 4.0], [5, 3.0, 3.0], [10, 2.5, 3.2], [15, 2.4, 3.5]]
    assert curves.overfitting(curves.history_of(run)) and 'overfitting since, now 3.5000' in plot.summary(run)


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / 'chars', FALL)),
            curves.read_run(write_run(tmp_path / 'words', FALL, bits=0.4))]
    ax = loss_axes(runs)
    assert 'bits per byte' in ax.get_title(loc='left') + ax.get_title() and ax.lines[-1].get_ydata()[0] == 2.4 * 0.4


def test_runs_with_one_tokenizer_are_compared_in_nats(tmp_path):
    assert not curves.use_bits([curves.read_run(write_run(tmp_path / name, FALL)) for name in 'ab'])


def test_an_interrupted_run_names_the_updates_that_no_evaluation_has_seen(tmp_path):
    run = curves.read_run(write_run(tmp_path / 'a', [4.2]))  # Ctrl-C came before the second evaluation
    assert plot.summary(run).startswith(
        'a: best val loss 4.2000 at iter 0; the updates up to iter 4 are not evaluated yet\n')


def test_runs_with_an_unknown_number_of_bytes_are_compared_in_nats(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / 'a', FALL)), curves.read_run(write_run(tmp_path / 'b', FALL, bits=0))]
    assert not curves.use_bits(runs)


@pytest.mark.parametrize('n', [2, 3, 10])
def test_a_short_run_is_on_the_picture_from_its_first_evaluation_on(tmp_path, n):
    losses = [2.0 + 2.2 * 0.7 ** i for i in range(n)]
    train = [0.95 * loss for loss in losses]
    low, high = loss_axes([curves.read_run(write_run(tmp_path / 'a', losses, train=train))]).get_ylim()
    assert low < train[-1] < losses[0] < high


def test_the_steep_drop_at_the_beginning_of_a_long_run_is_clipped(tmp_path):
    losses = [11.0, *(3 - 0.006 * i for i in range(100))]
    ax = loss_axes([curves.read_run(write_run(tmp_path / 'a', losses, train=losses))])
    assert 3 < ax.get_ylim()[1] < 4


def test_a_rise_after_the_beginning_stays_on_the_picture(tmp_path):
    losses = [11.0, *(2 + 0.05 * i for i in range(100))]
    ax = loss_axes([curves.read_run(write_run(tmp_path / 'a', losses, train=losses))])
    assert ax.get_ylim()[1] > losses[-1]


def test_the_whole_split_and_the_best_of_the_fixed_windows_have_different_labels(tmp_path):
    run = curves.read_run(write_run(tmp_path / 'a', FALL, whole=2.45))
    assert labels(loss_axes([run])).endswith('best val 2.4000 at 15, fixed windows last model 2.4500, whole val split')
    assert 'best 2.4000 at 15; whole split 2.4500' in labels(loss_axes([run, run]))
    assert 'best val loss 2.4000 at iter 15; last model, whole split: 2.4500\n' in plot.summary(run)


def test_the_pale_curve_is_called_what_it_is_as_only_every_nth_update_is_logged(tmp_path):
    assert 'train, logged updates' in labels(loss_axes([curves.read_run(write_run(tmp_path / 'a', FALL))]))


def test_the_whole_split_is_in_bits_where_the_curves_are(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / name, FALL, bits=bits, whole=2.5)) for name, bits in
            (('chars', 1.44), ('words', 0.4))]
    assert 'best 0.9600 at 15; whole split 1.0000' in labels(loss_axes(runs))


def test_a_run_that_has_not_ended_has_no_whole_split(tmp_path):
    run = curves.read_run(write_run(tmp_path / 'a', FALL))
    assert 'whole' not in labels(loss_axes([run])) + plot.summary(run)


def test_a_font_that_has_the_letters_is_found(monkeypatch):
    stix = next(f.fname for f in font_manager.fontManager.ttflist if f.name == 'STIXGeneral' and f.style == 'normal'
                and f.weight in (400, 'normal', 'regular'))
    broken = __file__  # no font at all
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [broken, stix])
    assert curves.font_for('⫏') == 'STIXGeneral' and curves.font_for('abc') == ''


def test_smoothing_does_not_lag_behind_a_straight_line():
    line = [float(i) for i in range(200)]
    assert curves.smooth(line, fraction=0.05) == pytest.approx(line)


@pytest.mark.parametrize('values, width, bars', [
    ([], 10, ''), ([3.0], 10, '▁'), ([1.0, 2.0, 3.0], 10, '▁▅█'), ([2.0, 2.0], 10, '▁▁'),
    ([1.0, 1.0, 8.0, 8.0], 2, '▁█')])
def test_a_sparkline_spans_low_to_high_in_the_width(values, width, bars):
    assert plot.sparkline(values, width) == bars


@pytest.mark.parametrize('losses, bars', [([4.0, 3.0], '4.0000 █▁ 3.0000'), ([4.0, 3.0, 2.8], '4.0000 █▂▁ 2.8000')])
def test_a_run_of_few_evaluations_goes_down_in_the_terminal_as_it_did(tmp_path, losses, bars):
    assert plot.summary(curves.read_run(write_run(tmp_path / 'a', losses))).splitlines()[1].strip() == bars


def test_the_dot_of_the_best_is_above_the_diamond_and_fits_inside_it(tmp_path):
    lines = loss_axes([curves.read_run(write_run(tmp_path / 'a', FALL, whole=2.4))]).lines
    dot, diamond = (next(line for line in lines if line.get_marker() == marker) for marker in 'oD')
    assert dot.get_zorder() > diamond.get_zorder() and dot.get_markersize() < diamond.get_markersize() - 2


def test_runs_on_different_validation_data_in_nats_are_noted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a', FALL, data='1234'), write_run(tmp_path / 'b', FALL, data='5678')
    lines = [line for line in run('plot.py', 'a', 'b').out.splitlines() if line.startswith('note: ')]
    assert len(lines) == 1 and lines[0].startswith('note: a, b were evaluated on different validation data')


def test_runs_on_different_validation_data_in_bits_are_noted_since_their_texts_may_differ(tmp_path):
    runs = [curves.read_run(write_run(tmp_path / 'a', FALL, data='1234')),
            curves.read_run(write_run(tmp_path / 'b', FALL, data='5678', bits=0.4))]
    note = curves.comparison_note(runs)
    assert 'a, b' in note and 'bits per byte' in note and 'only if their validation texts are the same' in note


@pytest.mark.parametrize('bits, data', [(1.44, '1234'), (1.44, None), (0.4, None)],
                         ids=['same data', 'an old log', 'an old log in bits'])
def test_runs_that_can_be_compared_are_not_noted(tmp_path, bits, data):
    runs = [curves.read_run(write_run(tmp_path / 'a', FALL, data='1234')),
            curves.read_run(write_run(tmp_path / 'b', FALL, data=data, bits=bits))]
    assert curves.comparison_note(runs) == ''


def test_a_finished_run_leaves_a_picture_and_names_it(run, workdir):
    assert 'loss curves are in out/loss.png' in run('train.py', *TINY, '--max_iters=1').out
    assert size(workdir / 'out/loss.png') == (1000, 700)


# Faults

def test_a_folder_without_a_log_is_an_error_that_names_it(run, tmp_path):
    done = run('plot.py', tmp_path / 'nothing')
    assert done.status == 1 and 'nothing/log.jsonl' in done.last_error


def test_without_matplotlib_the_terminal_still_gets_its_lines(run, tmp_path, monkeypatch):
    write_run(tmp_path / 'a', FALL)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('plot.py', tmp_path / 'a')
    assert 'best val loss 2.4000' in done.out and 'pip install matplotlib' in done.last_error


@pytest.mark.parametrize('text', [
    '', '{"step": 0, "train_loss": 4.0, "val_loss"', '\x00\x00\n',
    ''.join(json.dumps({'iter': i, 'loss': 4.0 - i, 'lr': 0.1, 'grad_norm': None}) + '\n' for i in range(3)),
    '{"step": 0, "train_loss": null, "val_loss": null, "val_bpb": null}\n',
    '{"step": 0, "train_loss": 4.0, "val_loss": 4.0}\n{"iter": 0, "loss": 4.0}\n[1]\n3\n{"iter": 1, "lo'],
    ids=['empty', 'one broken line', 'zeros', 'three updates', 'not numbers', 'broken last line'])
def test_a_log_of_little_or_nothing_can_be_summarised_and_drawn(tmp_path, text):
    (tmp_path / 'log.jsonl').write_text(text, encoding='utf-8')
    found = curves.read_run(tmp_path)
    assert plot.summary(found).startswith(f'{tmp_path.name}: ')
    curves.draw_small(Figure().subplots(), [found], 'iterations', 'grad_norm', '')
    empty = not found.updates and not found.evals
    assert [text.get_text() for text in loss_axes([found]).texts] == ['nothing logged yet'] * empty


def test_a_name_that_no_font_can_write_is_one_line_and_still_a_picture(run, tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [])
    warnings.simplefilter('error')  # matplotlib's would be one a letter
    write_run(tmp_path / '三字经', FALL)
    done = run('plot.py', tmp_path / '三字经')
    assert sum('fonts-noto-cjk' in line for line in done.out.splitlines()) == 1 and done.err == ''
    assert (tmp_path / '三字经' / 'loss.png').exists()


def test_without_matplotlib_training_ends_without_a_warning(run, workdir, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('train.py', *TINY, '--max_iters=1')
    assert done.status == 0 and done.err == '' and not (workdir / 'out/loss.png').exists()


def test_a_drawing_that_fails_is_one_warning(run, workdir, monkeypatch):
    def fail(*_):
        raise ValueError('no such font')
    monkeypatch.setattr(curves, 'draw', fail)
    done = run('train.py', *TINY, '--max_iters=1')
    assert done.status == 0 and done.err == 'warning: no loss.png (ValueError: no such font)\n'
