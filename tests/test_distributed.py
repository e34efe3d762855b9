"""lib/machine/distributed.py: the arithmetic of several ranks, and how they fail. Two processes, gloo on a CPU."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import TINY, write_dataset
from kit import REPO, Ranks, differences, free_port, load, trained_part

from configurator import Settings, UserError
from lib.machine import distributed, runtime
from lib.machine.runtime import Runtime
from lib.training import optim
from lib.training.log import read_log
from lib.weights import checkpoint
from model import GPT, GPTConfig

FLAGS = [*TINY, '--gradient_accumulation_steps=4', '--max_iters=10', '--eval_interval=5', '--lr_decay_iters=20',
         '--dist_timeout=200', '--eval_iters=3']
BOTH = pytest.mark.parametrize('parallel', ['ddp', 'fsdp'])

# Hooks: code that a rank runs before the script
KEEP_GRADIENTS = """
import torch
from lib.machine import distributed
from lib.training import optim
from lib.training.log import read_log
real, calls = optim.clip_grad_norm_, []
def clip_grad_norm_(params, most):
    params = list(params)
    if not calls:
        calls.append([distributed.full_state_dict(p.grad.detach()).clone() for p in params])
        torch.save(calls[0], f'gradients{rank}.pt')
    return real(params, most)
optim.clip_grad_norm_ = clip_grad_norm_
"""
PRINT_SHARDS = """
from lib.machine import distributed
shard_or_move = distributed.shard_or_move
def print_shards(*args):
    model = shard_or_move(*args)
    here = sum((p.to_local() if hasattr(p, 'to_local') else p).numel() for p in model.parameters())
    print('parameters here', here, 'of', model.get_num_params(False), flush=True)
    return model
distributed.shard_or_move = print_shards
"""
PRINT_START = """
import torch
from lib.machine import compiler
from lib.training import trackers
real_compile, real_open = compiler.compile_or_fall_back, trackers.open_trackers
def compile_or_fall_back(*args):
    print('micro-steps left', args[-1](1.0), flush=True)
    return real_compile(*args)
def open_trackers(*args):
    print('seed', torch.initial_seed(), flush=True)
    return real_open(*args)
compiler.compile_or_fall_back, trackers.open_trackers = compile_or_fall_back, open_trackers
"""
CHUNKED_LOSS = """
import kernels
kernels.CHUNK = 40  # two tokens of 16 logits at a time
"""
IN_THE_LOOP = """
from lib.training import guard
begin = guard.Guard.__init__
def begin_loop(*args):
    calls.clear()  # the calls that compiled and timed the model
    begin(*args)
guard.Guard.__init__ = begin_loop
"""
ASK_SHORTLY = """
from lib.machine import distributed
distributed.unresponsive_ranks.__defaults__ = (0.3,)  # seconds; a rank that has ended never answers
"""
AT_BATCH = ASK_SHORTLY + IN_THE_LOOP + """
import os, signal
from lib.text import dataset
import torch
real, calls = dataset.Split.batch, []
def batch(self, *args):
    if torch.is_grad_enabled():
        calls.append(0)
        if rank == {rank} and len(calls) == {n}:
            {do}
    return real(self, *args)
dataset.Split.batch = batch
"""


def at_batch(n, rank, do):
    """Return a hook that does something on one rank while it reads its training batch number n, counted from 1."""
    return AT_BATCH.format(n=n, rank=rank, do=do)


def two(workdir, *flags, wait_for=2, **options):
    """Run train.py as two ranks; returns [(status, out, err), ...]."""
    return Ranks(2, 'train.py', *FLAGS, *flags, cwd=workdir, **options).wait(ranks=wait_for)


def ended_well(outcomes):
    assert [status for status, _, _ in outcomes] == [0, 0], [err for _, _, err in outcomes]


def losses(out_dir):
    with open(f'{out_dir}/log.jsonl', encoding='utf-8') as f:
        records = [json.loads(line) for line in f]
    return [r['loss'] for r in records if 'iter' in r], [r['val_loss'] for r in records if 'step' in r]


def alike(a, b):
    """True where two runs logged the same losses to 1e-4."""
    return all(len(x) == len(y) and max(abs(p - q) for p, q in zip(x, y)) < 1e-4
               for x, y in zip(losses(a), losses(b)))


@pytest.fixture(scope='module')
def folders():
    """Where the runs that several tests share are kept: a working directory per way to train."""
    return {}


@pytest.fixture
def trained(run, workdir, monkeypatch, folders):
    """trained('ddp') returns the folder and the ranks' outcomes of a run of two ranks; trained('one'), of one process.

    'fsdp' is another, and 'bf16', one update of DDP with bf16_gradients. Each is trained once for all tests of this
    file. The first update's gradients are in gradients*.pt.
    """
    def train(kind):
        if kind not in folders:
            flags = [*FLAGS, f'--out_dir=trained-{kind}', '--peak_tflops=1']
            if kind == 'one':
                monkeypatch.setattr(optim, 'clip_grad_norm_', optim.clip_grad_norm_)  # undone later
                exec(KEEP_GRADIENTS, {'rank': 'alone'})
                outcomes = [(run('train.py', *flags).status, '', '')]
            else:
                hook = CHUNKED_LOSS + PRINT_SHARDS + PRINT_START + KEEP_GRADIENTS
                how = ['--bf16_gradients', '--max_iters=1'] if kind == 'bf16' else [f'--parallel={kind}']
                outcomes = two(workdir, *flags[len(FLAGS):], *how, hook=hook)
            assert {status for status, _, _ in outcomes} == {0}, [err for _, _, err in outcomes]
            folders[kind] = workdir, outcomes
        return folders[kind]
    return train


@BOTH
def test_two_ranks_train_as_one_does(trained, parallel):
    alone, together = (trained(kind)[0] / f'trained-{kind}' for kind in ('one', parallel))
    one, both = load(alone / 'last.pt'), load(together / 'last.pt')
    assert alike(alone, together) and len(losses(together)[0]) == 10
    assert one['model'].keys() == both['model'].keys() and one['model_args'] == both['model_args']
    for name, p in one['model'].items():
        torch.testing.assert_close(both['model'][name], p, rtol=1e-3, atol=1e-4)


@BOTH
def test_gradients_of_two_ranks_are_the_mean_over_the_global_batch(trained, parallel):
    alone = load(trained('one')[0] / 'gradientsalone.pt')
    first, second = (load(trained(parallel)[0] / f'gradients{rank}.pt') for rank in (0, 1))
    for a, b, c in zip(alone, first, second, strict=True):
        assert float((a - b).norm()) <= 1e-6 * float(a.norm()) and torch.equal(b, c)


def test_mfu_is_the_fraction_of_the_peak_of_all_devices_together(trained):
    folder = trained('ddp')[0] / 'trained-ddp'
    flops = GPT(GPTConfig(**load(folder / 'last.pt')['model_args'])).flops_per_token(8)
    records = [r for r in read_log(folder / 'log.jsonl') if 'iter' in r]
    assert [r['mfu'] for r in records] == [pytest.approx(flops * r['tok_s'] / 2 / 1e12) for r in records] != []


def test_gradients_that_two_ranks_send_in_bfloat16_differ_by_its_rounding(trained):
    alone = load(trained('one')[0] / 'gradientsalone.pt')
    first, second = (load(trained('bf16')[0] / f'gradients{rank}.pt') for rank in (0, 1))
    for a, b, c in zip(alone, first, second, strict=True):
        assert b.dtype == torch.float32 and torch.equal(b, c)
        assert 1e-4 < float((a - b).norm() / a.norm()) < 1e-2


@pytest.mark.parametrize('parallel, fraction', [('ddp', 1.0), ('fsdp', 0.5)])
def test_under_fsdp_a_rank_holds_half_of_the_model(trained, parallel, fraction):
    lines = [line.split() for _, out, _ in trained(parallel)[1] for line in out.splitlines()
             if line.startswith('parameters here')]
    here, total = [int(words[2]) for words in lines], int(lines[0][4])
    assert sum(here) == 2 * fraction * total and max(here) < 1.1 * fraction * total


def test_each_rank_draws_its_own_dropout_and_computes_its_share_of_the_micro_steps(trained):
    for rank, (_, out, _) in enumerate(trained('ddp')[1]):
        assert f'seed {1337 + rank}' in out.splitlines() and 'micro-steps left 20.0' in out.splitlines()


GATHER = """
import sys, time, weakref, torch, torch.distributed as dist
from types import SimpleNamespace
from torch.distributed.tensor import DTensor
from lib.machine import distributed
from model import GPT, GPTConfig
dist.init_process_group('gloo', world_size=2, rank=rank, init_method=f'tcp://127.0.0.1:{sys.argv[1]}')
net = GPT(GPTConfig(8, 16, 2, 1, 4))
net = distributed.shard_or_move(net, SimpleNamespace(world_size=2, device=torch.device('cpu'), dtype=None), 'fsdp')
real, whole, most = DTensor.full_tensor, set(), 0
def full_tensor(self):
    global most
    until = time.monotonic() + 5
    while rank and whole and time.monotonic() < until:  # gloo's thread lets go of a tensor a little later
        time.sleep(0.01)
    tensor = real(self)
    whole.add(key := tensor.untyped_storage()._cdata)
    most = max(most, len(whole))
    weakref.finalize(tensor.untyped_storage(), whole.discard, key)
    return tensor
DTensor.full_tensor = full_tensor
state = distributed.full_state_dict(net, keep=rank == 0)
tied = state['lm_head.weight'] is state['transformer.wte.weight']
print(most, len(list(net.parameters())), len(state), sum(t is not None for t in state.values()), tied)
dist.destroy_process_group()
sys.exit()
"""


def test_saving_under_fsdp_gives_rank_0_each_tensor_once_and_the_others_one_at_a_time(workdir):
    outcomes = Ranks(2, 'train.py', free_port(), cwd=workdir, hook=GATHER).wait()
    assert [(status, err) for status, _, err in outcomes] == [(0, '')] * 2
    (most, n_params, n_names, kept, tied), others = (out.split() for _, out, _ in outcomes)
    assert most == n_params and kept == n_names and tied == 'True'  # the head is the embedding
    assert others[0] == '1' and others[3] == '0'


@pytest.mark.parametrize('path', [('one', 'fsdp', 'ddp', 'one'), ('one', 'ddp', 'fsdp', 'one')])
def test_a_run_moves_between_one_process_ddp_and_fsdp(run, workdir, trained, path):
    for i, kind in enumerate(path):
        flags = ['--init_from=auto', f'--max_iters={2 * i + 2}']
        if kind == 'one':
            assert run('train.py', *FLAGS, *flags).status == 0
        else:
            outcomes = two(workdir, *flags, f'--parallel={kind}')
            ended_well(outcomes)
            assert f'resuming from iter {2 * i} (out/last.pt)' in outcomes[0][1]
    straight, moved = losses(trained('one')[0] / 'trained-one')[0], losses('out')[0]
    assert len(moved) == 8 and max(abs(a - b) for a, b in zip(straight, moved)) < 1e-4


@BOTH
def test_resuming_two_ranks_is_exact_with_dropout(workdir, parallel):
    flags = ['--dropout=0.2', f'--parallel={parallel}', '--max_iters=4', '--eval_interval=3']
    ended_well(two(workdir, *flags, '--out_dir=whole'))
    (workdir / 'out').mkdir()
    shutil.copyfile('whole/last.prev.pt', 'out/last.pt')  # as if the run had ended at iter 3
    outcomes = two(workdir, *flags, '--init_from=resume')
    ended_well(outcomes)
    assert 'resuming from iter 3 (out/last.pt)' in outcomes[0][1]
    assert differences(trained_part(load('whole/last.pt')), trained_part(load('out/last.pt'))) == []


@pytest.mark.parametrize('n_batches', [(2, 3), (0, 1), (3, 3), (0, 0)])
def test_the_rank_with_fewer_batches_gets_none_until_all_have_run_out(n_batches):
    ranks = [Runtime(torch.device('cpu'), torch.float32, False, '', rank, rank, 2) for rank in range(2)]
    barrier, has_batch = threading.Barrier(2), [0, 0]

    def all_reduce_max(rank, number):  # over two threads in place of two processes
        has_batch[rank] = number
        barrier.wait()
        most = max(has_batch)
        barrier.wait()
        return (most,)

    found = [None, None]

    def iterate(rank):
        ranks[rank].all_reduce_max = lambda number: all_reduce_max(rank, number)
        found[rank] = list(ranks[rank].pad_to_longest_rank(range(1, n_batches[rank] + 1)))
    threads = [threading.Thread(target=iterate, args=(rank,), daemon=True) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    most = max(n_batches)
    assert found == [[*range(1, n + 1), *[None] * (most - n)] for n in n_batches]


TORCHRUN = {'RANK': '1', 'WORLD_SIZE': '2', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'localhost', 'MASTER_PORT': '29500'}


@pytest.fixture
def environ(monkeypatch):
    """environ({...}) sets the variables that torchrun sets, and no others of them."""
    def change(values):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
    return change


@pytest.mark.parametrize('values, expected', [({}, (0, 1)), ({'WORLD_SIZE': '1'}, (0, 1)), (TORCHRUN, (1, 2)),
                                              ({'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0'}, (0, 1))])
def test_the_environment_of_torchrun_is_read(environ, values, expected):
    environ(values)
    assert distributed.rank_and_world() == expected


# Faults

@pytest.mark.parametrize('change, problem', [
    ({'RANK': 'x'}, "RANK is 'x'"), ({'WORLD_SIZE': 'abc'}, "WORLD_SIZE is 'abc'"), ({'LOCAL_RANK': 'x'}, "LOCAL_RANK"),
    ({'RANK': ''}, "RANK is ''"), ({'RANK': '-1'}, "RANK is '-1'"), ({'RANK': '1.0'}, "RANK is '1.0'"),
    ({'RANK': '9' * 5000}, "RANK is '999"), ({'RANK': '2'}, 'RANK=2 and WORLD_SIZE=2'),
    ({'WORLD_SIZE': '0'}, 'RANK=1 and WORLD_SIZE=0'), ({'RANK': None}, 'WORLD_SIZE=2 but no RANK'),
    ({'WORLD_SIZE': None}, 'RANK=1 but no WORLD_SIZE'), ({'LOCAL_RANK': None}, 'WORLD_SIZE=2 but no LOCAL_RANK'),
    ({'MASTER_ADDR': None, 'MASTER_PORT': None}, 'no MASTER_ADDR, no MASTER_PORT'),
    ({'MASTER_PORT': 'x'}, "MASTER_PORT is 'x'")])
def test_a_malformed_environment_is_refused_in_one_line(environ, change, problem):
    environ({name: value for name, value in {**TORCHRUN, **change}.items() if value is not None})
    with pytest.raises(UserError) as error:
        distributed.rank_and_world()
    assert problem in error.value.message and 'torchrun' in error.value.message and '\n' not in error.value.message


@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_a_rank_without_a_world_ends_every_script(run, workdir, environ, script):
    environ({'RANK': '1'})
    done = run(script, *(TINY if script == 'train.py' else ['--device=cpu']))
    assert done.status and done.last_error.startswith('error: the environment has RANK=1 but no WORLD_SIZE')


def test_more_ranks_than_gpus_are_refused(environ, monkeypatch):
    environ(TORCHRUN)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    settings = Settings({'device': 'cuda', 'dtype': 'float32', 'compile': False, 'seed': 1})
    with pytest.raises(UserError, match='LOCAL_RANK is 1, but this machine has 1 CUDA devices'):
        runtime.start(settings)


@BOTH
def test_nan_on_one_rank_stops_all_at_the_same_update_and_names_it(workdir, parallel):  # fault 39
    poison = IN_THE_LOOP + """
import model
real, calls = model.GPT.forward, []
def forward(self, idx, targets=None, cache=None, return_logits=False):
    logits, loss = real(self, idx, targets, cache)
    if self.training and rank == 1:
        calls.append(0)
        if len(calls) == 7:  # in the fourth update of two micro-steps per rank
            loss = loss * float('nan')
    return logits, loss
model.GPT.forward = forward
"""
    outcomes = two(workdir, f'--parallel={parallel}', hook=poison)
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert 'rank 1: the loss is nan' in outcomes[1][2] and 'rank 0: the loss is nan' not in outcomes[0][2]
    assert all(' at iter 3 ' in err and 'Traceback' not in err for _, _, err in outcomes)
    assert load('out/last.pt')['iter_num'] == 0


def test_a_signal_to_one_rank_stops_both_at_one_step_with_one_save(workdir):  # fault 45
    outcomes = two(workdir, '--eval_interval=100', hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGTERM)'))
    assert [status for status, _, _ in outcomes] == [143, 143]
    assert outcomes[0][1].count('SIGTERM: saved iter 3 to out') == 1 and 'saved' not in outcomes[1][1]
    assert load('out/last.pt')['iter_num'] == 3


def test_a_killed_rank_ends_the_others_within_seconds(workdir):  # fault 49
    began = time.monotonic()
    outcomes = two(workdir, hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGKILL)'))
    assert outcomes[0][0] == 1 and time.monotonic() - began < 150  # the time-out is 200 s
    assert 'rank 0: lost the connection to other ranks' in outcomes[0][2] and 'not responding: 1.' in outcomes[0][2]


def test_a_rank_that_raises_is_named_and_ends_the_others(workdir):  # fault 49
    outcomes = two(workdir, hook=at_batch(5, 1, 'raise ZeroDivisionError("a bug")'))
    assert outcomes[1][0] == 1 and 'ZeroDivisionError: a bug' in outcomes[1][2]
    assert outcomes[0][0] == 1 and 'not responding: 1.' in outcomes[0][2]


def test_a_stopped_rank_ends_the_others_at_the_timeout(workdir):  # fault 50
    outcomes = two(workdir, '--dist_timeout=5', wait_for=1, hook=at_batch(5, 1, 'os.kill(os.getpid(), signal.SIGSTOP)'))
    assert outcomes[0][0] == 1 and 'not responding: 1.' in outcomes[0][2] and 'Traceback' not in outcomes[0][2]


FULL_DISK = """
import torch
real = torch.save
def save(state, f, **options):  # torch's own collectives use it too
    if rank == 0 and isinstance(state, dict) and state.get('iter_num', -1) {when}:
        raise OSError(28, 'No space left on device')
    return real(state, f, **options)
torch.save = save
"""


def test_a_save_that_fails_on_rank_0_ends_no_run_before_the_last_one(workdir):  # fault 51
    outcomes = two(workdir, hook=FULL_DISK.format(when='in (5, 10)'))
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert outcomes[0][2].count('could not write out/last.pt') == 2 and len(losses('out')[0]) == 10
    assert 'rank 0: could not write out/last.pt' in outcomes[0][2] and 'rank 0 could not save' in outcomes[1][2]
    assert load('out/last.pt')['iter_num'] == 0


def test_a_rank_without_the_data_reports_it_and_the_others_end(workdir):  # fault 53
    hide = "import os\nif rank == 1:\n    os.makedirs('elsewhere', exist_ok=True); os.chdir('elsewhere')\n"
    outcomes = two(workdir, '--dist_timeout=3', hook=ASK_SHORTLY + hide)
    assert outcomes[1][0] == 2 and 'error: rank 1: no dataset data/tiny' in outcomes[1][2]
    assert outcomes[0][0] == 1 and 'rank 0: lost the connection to other ranks' in outcomes[0][2]


def test_ranks_that_see_different_files_are_refused(run, workdir):  # a folder that the machines do not share
    assert run('train.py', *FLAGS, '--max_iters=2').status == 0
    hide = """
import os, shutil
if rank == 1:
    shutil.copytree('data', 'elsewhere/data'); os.chdir('elsewhere')
"""
    outcomes = two(workdir, '--init_from=auto', hook=hide)
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert "rank 1 has None; every machine must see the same files" in outcomes[0][2]


def test_ranks_with_different_datasets_of_one_name_are_refused(workdir):
    write_dataset(workdir / 'elsewhere' / 'data' / 'tiny', list(range(16)) * 10)
    outcomes = two(workdir, '--out_dir=' + str(workdir / 'out'), hook="import os\nif rank: os.chdir('elsewhere')\n")
    assert [status for status, _, _ in outcomes] == [1, 1]
    assert 'the dataset differs: rank 0 has' in outcomes[0][2] and 'must see the same files' in outcomes[0][2]


@pytest.mark.parametrize('flag', ['--lora_rank=2', '--bf16_gradients'])
def test_what_works_with_ddp_only_is_refused_with_fsdp(run, workdir, flag):
    done = run('train.py', *TINY, '--parallel=fsdp', flag)
    assert done.status == 2 and 'parallel=ddp only' in done.last_error


# What the ranks exchange

COUNT = IN_THE_LOOP + """
import json, torch, torch.distributed as dist
calls = counts = {}
def count(module, name):
    real = getattr(module, name)
    def counted(*args, **kwargs):
        counts[name] = counts.get(name, 0) + 1
        return real(*args, **kwargs)
    setattr(module, name, counted)
count(dist, '_broadcast_coalesced')
import torch.distributed.fsdp._fully_shard._fsdp_param_group as group
count(group, 'foreach_reduce')
from lib.machine import distributed
finish = distributed.finish
distributed.finish = lambda: (json.dump(counts, open(f'counts{rank}', 'w')), finish())
"""


@pytest.mark.parametrize('micro_steps', [2, 8])
def test_fsdp_reduces_gradients_once_per_update_whatever_the_number_of_micro_batches(workdir, micro_steps):
    flags = ['--max_iters=3', '--eval_interval=100', '--parallel=fsdp', f'--gradient_accumulation_steps={micro_steps}']
    outcomes = Ranks(2, 'train.py', *FLAGS, *flags, cwd=workdir, hook=COUNT).wait()
    assert [status for status, *_ in outcomes] == [0, 0], outcomes
    assert json.loads((workdir / 'counts0').read_text(encoding='utf-8'))['foreach_reduce'] == 3 * 3  # 2 blocks, rest


HALF = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
import torch.distributed.fsdp._fully_shard._fsdp_param_group as group
from lib.machine import distributed
from model import GPT, GPTConfig
dist.init_process_group('gloo', world_size=2, rank=rank, init_method=f'tcp://127.0.0.1:{sys.argv[1]}')
gather, dtypes = group.foreach_all_gather, set()
def counted(params, *args):
    dtypes.update(tensor.dtype for p in params for tensor in p.all_gather_inputs)
    return gather(params, *args)
group.foreach_all_gather = counted
def gradients(norm, dtype, bf16_residual=False):
    dtypes.clear()
    torch.manual_seed(1)
    net = GPT(GPTConfig(8, 16, 2, 1, 8, bias=True, norm=norm))
    torch.nn.init.normal_(net.transformer.h[0].mlp.c_proj.weight)
    net.set_compute_dtype(torch.bfloat16, bf16_residual)
    rt = SimpleNamespace(world_size=2, device=torch.device('cpu'), dtype=dtype)
    net = distributed.shard_or_move(net, rt, 'fsdp')
    for last in (False, False, True):
        distributed.set_grad_sync(net, last)
        idx = torch.randint(16, (4, 8))
        net(idx, idx)[1].backward()
    return [distributed.full_tensor(p.grad) for p in net.parameters()], sorted(map(str, dtypes))
half, with_half = gradients('rmsnorm', torch.bfloat16)
full, with_full = gradients('rmsnorm', torch.float32)
print(all(map(torch.equal, half, full)), {p.dtype for p in half}, with_half, with_full,
      gradients('layernorm', torch.bfloat16)[1], gradients('layernorm', torch.bfloat16, bf16_residual=True)[1])
dist.destroy_process_group()
sys.exit()
"""


def test_fsdp_sends_matrices_in_bfloat16_and_the_gradients_are_those_of_float32(workdir):
    outcomes = Ranks(2, 'train.py', free_port(), cwd=workdir, hook=HALF).wait()
    assert [(status, err) for status, _, err in outcomes] == [(0, '')] * 2
    # the embedding is float32; so is a layer whose norms have weights, unless the residual stream is bfloat16
    assert outcomes[0][1] == ("True {torch.float32} ['torch.bfloat16', 'torch.float32'] ['torch.float32'] "
                              "['torch.float32'] ['torch.bfloat16', 'torch.float32']\n")


def test_ddp_does_not_send_the_table_of_rotary_embeddings_at_every_update():
    """A buffer would be sent before each forward pass."""
    class Model(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer('rope', torch.zeros(4), persistent=False)
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        rt = Runtime(torch.device('cpu'), torch.float32, False, '', world_size=2)
        ddp = distributed.wrap_ddp(Model(), rt, 'ddp')
        assert not ddp.will_sync_module_buffers() and ddp.gradient_as_bucket_view
        assert not ddp._comm_hooks  # gradients are sent unchanged
    finally:
        torch.distributed.destroy_process_group()


# Muon, and how the ranks share an evaluation

RECORD_EVALUATIONS = """
import torch
from lib.text import dataset
real = dataset.Split.batch
def batch(self, starts, block_size):
    if not torch.is_grad_enabled():
        with open(f'evaluated-{rank}', 'a', encoding='utf-8') as file:
            print(self.path.stem, block_size, *starts, file=file)
    return real(self, starts, block_size)
dataset.Split.batch = batch
"""


# bfloat16 products round so coarsely that two orders of a sum give visibly different updates
EXACT_MUON = '\nfrom lib.training import optim\noptim.fast_bf16 = lambda device: False\n'


@pytest.fixture
def trained_with_muon(workdir, folders):
    """trained_with_muon(kind) returns where a run worked: 'one' process, or two ranks with 'ddp' or 'fsdp'.

    It was resumed after the fifth of ten updates, and from then on it recorded what it evaluated.
    """
    def train(kind):
        if f'muon {kind}' not in folders:
            folder, n = workdir / kind, 1 if kind == 'one' else 2
            shutil.copytree(workdir / 'data', folder / 'data')
            flags = [*FLAGS, '--optimizer=muon', '--eval_iters=4', f'--parallel={"fsdp" if kind == "fsdp" else "ddp"}']
            for part, hook in (('--max_iters=5', EXACT_MUON), ('--init_from=resume', EXACT_MUON + RECORD_EVALUATIONS)):
                ended = Ranks(n, 'train.py', *flags, part, cwd=folder, hook=hook).wait()
                assert {status for status, _, _ in ended} == {0}, ended
            folders[f'muon {kind}'] = folder
        return folders[f'muon {kind}']
    return train


@BOTH
def test_two_ranks_train_with_muon_as_one_does(trained_with_muon, parallel):
    folders = [trained_with_muon(kind) / 'out' for kind in ('one', parallel)]
    one, two = (load(folder / 'last.pt') for folder in folders)
    assert alike(*folders) and len(losses(folders[1])[0]) == 10
    for name, p in one['model'].items():
        torch.testing.assert_close(two['model'][name], p, rtol=1e-2, atol=1e-3)
    for i, moments in one['optimizer']['state'].items():
        assert moments.keys() == two['optimizer']['state'][i].keys()


ROWLESS = EXACT_MUON + """
import copy, sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from lib.machine.distributed import full_tensor
dist.init_process_group('gloo', world_size=3, rank=rank, init_method=f'tcp://127.0.0.1:{sys.argv[1]}')
def update(net):
    groups = [dict(params=[net.weight], use_muon=True, splits=[1], momentum=0.9)]
    opt = optim.MuonAdamW(groups, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        net(torch.eye(4)).square().sum().backward()
        opt.step()
    return full_tensor(net.weight)
torch.manual_seed(1)
net = torch.nn.Linear(4, 2, bias=False)
sharded = update(fully_shard(copy.deepcopy(net)))
dist.is_initialized = lambda: False  # from here on each rank works alone
print(torch.allclose(sharded, update(net), rtol=0, atol=1e-6))
sys.exit()
"""


def test_a_rank_without_rows_of_a_matrix_takes_part_in_its_update(workdir):
    outcomes = Ranks(3, 'train.py', free_port(), cwd=workdir, hook=ROWLESS).wait()
    assert [(status, out) for status, out, _ in outcomes] == [(0, 'True\n')] * 3, outcomes


def test_two_ranks_share_the_batches_of_an_evaluation_without_overlap(trained_with_muon):
    def evaluated(folder, rank):
        return (folder / f'evaluated-{rank}').read_text(encoding='utf-8').splitlines()
    whole = evaluated(trained_with_muon('one'), 0)
    parts = [evaluated(trained_with_muon('ddp'), rank) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)  # each batch as often as in one process
    assert abs(len(parts[0]) - len(parts[1])) <= 6  # 2 splits in 2 evaluations


# torchrun itself

LAUNCHED = [*TINY, '--dropout=0.2', '--gradient_accumulation_steps=2', '--decay_lr=False', '--dist_timeout=60',
            '--eval_interval=1', '--log_interval=50', '--eval_iters=1', '--init_from=auto']


def torchrun(workdir, torch_flags, flags, hook='pass'):
    """Start torchrun with two ranks of train.py, each of which runs `hook` first."""
    script = workdir / 'hooked.py'
    lines = ['import os, runpy, signal, sys', 'rank = int(os.environ["RANK"])', f'sys.path.insert(0, {str(REPO)!r})',
             hook, f'runpy.run_path({str(REPO / "train.py")!r}, run_name="__main__")']
    script.write_text('\n'.join(lines), encoding='utf-8')
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                             *torch_flags, str(script), *LAUNCHED, *flags], cwd=workdir, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path, process, seconds=120):
    until = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.1)
    assert path.exists(), process.communicate()[1]


@pytest.mark.slow
def test_term_to_torchrun_saves_once_at_one_step_and_the_run_continues(workdir):  # fault 44
    flags = ['--max_iters=100000', '--eval_interval=100000']
    process = torchrun(workdir, [], flags)
    wait_for(workdir / 'out' / 'last.pt', process)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and out.count('SIGTERM: saved iter') == 1
    iter_num = checkpoint.load(workdir / 'out' / 'last.pt')['iter_num']
    assert f'SIGTERM: saved iter {iter_num} to out' in out and iter_num > 0
    process = torchrun(workdir, [], [f'--max_iters={iter_num + 2}'])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and f'resuming from iter {iter_num}' in out, err


@pytest.mark.slow
def test_ranks_save_and_end_when_torchrun_is_killed(workdir):
    process = torchrun(workdir, [], ['--max_iters=100000', '--eval_interval=100000'])
    wait_for(workdir / 'out' / 'last.pt', process)
    process.kill()
    out, err = process.communicate(timeout=60)  # the pipes are closed when the last rank has ended
    assert 'SIGTERM: saved iter' in out + err
    assert checkpoint.load(workdir / 'out' / 'last.pt')['iter_num'] > 0


@pytest.mark.slow
def test_a_killed_rank_ends_torchrun_within_seconds(workdir):  # fault 49
    kill = 'import threading; rank == 1 and threading.Timer(15, os.kill, (os.getpid(), signal.SIGKILL)).start()'
    process = torchrun(workdir, [], ['--max_iters=100000', '--eval_interval=100000'], hook=kill)
    wait_for(workdir / 'out' / 'last.pt', process)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and 'rank      : 1' in err and 'SIGKILL' in err


@pytest.mark.slow
def test_max_restarts_with_init_from_auto_finishes_the_run(workdir):  # fault 52
    crash = """
if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and rank == 1:
    from lib.text import dataset
    real, calls = dataset.Split.batch, []
    def batch(*args):
        calls.append(0)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)
    dataset.Split.batch = batch
"""
    process = torchrun(workdir, ['--max-restarts=1'], ['--max_iters=12'], hook=crash)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert 'no checkpoint in out/: starting from scratch' in out and 'resuming from iter' in out
    assert load(workdir / 'out' / 'last.pt')['iter_num'] == 12


@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.EIO])
def test_an_error_of_the_disk_or_the_network_is_one_line(number):
    with pytest.raises(UserError, match=f'out/x: {os.strerror(number)}'), distributed.report_fatal_errors():
        raise OSError(number, os.strerror(number), 'out/x')


def test_another_operating_system_error_keeps_its_traceback():
    with pytest.raises(NotADirectoryError), distributed.report_fatal_errors():
        raise NotADirectoryError(errno.ENOTDIR, 'Not a directory')


def test_a_store_that_is_gone_with_torchrun_does_not_hide_the_error(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, '_get_default_store',
                        lambda: (_ for _ in ()).throw(RuntimeError('Connection reset by peer')))
    assert distributed.unresponsive_ranks(0, 2) == ['unknown']
