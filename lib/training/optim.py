"""What torch.optim lacks: Muon for matrices beside AdamW for the rest, in one optimizer with one state."""
import inspect
import math

import torch

from configurator import UserError
from lib.machine.device import fast_bf16
from lib.machine.distributed import shard_like
from lib.machine.share import Share, local, local_as
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
    of one buffer. With several ranks, each orthogonalises its share of them, and then they exchange the results. Under
    FSDP a rank has rows of every matrix, so they exchange the momenta first.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._buffers = {}  # (group, rows, columns) -> momenta, flat; under FSDP those of this rank's rows

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._buffers = {}  # the next step gathers the momenta that were loaded

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient, or none if the tensor `found_inf` is set and not zero.

        With several ranks, all must call it.
        """
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
                    size = p.size(0) // split, p.size(1)
                    by_size.setdefault((i, *(sorted(size) if split == 1 else size)), []).append((p, split))
            for key, matrices in by_size.items():
                self._muon(group, matrices, self._momenta(key, [p for p, _ in matrices]), found_inf)

    def _momenta(self, key, params):
        """Return the momenta of this rank's rows of `params`, flat; those in the state are views of them."""
        buffer, old = self._buffers.get(key), [self.state[p].get('momentum') for p in params]
        sizes = [local(p).numel() for p in params]
        if buffer is None or len(buffer) != sum(sizes) or any(m is None or local(m)._base is not buffer for m in old):
            old = [torch.zeros_like(local(p)) if m is None else local(m) for m, p in zip(old, params)]
            self._buffers[key] = buffer = torch.cat([m.flatten() for m in old])
            for part, p in zip(buffer.split(sizes), params):
                momentum = local_as(part.view(local(p).shape), p)
                self.state[p].update(step=torch.zeros(()), momentum=momentum)  # AdamW's loader expects a `step`
        return buffer

    @staticmethod
    def _muon(group, matrices, momenta, found_inf):
        """Update matrices [(parameter, split), ...] of one size; momenta: of this rank's rows, flat."""
        params, splits = zip(*matrices)
        shards = [local(p) for p in params]
        grads = torch.cat([local(p.grad).flatten() for p in params])
        if found_inf is not None and not found_inf.is_cpu:  # a bad gradient must not change the momentum
            grads = torch.where(found_inf.bool(), momenta, grads)
        momenta.lerp_(grads, 1 - group['momentum'])
        parts = grads.lerp_(momenta, group['momentum']).split([shard.numel() for shard in shards])
        share = Share([p.shape for p in params], splits, sharded=shards[0] is not params[0])
        updates = orthogonalized([(whole, splits[i]) for i, whole in zip(share.mine, share.gather(parts))])
        updates = share.spread(updates, like=momenta.new_empty(0, dtype=newton_dtype(momenta.device)))
        updates = torch.cat([u.flatten() for u in updates]).to(momenta.dtype).split([len(part) for part in parts])
        scales = [max(1, p.size(0) / split / p.size(1)) ** 0.5 for p, split in matrices]
        for scale in sorted(set(scales)):
            chosen = [(shard, u.view(shard.shape)) for shard, u, s in zip(shards, updates, scales)
                      if s == scale and len(shard)]
            if not chosen:
                continue
            # p -= lr * scale * (update + weight_decay / scale * p), for all of them in one operation
            torch._fused_sgd_(*map(list, zip(*chosen)), [], lr=group['lr'] * scale,
                              weight_decay=group['weight_decay'] / scale, momentum=0.0, dampening=0.0,
                              nesterov=False, maximize=False, is_first_step=True, found_inf=found_inf)


def is_tall(p, split):
    """True if p is a single matrix with more rows than columns."""
    return split == 1 and p.size(0) > p.size(1)


def wide(p, split):
    """Return the matrices in p as a view (split, rows, columns), transposed if it is tall."""
    return p.mT[None] if is_tall(p, split) else p.unflatten(0, (split, -1))


def orthogonalized(matrices):
    """Return newton_schulz of matrices [(tensor, split), ...] of one size, a tensor of the same shape for each."""
    if not matrices:
        return []
    order = sorted(range(len(matrices)), key=lambda i: is_tall(*matrices[i]))  # the wide ones first
    found = newton_schulz(torch.cat([wide(*matrices[i]) for i in order]))  # (n, rows, columns)
    n_wide, updates = sum(split for p, split in matrices if not is_tall(p, split)), [None] * len(matrices)
    parts = found[:n_wide].split([s for p, s in matrices if not is_tall(p, s)])
    parts += found[n_wide:].mT.contiguous().split(1)
    for i, part in zip(order, parts):
        updates[i] = part.flatten(0, 1)
    return updates


def newton_dtype(device):
    """Return the dtype in which newton_schulz computes."""
    return torch.bfloat16 if fast_bf16(device) else torch.float32


def newton_schulz(g, steps=5):
    """Return roughly U V^T for each matrix U S V^T in g (n, rows, columns), by Newton-Schulz in bfloat16 where fast.

    The coefficients of the quintic are Jordan's: steep at zero; singular values end between 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(newton_dtype(g.device))
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


def decay_for_epochs(weight_decay, epoch_decay, epochs, tokens):
    """Return the weight decay of a run that reads its text `epochs` times: more, the more often it repeats.

    Measured with one seed each: for four epochs 0.4 was better than 0.1 and 1.0; for one, 0.1 than 0.4
    (docs/experiments.md). weight_decay: the least; 0 means no decay at all. tokens: per update. With fewer than the
    4,096 of those measurements there are more updates per epoch, so each decays less (Wang and Aitchison 2024,
    arXiv:2405.13698).
    """
    return max(weight_decay, epoch_decay * math.sqrt(epochs) * min(1.0, tokens / 4096)) if weight_decay else 0.0


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
