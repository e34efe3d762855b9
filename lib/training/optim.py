"""What torch.optim lacks: Muon for matrices beside AdamW for the rest, in one optimizer with one state."""
import inspect

import torch

from configurator import UserError
from lib.machine.device import fast_bf16
from lib.machine.distributed import shard_like


class AdamW(torch.optim.AdamW):
    """torch's, without the import of torch's compiler, which takes as long as that of torch itself.

    torch imports it when one of these methods is first called, to keep it from compiling them; nothing here would.
    """
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)


class MuonAdamW(AdamW):
    """AdamW whose groups with use_muon=True are updated by Muon instead (Jordan et al. 2024, kellerjordan.github.io).

    Muon replaces the momentum of a matrix's gradient by the nearest semi-orthogonal matrix, so that every direction
    moves alike. Nesterov momentum; decoupled weight decay; the step is scaled by sqrt(max(1, rows / columns)).
    A group's `splits` says how many matrices are stacked in each of its parameters.
    """

    @torch.no_grad()
    def step(self, closure=None):
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group['use_muon']]
            super().step(closure)
        finally:
            self.param_groups = every
        found_inf = getattr(self, 'found_inf', None)
        for group in every:
            if group['use_muon']:
                self._muon(group, found_inf)

    def _muon(self, group, found_inf):
        by_shape = {}
        for p, split in zip(group['params'], group['splits']):
            if p.grad is not None:
                by_shape.setdefault((p.shape, split), []).append(p)
        for ((rows, columns), split), params in by_shape.items():
            rows //= split
            for p in params:
                if not self.state[p]:  # AdamW's loader wants a `step` in every state
                    self.state[p].update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            momenta = [self.state[p]['momentum'] for p in params]
            grads = [p.grad for p in params]
            if found_inf is not None:  # a step that is not finite changes nothing
                if found_inf.device.type == 'cpu' and found_inf:
                    return
                grads = [torch.where(found_inf.bool(), m, g) for m, g in zip(momenta, grads)]
            torch._foreach_lerp_(momenta, grads, 1 - group['momentum'])
            looked_ahead = torch._foreach_lerp(grads, momenta, group['momentum'])
            updates = orthogonalize(torch.cat(looked_ahead).view(-1, rows, columns))
            rate = group['lr'] * (1.0 if found_inf is None else 1 - found_inf)
            scale = rate * max(1, rows / columns) ** 0.5
            for p, update in zip(params, updates.reshape(len(params), *params[0].shape)):
                p.mul_(1 - rate * group['weight_decay']).sub_(update.to(p.dtype) * scale)


def orthogonalize(g, steps=5):
    """Return roughly U V^T for each matrix U S V^T in g (n, rows, columns), by Newton-Schulz in bfloat16 where fast.

    The quintic's coefficients are Jordan's: steep at zero, singular values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if fast_bf16(g.device) else g.float()
    if tall := g.size(-2) > g.size(-1):
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def make_optimizer(kind, groups, learning_rate, muon_lr, betas, device_type, muon_momentum=0.95):
    """Return 'adamw' or 'muon' over the groups of GPT.param_groups; each group keeps its peak rate as `initial_lr`.

    The fused update is taken where torch has one: one pass over the weights, and it can skip itself on the device.
    """
    for group in groups:
        group['initial_lr'] = muon_lr if kind == 'muon' and group['use_muon'] else learning_rate
        group['momentum'] = muon_momentum
    cls = MuonAdamW if kind == 'muon' else AdamW
    return cls(groups, lr=learning_rate, betas=betas, fused=device_type in ('cpu', 'cuda', 'mps'))


def load_optimizer_state(optimizer, saved, path):
    """Load a checkpoint's optimizer state; rates, betas and decay stay as they are set now."""
    now = optimizer.state_dict()['param_groups']
    if [len(group['params']) for group in saved['param_groups']] != [len(group['params']) for group in now]:
        raise UserError(f'the optimizer state in {path} does not fit: was the setting optimizer changed?')
    groups = [{**group, 'params': old['params']} for group, old in zip(now, saved['param_groups'])]
    params = [p for group in optimizer.param_groups for p in group['params']]
    state = {i: {key: shard_like(value, params[i]) for key, value in moments.items()}
             for i, moments in saved['state'].items()}
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
