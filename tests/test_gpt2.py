"""lib/weights/gpt2.py: models saved by transformers give its logits; what cannot be loaded is an error of one line."""
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, write_dataset
from textkit import skip_without_gpt2

from configurator import UserError
from lib.generate import generate
from lib.weights import gpt2

transformers = pytest.importorskip('transformers')
huggingface_hub = pytest.importorskip('huggingface_hub')
constants = huggingface_hub.constants
safetensors_torch = pytest.importorskip('safetensors.torch')


def make_hf(folder, std=0.2, **changes):
    """Save a random GPT-2 of transformers with weights large enough to tell activations apart; returns it."""
    torch.manual_seed(0)
    values = dict(n_layer=2, n_head=2, n_embd=16, n_positions=12, vocab_size=61, initializer_range=std,
                  bos_token_id=None, eos_token_id=None)
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**values, **changes})).eval()
    hf.save_pretrained(folder)
    return hf


@pytest.fixture(scope='module')
def hf(tmp_path_factory):
    """(folder, transformers' model) shared by tests that do not write to it."""
    folder = tmp_path_factory.mktemp('hf')
    return folder, make_hf(folder)


@pytest.fixture
def copy(hf, tmp_path):
    """A copy of the folder, which a test may damage."""
    return shutil.copytree(hf[0], tmp_path / 'copy')


@torch.no_grad()
def difference(model, hf):
    idx = torch.randint(hf.config.vocab_size, (3, hf.config.n_positions), generator=torch.Generator().manual_seed(1))
    return float((model.eval()(idx, idx, return_logits=True)[0] - hf(idx).logits).abs().max())


@pytest.mark.parametrize('changes', [{}, dict(n_layer=3, n_head=4, n_embd=32, n_positions=7, vocab_size=100),
                                     dict(n_head=1, n_embd=24), dict(activation_function='gelu')])
def test_logits_equal_those_of_transformers(tmp_path, changes):
    hf = make_hf(tmp_path, **changes)
    assert difference(gpt2.find(tmp_path).load(), hf) < 1e-4


def test_greedy_continuations_are_those_of_transformers(hf):
    folder, theirs = hf
    prompt = [5, 17, 3]
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=9, pad_token_id=0)[0, 3:]
    ours = generate(gpt2.find(folder).load().eval(), prompt, 1, 9, temperature=0)
    assert [int(ids) for ids in ours] == expected.tolist()


def test_a_model_in_several_files_is_read(tmp_path):
    hf = make_hf(tmp_path)
    hf.save_pretrained(tmp_path / 'parts', max_shard_size='5KB')
    assert len(gpt2.find(tmp_path / 'parts').files()) > 1
    assert difference(gpt2.find(tmp_path / 'parts').load(), hf) < 1e-4


def test_names_without_prefix_half_precision_masks_and_a_saved_head_are_read(hf, copy):
    """The files on the hub have bare names, buffers of the causal mask and, if they are old, the tied head."""
    path = copy / 'model.safetensors'
    tensors = {name.removeprefix('transformer.'): tensor.half()
               for name, tensor in safetensors_torch.load_file(path).items()}
    tensors['h.0.attn.bias'], tensors['h.1.attn.masked_bias'] = torch.ones(1, 1, 12, 12), torch.tensor(-1e4)
    tensors['lm_head.weight'] = tensors['wte.weight'].clone()
    safetensors_torch.save_file(tensors, path)
    model, whole = gpt2.find(copy).load(), gpt2.find(hf[0]).load()
    for (name, p), q in zip(model.named_parameters(), whole.parameters()):
        assert p.dtype == torch.float32 and torch.equal(p, q.half().float()), name


def test_a_cropped_context_computes_the_same_on_short_texts(hf):
    idx = torch.tensor([[1, 2, 3, 4, 5]])
    whole, cropped = gpt2.find(hf[0]).load().eval(), gpt2.find(hf[0]).load(block_size=5).eval()
    assert cropped.config.block_size == len(cropped.transformer.wpe.weight) == 5
    assert torch.equal(whole(idx)[0], cropped(idx)[0])


def test_dropout_is_the_argument_and_not_that_of_the_file(hf):
    assert gpt2.find(hf[0]).load().config.dropout == 0.0
    model = gpt2.find(hf[0]).load(dropout=0.3)
    assert model.config.dropout == model.transformer.drop.p == model.transformer.h[0].attn.dropout == 0.3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_weights_are_converted_while_they_are_read(hf, dtype):
    model, exact = gpt2.find(hf[0]).load(dtype=dtype), gpt2.find(hf[0]).load()
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(model.parameters(), exact.parameters()))
    assert torch.get_default_dtype() == torch.float32


def test_the_model_does_not_depend_on_its_files_later(copy):
    model = gpt2.find(copy).load()
    before = [p.clone() for p in model.parameters()]
    path = copy / 'model.safetensors'
    with open(path, 'r+b') as file:  # the same file, so that a mapping would show it
        file.seek(-64, os.SEEK_END)
        file.write(b'\xff' * 64)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_no_file_of_the_program_imports_transformers():
    for path in [*REPO.glob('*.py'), *REPO.glob('lib/**/*.py')]:
        assert not re.search(r'^\s*(import|from) transformers', path.read_text(encoding='utf-8'), re.M), path


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc/self/status')
def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    make_hf(tmp_path, n_layer=4, n_embd=1024, n_head=8, n_positions=64, vocab_size=20_000)
    code = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from lib.weights import gpt2
def anonymous():
    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon')) * 1024
def watch():
    while not done.wait(0.001):
        seen.append(anonymous())
import safetensors, torch
torch.ones(64, 64) @ torch.ones(64, 64)
seen, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = gpt2.find(sys.argv[2]).load()
done.set()
thread.join()
print((max(seen) - seen[0]) / sum(p.numel() * 4 for p in model.parameters()))
"""
    done = subprocess.run([sys.executable, '-c', code, REPO, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and float(done.stdout) < 1.2, done


# What cannot be loaded

def refusal(folder):
    """Return the error message of loading the folder."""
    with pytest.raises(UserError) as caught:
        gpt2.find(folder).load()
    assert '\n' not in caught.value.message
    return caught.value.message


def test_a_truncated_file_names_the_first_tensor_that_is_cut(copy):
    path = copy / 'model.safetensors'
    names = list(safetensors_torch.load_file(path))
    os.truncate(path, path.stat().st_size - 10)
    found = refusal(copy)
    assert 'model.safetensors is cut off in transformer.' in found and any(name in found for name in names)


def test_a_missing_tensor_is_named(copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    del tensors['transformer.h.1.ln_2.bias']
    safetensors_torch.save_file(tensors, copy / 'model.safetensors')
    assert 'transformer.h.1.ln_2.bias' in refusal(copy)


def test_a_tensor_of_another_shape_is_named(copy):
    config = json.loads((copy / 'config.json').read_text(encoding='utf-8'))
    (copy / 'config.json').write_text(json.dumps({**config, 'vocab_size': 60}), encoding='utf-8')
    found = refusal(copy)
    assert 'transformer.wte.weight' in found and '(61, 16)' in found and '(60, 16)' in found


def test_an_unexpected_tensor_is_named(copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    tensors['transformer.h.2.ln_1.bias'] = torch.zeros(16)
    safetensors_torch.save_file(tensors, copy / 'model.safetensors')
    assert 'unexpected tensor transformer.h.2.ln_1.bias' in refusal(copy)


@pytest.mark.parametrize('content', [b'', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'])
def test_another_kind_of_file_is_refused(copy, content):
    (copy / 'model.safetensors').write_bytes(content)
    assert 'is not a complete safetensors file' in refusal(copy)


def test_a_missing_file_is_named(copy):
    (copy / 'model.safetensors').unlink()
    assert 'model.safetensors not found' in refusal(copy)


@pytest.mark.parametrize('key, value', [('scale_attn_by_inverse_layer_idx', True), ('n_inner', 48),
                                        ('activation_function', 'relu'), ('layer_norm_epsilon', 1e-6),
                                        ('model_type', 'gpt_neo'), ('tie_word_embeddings', False)])
def test_an_architecture_that_this_program_does_not_compute_is_refused(copy, key, value):
    config = json.loads((copy / 'config.json').read_text(encoding='utf-8'))
    (copy / 'config.json').write_text(json.dumps({**config, key: value}), encoding='utf-8')
    assert f'{key}={value!r}' in refusal(copy)


def test_offline_and_not_cached_is_one_line_that_names_the_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    done = run('sample.py', '--init_from=gpt2', '--device=cpu')
    assert done.status == 1 and len(done.err.splitlines()) == 1
    assert 'is not in the cache and cannot be downloaded' in done.err
    assert '--init_from=FOLDER' in done.err and 'HF_ENDPOINT' in done.err


@pytest.mark.parametrize('repository', ['openai-community--gpt2', 'gpt2'])
def test_a_cached_model_is_taken_without_asking_the_hub(hf, tmp_path, monkeypatch, repository):
    snapshot = tmp_path / f'models--{repository}' / 'snapshots' / 'abc'
    snapshot.mkdir(parents=True)
    (tmp_path / f'models--{repository}' / 'refs').mkdir()
    (tmp_path / f'models--{repository}' / 'refs' / 'main').write_text('abc', encoding='utf-8')
    shutil.copy(hf[0] / 'model.safetensors', snapshot)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub, 'hf_hub_download', None)
    assert gpt2.find('gpt2').files() == [str(snapshot / 'model.safetensors')]


def test_a_partial_download_is_not_used(tmp_path, monkeypatch):
    blobs = tmp_path / 'models--openai-community--gpt2' / 'blobs'
    blobs.mkdir(parents=True)
    (blobs / '0123.incomplete').write_bytes(b'half')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='is not in the cache and cannot be downloaded'):
        gpt2.find('gpt2').files()


# In the scripts

FINETUNE = ('--device=cpu --dtype=float32 --init_from=hf --dataset=bpe --batch_size=2 --gradient_accumulation_steps=1 '
            '--max_iters=20 --eval_interval=10 --eval_iters=2 --learning_rate=1e-3 --decay_lr=False').split()


@pytest.fixture
def finetune_dir(workdir):
    """A working directory with a folder hf, GPT-2's vocabulary and 16 positions, and a dataset in its tokens."""
    make_hf(workdir / 'hf', n_layer=1, n_embd=8, n_positions=16, vocab_size=50257)
    ids = np.cumsum(np.random.default_rng(0).integers(1, 4, 600)) % 50 + 50200
    write_dataset(workdir / 'data' / 'bpe', ids)
    path = workdir / 'data' / 'bpe' / 'meta.json'
    meta = json.loads(path.read_text(encoding='utf-8'))
    meta.update(tokenizer={'kind': 'gpt2'}, vocab_size=50257)
    path.write_text(json.dumps(meta), encoding='utf-8')
    return workdir


def test_fine_tuning_from_a_folder_lowers_the_loss_and_leaves_an_ordinary_checkpoint(run, finetune_dir):
    done = run('train.py', *FINETUNE)
    assert done.status == 0, done.err
    state = torch.load('out/ckpt.pt', weights_only=True)
    assert state['model_args']['n_layer'] == 1 and state['model_args']['block_size'] == 16
    assert state['history'][-1][2] < state['history'][0][2] and state['iter_num'] == 20
    resumed = run('train.py', *FINETUNE, '--init_from=resume', '--max_iters=22')
    assert resumed.status == 0 and 'resuming from iter 20' in resumed.out, resumed.err
    scored = run('evaluate.py', '--device=cpu')
    assert scored.status == 0 and 'val of bpe: loss' in scored.out, scored.err


def test_a_fine_tuned_model_is_sampled(run, finetune_dir):
    skip_without_gpt2()
    run('train.py', *FINETUNE, '--max_iters=2')
    done = run('sample.py', '--device=cpu', '--num_samples=2', '--max_new_tokens=3', '--start=a')
    assert done.status == 0 and done.out.count('-' * 15) == 2, done.err


def test_a_smaller_block_size_crops_the_model(run, finetune_dir):
    run('train.py', *FINETUNE, '--max_iters=2', '--block_size=8', '--dropout=0.2')
    state = torch.load('out/last.pt', weights_only=True)
    assert state['model']['transformer.wpe.weight'].shape == (8, 8)
    assert state['model_args']['block_size'] == 8 and state['model_args']['dropout'] == 0.2


def test_a_dataset_with_another_tokenizer_is_refused(run, finetune_dir):
    done = run('train.py', *FINETUNE, '--dataset=tiny', '--block_size=8')
    assert done.status == 2
    assert done.last_error.endswith("tiny does not fit hf: its tokenizer is char, the model's is gpt2; prepare it with "
                                    '--tokenizer=gpt2'), done.last_error


def test_a_flag_that_contradicts_the_weights_is_refused(run, finetune_dir):
    done = run('train.py', *FINETUNE, '--n_layer=3', '--block_size=32')
    assert done.status == 2 and 'block_size=32 but hf has 16 positions' in done.err
    assert 'n_layer=3 but the checkpoint hf has 1' in run('train.py', *FINETUNE, '--n_layer=3').err


def test_a_folder_with_another_vocabulary_is_refused(run, finetune_dir):
    (finetune_dir / 'hf' / 'vocab.json').write_text('{"a": 0, "b": 1}', encoding='utf-8')
    done = run('train.py', *FINETUNE)
    assert done.status == 2 and "is not GPT-2's vocabulary" in done.last_error


def test_activation_checkpointing_works_with_imported_weights(hf):
    idx = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
    results = []
    for on in (False, True):
        model = gpt2.find(hf[0]).load(dropout=0.2).train()
        model.checkpoint_activations = on
        torch.manual_seed(0)
        loss = model(idx, idx)[1]
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results))


# Names

@pytest.mark.parametrize('name', ['gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'])
def test_the_hub_names_have_gpt2s_architecture(name):
    source = gpt2.find(name)
    config = source.config()
    assert source.folder is None and source.tokenizer_spec() == {'kind': 'gpt2'}
    assert (config.vocab_size, config.block_size, config.mlp, config.bias) == (50257, 1024, 'gelu_tanh', True)
    assert config.n_embd % config.n_head == 0 and config.validate() == []


@pytest.mark.parametrize('name', ['', 'scratch', 'resume', 'gpt3', 'nowhere/at/all'])
def test_other_names_are_no_source(name):
    assert gpt2.find(name) is None


def test_config_json_gives_the_config(hf):
    config = gpt2.find(hf[0]).config()
    assert (config.n_layer, config.n_head, config.n_embd, config.block_size, config.vocab_size) == (2, 2, 16, 12, 61)


def test_a_folder_without_config_json_names_it(copy):
    (copy / 'config.json').unlink()
    assert 'config.json not found' in refusal(copy)


@pytest.mark.parametrize('content', ['', '{"n_layer": ', '[]', '{"n_layer": "two", "model_type": "gpt2"}'])
def test_a_damaged_config_json_is_named(copy, content):
    (copy / 'config.json').write_text(content, encoding='utf-8')
    assert 'config.json is damaged' in refusal(copy)


# Folders of other programs

def change(path, **values):
    """Change values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text(encoding='utf-8')), **values}), encoding='utf-8')


def rename(folder, new_name):
    """Give each tensor in a folder another name."""
    tensors = safetensors_torch.load_file(folder / 'model.safetensors')
    safetensors_torch.save_file({new_name(name): t for name, t in tensors.items()}, folder / 'model.safetensors')


@pytest.mark.parametrize('prefix', ['', 'transformer.', 'module.transformer.', '_orig_mod.transformer.', 'model.',
                                    '_orig_mod.module.transformer.', 'module._orig_mod.'])
def test_prefixes_of_wrappers_and_compilers_are_dropped(hf, copy, prefix):
    rename(copy, lambda name: prefix + name.removeprefix('transformer.'))
    assert difference(gpt2.find(copy).load(), hf[1]) < 1e-4


def test_a_folder_with_pytorch_model_bin_only_is_read(hf, copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    torch.save({**tensors, 'lm_head.weight': tensors['transformer.wte.weight'],
                'transformer.h.0.attn.bias': torch.ones(1, 1, 12, 12, dtype=torch.uint8)}, copy / 'pytorch_model.bin')
    (copy / 'model.safetensors').unlink()
    assert difference(gpt2.find(copy).load(), hf[1]) < 1e-4


def test_shards_of_pytorch_model_bin_are_read(hf, copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    for i in range(2):
        torch.save(dict(list(tensors.items())[i::2]), copy / f'{i}.bin')
    (copy / 'pytorch_model.bin.index.json').write_text(json.dumps({'weight_map': {'a': '0.bin', 'b': '1.bin'}}))
    (copy / 'model.safetensors').unlink()
    assert difference(gpt2.find(copy).load(), hf[1]) < 1e-4


def test_a_pytorch_model_bin_with_a_payload_is_refused(copy, tmp_path):
    torch.save({'a': Harm(tmp_path / 'harmed'), 'b': torch.zeros(9000)}, copy / 'pytorch_model.bin')
    (copy / 'model.safetensors').unlink()
    assert 'refusing' in refusal(copy) and not (tmp_path / 'harmed').exists()


class Harm:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_whole_weights_win_over_the_index_of_shards_that_are_gone(hf, copy):
    (copy / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': 'gone.safetensors'}}))
    assert difference(gpt2.find(copy).load(), hf[1]) < 1e-4


def test_a_head_of_its_own_is_refused(copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    safetensors_torch.save_file({**tensors, 'lm_head.weight': tensors['transformer.wte.weight'] + 1},
                                copy / 'model.safetensors')
    assert 'lm_head.weight differs from the embedding' in refusal(copy)


@pytest.mark.parametrize('name', ['score.weight', 'v_head.summary.weight', 'multiple_choice_head.summary.bias'])
def test_a_head_for_another_task_is_named(copy, name):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    safetensors_torch.save_file({**tensors, name: torch.zeros(2, 16)}, copy / 'model.safetensors')
    assert f'{name} belongs to a head for another task' in refusal(copy)


def test_half_precision_is_read(hf, copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    safetensors_torch.save_file({n: t.bfloat16() for n, t in tensors.items()}, copy / 'model.safetensors')
    assert difference(gpt2.find(copy).load(), hf[1]) < 0.2


def test_quantised_weights_are_refused_by_their_dtype(copy):
    tensors = safetensors_torch.load_file(copy / 'model.safetensors')
    safetensors_torch.save_file({n: t.to(torch.int8) for n, t in tensors.items()}, copy / 'model.safetensors')
    assert 'has dtype int8' in refusal(copy)


@pytest.mark.parametrize('name', ['tf_model.h5', 'flax_model.msgpack'])
def test_weights_of_another_library_are_named(copy, name):
    (copy / 'model.safetensors').rename(copy / name)
    assert f'{name} is of a kind that this program does not read' in refusal(copy)


@pytest.mark.parametrize('files, size, reason', [
    ({'added_tokens.json': {'<|startoftext|>': 50257, '<|pad|>': 50258}}, 50259,
     "added_tokens.json adds 2 tokens to GPT-2's 50,257, such as '<|startoftext|>' = 50257"),
    ({'tokenizer.json': {'model': {'vocab': {'\u0120the': 262, '\u0120gazed': 50255}},
                         'added_tokens': [{'id': 50257, 'content': '[PAD]'}]}}, 50304, 'tokenizer.json adds 1 tokens'),
    ({'tokenizer_config.json': {'added_tokens_decoder': {'50257': {'content': '[PAD]'}}}}, 50264, 'adds 1 tokens'),
    ({'spiece.model': 'x'}, 52000, "another tokenizer than GPT-2's (spiece.model)"),
    ({'mine-vocab.json': {'a': 0}}, 52000, "another tokenizer than GPT-2's (mine-vocab.json)"),
    ({'vocab.txt': 'a'}, 50257, "another tokenizer than GPT-2's (vocab.txt)"), ({}, 52000, 'has no tokenizer'),
    ({}, 50259, "2 tokens more than GPT-2's tokenizer"), ({'vocab.json': {'a': 0}}, 50257, "is not GPT-2's vocabulary"),
    ({'added_tokens.json': ['a']}, 50257, 'added_tokens.json is damaged'),
    ({'tokenizer_spec.json': {'kind': 'char', 'chars': 5}}, 50257, 'tokenizer_spec.json is damaged')])
def test_another_vocabulary_is_refused_with_the_true_reason(copy, files, size, reason):
    change(copy / 'config.json', vocab_size=size)
    for name, content in files.items():
        (copy / name).write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(UserError) as caught:
        gpt2.find(copy).tokenizer_spec()
    assert reason in caught.value.message


@pytest.mark.parametrize('size', [50257, 50264, 50304])
def test_a_padded_vocabulary_of_gpt2_is_accepted(copy, size):
    change(copy / 'config.json', vocab_size=size)
    assert gpt2.find(copy).tokenizer_spec() == {'kind': 'gpt2'}


@pytest.mark.parametrize('key', ['n_layer', 'n_embd', 'vocab_size', 'n_positions', 'n_head'])
@pytest.mark.parametrize('value', [10**9, 10**400, -1, 2.5, 'x', None, [], True])
def test_sizes_that_the_files_are_too_small_for_are_refused_before_a_model_is_built(copy, key, value):
    change(copy / 'config.json', **{key: value})
    assert 'config.json' in refusal(copy)


@pytest.mark.parametrize('content', ['[]', '{', '[' * 100_000, '{"n_layer": ' + '9' * 5000 + '}', '"x"', 'null'])
def test_a_config_json_that_is_none_is_one_line(copy, content):
    (copy / 'config.json').write_text(content, encoding='utf-8')
    assert '\n' not in refusal(copy)
