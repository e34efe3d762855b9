"""Keeps a non-finite update out of the weights, without waiting for the device."""
import math

import torch

from configurator import UserError
from lib.machine.runtime import DelayedReader


class Guard:
    """Skips a non-finite update on the device, and ends the run once the host has found out.

    saved_iter: the iteration of the newest checkpoint, for the message. With a gradient scaler (float16) single
    overflows are normal: the scaler skips them, and only 20 in a row end the run.
    """

    def __init__(self, rt, scaler, out_dir, saved_iter):
        self.rt, self.scaler, self.out_dir, self.saved_iter = rt, scaler, out_dir, saved_iter
        self._read, self._latest, self._skipped = DelayedReader(rt.device), None, 0

    def allows(self, opt, loss, grad_norm):
        """Return whether to call opt.step(), which itself skips a non-finite update where torch supports it.

        loss, grad_norm: scalars on the device. The fused optimizers read `found_inf` there; Metal's does not in all
        versions of torch, so the host waits for these two numbers, once per update.
        """
        self._latest = torch.stack([loss, grad_norm])
        if self.rt.device.type == 'mps':
            self._latest = self._latest.cpu()  # check() reads the copy
            return math.isfinite(self._latest.sum())
        if not self.scaler.is_enabled():
            opt.found_inf = (~torch.isfinite(loss + grad_norm)).float()
        return True

    def check(self, iter_num):
        """Raise UserError if the update before last (on CUDA) or the last one was not finite."""
        loss, grad_norm = self._read(self._latest)
        self._skipped = 0 if math.isfinite(loss + grad_norm) else self._skipped + 1
        if self._skipped > (20 if self.scaler.is_enabled() else 0):
            raise self._error(f'the loss is {loss}, the norm of its gradient {grad_norm}', iter_num - self._read.delay)

    def check_losses(self, losses, iter_num):
        """Raise UserError if an evaluation's losses are not finite."""
        if not math.isfinite(sum(losses)):
            raise self._error(f'the losses are {losses[0]} and {losses[1]}', iter_num)

    def _error(self, found, iter_num):
        where = f' on rank {self.rt.rank}' if self.rt.world_size > 1 else ''
        return UserError(f'{found} at iter {iter_num}{where}; neither the update nor a checkpoint of it was kept, the '
                         f'newest good checkpoint in {self.out_dir} is of iter {self.saved_iter}. Lower learning_rate, '
                         'or use dtype=bfloat16 or float32 if it was float16, and resume with --init_from=resume')
