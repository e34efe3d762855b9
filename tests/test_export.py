"""export.py: transformers computes the same logits and token ids; models that it cannot express are refused."""
import json
import os
from pathlib import Path

import pytest
import torch

import export
from lib.text import tokenizer
from lib.weights import checkpoint, gpt2
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')


@pytest.fixture
def exported(run, tmp_path, monkeypatch):
    """exported(option=value, ...) exports a model with large random weights; returns (Outcome, model)."""
    monkeypatch.chdir(tmp_path)

    def exported(**options):
        torch.manual_seed(0)
        config = GPTConfig(**{**dict(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=16), **options})
        model = GPT(config).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        (tmp_path / 'out').mkdir()
        checkpoint.save('out/ckpt.pt', {'model': model.state_dict(), 'model_args': config.model_args(),
                                        'tokenizer': {'kind': 'char', 'chars': 'abcdefghijklmnop'}})
        return run('export.py'), model
    return exported


@pytest.mark.parametrize('options', [dict(bias=False), {}, dict(mlp='gelu_tanh', n_embd=24, n_head=3, n_layer=1),
                                     dict(block_size=5, vocab_size=20, dropout=0.1)])
def test_transformers_loads_it_and_computes_equal_logits(exported, options):
    done, model = exported(**options)
    assert done.status == 0, done.err
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained('out/hf', output_loading_info=True)
    assert not any(report[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    idx = torch.randint(16, (3, model.config.block_size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (theirs.eval()(idx).logits - model(idx, idx, return_logits=True)[0]).abs().max() < 1e-4


def test_import_undoes_export(exported):
    _, model = exported()
    back = gpt2.find('out/hf').load()
    assert back.config == model.config
    assert all(torch.equal(p, q) for p, q in zip(back.parameters(), model.parameters()))


def test_a_model_of_text_has_no_file_of_dialogue_marks(exported):
    assert 'chat.json' not in exported()[0].out and not Path('out/hf/chat.json').exists()


def test_a_bias_that_was_left_out_comes_back_as_zero(exported):
    model = exported(bias=False)[1].state_dict()
    back = gpt2.find('out/hf').load().state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in model.items())
    assert not any(back[name].any() for name in back.keys() - model.keys())


def test_the_folder_is_sampled_with_its_own_tokenizer(run, exported):
    exported()
    flags = ['--device=cpu', '--dtype=float32', '--num_samples=2', '--max_new_tokens=20', '--start=ab']
    from_folder, from_run = run('sample.py', '--init_from=out/hf', *flags), run('sample.py', *flags)
    assert from_run.status == 0 and from_folder.out == from_run.out, from_folder.err


def test_the_weights_have_the_same_permissions_as_the_other_files(exported, tmp_path):
    exported()
    folder = tmp_path / 'out' / 'hf'
    assert (folder / 'model.safetensors').stat().st_mode == (folder / 'config.json').stat().st_mode


TEXT = "It's 1984, isn't it?  Two  spaces\n\n\tand “quotes” — 東京 naïve 🙂 don't!"


def test_a_trained_bpe_keeps_its_ids_in_transformers(tmp_path):
    tok = tokenizer.train_bpe([TEXT * 3, 'the cat sat on the mat; the rat sat on the cat'], 320)
    export.write_tokenizer(tok, tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}', encoding='utf-8')
    assert tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json')).encode(TEXT).ids == tok.encode(TEXT)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)['input_ids'] == tok.encode(TEXT)
    assert theirs.decode(tok.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT
    assert theirs.eos_token_id == tok.eot


def test_characters_keep_their_ids_in_transformers(tmp_path):
    tok = tokenizer.CharTokenizer(''.join(sorted(set(TEXT))))
    export.write_tokenizer(tok, tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}', encoding='utf-8')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)['input_ids'] == tok.encode(TEXT)
    assert theirs.decode(tok.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT


@pytest.mark.slow
def test_gpt2s_own_tokenizer_keeps_its_ids_in_transformers(tmp_path):
    tok = tokenizer.gpt2()
    try:
        tok.encode('')
    except tokenizer.UserError as error:
        pytest.skip(error.message)
    export.write_tokenizer(tok, tmp_path)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}', encoding='utf-8')
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)['input_ids'] == tok.encode(TEXT)
    assert len(json.loads((tmp_path / 'vocab.json').read_text(encoding='utf-8'))) == 50257


# Faults

@pytest.mark.parametrize('name, value', [('pos', 'rope'), ('norm', 'rmsnorm'), ('mlp', 'relu2'), ('mlp', 'swiglu'),
                                         ('qk_norm', True), ('tie_weights', False), ('softcap', 15.0), ('smear', True),
                                         ('window', 64)])
def test_options_that_transformers_gpt2_lacks_are_refused_in_one_line(exported, tmp_path, name, value):
    done, _ = exported(**{name: value})
    assert done.status == 1 and len(done.err.strip().splitlines()) == 1
    assert f'{name}={value}' in done.err and 'config/gpt2_classic.py' in done.err and not (tmp_path / 'out/hf').exists()


def test_weights_that_are_not_finite_are_not_exported(run, exported):
    _, model = exported()
    saved = torch.load('out/ckpt.pt', weights_only=True)
    saved['model']['transformer.ln_f.bias'][3] = torch.nan
    checkpoint.save('out/ckpt.pt', saved)
    done = run('export.py', '--to=elsewhere')
    assert done.status == 1 and 'out/ckpt.pt: checkpoint contains NaN' in done.last_error


def test_without_a_checkpoint_the_missing_file_is_named(run, workdir):
    done = run('export.py', '--out_dir=nowhere')
    assert done.status == 1 and 'ckpt.pt not found' in done.last_error


def test_a_folder_that_cannot_be_completed_has_no_config(run, exported, monkeypatch):
    exported()

    def full(*args, **kwargs):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr('safetensors.torch.save_file', full)
    done = run('export.py')
    assert done.status == 1 and 'cannot write out/hf (No space left on device); name another' in done.last_error
    assert not os.path.exists('out/hf/config.json') and not list(Path('out/hf').glob('*.tmp*'))


def test_help_lists_the_three_settings_and_no_source_comment(run):
    listed = run('export.py', '--help').out.split('Settings (--name=value):\n')[1]
    assert [line.split()[0] for line in listed.splitlines()] == ['--init_from', '--out_dir', '--to']
