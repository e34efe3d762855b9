"""int8 weights for sampling on a CPU: a quarter of the memory of float32, and so of the time to read them per token.

Each row of a matrix is stored as whole numbers from -127 to 127 and one scale. Activations stay bfloat16. For
generation only: int8 weights get no gradients, and GPT.forward's loss without logits does not know their scales.
"""
import torch
import torch.nn.functional as F

from model import Linear


class Int8Linear(Linear):
    """A Linear with int8 weight (out, in) and scale (out,) in bfloat16; it computes x (weight * scale)^T + bias."""
    compute_dtype = torch.bfloat16

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device='meta')
        self.bias = linear.bias
        del self.weight
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer('weight', weight)
        self.register_buffer('scale', scale.bfloat16())

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


def quantize_model(model):
    """Replace all matrices of `model`, a GPT on the CPU, but its embeddings by int8 ones; in place."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is Linear:
                setattr(parent, name, Int8Linear(layer))
