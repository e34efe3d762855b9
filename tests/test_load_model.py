"""lib/weights/load_model.py: from a name to a checked model and its tokenizer, or one line on why not."""
import pickle

import numpy as np
import pytest
import torch

from configurator import UserError
from lib.weights.checkpoint import has_nan
from lib.weights.load_model import cast_matrices, load_model, model_from_checkpoint, state_dict_mismatch
from model import GPT, GPTConfig

ARGS = dict(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=16, bias=False, dropout=0.0)
CHARS = 'abcdefghijklmnop'


def random_model(**options):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**ARGS, **options}))


def write_checkpoint(folder, model, **changes):
    """Write the ckpt.pt of a model; returns its content."""
    state = {'model': model.state_dict(), 'model_args': model.config.model_args(), 'iter_num': 3,
             'tokenizer': {'kind': 'char', 'chars': CHARS}, **changes}
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / 'ckpt.pt')
    return state


@pytest.mark.parametrize('options', [{}, dict(pos='rope', norm='rmsnorm', mlp='swiglu', smear=True, tie_weights=False)])
def test_a_checkpoint_gives_its_model_its_tokenizer_and_itself(tmp_path, options):
    saved = random_model(**options)
    write_checkpoint(tmp_path / 'out', saved)
    model, tok, state = load_model('resume', tmp_path / 'out')
    assert model.config == saved.config and not model.training and state['iter_num'] == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters()))
    assert tok.decode([0, 15]) == 'ap'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_requested_dtype(tmp_path, dtype):
    write_checkpoint(tmp_path / 'out', random_model())
    assert {p.dtype for p in load_model('resume', tmp_path / 'out', dtype)[0].parameters()} == {dtype}


@pytest.mark.parametrize('tie_weights', [True, False])
def test_tied_weights_stay_tied(tmp_path, tie_weights):
    write_checkpoint(tmp_path / 'out', random_model(tie_weights=tie_weights))
    model, _, _ = load_model('resume', tmp_path / 'out')
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_weights


def test_a_nanogpt_checkpoint_takes_its_tokenizer_from_the_datasets_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = write_checkpoint(tmp_path / 'out', random_model(), config={'dataset': 'old'})
    del state['tokenizer']
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    folder = tmp_path / 'data' / 'old'
    folder.mkdir(parents=True)
    for name in ('train', 'val'):
        np.arange(16, dtype='<u2').tofile(folder / f'{name}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 16, 'itos': dict(enumerate(CHARS)),
                                                    'stoi': {c: i for i, c in enumerate(CHARS)}}))
    assert load_model('resume', 'out')[1].decode([1, 2]) == 'bc'


def test_dropout_can_be_overridden():
    saved = random_model()
    state = {'model': saved.state_dict(), 'model_args': saved.config.model_args()}
    assert model_from_checkpoint(state, 'x.pt', dropout=0.3).transformer.h[0].attn.dropout == 0.3


# Errors

@pytest.mark.parametrize('tie_weights', [True, False])
def test_a_model_can_take_the_tensors_of_its_checkpoint_without_a_copy(tie_weights):
    saved = random_model(tie_weights=tie_weights)
    state = {'model': saved.state_dict(), 'model_args': saved.config.model_args()}
    model = model_from_checkpoint(state, 'ckpt.pt', assign=True)
    assert all(p.data_ptr() == state['model'][name].data_ptr() for name, p in model.named_parameters())
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie_weights
    assert all(p.requires_grad for p in model.parameters())
    half = model_from_checkpoint(state, 'ckpt.pt', dtype=torch.float16, assign=True)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@pytest.mark.parametrize('options', [dict(bias=True, n_layer=2), dict(tie_weights=False, mlp='swiglu')])
def test_matrices_that_are_cast_once_give_the_same_losses_as_those_that_are_cast_at_every_pass(options):
    model, idx = random_model(**options).eval(), torch.randint(16, (3, 8), generator=torch.Generator().manual_seed(1))
    model.set_compute_dtype(torch.bfloat16)
    with torch.no_grad():
        expected = model(idx, idx.flip(1), return_logits=True)
        once = cast_matrices(model, torch.bfloat16)
        assert all(map(torch.equal, expected, once(idx, idx.flip(1), return_logits=True)))
    dtypes = {name: p.dtype for name, p in once.named_parameters()}
    assert dtypes['lm_head.weight'] == dtypes['transformer.h.0.mlp.c_fc.weight'] == torch.bfloat16
    assert dtypes['transformer.wte.weight'] == torch.float32


def refusal(*args):
    with pytest.raises(UserError) as caught:
        load_model(*args)
    return caught.value.message


def test_a_missing_checkpoint_is_named_with_the_remedy(tmp_path):
    assert 'ckpt.pt not found; train a model first' in refusal('resume', tmp_path)


def test_a_folder_without_a_model_is_told_what_it_must_hold(tmp_path):
    (tmp_path / 'last.pt').write_bytes(b'')
    with pytest.raises(UserError, match='must hold ckpt.pt, or config.json and model.safetensors'):
        load_model(str(tmp_path), 'out')


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    assert "init_from='gpt3': expected resume, gpt2, gpt2-medium" in refusal('gpt3', tmp_path)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    model = random_model()
    model.transformer.ln_f.weight.data[0] = value
    write_checkpoint(tmp_path / 'out', model)
    assert 'checkpoint contains NaN (iter 3)' in refusal('resume', tmp_path / 'out')


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    write_checkpoint(tmp_path / 'out', random_model(), tokenizer={'kind': 'char', 'chars': CHARS + 'xyz'})
    assert 'the model has 16 tokens, its tokenizer (char) has 19' in refusal('resume', tmp_path / 'out')


@pytest.mark.parametrize('args, message', [(dict(n_head=3), 'n_embd=16 is not divisible by n_head=3'),
                                           (dict(extra=1), 'extra'), (dict(n_layer=2), 'tensors missing')])
def test_model_args_that_do_not_fit_are_named(args, message):
    saved = random_model()
    state = {'model': saved.state_dict(), 'model_args': {**saved.config.model_args(), **args}}
    with pytest.raises(UserError, match=f'x.pt: .*{message}'):
        model_from_checkpoint(state, 'x.pt')


@pytest.mark.parametrize('change, message', [
    ({}, ''), ({'a': None}, '1 tensors missing, e.g. a'), ({'c': (1,)}, '1 tensors unexpected, e.g. c'),
    ({'b': (3, 2)}, '1 tensors of another shape, e.g. b')])
def test_a_difference_of_tensors_is_described(change, message):
    shapes = {'a': (2,), 'b': (2, 3)}
    want = {name: torch.zeros(shape) for name, shape in shapes.items()}
    have = {name: torch.zeros(shape) for name, shape in {**shapes, **change}.items() if shape}
    assert state_dict_mismatch(want, have) == message


def test_half_precision_weights_with_a_large_sum_are_finite():
    model = GPT(GPTConfig(block_size=8, vocab_size=2000, n_layer=1, n_head=1, n_embd=64)).half()
    torch.nn.init.ones_(model.transformer.wte.weight)  # they add up to 128,000, above float16's 65,504
    assert not has_nan(model)
    model.transformer.ln_f.weight.data[0] = torch.inf
    assert has_nan(model)
