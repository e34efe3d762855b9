"""Files from elsewhere: every field of every kind of file with wrong types, extreme values and wrong tensors."""
import copy
import math
import pickle
import random
import zipfile

import pytest
import torch

from configurator import UserError
from lib.text import schema as text_schema
from lib.training.optim import load_optimizer_state, make_optimizer
from lib.weights import checkpoint, lora
from lib.weights.load_model import model_from_checkpoint
from model import GPT, GPTConfig

ARGS = dict(n_layer=2, n_head=2, n_embd=8, block_size=8, vocab_size=16, bias=True, dropout=0.0)


def make(kind='adamw', rank=0):
    """Return (model, optimizer) after one update."""
    model = GPT(GPTConfig(**ARGS))
    if rank:
        lora.adapt(model, rank)
    optimizer = make_optimizer(kind, model.param_groups(0.1, muon=kind == 'muon'), 1e-3, 0.02, (0.9, 0.95), 'cpu')
    idx = torch.arange(8)[None]
    model(idx, idx)[1].backward()
    optimizer.step()
    return model, optimizer


def make_state(kind='adamw', rank=0):
    """Return a complete checkpoint."""
    model, optimizer = make(kind, rank)
    return {'model': model.state_dict(), 'model_args': dict(ARGS), 'optimizer': optimizer.state_dict(), 'iter_num': 1,
            'tokens_seen': 32, 'minutes': 0.5, 'best_val_loss': 2.5, 'history': [[0, 2.8, 2.9], [1, 2.4, 2.5]],
            'wandb_id': '', 'config': {'dataset': 'tiny', 'n_layer': 2}, 'origins': {'dataset': 'flag'}, 'format': 2,
            'tokenizer': {'kind': 'char', 'chars': 'abcdefghijklmnop'},
            'data': {'name': 'tiny', 'vocab_size': 16, 'train': [2000, 'a' * 64], 'val': [400, 'b' * 64]},
            'rng': [{'cpu': torch.get_rng_state()}], 'scaler': {}}


@pytest.fixture(scope='module')
def states():
    return {(kind, rank): make_state(kind, rank) for kind, rank in (('adamw', 0), ('muon', 0), ('adamw', 2))}


def use(state, path, kind='adamw', rank=0):
    """Save `state`, and do with the file what a resumed run does; UserError if it is refused."""
    torch.save(state, path)
    found = checkpoint.load(path)
    model = model_from_checkpoint(found, path).train()
    optimizer = make_optimizer(kind, model.param_groups(0.1, muon=kind == 'muon'), 1e-3, 0.02, (0.9, 0.95), 'cpu')
    load_optimizer_state(optimizer, found['optimizer'], path)
    idx = torch.arange(8)[None]
    model(idx, idx)[1].backward()
    optimizer.step()
    return found


def tensors_in(value, place=()):
    """Yield (place, tensor) for all tensors in nested containers."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(inner, torch.Tensor):
            yield (*place, key), inner
        else:
            yield from tensors_in(inner, (*place, key))


def replaced(state, place, value):
    """Return a copy of `state` with another value at `place`, a tuple of keys; None removes the key."""
    *parents, last = place
    new = copy.copy(state)
    inner = new
    for key in parents:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return new


def wrong_tensors(tensor):
    """Return {what: a tensor in the place of `tensor` that must be refused}."""
    flat = tensor.reshape(-1)
    wrong = {
        'too short': torch.zeros(max(1, tensor.numel() // 2) if tensor.numel() > 1 else 3),
        'one more': torch.zeros(tensor.numel() + 1),
        'empty': torch.zeros(0),
        'another number of dimensions': tensor[None],
        'whole numbers': tensor.to(torch.int32),
        'complex': tensor.to(torch.complex64),
        'sparse': tensor.to(torch.float32).to_sparse(),
        'without data': tensor.to('meta'),
        'text': 'text',
    }
    if tensor.dim() == 2 and tensor.size(0) != tensor.size(1):
        wrong['transposed'] = tensor.t()
    if tensor.numel() > 1:
        wrong['expanded'] = flat[:1].expand(tensor.numel()).view(tensor.shape)
        wrong['overlapping'] = torch.zeros(tensor.numel() + 1).as_strided(
            tensor.shape, (1,) * tensor.dim()) if tensor.dim() > 1 else flat[:1].expand(tensor.shape)
    return wrong


@pytest.mark.parametrize('kind, rank', [('adamw', 0), ('muon', 0), ('adamw', 2)])
def test_a_checkpoint_that_is_unchanged_is_used(states, tmp_path, kind, rank):
    use(states[kind, rank], tmp_path / 'last.pt', kind, rank)


@pytest.mark.parametrize('kind, rank', [('adamw', 0), ('muon', 0), ('adamw', 2)])
def test_every_wrong_tensor_at_every_place_is_refused_in_one_line(states, tmp_path, kind, rank):
    state, path, rng = states[kind, rank], tmp_path / 'last.pt', random.Random(1)
    cases = [(place, what, wrong) for place, tensor in tensors_in(state) if place[-1] != 'step'
             for what, wrong in wrong_tensors(tensor).items()]
    for place, what, wrong in rng.sample(cases, 60):
        with pytest.raises(UserError) as refused:
            use(replaced(state, place, wrong), path, kind, rank)
            raise AssertionError(f'{what} at {place} was used')
        assert '\n' not in refused.value.message and 'last.pt' in refused.value.message, (place, what)


@pytest.mark.slow
@pytest.mark.parametrize('kind, rank', [('adamw', 0), ('muon', 0), ('adamw', 2)])
def test_all_wrong_tensors_at_all_places_are_refused_in_one_line(states, tmp_path, kind, rank):
    state, path = states[kind, rank], tmp_path / 'last.pt'
    for place, tensor in tensors_in(state):
        for what, wrong in wrong_tensors(tensor).items() if place[-1] != 'step' else ():
            with pytest.raises(UserError) as refused:
                use(replaced(state, place, wrong), path, kind, rank)
                raise AssertionError(f'{what} at {place} was used')
            assert '\n' not in refused.value.message and 'last.pt' in refused.value.message, (place, what)


def test_the_moments_of_two_parameters_that_are_swapped_are_refused(states, tmp_path):
    state = copy.deepcopy(states['adamw', 0])
    moments = state['optimizer']['state']
    other = next(i for i in moments if moments[i]['exp_avg'].shape != moments[0]['exp_avg'].shape)
    moments[0], moments[other] = moments[other], moments[0]
    with pytest.raises(UserError, match='optimizer state in .*last.pt is wrong: exp_avg of parameter 0 has the shape'):
        use(state, tmp_path / 'last.pt')


def test_a_tensor_whose_shape_and_moments_fit_is_not_written_beyond_its_end(states, tmp_path):
    state = replaced(states['adamw', 0], ('optimizer', 'state', 0, 'exp_avg'), torch.zeros(4))
    torch.save(state, tmp_path / 'last.pt')
    found = checkpoint.load(tmp_path / 'last.pt')
    optimizer = make()[1]
    before = optimizer.state_dict()['state'][0]['exp_avg'].clone()
    with pytest.raises(UserError):
        load_optimizer_state(optimizer, found['optimizer'], 'last.pt')
    assert torch.equal(optimizer.state_dict()['state'][0]['exp_avg'], before)


WRONG = [None, 'text', '', -1, 0.5, 2**70, -2**70, math.nan, math.inf, True, [], [[]], {}, {'a': 1}, (1,),
         torch.zeros(3), ['a', 1, 2], [['a', 1, 2]], {1: 2}]


def fields_of(value, place=(), depth=2):
    """Yield the places of all entries of nested dictionaries and lists, down to a depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        if depth:
            yield from fields_of(inner, (*place, key), depth - 1)


def test_wrong_values_in_every_field_of_a_checkpoint_are_refused_or_do_no_harm(states, tmp_path):
    state, path, refused, rng = states['adamw', 0], tmp_path / 'last.pt', 0, random.Random(2)
    places = [place for place in fields_of(state) if place[0] not in ('model', 'config')]
    cases = [(place, wrong) for place in places for wrong in WRONG
             if not (wrong is None and isinstance(place[-1], int))]
    for place, wrong in rng.sample(cases, 200):
        try:
            use(replaced(state, place, wrong), path)
        except UserError as error:
            assert '\n' not in error.message and 'last.pt' in error.message, (place, wrong)
            refused += 1
    assert refused > 120


@pytest.mark.parametrize('place, wrong', [
    (('iter_num',), 'abc'), (('iter_num',), math.nan), (('iter_num',), -1), (('tokens_seen',), 2**70),
    (('history',), [['a', 1, 2]]), (('history',), [[5, 1.0, 2.0]]), (('best_val_loss',), math.nan),
    (('optimizer',), {'state': {}}), (('tokenizer',), {'kind': ['char']}), (('data', 'train'), [2000]),
    (('rng',), [{'cpu': torch.zeros(3)}]), (('scaler',), {'scale': 'x'}), (('origins',), {'a': 1})])
def test_a_field_of_another_type_is_named(states, tmp_path, place, wrong):
    with pytest.raises(UserError, match=place[0]):
        use(replaced(states['adamw', 0], place, wrong), tmp_path / 'last.pt')


@pytest.mark.parametrize('name, value', [
    ('n_layer', 10**9), ('n_embd', 2**31), ('vocab_size', 2**40), ('block_size', 2**40), ('n_layer', 10**400),
    ('dropout', math.nan), ('softcap', math.inf), ('n_head', 'two'), ('bias', None)])
def test_an_architecture_that_the_file_is_too_small_for_is_refused_before_it_is_built(states, tmp_path, name, value):
    state = replaced(states['adamw', 0], ('model_args',), {**ARGS, name: value})
    with pytest.raises(UserError, match='model_args do not describe a model'):
        use(state, tmp_path / 'last.pt')


def test_a_rope_that_is_longer_than_any_is_refused(states, tmp_path):
    state = replaced(states['adamw', 0], ('model_args',), {**ARGS, 'pos': 'rope', 'block_size': 2**40})
    with pytest.raises(UserError, match='block_size=1,099,511,627,776 is above'):
        use(state, tmp_path / 'last.pt')


def test_tensors_that_share_the_bytes_of_one_are_refused(states, tmp_path):
    big = torch.zeros(2**16)
    model = {f'w{i}': big for i in range(50)}
    with pytest.raises(UserError, match='its tensors share memory: 13,107,200 bytes of tensors in a file of'):
        use(replaced(states['adamw', 0], ('model',), model), tmp_path / 'last.pt')


def test_adapters_of_a_rank_that_the_file_is_too_small_for_are_refused(states, tmp_path):
    state = copy.copy(states['adamw', 2])
    state['model'] = {**state['model'], 'transformer.h.0.attn.c_attn.lora_a': torch.zeros(10**5, 0)}
    with pytest.raises(UserError, match='its adapters do not have rank 100000'):
        use(state, tmp_path / 'last.pt', rank=2)


def test_a_compressed_checkpoint_is_refused(states, tmp_path):
    plain, packed = tmp_path / 'plain.pt', tmp_path / 'last.pt'
    torch.save(states['adamw', 0], plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as target:
        for member in source.infolist():
            target.writestr(member.filename, source.read(member), zipfile.ZIP_DEFLATED)
    with pytest.raises(UserError, match='is compressed, which torch.save never does'):
        checkpoint.load(packed)


def test_lists_that_contain_each_other_many_times_are_refused_at_once(states, tmp_path):
    nested = [1]
    for _ in range(60):
        nested = [nested, nested]
    state = replaced(states['adamw', 0], ('history',), nested)
    with pytest.raises(UserError, match='history is a list'):
        use(state, tmp_path / 'last.pt')
    found = use(replaced(states['adamw', 0], ('config', 'eval_iters'), nested), tmp_path / 'last.pt')
    assert 'eval_iters' not in found['config']


@pytest.mark.parametrize('pickled', [
    b'\x80\x02]r\xff\xff\xff\x7f.',  # nine bytes that ask for a table of 2**31 places
    b'\x80\x05\x96\x00\x00\x00\x00\x01\x00\x00\x00.',  # four gigabytes of zeros
    b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.', b'\x80\x02' + b'(' * 100_000, b'I' + b'9' * 5000 + b'\n.',
    pickle.dumps({'itos': {0: 'a', 1: 'a'}}), pickle.dumps({'itos': ['a', '\ud800']}), pickle.dumps({'itos': 5}),
    pickle.dumps({'itos': {}}), pickle.dumps([]), b''])
def test_a_meta_pkl_that_is_none_is_one_line_and_takes_no_memory(tmp_path, pickled):
    from lib.text import data_folder
    (tmp_path / 'meta.pkl').write_bytes(pickled)
    with pytest.raises(UserError, match=r'meta\.pkl'):
        data_folder.from_nanogpt_meta(tmp_path)


@pytest.mark.parametrize('text', ['9' * 5000, '[' * 100_000, '{"a":' * 100_000, '', 'x', '\ud800'])
def test_json_that_is_none_is_a_value_error(text):
    with pytest.raises(ValueError):
        text_schema.parse_json(text)


BYTES = [chr(i) for i in range(256)]


@pytest.mark.parametrize('spec', [
    None, [], 'char', {}, {'kind': None}, {'kind': ['char']}, {'kind': 'char'}, {'kind': 'char', 'chars': ''},
    {'kind': 'char', 'chars': 'aba'}, {'kind': 'char', 'chars': ['a', 'b']}, {'kind': 'char', 'chars': 'a\ud800'},
    {'kind': 'bpe'}, {'kind': 'bpe', 'tokens': []}, {'kind': 'bpe', 'tokens': ['a', 'b']},
    {'kind': 'bpe', 'tokens': [*BYTES, '']}, {'kind': 'bpe', 'tokens': [*BYTES, 'a']},
    {'kind': 'bpe', 'tokens': [*BYTES, 'Ā']}, {'kind': 'bpe', 'tokens': [*BYTES, 5]},
    {'kind': 'bpe', 'tokens': BYTES[1:]}])
def test_a_tokenizer_that_cannot_be_made_is_named(spec):
    assert text_schema.spec_problem(spec)


def test_tokenizers_that_can_be_made_pass():
    for spec in ({'kind': 'byte'}, {'kind': 'gpt2'}, {'kind': 'char', 'chars': 'a\U0001f600'},
                 {'kind': 'bpe', 'tokens': [*BYTES, 'ab']}):
        assert text_schema.spec_problem(spec) == ''
