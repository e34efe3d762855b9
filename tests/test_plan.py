"""lib/training/plan.py, footprint.py and trial.py, lib/machine/cards.py, and the command plan.py."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, TINY
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from configurator import UserError
from lib.machine import cards
from lib.machine.device import PEAK_TFLOPS
from lib.machine.runtime import Runtime
from lib.training import plan, trial
from lib.training.footprint import footprint
from lib.training.optim import make_optimizer
from lib.weights import lora
from model import GPT, GPTConfig

MODERN = dict(pos='rope', norm='rmsnorm', mlp='relu2', qk_norm=True, tie_weights=False, smear=True)
GPT2 = GPTConfig(1024, 50257, 12, 12, 768, 0.0, False)


def job(config, **more):
    values = dict(batch_size=2, micro_steps=1, max_iters=10, max_minutes=0.0, contexts=[(1.0, config.block_size)],
                  eval_interval=5, eval_iters=1, optimizer='adamw', lora_rank=0, checkpoint_activations=False,
                  parallel='ddp', dtype=torch.float32)
    return plan.Job(config, **{**values, **more})


# parameters and FLOPs

def test_the_parts_add_up_to_nanogpts_124_million_parameters():
    assert plan.count(GPT2) == 124_337_664


def test_the_parts_are_those_of_a_model_that_is_built():
    config = GPTConfig(64, 100, 3, 2, 32, **MODERN)
    assert plan.count(config) == sum(p.numel() for p in GPT(config).parameters())


@pytest.mark.parametrize('config, more', [
    (GPTConfig(64, 65, 4, 4, 128, 0.0, False), {}),
    (GPTConfig(256, 65, 4, 4, 128, 0.0, False, **MODERN), {}),
    (GPTConfig(128, 1000, 3, 4, 256, 0.0, True, mlp='swiglu'), {}),
    (GPTConfig(512, 65, 3, 4, 64, 0.0, False, window=64), {}),
    (GPTConfig(64, 50257, 2, 4, 128, 0.0, False), {}),
    (GPTConfig(128, 1000, 3, 4, 256, 0.0, False), dict(checkpoint_activations=True)),
    (GPTConfig(128, 1000, 4, 4, 256, 0.0, True), dict(lora_rank=8)),
    (GPTConfig(128, 1000, 4, 4, 256, 0.1, True), dict(lora_rank=4, checkpoint_activations=True)),
])
def test_flops_per_token_are_those_that_torch_counts(config, more):
    planned = job(config, **more)
    with torch.device('meta'):
        model = GPT(config, init=False).train()
        if planned.lora_rank:
            lora.adapt(model, planned.lora_rank)
        model.checkpoint_activations = planned.checkpoint_activations
        idx = torch.zeros(2, config.block_size, dtype=torch.int64)
        # the counter knows no fused attention of CPUs; written out as products it is counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(idx, idx)[1].backward()
    assert plan.flops_per_token(planned) == pytest.approx(counter.get_total_flops() / idx.numel(), rel=0.01)


def test_muons_flops_are_those_that_torch_counts():
    config = GPTConfig(64, 65, 2, 4, 128, 0.0, False)
    model = GPT(config)
    opt = make_optimizer('muon', model.param_groups(0.1, muon=True), 1e-3, 1e-3, (0.9, 0.95), 'cpu')
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with FlopCounterMode(display=False) as counter:
        opt.step()
    assert plan.muon_flops(job(config, optimizer='muon')) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_nanogpts_notebook_300_billion_tokens_take_3_46_days_on_eight_a100():
    days = 6 * plan.count(GPT2) * 300e9 / (8 * PEAK_TFLOPS['A100'][0] * 1e12 * 0.3) / 86400
    assert days == pytest.approx(3.46, abs=0.005)


def test_with_attention_the_same_run_takes_four_days_as_nanogpt_measured():
    run = job(replace(GPT2, vocab_size=50304), batch_size=12, micro_steps=40, max_iters=600_000, eval_interval=1000,
              eval_iters=200, gpus=8)
    rate = 8 * PEAK_TFLOPS['A100'][0] * 1e12 * 0.3
    seconds = run.sequences * 1024 * plan.flops_per_token(run) / rate
    minutes, _ = plan.minutes_from(run, {1024: seconds}, plan.eval_flops(run) / rate)
    assert 3.8 < minutes / 1440 < 4.2


def test_nanogpts_notebook_a_checkpoint_has_1_49_gb():
    assert plan.checkpoint_bytes(job(GPT2)) == pytest.approx(1.49e9, rel=0.005)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_checkpoint_has_the_planned_bytes(run, workdir, optimizer):
    flags = ['--n_embd=128', '--n_layer=4', '--max_iters=1', f'--optimizer={optimizer}']
    assert run('train.py', *TINY, *flags).status == 0
    config = GPTConfig(8, 16, 4, 2, 128, 0.0, False)
    assert os.path.getsize('out/last.pt') == pytest.approx(plan.checkpoint_bytes(job(config, optimizer=optimizer)),
                                                           rel=0.05)


# memory

# a training step in another process, whose memory is given back at once when it is freed: see measured_peak
STEP = '''
import json, sys, torch
from lib.training.optim import make_optimizer
from lib.weights import lora
from model import GPT, GPTConfig

def status(key):
    with open('/proc/self/status', encoding='utf-8') as file:
        return 1024 * int(next(line for line in file if line.startswith(key)).split()[1])

def train(config, batch_size, micro_steps, dtype, optimizer, lora_rank, checkpoint_activations, updates):
    model = GPT(GPTConfig(**config)).train()
    if lora_rank:
        lora.adapt(model, lora_rank)
    model.set_compute_dtype(getattr(torch, dtype))
    model.checkpoint_activations = checkpoint_activations
    opt = make_optimizer(optimizer, model.param_groups(0.1, muon=optimizer == 'muon'), 1e-3, 1e-2, (0.9, 0.95), 'cpu')
    for _ in range(updates):
        for _ in range(micro_steps):
            idx = torch.zeros(batch_size, config['block_size'], dtype=torch.int64)
            model(idx, idx)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)

torch.set_num_threads(1)
case = json.loads(sys.argv[1])
small = {**case, 'config': {**case['config'], 'n_layer': 1, 'n_embd': 48, 'block_size': 16, 'vocab_size': 64}}
train(**{**small, 'batch_size': 1}, updates=1)  # loads what libraries load when they are first used
before = status('VmRSS')
train(**case, updates=2)
print(status('VmHWM') - before)
'''


def measured_peak(case):
    """Return the bytes that two updates add to a process at their peak.

    glibc would keep freed blocks for later, in fragments that other sizes do not fit: up to as much again. The
    variable makes it return each block above 128 KiB to the system, so that what is resident is what is in use.
    """
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '131072', 'MALLOC_TOP_PAD_': '65536', 'PYTHONPATH': str(REPO)}
    out = subprocess.run([sys.executable, '-c', STEP, json.dumps(case)], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return int(out.stdout)


def case(block_size, vocab_size, n_layer, n_head, n_embd, batch_size, micro_steps=1, dtype='float32', dropout=0.0,
         optimizer='adamw', lora_rank=0, checkpoint_activations=False, **options):
    config = dict(block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
                  dropout=dropout, bias=False, **options)
    return dict(config=config, batch_size=batch_size, micro_steps=micro_steps, dtype=dtype, optimizer=optimizer,
                lora_rank=lora_rank, checkpoint_activations=checkpoint_activations)


CASES = {
    'small': case(128, 65, 2, 4, 128, 64),
    'baby': case(256, 65, 6, 6, 384, 8, micro_steps=2, dropout=0.2),
    'recipe': case(256, 65, 4, 4, 128, 32, dtype='bfloat16', optimizer='muon', **MODERN),
    'checkpointing': case(256, 65, 8, 6, 384, 8, checkpoint_activations=True),
    'vocabulary': case(256, 50304, 2, 4, 128, 8),
    'vocabulary, bfloat16': case(128, 50304, 2, 4, 256, 8, micro_steps=2, dtype='bfloat16'),
    'lora': case(128, 8192, 6, 8, 512, 16, lora_rank=8),
    'swiglu': case(256, 1000, 4, 8, 512, 8, mlp='swiglu', qk_norm=True),
    'lora, checkpointing': case(256, 8192, 8, 8, 512, 8, lora_rank=8, checkpoint_activations=True),
}


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize('name', [name if name == 'small' else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CASES])
def test_the_planned_peak_is_that_of_a_process(name):
    values = CASES[name]
    values = {**values, 'config': GPTConfig(**values['config']), 'dtype': getattr(torch, values['dtype'])}
    assert footprint(**values).total == pytest.approx(measured_peak(CASES[name]), rel=0.1)


def test_a_deep_model_is_extrapolated_exactly():
    deep, shallow = (footprint(GPTConfig(32, 65, n, 2, 32), 4, optimizer='muon') for n in (5, 3))
    from lib.training.footprint import _trace
    exact = _trace(GPTConfig(32, 65, 5, 2, 32), 4, 1, torch.float32, 'muon', 0, False, 'cpu')
    assert deep.total == pytest.approx(exact.total, rel=0.01) and deep.total > shallow.total


def test_weights_gradients_and_adamws_state_are_16_bytes_per_parameter():
    config = GPTConfig(32, 65, 2, 2, 32)
    found = footprint(config, 1)
    assert found.weights + found.gradients + found.optimizer == pytest.approx(16 * plan.count(config), rel=0.02)


def test_each_way_to_save_memory_saves_it():
    config = GPTConfig(128, 65, 4, 4, 128)
    plain = footprint(config, 16).total
    for name, saved in {'batch': footprint(config, 8), 'lora': footprint(config, 16, lora_rank=4),
                        'checkpointing': footprint(config, 16, checkpoint_activations=True)}.items():
        assert saved.total < plain, name


def test_fsdp_divides_what_ddp_keeps_twice():
    config = GPTConfig(32, 65, 12, 2, 64)
    ddp, fsdp = (plan.memory(job(config, gpus=4, micro_steps=4, parallel=name), 'cuda') for name in ('ddp', 'fsdp'))
    one = plan.memory(job(config), 'cuda')
    assert ddp.gradients == 2 * one.gradients and fsdp.optimizer == ddp.optimizer / 4 and fsdp.total < ddp.total


def test_under_fsdp_a_rank_has_all_gradients_only_while_it_adds_up_micro_batches():
    config = GPTConfig(32, 65, 12, 2, 64)
    once, twice = (plan.memory(job(config, gpus=4, micro_steps=n, parallel='fsdp'), 'cuda').gradients for n in (4, 8))
    whole = plan.memory(job(config), 'cuda').gradients
    assert twice == 1.25 * whole and once < whole / 2


def test_the_largest_batch_fits_and_the_next_does_not():
    run = job(GPTConfig(64, 65, 2, 2, 64), batch_size=2, micro_steps=30)  # 60 sequences per update
    budget = plan.memory(replace(run, batch_size=13, micro_steps=1), 'cpu').total
    assert plan.largest_batch(run, 'cpu', budget) == 12
    assert plan.largest_batch(run, 'cpu', 1) == 0


# time

def test_short_contexts_give_a_timed_run_more_updates():
    plain = job(GPTConfig(64, 65, 1, 1, 8), max_iters=0, max_minutes=1.0, eval_interval=10**9)
    short = replace(plain, contexts=[(0.5, 16), (0.5, 64)])
    assert plan.minutes_from(plain, {64: 1.0}, 0.0)[1] == pytest.approx(60)
    assert plan.minutes_from(short, {16: 0.25, 64: 1.0}, 0.0)[1] == pytest.approx(30 / 0.25 + 30)


def test_the_line_of_train_py_has_time_memory_and_epochs():
    run = job(GPTConfig(100, 65, 1, 1, 8), max_iters=1000, eval_interval=10**9, eval_iters=1, train_tokens=10_000)
    minutes, _, line = plan.one_line(run, 0.6, n_bytes=2.5e9)
    assert minutes == pytest.approx(10, rel=0.01)
    assert line.startswith('plan: about 10m') and '1k updates, 200k tokens (20 epochs), 2.50 GB of memory' in line


def test_numbers_are_written_without_exponents():
    assert [plan.about(value) for value in (0.0021, 0.21, 1.84, 9.96, 18.38, 99.7, 1123.55)] == [
        '0.0021', '0.21', '1.8', '10', '18', '100', '1,124']


def test_many_epochs_of_a_short_text_are_a_plain_number():  # the Three Character Classic has 1,367 tokens
    run = job(GPTConfig(100, 65, 1, 1, 8), max_iters=2000, eval_interval=10**9, eval_iters=1, train_tokens=200)
    assert '(2,000 epochs)' in plan.one_line(run, 0.6)[2] and ', 2,000 epochs of' in plan.data_sentence(run, 4e5)


def test_a_resumed_run_has_the_rest_to_do():
    run = job(GPTConfig(100, 65, 1, 1, 8), max_iters=1000, eval_interval=10**9)
    assert plan.one_line(run, 0.6, updates_done=500)[0] == pytest.approx(5, rel=0.01)


def test_a_run_of_hours_is_warned_of_with_a_setting_that_shortens_it():
    assert plan.long_run_warning(59) == ''
    assert '10h00m' in plan.long_run_warning(600) and '--max_minutes' in plan.long_run_warning(600)


def test_a_large_model_on_a_gpu_is_not_advised_to_train_for_three_minutes():
    large, small = job(GPTConfig(1024, 50304)), job(GPTConfig(8, 16, 1, 1, 8))
    assert plan.long_run_warning(600, job=large, device_type='cuda') == ''
    assert plan.long_run_warning(600, job=large, device_type='cpu') != ''
    assert plan.long_run_warning(600, job=small, device_type='cuda') != ''


def test_a_probe_leaves_weights_gradients_and_random_numbers_as_they_were():
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 16, 1, 1, 8, dropout=0.5)).train()
    opt = make_optimizer('adamw', model.param_groups(0.1), 1e-3, 1e-3, (0.9, 0.95), 'cpu')
    before = [p.clone() for p in model.parameters()]
    state, idx = torch.get_rng_state(), torch.zeros(2, 8, dtype=torch.int64)
    rt = Runtime(torch.device('cpu'), torch.float32, False, '')
    seconds, n_bytes = trial.probe(lambda: model(idx, idx)[1].backward(), rt, model, opt)
    assert seconds > 0 and n_bytes > 2**20
    assert torch.equal(torch.get_rng_state(), state) and all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())


def test_the_model_that_is_timed_is_compiled_by_a_step_that_gives_its_loss(monkeypatch):
    steps = []
    monkeypatch.setattr(trial, 'compile_or_fall_back', lambda model, rt, explicit, step: steps.append(step) or model)
    config, rt = GPTConfig(8, 16, 1, 1, 8), Runtime(torch.device('cpu'), torch.float32, False, '')
    assert trial.time_run(job(config), rt, seconds=0.01).updates[8] > 0
    assert float(steps[0](GPT(config))) > 0


@pytest.mark.slow
def test_the_time_measured_here_is_that_of_training(run, workdir):
    flags = [*TINY, '--n_embd=128', '--n_layer=4', '--block_size=64', '--batch_size=16', '--max_iters=100',
             '--eval_interval=1000', '--out_dir=timed']
    out = run('plan.py', *flags).out
    planned = float(out.partition(' ms per update')[0].split()[-1].replace(',', ''))
    assert run('train.py', *flags).status == 0
    log = [json.loads(line) for line in open('timed/log.jsonl', encoding='utf-8')]
    updates = sorted(4 * 256 / record['tok_s'] * 1000 for record in log if record.get('iter', 0) > 5)
    assert planned == pytest.approx(updates[len(updates) // 2], rel=0.2)


# cards

@pytest.mark.parametrize('text, card', [('3090', 'RTX 3090'), ('a100', 'A100'), ('t4', 'T4'), ('h100', 'H100'),
                                        ('gtx 1060', 'GTX 1060'), ('rtx4070ti', 'RTX 4070 Ti'), ('V100', 'V100')])
def test_a_card_is_found_by_the_name_that_people_use(text, card):
    assert cards.find_card(text) == card


def test_an_unknown_card_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match='h999.*expected here.*RTX 3090'):
        cards.find_card('h999')


def test_every_card_with_a_peak_has_a_memory():
    assert cards.MEMORY_GB.keys() == PEAK_TFLOPS.keys()


def test_the_mfu_of_a_card_without_a_timed_training_is_called_a_guess():
    assert 'guess' in cards.mfu_of('T4', 124e6).source
    assert cards.mfu_of('A100', 11e6).mfu < cards.mfu_of('A100', 124e6).mfu


# the command

def days(out):
    line = next(line for line in out.splitlines() if line.startswith('time'))
    d, h = line.split()[1].rstrip('h').split('d')
    return int(d) + int(h) / 24


def test_the_62_days_that_a_reader_found_out_after_ten_hours(run, workdir):
    found = run('plan.py', 'config/train_gpt2.py', '--on=3090')
    assert found.status == 0 and days(found.out) == pytest.approx(62.5, rel=0.01)


@pytest.mark.slow
def test_a_gtx_1060_needs_more_than_the_year_of_a_tutorial_even_at_its_peak(run, workdir):
    assert 365 < days(run('plan.py', 'config/train_gpt2.py', '--on=gtx 1060', '--mfu=1').out) < 2 * 365


def test_the_page_of_a_prepared_dataset(run, workdir):
    found = run('plan.py', *TINY, '--on=t4', '--max_iters=1000', '--price=0.5', '--gpus=1')
    assert found.status == 0 and '16 epochs of train.bin' in found.out
    assert 'fits 16.00 GB, of which tensors can fill 13.92 GB' in found.out
    assert 'at 0.5 per card and hour' in found.out and 'a guess' in found.out


def test_a_config_file_sees_the_card_as_cuda(run, workdir):
    (workdir / 'c.py').write_text("n_embd = 8 if device == 'cpu' else 32\n", encoding='utf-8')
    assert 'C = 32' in run('plan.py', 'c.py', *[f for f in TINY if 'n_embd' not in f and 'device' not in f],
                           '--on=a100').out


@pytest.mark.parametrize('flags, told', [
    (['--on=h999'], 'h999'), (['--gpus=3', '--on=a100', '--gradient_accumulation_steps=4'], 'divisible by gpus=3'),
    (['--n_head=3'], 'n_head'), (['--batchsize=3'], 'batch_size')])
def test_mistakes_are_reported_in_one_line(run, workdir, flags, told):
    found = run('plan.py', *TINY, *flags)
    assert found.status in (1, 2) and told in found.last_error and 'Traceback' not in found.err


def test_help_lists_the_own_settings_and_those_of_train_py(run):
    out = run('plan.py', '--help').out
    assert '--price' in out and '--n_embd' in out and 'From train.py' in out


# threads

@pytest.fixture
def two_threads(monkeypatch):
    """Two threads, of which one alone takes a tenth of the time, on a machine where another program runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.delenv('MKL_NUM_THREADS', raising=False)
    monkeypatch.setattr(os, 'getloadavg', lambda: (1.2, 0.0, 0.0), raising=False)
    Waiting.now = 0.0
    monkeypatch.setattr(trial, 'time', SimpleNamespace(perf_counter=lambda: Waiting.now))
    yield
    torch.set_num_threads(before)


class Waiting(GPT):
    """A model whose forward pass takes seconds[number of threads] of a clock that nothing else advances."""

    def forward(self, idx, targets):
        Waiting.now += self.seconds[torch.get_num_threads()]
        return super().forward(idx, targets)


def choose(seconds, chosen=-1):
    """Return (the choice, torch's threads after it, the printed lines); seconds: {threads: seconds of a step}."""
    said, rt = [], Runtime(torch.device('cpu'), torch.float32, False, '')
    model, idx = Waiting(GPTConfig(8, 8, 1, 1, 8)), torch.zeros(2, 8, dtype=torch.long)
    model.seconds = seconds
    chosen = trial.choose_threads(model, (idx, idx), rt, chosen, said.append)
    assert all(p.grad is None for p in model.parameters())
    return chosen, torch.get_num_threads(), said


def test_a_thread_that_another_program_holds_up_is_left_out(two_threads):
    chosen, threads, said = choose({1: 0.01, 2: 0.1})
    assert (chosen, threads) == (1, 1) and said == ['other programs use the CPUs: 1 of 2 threads is faster']


def test_all_threads_are_used_where_they_are_faster(two_threads):
    assert choose({1: 0.1, 2: 0.01}) == (0, 2, [])


def test_an_idle_machine_is_not_timed(two_threads, monkeypatch):
    monkeypatch.setattr(os, 'getloadavg', lambda: (0.1, 2.0, 2.0))
    assert choose({}) == (0, 2, [])


def test_a_large_model_is_not_timed(two_threads, monkeypatch):
    monkeypatch.setattr(GPT, 'flops_per_token', lambda self, context: 1e10)
    assert choose({}) == (0, 2, [])


def test_a_resumed_run_keeps_its_number_of_threads(two_threads):
    assert choose({}, chosen=1) == (1, 1, ['computing with 1 of 2 threads, as this run did before'])
    torch.set_num_threads(2)
    assert choose({}, chosen=0) == (0, 2, [])
    assert choose({}, chosen=500) == (500, 2, [])  # on a machine with fewer CPUs


def test_the_environment_decides_the_number_of_threads(two_threads, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '2')
    assert choose({}) == (0, 2, [])
