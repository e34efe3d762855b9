"""lib/decode.py and lib/machine/graph.py: a recorded step writes the text of the cache that grows."""
import contextlib
import math

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import kernels
from lib import decode
from lib.generate import generate
from lib.machine import device
from lib.machine.graph import Graph
from model import CHOICES, GPT, GPTConfig, KVCache

MODERN = dict(pos='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, tie_weights=False, softcap=15.0, smear=True,
              bias=False)
OPTIONS = [{}, MODERN, dict(bias=False), dict(qk_norm=True), dict(tie_weights=False), dict(softcap=15.0),
           dict(smear=True), dict(window=3), {**MODERN, 'window': 3},
           *({name: choice} for name, choices in CHOICES.items() for choice in choices[1:])]
RULES = [dict(temperature=0), dict(top_k=5, repetition_penalty=1.3, no_repeat_ngram=3, valid_vocab=12)]


class Tape(TorchFunctionMode):
    """Stands for a CUDA graph: holds the calls of a recording with their tensors and numbers, nothing else.

    As in a graph, recording leaves all memory unchanged, and reading a number from a tensor is an error.
    """
    READS = {'item', 'tolist', '__float__', '__bool__', '__int__', '__index__'}

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in self.READS:
            raise RuntimeError('operation not permitted when stream is capturing\nand more')
        if func.__name__.endswith('_') and func.__name__ != '__get__':  # copy_, __setitem__: may write to args[0]
            self.before.append((args[0], args[0].clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def replay(self):
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def tapes(monkeypatch):
    """Let the CPU be a device whose steps are recorded, on tapes; returns these."""
    made = []
    monkeypatch.setattr(torch.cuda, 'CUDAGraph', lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, 'graph', lambda graph, capture_error_mode: graph)
    monkeypatch.setattr(torch.cuda, 'Stream', FakeStream)
    monkeypatch.setattr(torch.cuda, 'current_stream', FakeStream)
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(decode, 'DEVICES', ('cpu',))
    monkeypatch.setattr(Graph, 'works', True)
    monkeypatch.setattr(kernels, 'ENABLED', False)
    return made


def tiny(**options):
    """A GPT with weights large enough that its predictions differ clearly."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, **{'block_size': 8, 'vocab_size': 13, **options})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.4)
    return model


def ids_of(model, prompt, num_samples, n, **rules):
    return torch.stack(list(generate(model, prompt, num_samples, n, **rules)), dim=1).tolist()


def both(model, *args, **rules):
    """Return the ids that the recorded step writes, and those of the cache that grows. The fixture resets DEVICES."""
    recorded, decode.DEVICES = ids_of(model, *args, **rules), ()
    return recorded, ids_of(model, *args, **rules)


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('rules', RULES, ids=['greedy', 'rules'])
def test_a_recorded_step_writes_the_tokens_of_the_growing_cache(tapes, options, rules):
    recorded, grown = both(tiny(**options), [3, 5], 3, 30, **rules)  # the context of 8 slides several times
    assert recorded == grown and len(tapes) == 1 and len({tuple(row) for row in grown}) == (1 if len(rules) == 1 else 3)


@pytest.mark.parametrize('prompt', [1, 7, 8, 20])
@pytest.mark.parametrize('block_size', [1, 2, 3, 8])
def test_any_prompt_and_context_work(tapes, prompt, block_size):
    recorded, grown = both(tiny(**{**MODERN, 'block_size': block_size}), list(range(prompt % 13)) or [1], 1, 12)
    assert recorded == grown


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_works(tapes, dtype):
    model = tiny(**MODERN)
    recorded, grown = both(model.to(dtype), [3, 5], 2, 12, temperature=0)
    assert recorded == grown and len(tapes) == 1


def test_memory_that_was_never_written_has_no_effect(tapes, monkeypatch):
    """What torch.empty returns may hold NaN."""
    model, before = tiny(), KVCache.__init__

    def with_nan(self, *args):
        before(self, *args)
        for slots in self.k + self.v:
            slots.fill_(math.nan)
    monkeypatch.setattr(KVCache, '__init__', with_nan)
    assert -1 not in ids_of(model, [3], 1, 5, temperature=0)[0] and tapes


def test_a_failed_recording_falls_back_with_one_line(tapes, monkeypatch, capsys):
    model = tiny(smear=True)
    read_once = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, 'forward', lambda x: read_once(x) if math.isfinite(float(x.sum())) else None)
    first, second = ids_of(model, [3], 2, 20), both(model, [3], 2, 20)
    assert second == (first, first)
    assert capsys.readouterr().err == ('no CUDA graph (operation not permitted when stream is capturing); generating '
                                       'is slower without\n')


def test_a_model_with_hooks_is_not_recorded(tapes):
    model, seen = tiny(), []
    hook = model.register_forward_hook(lambda *args: seen.append(1))
    ids_of(model, [3], 1, 6)
    hook.remove()
    assert len(seen) == 6 and not tapes


def test_a_compiled_model_and_other_devices_keep_the_cache_that_grows(tapes):
    model = tiny()
    model.__class__ = type('Compiled', (GPT,), {})
    assert type(decode.make_cache(model, 1, torch.float32)) is KVCache
    decode.DEVICES = ('cuda',)
    assert type(decode.make_cache(tiny(), 1, torch.float32)) is KVCache


@pytest.mark.parametrize('dtype, num_samples, steps', [
    (torch.bfloat16, 1, [True, False, False]),  # the prompt has many rows
    (torch.bfloat16, 2, [True, True, True]),
    (torch.float32, 1, [True, True, True])])
def test_on_a_cpu_one_row_in_bfloat16_is_multiplied_without_onednn(dtype, num_samples, steps):
    model = GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=1, n_head=2, n_embd=16)).eval().to(dtype)
    seen = []
    model.register_forward_pre_hook(lambda *call: seen.append(torch.backends.mkldnn.enabled))
    for _ in generate(model, [1, 2, 3], num_samples, 3):
        assert torch.backends.mkldnn.enabled, 'off outside the model'
    assert seen == steps


def test_onednn_is_on_again_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with device.without_onednn():
            assert not torch.backends.mkldnn.enabled
            raise ZeroDivisionError
    assert torch.backends.mkldnn.enabled
