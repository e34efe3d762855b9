"""train.py: one run from start to end, what it leaves behind, and resuming it."""
import json
import math
import random
import re
import time
from types import SimpleNamespace

import pytest
import reference
import torch
from conftest import TINY, write_dataset
from kit import Ranks, differences, load, trained_part

import kernels
import train
from configurator import UserError
from lib.machine import compiler, distributed, runtime, signals
from lib.text import dataset
from lib.text.dataset import eval_starts, open_dataset, split_batches, train_starts
from lib.training.log import read_log
from lib.weights import checkpoint
from model import GPT, Block, GPTConfig


def without(*names):
    """Return the flags of TINY but those of `names`."""
    return [flag for flag in TINY if flag[2:].split('=')[0] not in names]


@pytest.fixture
def windows(monkeypatch):
    """A list to which every training batch adds (starts of its windows, their length)."""
    read, training = [], []
    real_open, real_starts, real_batch = dataset.open_dataset, dataset.train_starts, dataset.Split.batch

    def batch(self, starts, block_size):
        if training and torch.is_grad_enabled():  # neither the trial before training nor an evaluation
            read.append((starts.tolist(), block_size))
        return real_batch(self, starts, block_size)
    monkeypatch.setattr(dataset, 'open_dataset', lambda *args: training.clear() or real_open(*args))
    monkeypatch.setattr(dataset, 'train_starts', lambda *args: training.append(1) or real_starts(*args))
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    return read


# A run

def test_a_run_makes_exactly_max_iters_updates_and_saves_at_the_end(run, workdir):
    done = run('train.py', *TINY, '--max_iters=7', '--eval_interval=5')
    assert done.status == 0, done.err
    assert load('out/last.pt')['iter_num'] == 7


def test_a_finished_run_says_so_and_which_settings_train_longer(run, workdir):
    assert 'nothing left to do' not in run('train.py', *TINY).out
    done = run('train.py', *TINY, '--init_from=resume')
    assert done.status == 0 and 'nothing left to do at iter 6: to train longer raise --max_iters' in done.out


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_bf16_residual_keeps_the_stream_in_bfloat16_where_products_are(run, workdir, monkeypatch, dtype):
    real, seen = Block.forward, set()
    monkeypatch.setattr(Block, 'forward', lambda self, x, *args: seen.add(x.dtype) or real(self, x, *args))
    assert run('train.py', *TINY, '--max_iters=1', f'--dtype={dtype}', '--bf16_residual').status == 0
    assert seen == {getattr(torch, dtype)}


def test_a_compiled_model_is_saved_under_the_same_names(run, workdir, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda model, **more: real(model, backend='eager'))  # no compiler is needed
    run('train.py', *TINY, '--max_iters=2', '--out_dir=plain')
    done = run('train.py', *TINY, '--max_iters=2', '--out_dir=compiled', '--compile=True')
    assert done.status == 0 and 'compile on' in done.out, done.err
    plain, compiled = load('plain/last.pt')['model'], load('compiled/last.pt')['model']
    assert list(plain) == list(compiled)
    for name, p in plain.items():
        torch.testing.assert_close(compiled[name], p, atol=1e-5, rtol=0)  # products are fused in another order


@pytest.mark.parametrize('batch_size', [1, 2, 4, 8])
def test_total_batch_tokens_keeps_the_update_whatever_the_micro_batch(run, workdir, batch_size):
    flags = ['--total_batch_tokens=64', '--max_iters=3', '--learning_rate=1e-3']
    run('train.py', *TINY, *flags, '--batch_size=8', '--out_dir=one')
    done = run('train.py', *TINY, *flags, f'--batch_size={batch_size}')
    assert 'tokens per iteration: 64 ' in done.out
    one, other = load('one/last.pt')['model'], load('out/last.pt')['model']
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_too_little_memory_names_the_settings_that_need_less(run, workdir, monkeypatch):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB\nand more')
    monkeypatch.setattr(GPT, 'forward', forward)
    done = run('train.py', *TINY)
    assert done.status == 1 and 'Tried to allocate 20.00 GiB' in done.last_error
    assert all(flag in done.last_error for flag in ('--batch_size', '--total_batch_tokens', '--checkpoint_activations'))


def test_float32_training_equals_plain_arithmetic(run, workdir, monkeypatch):
    """AdamW, clipping, accumulation and the loss, written out over the reference model."""
    monkeypatch.setattr(kernels, 'CHUNK', 100)  # so that the loss is computed in chunks
    run('train.py', *TINY, '--max_iters=0', '--out_dir=first')
    done = run('train.py', *TINY, '--max_iters=20', '--gradient_accumulation_steps=2', '--learning_rate=1e-3',
               '--warmup_iters=0', '--decay_lr=False', '--grad_clip=0.5', '--beta1=0.9', '--beta2=0.99',
               '--weight_decay=0.1')
    assert done.status == 0, done.err
    state = load('first/ckpt.pt')
    assert state['iter_num'] == 0
    w = {name: p.requires_grad_() for name, p in state['model'].items() if name != 'lm_head.weight'}
    config, data = GPTConfig(**state['model_args']), open_dataset('tiny', 8).train
    m, v = ({name: torch.zeros_like(p) for name, p in w.items()} for _ in 'mv')
    norms = []
    for step in range(1, 21):
        idx, targets = data.batch(train_starts(1337, len(data), 8, (step - 1) * 8, 8), 8)
        grads = torch.autograd.grad(reference.loss(w, config, idx, targets), list(w.values()))
        norms.append(float(sum(g.square().sum() for g in grads).sqrt()))
        with torch.no_grad():
            for (name, p), g in zip(w.items(), grads):
                g = g * min(1.0, 0.5 / (norms[-1] + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.99 * v[name] + 0.01 * g * g
                p.mul_(1 - 1e-3 * 0.1 if p.dim() > 1 else 1.0)
                p.sub_(1e-3 * m[name] / (1 - 0.9**step) / ((v[name] / (1 - 0.99**step)).sqrt() + 1e-8))
    assert max(norms) > 0.5 and [r['grad_norm'] for r in updates()] == pytest.approx(norms, rel=1e-3)
    trained = load('out/last.pt')['model']
    for name, p in w.items():
        torch.testing.assert_close(trained[name], p.detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize('scale', [1.0, 2.0**10])
def test_clipping_and_the_logged_gradient_norm_do_not_depend_on_the_loss_scale(run, workdir, monkeypatch, scale):
    flags = [*TINY, '--grad_clip=0.1']
    run('train.py', *flags, '--out_dir=plain')
    real = torch.amp.GradScaler  # preflight allows float16 on CUDA only; the scaler itself works on the CPU
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: real(device, init_scale=scale))
    run('train.py', *flags)
    assert load('out/last.pt')['scaler']['scale'] == scale
    assert [r['grad_norm'] for r in updates()] == pytest.approx([r['grad_norm'] for r in updates('plain')], rel=1e-4)
    plain, scaled = load('plain/last.pt')['model'], load('out/last.pt')['model']
    for name, p in plain.items():
        torch.testing.assert_close(scaled[name], p, atol=1e-5, rtol=1e-4)


def test_the_last_evaluation_reads_65536_training_tokens_and_all_of_validation(run, workdir, monkeypatch):
    """Its bar counts the batches."""
    found = []

    def progress(batches, n_batches, what, show):
        batches = list(batches)
        found.append((sum(targets.numel() for _, targets in batches), len(batches), n_batches))
        return batches[:1]
    monkeypatch.setattr('lib.training.log.progress', progress)
    write_dataset(workdir / 'data' / 'long', [i * i % 16 for i in range(70_000)], [i % 7 for i in range(5_001)])
    done = run('train.py', *TINY, '--dataset=long', '--max_iters=0', '--eval_iters=1', '--block_size=64',
               '--batch_size=64')
    assert done.status == 0, done.err
    assert found == [(2**16, 16, 16), (5_000, 3, 3)]
    assert 'the last evaluation reads the whole validation split' in done.out


def test_an_evaluation_reads_evenly_spread_windows_of_both_splits_and_logs_their_losses(run, workdir):
    run('train.py', *TINY, '--max_iters=0')
    state, data = load('out/last.pt'), open_dataset('tiny', 8)
    model, expected = GPT(GPTConfig(**state['model_args'])), []
    model.load_state_dict(state['model'])
    for split in (data.train, data.val):
        batches = [split.batch(row, 8) for row in eval_starts(len(split), 8, 2, 4)]
        expected.append(sum(float(model(*batch)[1].detach()) for batch in batches) / 2)
    assert state['history'] == [pytest.approx([0, *expected], abs=1e-5)]
    record, = read_log('out/log.jsonl')
    assert [record['train_loss'], record['val_loss']] == state['history'][0][1:]
    assert record['train_bpb'] == data.train.bits_per_byte(record['train_loss'])
    assert record['val_bpb'] == data.val.bits_per_byte(record['val_loss'])
    whole = []
    for split in (data.train, data.val):  # the last evaluation, of all targets alike
        batches = [(model(*batch)[1].item(), batch[1].numel()) for batch in split_batches(split, 8, 4)]
        whole.append(sum(loss * n for loss, n in batches) / sum(n for _, n in batches))
    assert [record['whole_train_loss'], record['whole_val_loss']] == pytest.approx(whole, abs=1e-5)
    bits = record['whole_val_loss'] * (len(data.val) - 1) / math.log(2)  # of all tokens but the first
    assert record['whole_val_bpb'] == pytest.approx(bits / data.val.n_bytes)


@pytest.mark.parametrize('flags', [[], ['--eval_only=True', '--init_from=resume']])
def test_full_batches_and_no_others_are_evaluated_by_the_compiled_model(run, trained, monkeypatch, flags):
    shapes = []

    def compiled(model, *args):
        return lambda idx, targets: shapes.append(tuple(idx.shape)) or model(idx, targets)
    monkeypatch.setattr(compiler, 'compile_or_fall_back', compiled)
    monkeypatch.setattr(distributed, 'wrap_ddp', lambda compiled, *args: compiled)
    done = run('train.py', *TINY, '--max_iters=0', *flags)
    assert done.status == 0, done.err
    assert len(shapes) > 60 and set(shapes) == {(4, 8)}  # all of training has 62 full batches


class Constant(torch.nn.Module):
    """A model whose loss is a constant; remembers the shapes that it read, and whether it was in training mode."""

    def __init__(self, loss):
        super().__init__()
        self.loss, self.read = loss, []

    def forward(self, idx, targets):
        self.read.append((tuple(idx.shape), self.training))
        return None, torch.tensor(self.loss)


def test_an_evaluation_weighs_targets_alike_and_compiles_nothing_for_a_shorter_batch(monkeypatch):
    monkeypatch.setattr(train, 'batch_size', 4)
    monkeypatch.setattr(train, 'block_size', 8)
    compiled, raw = Constant(1.0), Constant(3.0)
    rt = runtime.Runtime(torch.device('cpu'), torch.float32, False, '')
    full, masked, short = (torch.zeros(n, 8, dtype=torch.long) for n in (4, 4, 2))
    masked[:, 3:] = -1
    found = train.estimate_loss(compiled, raw, rt, [(full, full), (full, masked), (short, short)])
    assert found == pytest.approx((1.0 * 32 + 1.0 * 12 + 3.0 * 16) / 60)
    assert compiled.read == [((4, 8), True)] * 2 and raw.read == [((2, 8), False)] and raw.training
    assert train.estimate_loss(compiled, raw, rt, [(full[:1, :1], full[:1, :1])]) == 3.0
    assert train.estimate_loss(compiled, raw, rt, []) == 0.0


@pytest.mark.parametrize('flags, seconds, lengths', [
    (['--max_iters=6', '--gradient_accumulation_steps=3'], 2 * 6 * 3, [8]),
    (['--max_iters=1000000', '--max_minutes=2'], 2 * 60, [8]), (['--context_warmup=0.5'], 2 * 6, [2, 4, 8]),
    (['--init_from=resume', '--max_iters=9'], 2 * 3, [8])])
def test_whether_to_compile_depends_on_what_is_left_of_the_run(run, trained, monkeypatch, flags, seconds, lengths):
    """A step of 2 seconds; what is compiled are all lengths of the context."""
    found = []
    monkeypatch.setattr(compiler, 'step_in_all_shapes', lambda model, batches: [idx.size(1) for idx, _ in batches])

    def compile_or_fall_back(model, rt, explicit, try_step, seconds_ahead):
        found.extend((seconds_ahead(2.0), try_step))
        raise UserError('enough')
    monkeypatch.setattr(compiler, 'compile_or_fall_back', compile_or_fall_back)
    assert 'enough' in run('train.py', *TINY, *flags).err and found == [seconds, lengths]


@pytest.mark.parametrize('log_interval', [1, 2])
def test_speed_and_eta_follow_from_the_time_of_the_updates_since_the_last_line(run, workdir, monkeypatch, log_interval):
    now, real = [0.0], dataset.train_starts

    def starts_of_an_update(*args):
        now[0] += 2.0
        return real(*args)
    monkeypatch.setattr(dataset, 'train_starts', starts_of_an_update)
    monkeypatch.setattr(time, 'perf_counter', lambda: now[0])
    done = run('train.py', *TINY, f'--log_interval={log_interval}', '--peak_tflops=1', '--max_iters=100',
               '--max_minutes=1000', '--eval_interval=3', '--patience=1', '--learning_rate=0')
    assert done.status == 0, done.err
    found = re.findall(r'iter (\d+): .* time (.*)ms, .* tok/s (.*), eta (.*)', done.out)
    assert found == [(str(i), '2000.00', '16', f'3m{18 - 2 * i}s') for i in range(0, 4, log_interval)]
    flops = GPT(GPTConfig(**load('out/last.pt')['model_args'])).flops_per_token()
    assert [r['mfu'] for r in updates()] == pytest.approx([flops * 16 / 1e12] * len(found))


def test_the_bar_shows_the_fraction_of_the_run_and_is_closed(run, workdir, monkeypatch):
    class Bar:
        n = closed = 0

        def __init__(self, total, show):
            self.total = total
            bars.append(self)

        def set_description_str(self, text, refresh):
            pass

        def update(self, more):
            self.n += more

        def close(self):
            self.closed = True
    bars = []
    monkeypatch.setattr('lib.training.log.progress_bar', Bar)
    assert run('train.py', *TINY, '--max_iters=2').status == 0
    bar, = bars
    assert bar.n == bar.total / 2 and bar.closed  # before the second of two updates


def test_trackers_get_every_evaluation_and_update_and_are_finished(run, workdir, monkeypatch):
    steps = []
    monkeypatch.setattr('lib.training.trackers.open_trackers', lambda *args: (
        lambda values, step: steps.append((min(values).split('/')[0], step)), lambda: steps.append('finished'), ''))
    assert run('train.py', *TINY, '--max_iters=2').status == 0
    assert steps == [('eval', 0), ('train', 0), ('train', 1), ('eval', 2), 'finished']


def test_the_runtime_is_told_that_it_is_to_train(run, workdir, monkeypatch):
    real, told = runtime.start, []
    monkeypatch.setattr(runtime, 'start', lambda settings, trains: told.append(trains) or real(settings, trains))
    run('train.py', *TINY, '--max_iters=0')
    assert told == [True]


def test_the_logged_loss_is_the_mean_of_an_updates_micro_batches(run, workdir, windows):
    run('train.py', *TINY, '--max_iters=2', '--learning_rate=0', '--gradient_accumulation_steps=2')
    model, data = GPT(GPTConfig(**load('out/last.pt')['model_args'])), open_dataset('tiny', 8).train
    model.load_state_dict(load('out/last.pt')['model'])
    batches = [data.batch(torch.tensor(starts).numpy(), length) for starts, length in list(windows)]
    losses = [model(*batch)[1].item() for batch in batches]
    assert [r['loss'] for r in updates()] == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], abs=1e-5)


def test_weight_decay_follows_the_epochs_that_the_run_will_have(run, workdir, monkeypatch):
    found = []
    monkeypatch.setattr('lib.training.optim.decay_for_epochs', lambda decay, each, epochs, tokens: found.append(
        (epochs, tokens)) or decay)
    run('train.py', *TINY, '--max_iters=4')
    epochs = 4 * 32 / open_dataset('tiny', 8).train.epoch_tokens(8)
    n = len(found) // 4  # parameter groups
    assert found == [(0.0, 32)] * n + [(pytest.approx(epochs), 32)] * 3 * n  # before the first update it is not known


def test_an_evaluation_that_is_no_better_leaves_ckpt_as_it_is(run, workdir):
    run('train.py', *TINY, '--max_iters=4', '--eval_interval=2', '--learning_rate=0')
    assert len({loss for _, _, loss in load('out/last.pt')['history']}) == 1
    assert [load(f'out/{name}.pt')['iter_num'] for name in ('ckpt', 'last')] == [0, 4]


def test_the_vocabulary_of_gpt2_is_padded():
    shape = dict(block_size=4, n_layer=1, n_head=1, n_embd=4)
    model = train.build_model(shape, SimpleNamespace(tokenizer={'kind': 'gpt2'}), None)
    assert model.config.vocab_size == 50304


def test_only_float16_scales_the_loss(run, trained):
    assert load('out/last.pt')['scaler'] == {}


def test_eval_only_evaluates_and_writes_nothing(run, trained):
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in trained.iterdir()}
    done = run('train.py', *TINY, '--init_from=resume', '--eval_only=True')
    assert done.status == 0 and done.out.count('step ') == 1 and 'iter ' not in done.out.replace('per iter', '')
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in trained.iterdir()} == before


# Schedules

def updates(out_dir='out'):
    """Return the records of updates in the log."""
    return [r for r in read_log(f'{out_dir}/log.jsonl') if 'iter' in r]


def rates(out_dir='out'):
    return [r['lr'] for r in updates(out_dir)]


def nanogpt_rate(it, warmup, decay, peak, low):
    """nanoGPT's schedule from its documentation: linear warm-up, cosine to min_lr at lr_decay_iters, then flat."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    decayed = min(1.0, (it - warmup) / max(1, decay - warmup))
    return low + (peak - low) * (1 + math.cos(math.pi * decayed)) / 2


@pytest.mark.parametrize('warmup, decay', [(0, 12), (4, 12), (4, 8), (4, 5), (2, 20), (20, 40)])
def test_the_learning_rate_is_nanogpts(run, workdir, warmup, decay):
    done = run('train.py', *TINY, '--max_iters=12', f'--warmup_iters={warmup}', f'--lr_decay_iters={decay}',
               '--learning_rate=0.01', '--min_lr=0.002')
    assert done.status == 0
    assert rates() == pytest.approx([nanogpt_rate(it, warmup, decay, 0.01, 0.002) for it in range(12)])


def test_muons_rate_falls_to_zero_where_adamw_has_none(monkeypatch):
    for name, value in (('learning_rate', 0.0), ('min_lr', 0.0), ('warmup_iters', 10),
                        ('decay_lr', True), ('lr_schedule', 'cosine')):
        monkeypatch.setattr(train, name, value)
    assert train.get_lr_scale(1000, 1.0, by_clock=True) == 0.0


def test_without_settings_the_decay_follows_max_iters_to_a_tenth_of_the_rate(run, workdir):
    run('train.py', *TINY, '--max_iters=30', '--learning_rate=0.01')
    assert rates() == pytest.approx([nanogpt_rate(it, 2, 30, 0.01, 0.001) for it in range(30)])


def test_wsd_is_constant_and_then_decays_linearly(run, workdir):
    run('train.py', *TINY, '--max_iters=22', '--lr_schedule=wsd', '--cooldown_frac=0.5', '--learning_rate=0.01',
        '--min_lr=0')
    lr = rates()
    assert lr[2:13] == pytest.approx([0.01] * 11) and lr[21] == pytest.approx(0.001)
    assert [a - b for a, b in zip(lr[12:], lr[13:])] == pytest.approx([0.001] * 9)


def test_by_updates_contexts_grow_and_every_token_is_read_once(run, workdir, windows):
    done = run('train.py', *TINY, '--context_warmup=0.6', '--max_iters=50')
    assert done.status == 0, done.err
    assert [length for _, length in windows] == [2] * 16 + [4] * 14 + [8] * 20  # a window begun is read to its end
    read = [start + n for starts, length in windows for start in starts for n in range(length)]
    assert len(set(read)) == len(read) == 4 * (16 * 2 + 14 * 4 + 20 * 8)
    assert [r['tokens'] for r in updates()][-1] == len(read)
    whole = set(train_starts(1337, 2000, 8, 0, len(read) // 8).tolist())  # the windows of a run without short contexts
    assert set(read) == {start + n for start in whole for n in range(8)}


# Runs by the clock. The clock is patched: every update takes 0.1 minutes, evaluations and saving none.

@pytest.fixture
def clock(monkeypatch):
    """Patch the clock of the process; clock.restart() is what starting a new process does."""
    class Clock:
        n_updates = 0

        def restart(self):
            self.n_updates = 0
    clock, real = Clock(), dataset.train_starts

    def starts_of_an_update(*args):
        clock.n_updates += 1
        return real(*args)
    monkeypatch.setattr(dataset, 'train_starts', starts_of_an_update)
    monkeypatch.setattr(runtime, 'minutes_running', lambda: clock.n_updates / 10)
    return clock


TIMED = [*without('max_iters'), '--warmup_iters=0', '--eval_interval=100000', '--min_lr=0.001', '--learning_rate=0.01']


def cosine(fraction):
    """Return the rate of TIMED after this fraction of the run."""
    return 0.001 + 0.009 * (1 + math.cos(math.pi * fraction)) / 2


@pytest.mark.parametrize('minutes', [0.5, 2])
def test_max_minutes_ends_a_run_and_sets_the_length_of_its_schedule(run, workdir, clock, minutes):
    done, n = run('train.py', *TIMED, f'--max_minutes={minutes}'), int(10 * minutes)
    assert ' iterations per epoch)' in done.out  # how many epochs it will be is not known
    assert done.status == 0 and load('out/last.pt')['iter_num'] == n, done.err
    assert rates() == pytest.approx([cosine(i / n) for i in range(n)])
    assert [r['minutes'] for r in updates()] == pytest.approx([(i + 1) / 10 for i in range(n)])


def test_the_minutes_before_a_resume_count(run, workdir, clock):
    run('train.py', *TIMED, '--max_minutes=1')
    clock.restart()
    done = run('train.py', *TIMED, '--max_minutes=2', '--init_from=resume')
    assert 'resuming from iter 10' in done.out and load('out/last.pt')['iter_num'] == 20, done.err
    assert load('out/last.pt')['minutes'] == pytest.approx(2.0)
    assert f'{cosine(9 / 10):.3g} in the last update, {cosine(10 / 20):.3g} in the next' in done.out
    assert rates()[10:] == pytest.approx([cosine(i / 20) for i in range(10, 20)])


def test_wsd_decays_by_the_clock(run, workdir, clock):
    run('train.py', *TIMED, '--max_minutes=2', '--lr_schedule=wsd', '--cooldown_frac=0.5')
    assert rates() == pytest.approx([0.001 + 0.009 * min(1, (1 - i / 20) / 0.5) for i in range(20)])


@pytest.mark.parametrize('flags', [[], ['--max_iters=9']], ids=['time', 'updates'])
def test_a_run_whose_time_is_over_before_the_first_update_says_that_the_model_is_untrained(run, workdir, clock, flags):
    assert 'untrained' not in run('train.py', *TIMED, '--max_minutes=0.2', *flags).err
    clock.n_updates = 1  # importing took 0.1 minutes
    done = run('train.py', *TIMED, '--max_minutes=0.05', *flags)
    assert 'max_minutes=0.05 was over before the first update, so the model is untrained' in done.err
    assert 'untrained' not in run('train.py', *TINY, '--max_iters=0', '--out_dir=none').err


@pytest.mark.parametrize('minutes', [2, 4])
def test_a_run_by_the_clock_evaluates_at_each_eighth_of_it(run, workdir, clock, minutes):
    run('train.py', *TIMED, f'--max_minutes={minutes}')
    steps = [step for step, *_ in load('out/last.pt')['history']]
    assert steps == [-(-eighth * 10 * minutes // 8) for eighth in range(9)]


def test_slow_evaluations_leave_time_to_train_between_them(run, workdir, clock, monkeypatch):
    real = dataset.Split.batch

    def batch(self, *args):  # an evaluation reads four, and so takes a quarter of the time
        clock.n_updates += 0 if torch.is_grad_enabled() else 10
        return real(self, *args)
    monkeypatch.setattr(dataset.Split, 'batch', batch)
    run('train.py', *TIMED, '--max_minutes=16')
    steps = [step for step, *_ in load('out/last.pt')['history']]
    assert steps == [0, 20, 40, 41]  # at 41 the time is over


def test_a_run_by_updates_evaluates_at_its_interval_only(run, workdir, clock):
    run('train.py', *TIMED, '--max_minutes=4', '--max_iters=12')
    assert [step for step, *_ in load('out/last.pt')['history']] == [0, 12]


def test_max_iters_is_the_schedule_and_max_minutes_only_a_limit_where_both_are_flags(run, workdir, clock):
    run('train.py', *TIMED, '--max_minutes=1', '--max_iters=20')
    assert load('out/last.pt')['iter_num'] == 10
    assert rates() == pytest.approx([cosine(i / 20) for i in range(10)])


def test_the_eta_is_the_nearer_of_both_limits(run, workdir, clock):
    def etas(*flags):
        return re.findall(r'eta (\w+)', run('train.py', *TIMED, *flags).out)
    assert etas('--max_minutes=0.5', '--max_iters=10000000')[:3] == ['30s', '24s', '18s']  # an update takes 6
    assert etas('--max_minutes=1000', '--max_iters=3')[2] == '0s'


def test_by_the_clock_contexts_grow_with_the_time(run, workdir, clock, windows):
    run('train.py', *TIMED, '--max_minutes=5', '--context_warmup=0.6')
    assert [length for _, length in windows] == [2] * 16 + [4] * 14 + [8] * 20


# Resuming

HARD = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--lr_decay_iters=6', '--eval_interval=2']


def halves(run, out_dir, at, *flags, spoil=lambda state: None):
    """Train 6 updates in two runs, the first of which ends after `at`; returns the final state."""
    assert run('train.py', *HARD, *flags, f'--out_dir={out_dir}', f'--max_iters={at}').status == 0
    state = load(f'{out_dir}/last.pt')
    spoil(state)
    torch.save(state, f'{out_dir}/last.pt')
    done = run('train.py', *HARD, *flags, f'--out_dir={out_dir}', '--init_from=resume')
    assert done.status == 0, done.err
    return load(f'{out_dir}/last.pt')


@pytest.mark.parametrize('flags', [[], ['--optimizer=muon'], ['--lr_schedule=wsd'], ['--checkpoint_activations=True']])
def test_six_steps_equal_three_and_three_more_bit_for_bit(run, workdir, flags):  # fault 13
    run('train.py', *HARD, *flags, '--out_dir=whole')
    assert differences(trained_part(load('whole/last.pt')), trained_part(halves(run, 'halves', 3, *flags))) == []


@pytest.mark.parametrize('flags', [[], ['--optimizer=muon', '--norm=rmsnorm']])
def test_resuming_prints_what_changes_and_adamws_rate_in_the_last_update_and_in_the_next(run, workdir, flags):
    flags = [*TINY, '--lr_decay_iters=20', *flags]
    run('train.py', *flags, '--max_iters=3')
    done = run('train.py', *flags, '--max_iters=4', '--init_from=resume')
    assert 'max_iters: checkpoint 3, now 4' in done.out
    assert 'learning rate: {:.3g} in the last update, {:.3g} in the next'.format(*rates()[2:]) in done.out


def test_without_the_random_state_the_weights_differ(run, workdir):  # fault 13: the test above can fail
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3, spoil=lambda state: state.pop('rng'))
    assert any(where.startswith('/model') for where in differences(trained_part(load('whole/last.pt')),
                                                                   trained_part(ended)))


def test_without_the_optimizer_moments_the_weights_differ(run, workdir):  # fault 13: the test above can fail
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3, spoil=lambda state: state['optimizer']['state'][0]['exp_avg'].zero_())
    assert any(where.startswith('/model') for where in differences(trained_part(load('whole/last.pt')),
                                                                   trained_part(ended)))


def test_resuming_three_times_reads_the_windows_of_one_run_in_order(run, workdir, windows):  # fault 14
    run('train.py', *TINY, '--out_dir=whole')
    once, windows[:] = list(windows), []
    for end in (2, 3, 6):
        run('train.py', *TINY, f'--max_iters={end}', '--init_from=auto')
    assert windows == once and len({start for starts, _ in windows for start in starts}) == 24


@pytest.mark.parametrize('flag', ['--eval_interval=1', '--eval_iters=9', '--log_interval=3'])
def test_the_intervals_of_evaluation_and_log_change_no_weight(run, workdir, flag):  # fault 15
    run('train.py', *HARD, '--out_dir=a')
    run('train.py', *HARD, '--out_dir=b', flag)
    assert differences(trained_part(load('a/last.pt')), trained_part(load('b/last.pt'))) == []


def test_the_gradient_scaler_continues_with_its_scale(run, workdir, monkeypatch):  # fault 16
    real = torch.amp.GradScaler  # preflight allows float16 on CUDA only; the scaler itself works on the CPU
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: real(device, growth_interval=2))
    run('train.py', *HARD, '--out_dir=whole')
    ended = halves(run, 'halves', 3)
    assert ended['scaler']['scale'] == 2.0**19
    assert differences(trained_part(load('whole/last.pt')), trained_part(ended)) == []


def resume(run, *flags):
    return run('train.py', *TINY, '--init_from=resume', *flags)


def test_the_best_model_stays_best_when_later_ones_are_worse(run, workdir):
    flags = [*TINY, '--eval_interval=1', '--max_iters=8', '--learning_rate=0.5', '--decay_lr=False', '--grad_clip=0']
    run('train.py', *flags)
    history = load('out/last.pt')['history']
    best = min(history, key=lambda h: h[2])
    assert best[0] < 8, 'this run should get worse'
    assert (load('out/ckpt.pt')['iter_num'], load('out/last.pt')['best_val_loss']) == (best[0], best[2])
    run('train.py', *flags, '--init_from=resume', '--max_iters=9')
    assert load('out/ckpt.pt')['iter_num'] == best[0]


def test_the_log_of_a_resumed_run_has_no_gap_and_no_repetition(run, workdir):
    run('train.py', *TINY, '--max_iters=3')
    (workdir / 'out' / 'log.jsonl').open('a', encoding='utf-8').write('{"iter": 3, "loss": 1.0}\n{"iter": 4, "lo')
    resume(run)
    records = [json.loads(line) for line in (workdir / 'out' / 'log.jsonl').read_text(encoding='utf-8').splitlines()]
    assert [r['iter'] for r in records if 'iter' in r] == [0, 1, 2, 3, 4, 5]
    assert [r['step'] for r in records if 'step' in r] == [0, 3, 4, 6]


def test_the_newest_state_is_resumed_rather_than_the_best(run, trained):
    state = load('out/ckpt.pt')
    state['iter_num'] = 1
    checkpoint.save('out/ckpt.pt', state)
    assert 'resuming from iter 6 (out/last.pt)' in resume(run, '--max_iters=7').out


def test_a_save_on_a_signal_does_not_replace_a_good_initial_model_in_ckpt(run, trained, monkeypatch):
    """Fine-tuning begins with a good model; what a signal saves later may be worse and was not evaluated."""
    good = {**torch.load('out/last.pt', weights_only=True), 'best_val_loss': 0.0}
    good['history'] = good['history'][:1]
    torch.save(good, 'out/last.pt')
    torch.save(good, 'out/ckpt.pt')
    before = (trained / 'ckpt.pt').read_bytes()
    monkeypatch.setattr(signals.Signals, '__enter__', lambda self: setattr(self, 'level', 1) or self)
    assert 'SIGUSR1: saved' in run('train.py', *TINY, '--init_from=resume', '--max_iters=7').out
    assert (trained / 'ckpt.pt').read_bytes() == before


def test_weight_decay_follows_the_epochs_that_the_whole_run_reads(run, workdir):
    run('train.py', *TINY, '--epoch_decay=128', '--max_iters=6')
    state = load('out/last.pt')
    decays = {group['weight_decay'] for group in state['optimizer']['param_groups']}
    expected = 128 * state['tokens_seen'] / 6 / 4096 * math.sqrt(state['tokens_seen'] / state['data']['train'][0])
    assert expected > 0.1 and sorted(decays) == pytest.approx([0.0, expected])


# nanoGPT's files

def nanogpt_checkpoint(path, prefix=''):
    """Write what nanoGPT's train.py writes, with its documented keys and the optimizer moments of one step."""
    args = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=16, dropout=0.0)
    torch.manual_seed(5)
    model = GPT(GPTConfig(**args))
    shapes = [[p for p in model.parameters() if p.dim() >= 2], [p for p in model.parameters() if p.dim() < 2]]
    opt = torch.optim.AdamW([{'params': shapes[0], 'weight_decay': 0.1}, {'params': shapes[1], 'weight_decay': 0.0}],
                            lr=6e-4, betas=(0.9, 0.95))
    model(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))[1].backward()
    opt.step()
    path.parent.mkdir()
    torch.save({'model': {prefix + name: p for name, p in model.state_dict().items()}, 'optimizer': opt.state_dict(),
                'model_args': args, 'iter_num': 20, 'best_val_loss': torch.tensor(2.5),
                'config': {'dataset': 'tiny', 'learning_rate': 6e-4, 'block_size': 8, 'device': 'cuda'}}, path)
    return model


def nanogpt_dataset(folder):
    """Turn a dataset into nanoGPT's: the .bin files and a meta.pkl."""
    import pickle
    chars = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))['tokenizer']['chars']
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 16, 'itos': dict(enumerate(chars)),
                                                    'stoi': {c: i for i, c in enumerate(chars)}}))


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
def test_a_nanogpt_checkpoint_and_data_folder_continue_training(run, workdir, prefix):  # fault 22
    nanogpt_checkpoint(workdir / 'out' / 'ckpt.pt', prefix)
    nanogpt_dataset(workdir / 'data' / 'tiny')
    done = resume(run, '--max_iters=24')
    assert done.status == 0, done.err
    assert 'resuming from iter 20 (out/ckpt.pt)' in done.out and 'resuming is not exact' in done.err
    assert load('out/last.pt')['iter_num'] == 24


def test_a_nanogpt_checkpoint_is_evaluated_and_sampled(run, workdir):
    nanogpt_checkpoint(workdir / 'out' / 'ckpt.pt')
    nanogpt_dataset(workdir / 'data' / 'tiny')
    evaluated = resume(run, '--eval_only=True')
    assert evaluated.status == 0 and 'step 20: train loss' in evaluated.out
    sampled = run('sample.py', '--device=cpu', '--start=ab', '--num_samples=1', '--max_new_tokens=5')
    assert sampled.status == 0 and sampled.out.startswith('ab') and '-' * 15 in sampled.out, sampled.err


def test_a_checkpoint_has_the_keys_names_and_shapes_of_nanogpts(run, trained):
    state = load('out/ckpt.pt')
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= state.keys()
    assert state['format'] == 2  # nanoGPT's has no number
    assert state['model_args'] == dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=16,
                                       dropout=0.0)
    layer = {'ln_1.weight': (16,), 'attn.c_attn.weight': (48, 16), 'attn.c_proj.weight': (16, 16),
             'ln_2.weight': (16,), 'mlp.c_fc.weight': (64, 16), 'mlp.c_proj.weight': (16, 64)}
    assert {name: tuple(p.shape) for name, p in state['model'].items()} == {
        'transformer.wte.weight': (16, 16), 'transformer.wpe.weight': (8, 16),
        **{f'transformer.h.{i}.{name}': shape for i in range(2) for name, shape in layer.items()},
        'transformer.ln_f.weight': (16,), 'lm_head.weight': (16, 16)}


# Kills at random times

KILLED = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False', '--dist_timeout=60',
          '--eval_interval=1', '--log_interval=50', '--eval_iters=1', '--init_from=auto', '--max_iters=600']
NOTE_SAVES = """
import os
from lib.weights import checkpoint
real = checkpoint.save
def save(*args, **options):
    os.write(saves, b'(')
    real(*args, **options)
    os.write(saves, b')')
checkpoint.save = save
saves = os.open('saves', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
"""


@pytest.mark.slow
def test_thirty_random_kills_of_a_run_that_saves_at_every_step_change_no_bit(workdir):  # fault 1
    (alone,) = Ranks(1, 'train.py', *KILLED, '--out_dir=whole', cwd=workdir).wait(500)
    assert alone[0] == 0
    pause, kills, inside_a_save, saves = random.Random(0), 0, 0, workdir / 'saves'
    while kills < 30 or inside_a_save < 10:
        saves.unlink(missing_ok=True)
        ranks = Ranks(1, 'train.py', *KILLED, cwd=workdir, hook=NOTE_SAVES)
        while not (saves.exists() and saves.stat().st_size > 1) and ranks.all[0].is_alive():
            time.sleep(0.001)
        time.sleep(pause.random() * 0.1)
        assert ranks.all[0].is_alive(), 'the run ended before it was killed often enough: raise max_iters'
        ranks.all[0].kill()
        ranks.all[0].join()
        kills += 1
        inside_a_save += saves.read_bytes().endswith(b'(')
        assert checkpoint.load('out/ckpt.pt') and checkpoint.find_latest('out')[0].name == 'last.pt'
    print(f'{kills} kills, {inside_a_save} of them inside a save')
    (last,) = Ranks(1, 'train.py', *KILLED, cwd=workdir).wait(500)
    assert last[0] == 0, last
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []
