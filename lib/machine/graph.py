"""CUDA graphs: the kernels of a function are recorded once and then launched together, without Python."""
import sys

import torch

from lib.machine.distributed import first_line


class Graph:
    """Calls function() on CUDA: the first time as usual, then as a recording of its kernels.

    The recording holds addresses and numbers, not Python code. So the function must read what changes from tensors
    that stay in place, and must not wait for the device. All calls but the first return the same tensor, which each
    call overwrites. If recording fails, one line says so, and this process calls functions as usual.
    """
    works = True

    def __init__(self, function):
        self.function, self.warm, self.graph, self.result = function, False, None, None

    def __call__(self):
        if self.graph is None and Graph.works:
            if not self.warm:
                return self._call_on_another_stream()
            self._record()
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.result

    def _call_on_another_stream(self):
        """Call the function before its recording, as torch's documentation asks: libraries load and allocate."""
        stream, self.warm = torch.cuda.Stream(), True
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = self.function()
        torch.cuda.current_stream().wait_stream(stream)
        return result

    def _record(self):
        """Record the function, which computes nothing. Other threads may use the device meanwhile (thread_local)."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode='thread_local'):
                self.result = self.function()
            self.graph = graph
        except RuntimeError as error:
            Graph.works = False
            print(f'no CUDA graph ({first_line(error)}); generating is slower without', file=sys.stderr, flush=True)
