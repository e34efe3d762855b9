"""Saving while training goes on, on a GPU: copying the state takes a fraction of the time of writing it."""
import threading

import torch

from lib.machine.device import free_memory
from lib.weights import checkpoint

LARGEST = 4 * 2**30  # bytes; a larger copy could be too much for a container with other programs in it


class Saver:
    """Writes the checkpoints of one run to `out_dir`, one after the other; see checkpoint.save_run.

    lock: of `out_dir`, held as long as a file is being written. saved_iter: the iteration of the newest checkpoint.
    """

    def __init__(self, rt, out_dir, lock, saved_iter, say=print, warn=print):
        self.rt, self.out_dir, self.lock, self.say, self.warn = rt, out_dir, lock, say, warn
        self.saved_iter, self._before = saved_iter, saved_iter  # _before: that of the checkpoint before the newest
        self._thread, self._failed = None, False

    def save(self, state, model, as_best, required, wait=True):
        """Save the state of a run; every rank calls it. Returns the iteration of the newest checkpoint.

        wait: return when the file is written. Otherwise, on CUDA and if memory allows, it is written meanwhile, and a
        failure is a warning. required: wait, and raise UserError if the file cannot be written.
        """
        self.finish()
        write = None
        if not (wait or required) and self.rt.is_master and self.rt.device.type == 'cuda' and _small_enough(state):
            state, write = on_host(state), self._start
        if checkpoint.save_run(self.rt, self.out_dir, state, model, as_best=as_best, required=required, say=self.say,
                               warn=self.warn, run=write):
            self._before, self.saved_iter = self.saved_iter, state['iter_num']
        return self.saved_iter

    def finish(self):
        """Wait until the file is written that is being written, if any."""
        if self._thread:
            self._thread.join()
            self._thread = None
            if self._failed:
                self.saved_iter = self._before

    def _start(self, write):
        """Call write() in a thread; returns '', its failure is not known yet. The interpreter ends after the thread."""
        def run():
            try:
                failure = write()
            except Exception as error:
                failure = f'could not write {self.out_dir} ({type(error).__name__}: {error})'
            if failure:
                self._failed = True
                self.warn(failure)
        self._failed, self._thread = False, threading.Thread(target=run)
        self._thread.start()
        return ''


def _small_enough(state):
    n_bytes = checkpoint.n_bytes(state)
    return n_bytes <= LARGEST and 4 * n_bytes <= free_memory(torch.device('cpu'))


def on_host(value, copies=None):
    """Return a copy on the CPU of tensors in nested dicts and lists; tensors that share memory still do."""
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride()
        if key not in copies:
            copies[key] = value.detach().to('cpu', copy=True)
        return copies[key]
    if isinstance(value, dict):
        return {key: on_host(inner, copies) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_host(inner, copies) for inner in value)
    return value
