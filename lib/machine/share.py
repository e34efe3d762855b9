"""How several ranks share work on whole matrices, of which each has all rows, or a part of them under FSDP."""
import torch
import torch.distributed as dist


def local(tensor):
    """Return this rank's rows of a tensor that FSDP has sharded; any other tensor unchanged."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def local_as(tensor, param):
    """Return this rank's rows as a tensor that is sharded as `param` is; unchanged if `param` is not sharded."""
    if not hasattr(param, 'to_local'):
        return tensor
    from torch.distributed.tensor import DTensor
    return DTensor.from_local(tensor, param.device_mesh, param.placements, shape=param.shape, stride=param.stride())


class Share:
    """How the ranks share work on whole matrices; without other ranks, all of it is this one's.

    shapes: of the matrices. costs: a number for each; the sums of the ranks are about equal. sharded: each rank holds
    rows of every matrix, as FSDP distributes them; otherwise all rows. mine: the numbers of this rank's matrices.
    """

    def __init__(self, shapes, costs, sharded):
        self.n, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        self.shapes, self.sharded, self.owned, load = shapes, sharded, [[] for _ in range(self.n)], [0] * self.n
        for i in sorted(range(len(shapes)), key=lambda i: -costs[i]):
            owner = load.index(min(load))
            self.owned[owner].append(i)
            load[owner] += costs[i]
        self.mine = self.owned[self.rank]

    def gather(self, parts):
        """Return this rank's matrices, whole; parts: its rows of every matrix, flat. Every rank must call it."""
        if self.sharded:
            outgoing = [parts[i] for owned in self.owned for i in owned]
            received = _exchange(outgoing, [[self._size(i, self.rank) for i in owned] for owned in self.owned],
                                 [[self._size(i, rank) for i in self.mine] for rank in range(self.n)])
            whole = [torch.cat(rows) for rows in zip(*received)]
        else:
            whole = [parts[i] for i in self.mine]
        return [matrix.view(self.shapes[i]) for i, matrix in zip(self.mine, whole)]

    def spread(self, matrices, like):
        """The reverse: from this rank's matrices return its rows of all. like: a tensor of their dtype and device."""
        if self.n == 1:
            parts = dict(zip(self.mine, matrices))
        else:
            outgoing = [m[self._rows(i, rank)].flatten() for rank in range(self.n) for i, m in zip(self.mine, matrices)]
            received = _exchange(outgoing, [[self._size(i, rank) for i in self.mine] for rank in range(self.n)],
                                 [[self._size(i, self.rank) for i in owned] for owned in self.owned], like)
            parts = {i: part for owned, rows in zip(self.owned, received) for i, part in zip(owned, rows)}
        return [parts[i] for i in range(len(parts))]

    def _rows(self, i, rank):
        """Return which rows of matrix i a rank holds, as a slice."""
        n_rows = self.shapes[i][0]
        each = -(-n_rows // self.n) if self.sharded else n_rows
        first = rank * each if self.sharded else 0
        return slice(min(first, n_rows), min(first + each, n_rows))

    def _size(self, i, rank):
        """Return how many numbers of matrix i a rank holds."""
        rows = self._rows(i, rank)
        return (rows.stop - rows.start) * self.shapes[i][1]


def _exchange(outgoing, sizes_out, sizes_in, like=None):
    """Send tensors to the other ranks and return those they sent, flat, in a list for each rank.

    outgoing: flat tensors, first those for rank 0. sizes_out, sizes_in: a list for each rank of the sizes of the
    tensors it gets and sends. like: a tensor of their dtype and device, where there may be none to send.
    """
    sent = torch.cat([(outgoing[0] if like is None else like).new_empty(0), *outgoing])
    received = sent.new_empty(sum(map(sum, sizes_in)))
    dist.all_to_all_single(received, sent, [sum(sizes) for sizes in sizes_in], [sum(sizes) for sizes in sizes_out])
    parts = iter(received.split([size for sizes in sizes_in for size in sizes]))
    return [[next(parts) for _ in sizes] for sizes in sizes_in]
