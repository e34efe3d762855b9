"""lib/training/fit.py: a run gets micro-batches that suit its GPU, and the same updates."""
from types import SimpleNamespace

import pytest
import torch

import train
from configurator import Settings, literals
from lib.training import fit, plan
from lib.training.fit import larger_batch, smaller_batch
from model import GPTConfig

CONFIG = GPTConfig(256, 1000, 2, 2, 64, 0.0, False)
VALUES = dict(batch_size=12, gradient_accumulation_steps=40, total_batch_tokens=0, eval_iters=200)


@pytest.fixture
def run(monkeypatch):
    """run(**values) returns (Settings, plan.Job) of a run on CUDA; the context of CUDA takes no memory here."""
    monkeypatch.setattr(plan, 'CUDA_CONTEXT', 0)

    def new(flag='', **values):
        s = Settings({**VALUES, **values})
        if flag:
            s.put(flag, s[flag], 'flag', f'--{flag}')
        steps = s['total_batch_tokens'] // (s['batch_size'] * 256) or s['gradient_accumulation_steps']
        return s, plan.Job(CONFIG, s['batch_size'], steps, 10, 0.0, [(1.0, 256)], 5, 1, 'adamw', 0, False, 'ddp',
                           torch.bfloat16)
    return new


def memory_of(job, batch_size):
    """Return the bytes of a GPU that holds just this batch_size."""
    return plan.memory(plan.replace(job, batch_size=batch_size), 'cuda').total / plan.USABLE * 1.01


def test_a_run_that_fits_is_left_as_it_is(run):
    s, job = run()
    assert smaller_batch(s, job, memory_of(job, 12)) == '' and s == VALUES


@pytest.mark.parametrize('total', [0, 12 * 40 * 256])
def test_a_run_that_does_not_fit_gets_smaller_micro_batches_and_the_same_updates_and_evaluations(run, total):
    s, job = run(total_batch_tokens=total)
    line = smaller_batch(s, job, memory_of(job, 7))
    assert s['batch_size'] == 6 and s['eval_iters'] == 400 and s['total_batch_tokens'] == total
    assert s['gradient_accumulation_steps'] == (40 if total else 80)
    assert line.startswith('batch_size=12 needs about ') and 'with batch_size=6, eval_iters=400' in line
    assert '\n' not in line and ('gradient_accumulation_steps=80' in line) == (not total)


@pytest.mark.parametrize('flag', ['batch_size', 'gradient_accumulation_steps'])
def test_a_flag_stays_as_given_and_the_line_has_the_flags_that_fit(run, flag):
    s, job = run(flag)
    line = smaller_batch(s, job, memory_of(job, 7))
    assert s == VALUES and line.endswith('--batch_size=6 --eval_iters=400 --gradient_accumulation_steps=80')


def test_ranks_of_several_machines_choose_nothing_each_for_itself(run):
    s, job = run()
    assert '--batch_size=6' in smaller_batch(s, job, memory_of(job, 7), may_change=False) and s == VALUES


def test_where_not_even_one_sequence_fits_the_line_names_other_settings(run):
    s, job = run()
    assert '--checkpoint_activations' in smaller_batch(s, job, memory_of(job, 1) / 2) and s == VALUES


@pytest.mark.parametrize('total', [0, 12 * 40 * 256])
def test_a_run_with_room_gets_larger_micro_batches_and_the_same_updates_and_evaluations(run, total):
    s, job = run(total_batch_tokens=total)
    line = larger_batch(s, job, 2 * plan.USABLE * memory_of(job, 31))
    assert s['batch_size'] == 30 and s['eval_iters'] == 80 and s['total_batch_tokens'] == total
    assert s['gradient_accumulation_steps'] == (40 if total else 16)
    assert line.startswith('batch_size=12 leaves most of the ') and 'with batch_size=30, eval_iters=80' in line
    assert '\n' not in line and ('gradient_accumulation_steps=16' in line) == (not total)


def test_a_larger_micro_batch_fills_at_most_half_of_the_gpu(run):
    s, job = run()
    larger_batch(s, job, 1e9)
    used = plan.memory(plan.replace(job, batch_size=s['batch_size']), 'cuda').total
    assert s['batch_size'] > 12 and used <= 0.5e9


def test_a_larger_micro_batch_needs_several_per_rank(run):
    s, job = run(gradient_accumulation_steps=1)
    assert larger_batch(s, job, 1e12) == '' and s['batch_size'] == 12


def test_a_larger_micro_batch_evaluates_the_same_number_of_texts(run):
    s, job = run(eval_iters=8)
    larger_batch(s, job, 2 * plan.USABLE * memory_of(job, 61))
    assert (s['batch_size'], s['eval_iters']) == (48, 2)  # 60, which fits, does not divide 96


def test_a_larger_micro_batch_has_fewer_logits_than_32_bits_count(run, monkeypatch):
    monkeypatch.setattr(fit, 'LARGE', 24 * 256 * 1000)
    s, job = run()
    larger_batch(s, job, 1e12)
    assert s['batch_size'] == 20


@pytest.mark.parametrize('flag', ['batch_size', 'gradient_accumulation_steps'])
def test_a_flag_stays_as_given_where_there_is_room(run, flag):
    s, job = run(flag)
    assert larger_batch(s, job, 1e12) == '' and s == VALUES


@pytest.fixture
def on_two_gpus(monkeypatch):
    """on_two_gpus(bytes, bytes) makes this process one of two ranks; returns train.py's Settings and a dataset."""
    def start(*memories):
        monkeypatch.setattr(fit.distributed, 'rank_and_world', lambda: (0, 2))
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
        monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
        monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda i: SimpleNamespace(total_memory=memories[i]))
        monkeypatch.setattr(fit.devices, 'pick_dtype', lambda device: ('bfloat16', ''))
        monkeypatch.setattr(plan, 'memory', lambda job, kind: SimpleNamespace(total=1e9 * job.batch_size))
        split = SimpleNamespace(epoch_tokens=lambda T: 10**6)
        data = SimpleNamespace(tokenizer={'kind': 'char'}, vocab_size=65, marks=None, train=split)
        return Settings({**literals(vars(train)), 'device': 'cuda'}), data
    return start


def test_the_smallest_gpu_of_the_machine_counts(on_two_gpus, capfd):
    s, data = on_two_gpus(80e9, 8e9)
    fit.fit_gpu(s, None, None, data)
    assert s['batch_size'] == 6 and s['gradient_accumulation_steps'] == 80  # each rank has 240 sequences
    assert 'needs about 12.00 GB, the GPU has 8.00 GB' in capfd.readouterr().err


def test_gpus_with_enough_memory_change_nothing(on_two_gpus, capfd):
    s, data = on_two_gpus(80e9, 24e9)
    fit.fit_gpu(s, None, None, data)
    assert s['batch_size'] == 12 and not capfd.readouterr().err


def test_two_large_gpus_get_larger_micro_batches(on_two_gpus, capfd):
    s, data = on_two_gpus(80e9, 80e9)
    fit.fit_gpu(s, None, None, data)
    assert s['batch_size'] == 30 and s['gradient_accumulation_steps'] == 16  # 480 sequences as before
    assert 'leaves most of the 80.00 GB' in capfd.readouterr().err


def test_ranks_of_several_machines_keep_their_micro_batches(on_two_gpus, monkeypatch, capfd):
    s, data = on_two_gpus(80e9, 80e9)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1')
    fit.fit_gpu(s, None, None, data)
    assert s['batch_size'] == 12 and not capfd.readouterr().err


def test_nothing_is_chosen_on_a_cpu():
    fit.fit_gpu(Settings({'device': 'cpu', 'eval_only': False}), None, None, None)  # would fail without more settings
