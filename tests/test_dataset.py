"""lib/text/dataset.py: the tokens in a batch are a pure function of the seed and the sample's number."""
import math
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, write_dataset
from kit import Ranks, load

from configurator import UserError
from lib.text import data_folder, dataset
from lib.text.dataset import (
    Dialogues,
    Split,
    eval_starts,
    next_windows,
    open_dataset,
    sliding_windows,
    split_batches,
    train_starts,
)


def starts(seed=1, n_tokens=1000, block_size=8, first=0, count=100):
    return train_starts(seed, n_tokens, block_size, first, count)


def as_split(ids, n_bytes=0, vocab_size=2**16):
    return Split(Path('some.bin'), np.asarray(ids, dtype='<u4'), n_bytes, '', vocab_size)


# Training samples

def test_samples_do_not_depend_on_how_they_are_grouped():
    whole = starts(count=300)
    parts = [starts(first=first, count=count) for first, count in ((0, 7), (7, 200), (207, 93))]
    assert (np.concatenate(parts) == whole).all()


RECORD_WINDOWS = """
import torch
from lib.text import dataset
real_starts, real_batch, training = dataset.train_starts, dataset.Split.batch, []
def train_starts(*args):
    training.append(1)  # before the first update, a trial reads other batches
    return real_starts(*args)
def batch(self, starts, block_size):
    if training and torch.is_grad_enabled():  # not in an evaluation
        with open(f'windows-{rank}', 'a', encoding='utf-8') as file:
            print(*starts, file=file)
    return real_batch(self, starts, block_size)
dataset.train_starts, dataset.Split.batch = train_starts, batch
"""


def test_two_ranks_read_the_samples_of_one_process_in_every_update(run, workdir, monkeypatch):
    flags = [*TINY, '--max_iters=3', '--gradient_accumulation_steps=4', '--compile=False', '--out_dir=two']
    ended = Ranks(2, 'train.py', *flags, '--backend=gloo', cwd=workdir, hook=RECORD_WINDOWS).wait()
    assert [status for status, _, _ in ended] == [0, 0], ended
    lines = [Path(f'windows-{rank}').read_text(encoding='utf-8').splitlines() for rank in (0, 1)]
    assert [len(of_rank) for of_rank in lines] == [6, 6]  # 3 updates of 2 micro-batches each
    for update in range(3):
        read = ' '.join(lines[0][2 * update:2 * update + 2] + lines[1][2 * update:2 * update + 2]).split()
        assert sorted(map(int, read)) == sorted(starts(seed=1337, n_tokens=2000, first=16 * update, count=16))


@pytest.mark.parametrize('n_tokens', [9, 10, 17, 25, 26, 49, 145, 999, 1000, 1001])
def test_an_epoch_reads_every_window_once_and_stays_inside(n_tokens):
    n_windows = max(1, (n_tokens - 1) // 8 - 1)
    for epoch in range(5):
        read = starts(n_tokens=n_tokens, first=epoch * n_windows, count=n_windows)
        assert len(set(read)) == n_windows and len(set(read % 8)) == 1
        assert read.min() >= 0 and read.max() + 8 + 1 <= n_tokens


def test_epochs_differ_in_order_and_offset():
    epochs = [starts(first=e * 123, count=123) for e in range(20)]
    assert len({e[0] % 8 for e in epochs}) > 3
    assert not any((a == b).all() for a, b in zip(epochs, epochs[1:]))


def test_every_token_is_a_target_within_a_few_epochs():
    seen = np.zeros(1000, bool)
    for start in starts(count=40 * 123):
        seen[start + 1:start + 9] = True
    assert seen[8:-8].all()


def test_another_seed_reads_other_samples():
    assert (starts(seed=1) != starts(seed=2)).any()


def test_a_shuffled_order_is_not_a_simple_stride():
    order = starts(n_tokens=8 * 4097, count=4095) // 8
    assert len(set(np.diff(order))) > 2000 and abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_the_order_is_the_same_in_every_version():
    """A run that is resumed with a later version of the program must not read other samples."""
    mixed = dataset._splitmix64(np.array([0x9e3779b97f4a7c15], dtype=np.uint64))
    assert mixed.tolist() == [0xe220a8397b1dcdaf]  # the first number of splitmix64 with seed 0, as published
    assert starts(count=8).tolist() == [41, 313, 785, 297, 441, 713, 1, 225]
    assert starts(n_tokens=26, count=6).tolist() == [11, 3, 5, 13, 17, 9]  # epochs of 2
    assert starts(n_tokens=41, count=6).tolist() == [9, 17, 25, 1, 30, 14]  # of 4
    assert starts(n_tokens=49, count=5).tolist() == [17, 25, 1, 33, 9]  # of 5, one more than a power of two
    assert starts(first=120, count=8).tolist() == [113, 881, 473, 789, 949, 701, 149, 685]  # epochs are 123 long
    where = Dialogues(np.arange(0, 1000, 10), np.arange(9, 1009, 10), np.ones(100), 0, 0, 0)
    assert train_starts(1, 1000, 8, 98, 6, where).tolist() == [630, 690, 970, 380, 860, 170]  # epochs are 100 long


@pytest.mark.parametrize('tokens_seen, fraction, expected', [
    (0, 0.0, (0, 0, 2)), (0, 0.29, (0, 0, 2)), (0, 0.3, (0, 0, 4)), (0, 0.59, (0, 0, 4)), (0, 0.6, (0, 0, 8)),
    (8, 0.3, (0, 2, 2)), (16, 0.3, (0, 4, 4)), (24, 0.9, (0, 6, 2)), (16, 0.9, (0, 4, 4)),  # a window that was begun
    (32, 0.3, (4, 0, 4)), (72, 0.3, (8, 2, 2))])
def test_contexts_of_a_quarter_and_of_half_the_window_come_first(tokens_seen, fraction, expected):
    assert next_windows(tokens_seen, 4, 8, fraction, context_warmup=0.6) == expected


def test_a_window_that_was_begun_is_read_on_from_a_multiple_of_its_quarter():
    assert next_windows(20 * 4, 4, 40, 0.9, context_warmup=0.6) == (0, 20, 20)
    assert next_windows(10 * 4, 4, 40, 0.9, context_warmup=0.6) == (0, 10, 10)


def test_without_short_contexts_every_update_reads_whole_windows():
    assert [next_windows(n * 32, 4, 8, n / 10) for n in range(4)] == [(n * 4, 0, 8) for n in range(4)]
    assert next_windows(0, 4, 8, context_warmup=0.6) == (0, 0, 2)  # at the start of a run


def test_targets_are_the_inputs_shifted_by_one(workdir):
    split = open_dataset('tiny', 8).train
    idx, targets = split.batch(np.array([0, 5]), 8)
    assert idx.tolist() == [split.tokens[0:8].tolist(), split.tokens[5:13].tolist()]
    assert targets.tolist() == [split.tokens[1:9].tolist(), split.tokens[6:14].tolist()]


# Evaluation

def test_evaluation_windows_are_spread_evenly_from_end_to_end():
    at = eval_starts(1000, 8, 5, 4)
    assert at.shape == (5, 4) and at[0, 0] == 0 and at[-1, -1] == 1000 - 8 - 1
    assert np.ptp(np.diff(at.ravel())) <= 1


@pytest.mark.parametrize('n_tokens', [9, 16, 17, 400])
@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_in_a_whole_split_every_token_but_the_first_is_a_target_once(world_size, n_tokens):
    split = as_split(range(n_tokens))
    batches = [pair for rank in range(world_size) for pair in split_batches(split, 8, 4, rank, world_size)]
    assert sorted(np.concatenate([targets.numpy().ravel() for _, targets in batches])) == list(range(1, n_tokens))
    assert sorted(np.concatenate([idx.numpy().ravel() for idx, _ in batches])) == list(range(n_tokens - 1))


@pytest.mark.parametrize('n_tokens', [9, 32, 33, 34, 400])
@pytest.mark.parametrize('most', [None, 64])
def test_the_number_of_batches_of_a_whole_split_is_known_before_they_are_read(n_tokens, most):
    for rank in range(3):
        batches = split_batches(as_split(range(n_tokens)), 8, 4, rank, 3, most)
        assert len(batches) == len(list(batches))


def test_max_targets_reads_full_windows_spread_evenly_over_the_split():
    batches = list(split_batches(as_split(range(1001)), 10, 4, max_targets=99))
    first = np.concatenate([idx[:, 0].numpy() for idx, _ in batches])
    assert first.tolist() == [0, 120, 240, 370, 490, 610, 740, 860, 990]  # 9 of the 100 windows
    assert all(idx.shape[1] == 10 for idx, _ in batches)


def test_max_targets_below_a_window_reads_one_window():
    (idx, targets), = split_batches(as_split(range(1001)), 10, 4, max_targets=5)
    assert idx.tolist() == [list(range(10))]


def test_max_targets_leaves_a_shorter_split_whole():
    whole, limited = (list(split_batches(as_split(range(95)), 10, 4, max_targets=most)) for most in (None, 94))
    assert sum(targets.numel() for _, targets in limited) == sum(targets.numel() for _, targets in whole) == 94


def test_bits_per_byte_of_a_uniform_guess_are_known():
    loss = math.log(16)  # nats per token: 4 bits
    split = as_split([0] * 400, n_bytes=800)
    assert split.bits_per_byte(loss, 400) == pytest.approx(2.0)
    assert split.bits_per_byte(loss, 399) == pytest.approx(2.0 * 399 / 400)


def test_bits_per_byte_of_a_text_of_unknown_size_are_none():
    assert as_split([0] * 400).bits_per_byte(1.0, 400) is None


# Faults

@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('n_tokens', [5, 8])
def test_a_split_shorter_than_a_window_and_its_target_is_refused(workdir, split, n_tokens):  # fault 30
    ids = {'train': range(16), 'val': range(16), split: [0] * n_tokens}
    write_dataset(workdir / 'data' / 'short', list(ids['train']), list(ids['val']))
    with pytest.raises(UserError, match=f'{split}.bin has {n_tokens} tokens; block_size=8 needs at least 9'):
        open_dataset('short', 8)


def test_a_split_of_one_window_trains(run, workdir):  # fault 30: the shortest that works
    write_dataset(workdir / 'data' / 'short', list(range(9)), list(range(10)))
    done = run('train.py', *TINY, '--dataset=short')
    assert done.status == 0, done.err


def test_a_mapped_file_reads_like_one_in_memory(workdir, monkeypatch):
    small = open_dataset('tiny', 8).train.batch(np.arange(50), 8)
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)
    mapped = open_dataset('tiny', 8).train
    assert isinstance(mapped.tokens, np.memmap)
    assert all((a == b).all() for a, b in zip(small, mapped.batch(np.arange(50), 8)))


def test_an_invalid_token_in_a_mapped_file_is_reported_with_its_position(workdir, monkeypatch):  # fault 31
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)  # map the file and do not scan it
    path = workdir / 'data' / 'tiny' / 'train.bin'
    ids = np.fromfile(path, '<u2')
    ids[17] = 16  # the smallest that is invalid
    ids.tofile(path)
    split = open_dataset('tiny', 8).train
    with pytest.raises(UserError, match='train.bin contains token 16 at position 17, vocab_size is 16'):
        split.batch(np.array([0, 10]), 8)
    split.batch(np.array([0, 18]), 8)


def test_a_bin_truncated_while_training_is_reported_in_one_line(run, workdir, monkeypatch):  # fault 35
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)
    real, calls = Split.batch, []

    def batch(self, *args):
        calls.append(self)
        if len(calls) == 6:
            os.truncate(workdir / 'data' / 'tiny' / 'train.bin', 100)
        return real(self, *args)
    monkeypatch.setattr(Split, 'batch', batch)
    done = run('train.py', *TINY)
    assert done.status == 1 and 'train.bin was truncated while it was being read' in done.last_error
    assert load('out/last.pt')['iter_num'] == 0


@pytest.mark.parametrize('n_tokens, block_size', [(1367, 64), (65, 64), (200, 64), (1000, 7)])
def test_over_many_epochs_every_token_is_read_and_predicted(n_tokens, block_size):
    starts = train_starts(0, n_tokens, block_size, 0, 60_000)
    assert starts.min() == 0 and starts.max() == n_tokens - block_size - 1  # its last target is the last token


def test_a_mapped_file_that_was_renamed_during_a_run_is_read_to_the_end(tmp_path):
    path = tmp_path / 'train.bin'
    np.arange(100, dtype='<u2').tofile(path)
    split = Split(path, np.memmap(path, '<u2', 'r'), 0, '', 100)
    path.rename(tmp_path / 'moved.bin')
    assert split.batch(np.array([3]), 2)[0].tolist() == [[3, 4]]

@pytest.mark.parametrize('n_tokens', [2, 8, 9, 10, 17, 30])
@pytest.mark.parametrize('stride', [1, 3, 8])
def test_sliding_windows_score_every_token_but_the_first_once(n_tokens, stride):
    scored = []
    for start, length, n_scored in sliding_windows(n_tokens, 8, stride):
        assert 0 < n_scored <= length <= 8
        scored += range(start + length - n_scored + 1, start + length + 1)
    assert scored == list(range(1, n_tokens))
