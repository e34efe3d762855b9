"""What torch.optim lacks: Muon for matrices beside AdamW for the rest, in one optimizer with one state."""
import inspect
import math

import torch

from configurator import UserError
from lib.machine.device import fast_bf16
from lib.machine.distributed import shard_like
from lib.weights import schema


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW without importing torch._dynamo, which would double the start-up time.

    torch imports it when one of these methods is first called, to keep them from being compiled.
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

    Matrices of one size, whichever way they lie, are updated together in a few operations. Their momenta are views
    of one buffer (n, rows, columns) with rows <= columns.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._buffers = {}  # (group, rows, columns) -> momenta (n, rows, columns)

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._buffers = {}  # the next step gathers the momenta that were loaded

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient, or none if the tensor `found_inf` is set and not zero."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group['use_muon']]
            super().step(closure)
        finally:
            self.param_groups = groups
        found_inf = getattr(self, 'found_inf', None)
        if found_inf is not None and found_inf.is_cpu and found_inf:
            return
        for i, group in enumerate(groups):
            by_size = {}
            for p, split in zip(group['params'], group.get('splits', ())):
                if p.grad is not None:
                    by_size.setdefault((i, *wide(p, split).shape[1:]), []).append((p, split))
            for key, matrices in by_size.items():
                matrices.sort(key=lambda matrix: is_tall(*matrix))  # the wide ones first
                self._muon(group, matrices, self._momenta(key, matrices), found_inf)

    def _momenta(self, key, matrices):
        """Return the momenta (n, rows, columns) of matrices [(parameter, split), ...], which share a buffer."""
        buffer, old = self._buffers.get(key), [self.state[p].get('momentum') for p, _ in matrices]
        n = sum(split for _, split in matrices)
        if buffer is None or len(buffer) != n or any(m is None or m._base is not buffer for m in old):
            old = [torch.zeros_like(p) if m is None else m for m, (p, _) in zip(old, matrices)]
            self._buffers[key] = buffer = torch.cat([wide(m, split) for m, (_, split) in zip(old, matrices)])
            for part, (p, split) in zip(buffer.split([split for _, split in matrices]), matrices):
                momentum = (part.mT if is_tall(p, split) else part).flatten(0, 1)  # a view of the shape of p
                self.state[p].update(step=torch.zeros(()), momentum=momentum)  # AdamW's loader expects a `step`
        return buffer

    @staticmethod
    def _muon(group, matrices, momenta, found_inf):
        """Update matrices [(parameter, split), ...] of one size, the wide ones first; momenta: (n, rows, columns)."""
        grads = torch.cat([wide(p.grad, split) for p, split in matrices])
        if found_inf is not None and not found_inf.is_cpu:  # a bad gradient must not change the momentum
            grads = torch.where(found_inf.bool(), momenta, grads)
        momenta.lerp_(grads, 1 - group['momentum'])
        nesterov = grads.lerp_(momenta, group['momentum'])
        updates = newton_schulz(nesterov)
        n_wide = sum(split for p, split in matrices if not is_tall(p, split))
        for tall, part in ((False, updates[:n_wide]), (True, updates[n_wide:].mT)):
            if not len(part):
                continue
            params, splits = zip(*[(p, split) for p, split in matrices if is_tall(p, split) == tall])
            scale = max(1, part.size(1) / part.size(2)) ** 0.5
            part = part.to(momenta.dtype, memory_format=torch.contiguous_format).split(splits)
            # p -= lr * scale * (update + weight_decay / scale * p), for all of them in one operation
            torch._fused_sgd_(params, [u.view(p.shape) for u, p in zip(part, params)], [], lr=group['lr'] * scale,
                              weight_decay=group['weight_decay'] / scale, momentum=0.0, dampening=0.0,
                              nesterov=False, maximize=False, is_first_step=True, found_inf=found_inf)


def is_tall(p, split):
    """True if p is a single matrix with more rows than columns."""
    return split == 1 and p.size(0) > p.size(1)


def wide(p, split):
    """Return the matrices in p as a view (split, rows, columns), transposed if it is tall."""
    return p.mT[None] if is_tall(p, split) else p.unflatten(0, (split, -1))


def newton_schulz(g, steps=5):
    """Return roughly U V^T for each matrix U S V^T in g (n, rows, columns), by Newton-Schulz in bfloat16 where fast.

    The coefficients of the quintic are Jordan's: steep at zero; singular values end between 0.7 and 1.2.
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


def clip_grad_norm_(parameters, max_norm):
    """torch.nn.utils.clip_grad_norm_: scale the gradients so that their norm is at most max_norm; return their norm.

    On a CPU the gradients of a small model become views of one tensor first: five operations instead of two per
    parameter.
    """
    params = [p for p in parameters if p.grad is not None]
    plain = all(type(p.grad) is torch.Tensor and p.grad.is_cpu and p.grad.dtype == torch.float32 for p in params)
    if not plain or not 0 < sum(p.numel() for p in params) <= 2**24:
        return torch.nn.utils.clip_grad_norm_(params, max_norm)
    grads = torch.cat([p.grad.flatten() for p in params])
    norm = torch.linalg.vector_norm(grads)
    grads.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))
    for p, grad in zip(params, grads.split([p.numel() for p in params])):
        p.grad = grad.view(p.shape)
    return norm


def make_optimizer(kind, groups, learning_rate, muon_lr, betas, device_type, muon_momentum=0.95):
    """Return 'adamw' or 'muon' over the groups of GPT.param_groups.

    Each group keeps its peak rate as `initial_lr` and its weight decay as `initial_decay`.

    Uses torch's fused update if it has one: a single pass over the weights, and it can skip a bad update on the
    device.
    """
    for group in groups:
        group['initial_lr'] = muon_lr if kind == 'muon' and group['use_muon'] else learning_rate
        group['momentum'], group['initial_decay'] = muon_momentum, group['weight_decay']
    cls = MuonAdamW if kind == 'muon' else AdamW
    return cls(groups, lr=learning_rate, betas=betas, fused=device_type in ('cpu', 'cuda', 'mps'))


def decay_for_epochs(weight_decay, epoch_decay, epochs):
    """Return the weight decay of a run that reads its text `epochs` times: more, the more often it repeats.

    The best value was 0.1 or less for one epoch, about 0.4 for four and 1 or more for thirty (docs/experiments.md).
    weight_decay: the least; 0 means no decay at all.
    """
    return max(weight_decay, epoch_decay * math.sqrt(epochs)) if weight_decay else 0.0


def load_optimizer_state(optimizer, saved, path):
    """Load the optimizer state of the checkpoint at `path`; rates, betas and weight decay keep their present values."""
    if problem := schema.optimizer_problem(optimizer, saved):
        raise UserError(f'the optimizer state in {path} {problem}')
    now = optimizer.state_dict()['param_groups']
    groups = [{**group, 'params': old['params']} for group, old in zip(now, saved['param_groups'])]
    params = [p for group in optimizer.param_groups for p in group['params']]
    state = {i: {key: shard_like(value, params[i]) for key, value in moments.items()}
             for i, moments in saved['state'].items()}
    optimizer.load_state_dict({'state': state, 'param_groups': groups})
