"""Files from elsewhere: every field of every kind of file with wrong types, extreme values and wrong tensors."""
import copy
import io
import json
import math
import os
import pickle
import random
import zipfile
from collections import OrderedDict

import kit
import pytest
import torch
from conftest import TINY

from configurator import UserError
from lib import tasks
from lib.text import download, inputs
from lib.text import schema as text_schema
from lib.training import log
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
    for place, what, wrong in rng.sample(cases, 30):
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


@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('place', [('model', 'transformer.wte.weight'), ('optimizer', 'state', 0, 'exp_avg')])
@pytest.mark.parametrize('make_tensor', [
    lambda: torch.nested.nested_tensor([torch.zeros(16, 8)]), lambda: torch.zeros(16, 8, dtype=torch.bool),
    lambda: torch.zeros(16, 8).to(torch.float8_e4m3fn), lambda: torch.eye(16, 8).to_sparse(),
    lambda: torch.zeros(16, 8, device='meta'),
    lambda: torch.quantize_per_tensor(torch.zeros(16, 8), 1.0, 0, torch.qint8)],
    ids=['nested', 'bool', 'float8', 'sparse', 'without data', 'quantized'])
def test_a_tensor_of_a_kind_that_no_weight_has_is_refused(states, tmp_path, place, make_tensor):
    with pytest.raises(UserError, match='is not a plain tensor|has dtype'):
        use(replaced(states['adamw', 0], place, make_tensor()), tmp_path / 'last.pt')


class Rebuilt:
    """Stored as a tensor that has four numbers in the file and claims another place, shape and strides."""

    def __init__(self, offset, size, stride):
        self.claim = offset, size, stride

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(4)._typed_storage(), *self.claim, False, OrderedDict())


@pytest.mark.parametrize('claim', [
    (10**6, (16, 8), (8, 1)), (-1000, (16, 8), (8, 1)), (0, (16, 8), (8, 1)), (0, (-16, -8), (8, 1)),
    (3, (16, 8), (-8, -1)), (0, (2**32, 2**32), (2**32, 1)), (2**63 - 1, (16, 8), (8, 1))], ids=str)
@pytest.mark.parametrize('mmap', [False, True])
def test_a_tensor_that_claims_memory_beyond_its_own_is_refused(states, tmp_path, claim, mmap):
    torch.save(replaced(states['adamw', 0], ('model', 'transformer.wte.weight'), Rebuilt(*claim)), tmp_path / 'last.pt')
    with pytest.raises(UserError, match='last.pt is damaged'):
        checkpoint.load(tmp_path / 'last.pt', mmap=mmap)


@pytest.mark.parametrize('mmap', [False, True])
@pytest.mark.parametrize('change', [lambda data: data[:8], lambda data: b'', lambda data: data + bytes(64)],
                         ids=['shorter', 'empty', 'longer'])
def test_a_tensor_whose_part_of_the_file_has_another_size_is_refused(states, tmp_path, mmap, change):
    """A mapped tensor would continue in what follows in the file, without an error."""
    torch.save(states['adamw', 0], tmp_path / 'whole.pt')
    with zipfile.ZipFile(tmp_path / 'whole.pt') as source, zipfile.ZipFile(tmp_path / 'last.pt', 'w') as target:
        for member in source.infolist():
            data = source.read(member)
            target.writestr(member.filename, change(data) if member.filename.endswith('/data/3') else data)
    with pytest.raises(UserError, match='last.pt is damaged .record size|last.pt is damaged: it has a tensor of'):
        checkpoint.load(tmp_path / 'last.pt', mmap=mmap)


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
    for place, wrong in rng.sample(cases, 100):
        try:
            use(replaced(state, place, wrong), path)
        except UserError as error:
            assert '\n' not in error.message and 'last.pt' in error.message, (place, wrong)
            refused += 1
    assert refused > 60


@pytest.mark.parametrize('place, wrong', [
    (('iter_num',), 'abc'), (('iter_num',), math.nan), (('iter_num',), -1), (('tokens_seen',), 2**70),
    (('history',), [['a', 1, 2]]), (('history',), [[5, 1.0, 2.0]]), (('best_val_loss',), math.nan),
    (('best_val_loss',), torch.zeros(3)),
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
    with pytest.raises(UserError, match=r'meta\.pkl') as refused:
        data_folder.from_nanogpt_meta(tmp_path)
    assert 'MemoryError' not in refused.value.message  # it was not even tried


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


# Other small files

@pytest.mark.parametrize('line', ['[' * 100_000, '9' * 5000, '{"iter": "x", "loss": 1}', '{"iter": 1, "loss": []}',
                                  '{"step": -1, "val_loss": 1}', '{"step": 1, "val_loss": 1e400}', '\ud800', '[]',
                                  '{"step"'])
def test_a_line_of_the_log_that_this_program_never_writes_is_left_out(tmp_path, line):
    good = '{"iter": 0, "loss": 2.5, "mfu": null}\n'
    (tmp_path / 'log.jsonl').write_text(good + line + '\n' + good, encoding='utf-8', errors='surrogatepass')
    records = log.read_log(tmp_path / 'log.jsonl')
    assert records[0] == records[-1] == {'iter': 0, 'loss': 2.5, 'mfu': None} and len(records) == 2
    log.trim_log(tmp_path / 'log.jsonl', 5, 5)


@pytest.mark.parametrize('row', [
    {'ctx': None}, {'ctx': 'a \ud800'}, {'endings': []}, {'endings': 'ab'}, {'endings': ['a', '']},
    {'endings': ['a', 5]}, {'label': 2}, {'label': 'x'}, {'label': None}, {'label': -1}, {'label': []},
    {'label': 10**30}, {'text': None}, {'text': ''}, {'text': ' '}, {'text': 5}, {'text': ['a']},
    {'text': 'a \ud800'}, []])
def test_a_row_of_a_task_with_a_wrong_value_is_named_with_its_line(tmp_path, row):
    task = 'lambada' if 'text' in row else 'hellaswag'
    good = {'hellaswag': {'ctx': 'a', 'endings': ['b', 'c'], 'label': '1'}, 'lambada': {'text': 'one two'}}[task]
    row = {**good, **row} if row else row
    path = tmp_path / 'rows.jsonl'
    path.write_text(json.dumps(good) + '\n' + json.dumps(row) + '\n', encoding='utf-8')
    with pytest.raises(UserError, match=r'rows\.jsonl:2: '):
        tasks.read(task, path)


@pytest.mark.parametrize('flags', [['--n_layer=1000000000'], ['--n_embd=2000000000', '--n_head=1'],
                                   ['--block_size=2000000000000', '--dataset=tiny']])
def test_a_model_that_no_memory_holds_is_refused_before_it_is_built(run, workdir, flags):
    done = run('train.py', *TINY, *flags)
    assert done.status == 2 and 'and this machine has' in done.err


def test_an_out_dir_with_a_name_that_is_too_long_is_one_line(run, workdir):
    done = run('train.py', *TINY, '--out_dir=' + 'x' * 300)
    assert done.status == 2 and 'is not a writable folder (File name too long)' in done.last_error


def test_export_never_removes_or_mixes_files_that_it_has_not_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    state['model_args']['bias'] = True
    (tmp_path / 'out').mkdir()
    torch.save(state, tmp_path / 'out' / 'ckpt.pt')
    for name in ('config.json', 'model-00001-of-00002.safetensors', 'vocab.json', 'model.safetensors.index.json'):
        folder = tmp_path / 'project'
        folder.mkdir(exist_ok=True)
        (folder / name).write_text('mine')
        done = run('export.py', '--to=project')
        assert done.status == 1 and f'project holds {name}, which export.py has not written' in done.last_error
        assert [p.name for p in folder.iterdir()] == [name] and (folder / name).read_text() == 'mine'
        (folder / name).unlink()
    assert run('export.py', '--to=project').status == 0
    (tmp_path / 'project' / 'vocab.json').write_text('{}')  # of an earlier export with another tokenizer
    (tmp_path / 'project' / 'README.md').write_text('mine')
    assert run('export.py', '--to=project').status == 0
    assert not (tmp_path / 'project' / 'vocab.json').exists() and (tmp_path / 'project' / 'README.md').exists()


# Downloads

def test_two_addresses_are_two_files_and_a_text_put_there_by_hand_stays(tmp_path, monkeypatch):
    (tmp_path / 'input.txt').write_text('my text')
    monkeypatch.setattr(download, '_fetch', lambda url, path: path.write_text(url))
    paths = inputs.find('input', ['http://a/x', 'http://b/x'], tmp_path)
    assert [p.read_text() for p in paths] == ['http://a/x', 'http://b/x']
    assert (tmp_path / 'input.txt').read_text() == 'my text'


def test_a_download_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    path = download.own_file(tmp_path, 'file:///x')
    path.write_text('earlier')
    monkeypatch.setattr(download, 'WAIT', 0)
    with pytest.raises(UserError, match='download failed'):
        inputs.find('input', ['file:///x'], tmp_path)
    assert path.read_text() == 'earlier' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('url, ascii_url', [
    ('http://host/水浒.txt', 'http://host/%E6%B0%B4%E6%B5%92.txt'), ('http://主机.cn/a b', 'http://xn--tiq422d.cn/a%20b'),
    ('http://host/%E6?q=水&b=1', 'http://host/%E6?q=%E6%B0%B4&b=1')])
def test_an_address_in_chinese_is_an_address(url, ascii_url):
    assert download.ascii_url(url) == ascii_url


@pytest.mark.parametrize('url', ['http://[', 'foo://x', 'http://a:b/', 'http://a\n/', '://',
                                 'http://' + 'x' * 300 + '.水/'])
def test_what_is_no_address_is_one_line(tmp_path, monkeypatch, url):
    monkeypatch.setattr(download, 'WAIT', 0)
    with pytest.raises(UserError, match='download failed'):
        download.download(url, tmp_path / 'x')


class Reply(io.BytesIO):
    def __init__(self, data, **headers):
        super().__init__(data)
        self.headers = headers


@pytest.mark.parametrize('headers, size, reason', [
    ({'Content-Length': str(10**15)}, 5, '1,000,000,000,000,000 bytes, and only'), ({}, 10**4, 'more than'),
    ({'Content-Length': 'x'}, 0, '0 of 0'), ({'Content-Length': '9' * 5000}, 0, '0 of 0'),
    ({'Content-Length': '7'}, 5, '5 of 7 bytes')])
def test_a_download_is_bounded_and_its_size_is_checked(tmp_path, monkeypatch, headers, size, reason):
    monkeypatch.setattr(download, 'WAIT', 0)
    monkeypatch.setattr(download.urllib.request, 'urlopen', lambda *_, **__: Reply(b'a' * size, **headers))
    usage = type('Usage', (), {'free': download.RESERVE + 5000})
    monkeypatch.setattr(download.shutil, 'disk_usage', lambda path: usage)
    with pytest.raises(UserError, match=reason):
        download.download('http://a/', tmp_path / 'x')
    assert not (tmp_path / 'x').exists()


def test_a_download_that_trickles_is_given_up(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(download.time, 'monotonic', lambda: next(clock))
    monkeypatch.setattr(download, 'WAIT', 0)
    monkeypatch.setattr(download, 'CHUNK', 1)
    monkeypatch.setattr(download.urllib.request, 'urlopen', lambda *_, **__: Reply(b'a' * 1000))
    with pytest.raises(UserError, match='only 4 bytes in 80 seconds'):
        download.download('http://a/', tmp_path / 'x')


# Pipes, and characters that look alike

def test_a_prompt_and_a_text_to_evaluate_are_read_from_a_pipe(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    torch.save(make_state(), tmp_path / 'out' / 'ckpt.pt')
    for script, flag in (('sample.py', '--start=FILE:'), ('evaluate.py', '--text=')):
        reader, writer = os.pipe()
        os.write(writer, b'abcdefgh' * 10)
        os.close(writer)
        done = run(script, f'{flag}/dev/fd/{reader}', '--device=cpu', *['--num_samples=1'] * (script == 'sample.py'))
        os.close(reader)
        assert done.status == 0, done.err


def test_a_pipe_as_input_of_prepare_is_refused_with_the_reason(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='can be read only once, and prepare reads twice'):
        inputs.find('input', [str(tmp_path / 'pipe')], tmp_path)


def test_a_character_that_the_text_writes_as_two_is_explained():
    from lib.text.tokenizer import CharTokenizer
    with pytest.raises(UserError, match='the text writes it as .e. [+] .*u0301'):
        CharTokenizer('e\u0301x').encode('\xe9')


def test_a_folder_whose_name_looks_like_a_formula_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('o$\\frac5$', 'b$^$'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(
            '{"iter": 0, "loss": 2.5}\n{"step": 0, "train_loss": 2.5, "val_loss": 2.6}\n')
    assert run('plot.py', 'o$\\frac5$').status == 0
    assert run('plot.py', 'o$\\frac5$', 'b$^$').status == 0


@pytest.mark.parametrize('state', [{}, {0: {}}])
def test_an_optimizer_state_from_before_the_first_update_is_used(states, tmp_path, state):
    saved = copy.deepcopy(states['adamw', 0])
    saved['optimizer']['state'] = state
    use(saved, tmp_path / 'last.pt')


def test_a_file_system_that_cannot_map_files_is_read(states, tmp_path, monkeypatch):
    torch.save(states['adamw', 0], tmp_path / 'last.pt')
    real = torch.load
    monkeypatch.setattr(torch, 'load', lambda *args, mmap=False, **kw: 1 / 0 if mmap else real(*args, **kw))
    assert checkpoint.load(tmp_path / 'last.pt', mmap=True)['iter_num'] == 1


def test_a_disk_that_fails_is_not_called_a_damaged_checkpoint(states, tmp_path, monkeypatch):
    torch.save(states['adamw', 0], tmp_path / 'last.pt')
    kit.break_call(monkeypatch, zipfile.ZipFile, 'testzip', OSError(5, 'Input/output error'))
    with pytest.raises(UserError, match='cannot be read .Input/output error.'):
        checkpoint.load(tmp_path / 'last.pt')


@pytest.mark.parametrize('wrong', [['a'], 5, None, {'a': 1}])
def test_a_dataset_in_a_checkpoint_that_is_no_name_is_left_out(states, tmp_path, wrong):
    found = use(replaced({**states['adamw', 0], 'config': {'dataset': 'x'}}, ('config',), {'dataset': wrong}),
                tmp_path / 'last.pt')
    assert 'dataset' not in found['config']
