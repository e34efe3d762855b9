"""lib/novelty.py: copied n-grams and spans are found where they were planted, and nowhere else."""
import time

import numpy as np
import pytest
from conftest import TINY

from lib import novelty
from lib.novelty import Hashes, TrainingText, copied_fraction, longest_copied, report


@pytest.fixture
def train():
    return np.random.default_rng(0).integers(0, 60, 20_000).astype(np.uint16)


def fresh(n, seed=1):
    """Random ids of which no long sequence is in `train`."""
    return np.random.default_rng(seed).integers(0, 60, n)


def test_two_windows_have_the_same_hash_exactly_if_they_are_equal(train):
    ids = train[:300] % 3
    for length in (1, 2, 7):
        hashes = Hashes(ids).of(length)
        windows = [tuple(ids[i:i + length]) for i in range(len(ids) - length + 1)]
        assert len(hashes) == len(windows)
        assert len(set(zip(windows, hashes.tolist()))) == len(set(windows)) == len(set(hashes.tolist()))


def test_a_window_longer_than_the_text_has_no_hash():
    assert len(Hashes([1, 2]).of(3)) == 0 and len(Hashes([]).of(1)) == 0


def test_a_text_from_the_training_text_is_copied_whole(train):
    text = train[500:900]
    assert copied_fraction([text], TrainingText(train), 20) == 1.0
    assert longest_copied([text], TrainingText(train)) == (400, 0, 0, 500)


def test_a_random_text_is_not_copied(train):
    assert copied_fraction([fresh(500)], TrainingText(train), 10) == 0.0
    assert longest_copied([fresh(500)], TrainingText(train))[0] < 6


def test_a_planted_span_is_found_with_its_two_places(train):
    planted = fresh(500, 2)
    planted[123:223] = train[4567:4667]
    planted[122], planted[223] = (train[4566] + 1) % 60, (train[4667] + 1) % 60  # not one token longer
    assert longest_copied([fresh(500), planted], TrainingText(train)) == (100, 1, 123, 4567)


def test_the_fraction_counts_n_grams(train):
    half = np.concatenate([train[:105], fresh(100)])  # 96 of the 196 10-grams begin and end within the copied part
    assert copied_fraction([half], TrainingText(train), 10) == pytest.approx(96 / 196, abs=0.006)


@pytest.mark.parametrize('at', [900, 1100, 2040, 3950])
def test_spans_across_the_borders_of_chunks_are_found(train, monkeypatch, at):
    monkeypatch.setattr(novelty, '_CHUNK', 1000)
    assert longest_copied([train[at:at + 500]], TrainingText(train[:5000])) == (500, 0, 0, at)


def test_the_end_of_the_training_text_is_compared_with(train, monkeypatch):
    for n in (1999, 2000, 2001, 3000, 3001, 4999, 5000):
        monkeypatch.setattr(novelty, '_CHUNK', 1000)
        assert longest_copied([train[n - 50:n]], TrainingText(train[:n]))[0] == 50


def test_no_texts_or_short_ones_have_no_n_grams(train):
    for texts in ([], [[1]]):
        assert np.isnan(copied_fraction(texts, TrainingText(train), 5))
    assert longest_copied([], TrainingText(train)) == (0, 0, 0, 0)


def test_the_report_puts_samples_beside_real_text_and_shows_the_longest_span(train):
    lines = report([fresh(300), train[1000:1300]], [fresh(300, 5), fresh(300, 6)], train, lambda ids: f'{len(ids)} ids')
    assert '   50.0%       0.0%' in lines[2]
    assert 'longest span: sample 2 from token 0, training text from token 1,000:' in lines and "  '300 ids'" in lines


def test_a_megabyte_takes_seconds():
    ids = np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint16)
    began = time.process_time()
    report([ids[i:i + 500] for i in range(0, 10_000, 500)], [fresh(500, i) for i in range(20)], ids, str)
    assert time.process_time() - began < 5


def test_evaluate_compares_samples_and_held_out_text_with_the_training_text(run, workdir):
    assert run('train.py', *TINY, '--max_iters=1').status == 0
    done = run('evaluate.py', '--device=cpu', '--dtype=float32', '--samples=3')
    assert done.status == 0, done.err
    lines = done.out.splitlines()
    assert lines[-2].startswith('longest span: sample ')
    assert [line.split()[-1] for line in lines if 'sequences of' in line] == ['100.0%'] * 3  # val is a part of train
    assert [line.split()[-1] for line in lines if 'longest span, in tokens' in line] == ['400']  # the whole of it


def test_samples_do_not_go_with_a_text_or_a_task(run, workdir):
    done = run('evaluate.py', '--samples=3', '--task=lambada')
    assert done.status == 2 and 'samples are compared with a dataset' in done.err
