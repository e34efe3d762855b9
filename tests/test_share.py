"""lib/machine/share.py: work on whole matrices that is shared among ranks gives what one process computes."""
import pytest
import torch
from kit import Ranks, free_port

from lib.machine.share import Share

# Five updates in one process, then the same on all ranks, each with the same gradients. After the third update the
# optimizer is replaced by one that loads its state, as when a run is resumed.
UPDATES = """
import sys, torch, torch.distributed as dist
from types import SimpleNamespace
from lib.machine import distributed
from lib.training import optim
from model import GPT, GPTConfig
kind, calls, newton_schulz = sys.argv[1], [], optim.newton_schulz
def counted(g):
    calls.append(len(g))
    return newton_schulz(g)
optim.newton_schulz = counted
def new_optimizer(net):
    return optim.make_optimizer('muon', net.param_groups(0.1, muon=True), 1e-2, 2e-2, (0.9, 0.95), 'cpu')
def updates(parallel):
    torch.manual_seed(1)
    net = GPT(GPTConfig(8, 16, 2, 1, 5, bias=True))
    rt = SimpleNamespace(world_size=n, device=torch.device('cpu'), dtype=torch.float32)
    net = distributed.shard_or_move(net, rt, parallel)
    opt = new_optimizer(net)
    for update in range(5):
        for p in net.parameters():
            whole = torch.randn(p.shape)
            p.grad = distributed.shard_like(whole, p)
        opt.step()
        if update == 2:
            saved = distributed.full_state_dict(opt.state_dict())
            opt = new_optimizer(net)
            optim.load_optimizer_state(opt, saved, 'last.pt')
    matrices = [p for group in opt.param_groups if group['use_muon'] for p in group['params']]
    return distributed.full_state_dict([[p.detach(), opt.state[p]['momentum']] for p in matrices])
n = int(sys.argv[2])
alone, by_one = updates('one'), sum(calls)
calls.clear()
dist.init_process_group('gloo', world_size=n, rank=rank, init_method=f'tcp://127.0.0.1:{sys.argv[3]}')
together = updates(kind)
from kit import differences
print(differences(alone, together), by_one, sum(calls), flush=True)
dist.destroy_process_group()
sys.exit()
"""


@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_muon_shared_by_four_ranks_is_muon_in_one_process_to_the_last_bit(workdir, kind):
    """Five rows: the ranks of FSDP have two, two, one and none of them."""
    outcomes = Ranks(4, 'train.py', kind, 4, free_port(), cwd=workdir, hook=UPDATES).wait()
    assert [(status, err) for status, _, err in outcomes] == [(0, '')] * 4
    words = [out.split() for _, out, _ in outcomes]
    assert [w[0] for w in words] == ['[]'] * 4
    by_one, by_each = int(words[0][1]), [int(w[2]) for w in words]
    assert sum(by_each) == by_one and max(by_each) <= by_one / 2  # each matrix once; the stacked ones are not divided


def test_the_ranks_get_parts_of_about_equal_cost(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 8)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 2)
    costs = [3] * 12 + [1] * 12  # the attention of twelve layers: queries, keys and values in one, and a projection
    share = Share([(4, 4)] * 24, costs, sharded=False)
    assert [sum(costs[i] for i in owned) for owned in share.owned] == [6] * 8
    assert sorted(i for owned in share.owned for i in owned) == list(range(24)) and share.mine == share.owned[2]


def test_one_process_has_all_matrices_and_copies_none():
    parts = [torch.randn(6), torch.randn(4)]
    share = Share([(2, 3), (2, 2)], [1, 1], sharded=False)
    whole = share.gather(parts)
    assert [m.shape for m in whole] == [(2, 3), (2, 2)] and whole[0].data_ptr() == parts[0].data_ptr()
    assert share.spread(whole, like=whole[0])[1] is whole[1]
