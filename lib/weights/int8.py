"""int8 weights for sampling on a CPU: a quarter of the memory of float32, and so of the time to read them per token.

Each row of a matrix is stored as whole numbers from -127 to 127 and one scale. Activations stay bfloat16. For
generation only: int8 weights get no gradients, and GPT.forward's loss without logits does not know their scales.
Loading quantizes one tensor at a time, so memory never holds the weights in another form.
"""
import torch
import torch.nn.functional as F

from model import Linear

CHUNK = 2**20  # weights that are quantized at a time


class Int8Linear(Linear):
    """A Linear with int8 weight (out, in) and scale (out,) in bfloat16; it computes x (weight * scale)^T + bias.

    Its weight is undefined until copy_ or load_state_dict sets it.
    """
    compute_dtype = torch.bfloat16

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device='meta')
        self.bias, self.shape = linear.bias, self.weight.shape
        del self.weight
        self.register_buffer('weight', torch.empty(self.shape, dtype=torch.int8))
        self.register_buffer('scale', torch.empty(self.shape[0], dtype=torch.bfloat16), persistent=False)

    @torch.no_grad()
    def copy_(self, weight):
        """Quantize weight (out, in) in any float dtype; NaN or infinity in a row makes its scale NaN or infinite."""
        n_rows = max(1, CHUNK // self.in_features)
        for start in range(0, self.out_features, n_rows):
            rows = slice(start, start + n_rows)
            self.weight[rows], self.scale[rows] = quantize(weight[rows])

    @torch.no_grad()
    def _load_from_state_dict(self, state, prefix, *rest):
        self.copy_(state[prefix + 'weight'])
        if self.bias is not None:
            self.bias.copy_(state[prefix + 'bias'])

    def forward(self, x):
        x = x.bfloat16()
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= 4:  # memory is the limit
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale).view(*x.shape[:-1], -1)
        else:  # a prompt: torch's int8 product is several times slower than one in bfloat16 with many rows
            y = F.linear(x, self.weight.bfloat16()) * self.scale
        return y if self.bias is None else y + self.bias.bfloat16()


def quantize(weight):
    """Return (int8 matrix, float32 scales (out,)) whose product is weight (out, in), off by half a scale at most."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def use_int8(model):
    """Replace all matrices of `model`, a GPT on the CPU, but its embeddings by undefined int8 ones; in place.

    Returns {name: what has a `shape` and copy_(tensor)} of all that is to be filled; a tied head is not among them.
    """
    to_fill = dict(model.named_parameters())
    for where, parent in list(model.named_modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear:
                int8 = Int8Linear(layer)
                setattr(parent, name, int8)
                weight = f'{where}.{name}.weight'.lstrip('.')
                if weight in to_fill:
                    to_fill[weight] = int8
    return to_fill
