"""plot.py: what the picture shows, and logs that are short, empty or broken off."""
import json
import sys
import warnings

import pytest

pytest.importorskip('matplotlib')
from matplotlib import font_manager, image  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import plot  # noqa: E402

FALL, RISE = [4.0, 3.0, 2.5, 2.4], [4.0, 3.0, 3.2, 3.5]


def write_run(folder, val, train=FALL, bits=1.44, per_eval=5, whole=None):
    """Write a log.jsonl with an evaluation for each loss and some updates between; returns the folder.

    whole: the loss over the whole validation split, which the last evaluation of a finished run has.
    """
    folder.mkdir()
    records = []
    for i, (a, b) in enumerate(zip(train, val)):
        step = i * per_eval
        records.append({'step': step, 'train_loss': a, 'val_loss': b, 'val_bpb': b * bits, 'train_bpb': a * bits,
                        'tokens': step * 32, 'minutes': step / 10})
        records += [{'iter': step + j, 'loss': a, 'lr': 1e-3, 'grad_norm': 1.0, 'tok_s': 5000.0, 'mfu': None,
                     'tokens': (step + j + 1) * 32, 'minutes': (step + j + 1) / 10} for j in range(per_eval)]
    if whole:
        next(r for r in reversed(records) if 'step' in r).update(whole_val_loss=whole)
    (folder / 'log.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records), encoding='utf-8')
    return folder


def loss_axes(runs, axis='iterations'):
    ax = Figure().subplots()
    plot.draw_loss(ax, runs, axis)
    return ax


def labels(ax):
    return ' '.join(ax.get_legend_handles_labels()[1])


def size(path):
    height, width, _ = image.imread(path).shape
    return width, height


def test_a_run_becomes_a_picture_in_its_folder(run, tmp_path):
    write_run(tmp_path / 'out-a', FALL)
    assert run('plot.py', tmp_path / 'out-a').status == 0
    assert size(tmp_path / 'out-a' / 'loss.png') == (1000, 700)


def test_several_runs_become_compare_png_in_the_working_directory(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a', FALL), write_run(tmp_path / 'b', RISE)
    done = run('plot.py', 'a', 'b')
    assert 'wrote compare.png' in done.out and (tmp_path / 'compare.png').exists()


def test_of_several_folders_those_without_a_log_are_a_warning_each_and_the_rest_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / 'a', FALL)
    for name in 'bc':
        (tmp_path / name).mkdir()
    (tmp_path / 'b' / '.lock').touch(), (tmp_path / 'c' / 'log.jsonl').touch()
    done = run('plot.py', 'a', 'b', 'c')
    assert done.status == 0 and 'wrote compare.png' in done.out and 'c: no evaluation in the log yet' in done.out
    assert done.err.startswith('warning: left out: b/log.jsonl') and len(done.err.splitlines()) == 1


def test_several_folders_without_any_log_are_one_error_that_names_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run('plot.py', 'a', 'b')
    assert done.status == 1 and len(done.err.splitlines()) == 1 and {'a/log.jsonl:', 'b/log.jsonl:'} <= set(
        done.err.split())


@pytest.mark.parametrize('axis', plot.AXES)
def test_every_axis_can_be_drawn(run, tmp_path, axis):
    write_run(tmp_path / 'a', FALL)
    assert run('plot.py', tmp_path / 'a', f'--axis={axis}', f'--output={tmp_path}/x.png').status == 0


def test_an_unknown_axis_is_refused_with_the_choices(run, tmp_path):
    done = run('plot.py', tmp_path, '--axis=epochs')
    assert done.status == 2 and 'iterations, tokens, minutes' in done.last_error


@pytest.mark.parametrize('text', [
    '', '{"step": 0, "train_loss": 4.0, "val_loss"', '\x00\x00\n',
    ''.join(json.dumps({'iter': i, 'loss': 4.0 - i, 'lr': 0.1, 'grad_norm': None}) + '\n' for i in range(3)),
    '{"step": 0, "train_loss": null, "val_loss": null, "val_bpb": null}\n',
    '{"step": 0, "train_loss": 4.0, "val_loss": 4.0}\n{"iter": 0, "loss": 4.0}\n[1]\n3\n{"iter": 1, "lo'],
    ids=['empty', 'one broken line', 'zeros', 'three updates', 'not numbers', 'broken last line'])
def test_a_log_of_little_or_nothing_is_still_a_picture(run, tmp_path, text):
    (tmp_path / 'log.jsonl').write_text(text, encoding='utf-8')
    done = run('plot.py', tmp_path)
    assert done.status == 0 and size(tmp_path / 'loss.png') == (1000, 700), done.err


def test_three_evaluations_without_updates_are_drawn(run, tmp_path):
    (tmp_path / 'log.jsonl').write_text(''.join(
        json.dumps({'step': i, 'train_loss': 3.0 - i, 'val_loss': 3.0 - i}) + '\n' for i in range(3)), encoding='utf-8')
    assert 'best val loss 1.0000 at iter 2' in run('plot.py', tmp_path).out


def test_a_folder_without_a_log_is_an_error_that_names_it(run, tmp_path):
    done = run('plot.py', tmp_path / 'nothing')
    assert done.status == 1 and 'nothing/log.jsonl' in done.last_error


def test_without_matplotlib_the_terminal_still_gets_its_lines(run, tmp_path, monkeypatch):
    write_run(tmp_path / 'a', FALL)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('plot.py', tmp_path / 'a')
    assert 'best val loss 2.4000' in done.out and 'pip install matplotlib' in done.last_error


def test_the_best_point_is_marked_where_validation_loss_is_lowest(tmp_path):
    ax = loss_axes([plot.read_run(write_run(tmp_path / 'a', RISE))])
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() == 'o'] == [(5, 3.0)]


def test_overfitting_is_shaded_from_the_best_point_on(tmp_path):
    ax = loss_axes([plot.read_run(write_run(tmp_path / 'a', RISE))])
    assert [(p.get_x(), p.get_x() + p.get_width()) for p in ax.patches] == [(5, 15)]


def test_a_run_that_still_improves_is_not_shaded(tmp_path):
    assert not loss_axes([plot.read_run(write_run(tmp_path / 'a', FALL))]).patches


def test_a_rise_within_the_noise_is_not_overfitting(tmp_path):
    run = plot.read_run(write_run(tmp_path / 'a', [4.0, 3.0, 2.5, 2.51]))
    assert plot.best(run)['step'] == 10 and not plot.overfitted(run)


def test_a_rise_with_training_loss_rising_too_is_not_overfitting(tmp_path):
    assert not plot.overfitted(plot.read_run(write_run(tmp_path / 'a', RISE, train=RISE)))


def test_runs_with_unlike_tokenizers_are_compared_in_bits_per_byte(tmp_path):
    runs = [plot.read_run(write_run(tmp_path / 'chars', FALL)),
            plot.read_run(write_run(tmp_path / 'words', FALL, bits=0.4))]
    ax = loss_axes(runs)
    assert 'bits per byte' in ax.get_title(loc='left') + ax.get_title() and ax.lines[-1].get_ydata()[0] == 2.4 * 0.4


def test_runs_with_one_tokenizer_are_compared_in_nats(tmp_path):
    assert not plot.in_bits([plot.read_run(write_run(tmp_path / name, FALL)) for name in 'ab'])


def test_runs_that_know_no_bytes_are_compared_in_nats(tmp_path):
    runs = [plot.read_run(write_run(tmp_path / 'a', FALL)), plot.read_run(write_run(tmp_path / 'b', FALL, bits=0))]
    assert not plot.in_bits(runs)


@pytest.mark.parametrize('n', [2, 3, 10])
def test_a_short_run_is_on_the_picture_from_its_first_evaluation_on(tmp_path, n):
    losses = [2.0 + 2.2 * 0.7 ** i for i in range(n)]
    train = [0.95 * loss for loss in losses]
    low, high = loss_axes([plot.read_run(write_run(tmp_path / 'a', losses, train=train))]).get_ylim()
    assert low < train[-1] < losses[0] < high


def test_the_plunge_of_a_long_run_leaves_through_the_top_so_that_the_rest_can_be_read(tmp_path):
    losses = [11.0, *(3 - 0.006 * i for i in range(100))]
    ax = loss_axes([plot.read_run(write_run(tmp_path / 'a', losses, train=losses))])
    assert 3 < ax.get_ylim()[1] < 4


def test_a_rise_after_the_beginning_stays_on_the_picture(tmp_path):
    losses = [11.0, *(2 + 0.05 * i for i in range(100))]
    ax = loss_axes([plot.read_run(write_run(tmp_path / 'a', losses, train=losses))])
    assert ax.get_ylim()[1] > losses[-1]


def test_the_whole_split_is_told_apart_from_the_best_of_the_fixed_windows(tmp_path):
    run = plot.read_run(write_run(tmp_path / 'a', FALL, whole=2.45))
    assert labels(loss_axes([run])).endswith('best val 2.4000 at 15, fixed windows last model 2.4500, whole val split')
    assert 'best 2.4000 at 15; whole split 2.4500' in labels(loss_axes([run, run]))
    assert 'best val loss 2.4000 at iter 15; last model, whole split: 2.4500\n' in plot.summary(run)


def test_the_whole_split_is_in_bits_where_the_curves_are(tmp_path):
    runs = [plot.read_run(write_run(tmp_path / name, FALL, bits=bits, whole=2.5)) for name, bits in
            (('chars', 1.44), ('words', 0.4))]
    assert 'best 0.9600 at 15; whole split 1.0000' in labels(loss_axes(runs))


def test_a_run_that_has_not_ended_has_no_whole_split(tmp_path):
    run = plot.read_run(write_run(tmp_path / 'a', FALL))
    assert 'whole' not in labels(loss_axes([run])) + plot.summary(run)


def test_a_name_that_no_font_can_write_is_one_line_and_still_a_picture(run, tmp_path, monkeypatch):
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [])
    warnings.simplefilter('error')  # matplotlib's would be one a letter
    write_run(tmp_path / '三字经', FALL)
    done = run('plot.py', tmp_path / '三字经')
    assert sum('fonts-noto-cjk' in line for line in done.out.splitlines()) == 1 and done.err == ''
    assert (tmp_path / '三字经' / 'loss.png').exists()


def test_a_font_that_has_the_letters_is_found(monkeypatch):
    stix = next(f.fname for f in font_manager.fontManager.ttflist if f.name == 'STIXGeneral' and f.style == 'normal'
                and f.weight in (400, 'normal', 'regular'))
    broken = __file__  # no font at all
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: [broken, stix])
    assert plot.font_for('⫏') == 'STIXGeneral' and plot.font_for('abc') == ''


def test_smoothing_does_not_lag_behind_a_straight_line():
    line = [float(i) for i in range(200)]
    assert plot.smooth(line, share=0.05) == pytest.approx(line)


@pytest.mark.parametrize('values, width, bars', [
    ([], 10, ''), ([3.0], 10, '▁'), ([1.0, 2.0, 3.0], 10, '▁▅█'), ([2.0, 2.0], 10, '▁▁'),
    ([1.0, 1.0, 8.0, 8.0], 2, '▁█')])
def test_a_sparkline_spans_low_to_high_in_the_width(values, width, bars):
    assert plot.sparkline(values, width) == bars


@pytest.mark.parametrize('losses, bars', [([4.0, 3.0], '4.0000 █▁ 3.0000'), ([4.0, 3.0, 2.8], '4.0000 █▂▁ 2.8000')])
def test_a_run_of_few_evaluations_goes_down_in_the_terminal_as_it_did(tmp_path, losses, bars):
    assert plot.summary(plot.read_run(write_run(tmp_path / 'a', losses))).splitlines()[1].strip() == bars


@pytest.mark.parametrize('number, text', [(0, '0'), (500, '500'), (1000, '1k'), (2.5e6, '2.5M'), (0.006, '0.006')])
def test_axis_numbers_are_short(number, text):
    assert plot.short_ticks(number) == text
