"""lib/text/dataset.py: which tokens a batch holds is a pure function of the seed and the sample's number."""
import numpy as np
import pytest

from lib.text.data_folder import folder
from lib.text.dataset import eval_starts, open_dataset, split_batches, train_starts


def starts(order='epochs', seed=1, n_tokens=1000, block_size=8, first=0, count=100):
    return train_starts(order, seed, n_tokens, block_size, first, count)


@pytest.mark.parametrize('order', ['epochs', 'random'])
def test_samples_do_not_depend_on_how_they_are_asked_for(order):
    whole = starts(order, count=300)
    parts = [starts(order, first=first, count=count) for first, count in ((0, 7), (7, 200), (207, 93))]
    assert (np.concatenate(parts) == whole).all()


@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_any_number_of_ranks_reads_the_same_samples_in_a_step(world_size):
    micro_steps, batch_size, step = 4, 3, 5
    read = [start for rank in range(world_size) for micro in range(rank, micro_steps, world_size)
            for start in starts(first=step * micro_steps * batch_size + micro * batch_size, count=batch_size)]
    assert sorted(read) == sorted(starts(first=step * 12, count=12))


@pytest.mark.parametrize('n_tokens', [9, 10, 17, 25, 26, 999, 1000, 1001])
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


@pytest.mark.parametrize('order', ['epochs', 'random'])
def test_another_seed_reads_otherwise(order):
    assert (starts(order, seed=1) != starts(order, seed=2)).any()


def test_random_crops_are_uniform():
    counts = np.bincount(starts('random', n_tokens=108, count=100_000), minlength=100)
    assert len(counts) == 100 and ((counts - 1000) ** 2 / 1000).sum() / 99 < 1.4  # chi-squared a degree of freedom


def test_a_shuffled_order_is_no_simple_stride():
    order = starts(n_tokens=8 * 4097, count=4095) // 8
    assert len(set(np.diff(order))) > 2000 and abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05


def test_evaluation_windows_are_spread_evenly_from_end_to_end():
    at = eval_starts(1000, 8, 5, 4)
    assert at.shape == (5, 4) and at[0, 0] == 0 and at[-1, -1] == 1000 - 8 - 1
    assert np.ptp(np.diff(at.ravel())) <= 1


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_the_whole_split_makes_every_token_but_the_first_a_target_once(workdir, world_size):
    split = open_dataset('tiny', 8).val
    windows = [pair for rank in range(world_size) for pair in split_batches(split, 8, 4, rank, world_size)]
    assert sum(targets.numel() for _, targets in windows) == len(split) - 1
    targets = np.concatenate([t.numpy().ravel() for _, t in windows])
    assert (np.bincount(targets) == np.bincount(split.tokens[1:])).all()


def test_targets_are_the_tokens_one_on(workdir):
    idx, targets = open_dataset('tiny', 8).train.batch(np.array([0, 5]), 8)
    assert idx.shape == targets.shape == (2, 8) and (idx[:, 1:] == targets[:, :-1]).all()


def test_a_mapped_file_reads_as_one_in_memory(workdir, monkeypatch):
    from lib.text import data_folder
    small = open_dataset('tiny', 8).train.batch(np.arange(50), 8)
    monkeypatch.setattr(data_folder, 'IN_MEMORY', 0)
    mapped = open_dataset('tiny', 8).train
    assert isinstance(mapped.tokens, np.memmap)
    assert all((a == b).all() for a, b in zip(small, mapped.batch(np.arange(50), 8)))


def test_a_folder_here_comes_before_the_repositorys(workdir):
    (workdir / 'data' / 'shakespeare_char').mkdir()
    assert folder('shakespeare_char').resolve() == workdir / 'data' / 'shakespeare_char'
