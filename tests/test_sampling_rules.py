"""The sampling options min_p and no_repeat_ngram, and prompts that sample.py fits to a vocabulary."""
import pytest
import torch

from lib.generate import filter_min_p, forbid_repeated_ngrams, generate, sample_next_token
from model import GPT, GPTConfig


def small_model(vocab_size=5):
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=1, n_embd=8)).eval()


# min_p

def test_min_p_keeps_the_tokens_that_are_likely_enough_relative_to_the_most_likely_one():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.9, 0.04, 0.03, 0.03]]).log()
    kept = filter_min_p(logits, 0.2).softmax(-1)
    assert torch.allclose(kept, torch.tensor([[0.5, 0.3, 0.15, 0.0], [0.9, 0, 0, 0]]) /
                          torch.tensor([[0.95], [0.9]]))


def test_min_p_one_is_greedy_and_zero_is_off():
    logits, uniform = torch.randn(200, 7), torch.rand(200)
    assert torch.equal(sample_next_token(logits, uniform, min_p=1.0), logits.argmax(-1))
    assert torch.equal(sample_next_token(logits, uniform, min_p=0.0), sample_next_token(logits, uniform))


def test_min_p_applies_after_the_temperature():
    logits = torch.tensor([[2.0, 0.0]]).expand(500, 2)  # e^-2 = 0.135 of the first; at temperature 2 e^-1 = 0.37
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(0))
    assert sample_next_token(logits, uniform, min_p=0.2).max() == 0
    assert sample_next_token(logits, uniform, min_p=0.2, temperature=2.0).max() == 1


# no_repeat_ngram

def test_a_token_that_would_complete_an_ngram_again_is_forbidden():
    idx = torch.tensor([[1, 2, 3, 1, 2], [1, 2, 3, 2, 1]])  # row 0: 1 2 3 again is forbidden; row 1 has seen no "2 1 x"
    logits = forbid_repeated_ngrams(torch.zeros(2, 5), idx, 3)
    assert logits.isinf().tolist() == [[False, False, False, True, False], [False] * 5]


def test_an_ngram_of_one_forbids_every_token_that_occurred():
    assert forbid_repeated_ngrams(torch.zeros(1, 4), torch.tensor([[2, 0, 2]]), 1).isinf().tolist() == [
        [True, False, True, False]]


def test_a_text_as_long_as_the_ngram_is_looked_at():
    assert forbid_repeated_ngrams(torch.zeros(1, 3), torch.tensor([[1, 1]]), 2).isinf().tolist() == [
        [False, True, False]]


def test_a_text_shorter_than_the_ngram_forbids_nothing():
    assert not forbid_repeated_ngrams(torch.zeros(1, 4), torch.tensor([[2, 2]]), 3).isinf().any()


def test_where_every_token_is_forbidden_none_is():
    assert not forbid_repeated_ngrams(torch.zeros(1, 2), torch.tensor([[0, 1]]), 1).isinf().any()


@pytest.mark.parametrize('n', [2, 3])
def test_no_ngram_occurs_twice_in_what_is_generated(n):
    prompt = [0, 1, 0]
    for ids in zip(*(step.tolist() for step in generate(small_model(), prompt, 3, 12 if n == 2 else 40,
                                                        no_repeat_ngram=n, temperature=0.1))):
        text = prompt + list(ids)
        ngrams = list(zip(*(text[i:] for i in range(n))))
        assert len(set(ngrams)) == len(ngrams)


def test_without_the_option_a_greedy_model_repeats_itself():
    text = [int(ids) for ids in generate(small_model(), [0], 1, 40, temperature=0)]
    assert len(set(zip(text, text[1:]))) < 39


# sample.py

@pytest.fixture
def chinese(tmp_path, monkeypatch):
    """A checkpoint whose vocabulary has full-width marks, no space and no backslash; returns the command to sample."""
    chars, model = '\n，：道松武酒！', small_model(8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'out').mkdir()
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args(), 'iter_num': 1,
                'best_val_loss': 1.0, 'config': {}, 'tokenizer': {'kind': 'char', 'chars': chars}}, 'out/ckpt.pt')
    return ['sample.py', '--device=cpu', '--num_samples=1', '--max_new_tokens=3']


def test_a_prompt_in_the_other_width_is_converted_with_one_line_about_it(run, chinese):
    done = run(*chinese, '--start=武松道:酒!')
    assert done.status == 0 and done.out.startswith('武松道：酒！')
    assert done.err.count("prompt: ':' became '：', '!' became '！'") == 1


def test_fold_false_keeps_the_prompt_as_typed(run, chinese):
    done = run(*chinese, '--start=武松道:', '--fold=False')
    assert done.status == 1 and 'U+FF1A' in done.err


def test_escapes_in_start_and_stop_are_read(run, chinese):
    done = run(*chinese, r'--start=\n武', r'--stop=\n', '--max_new_tokens=60', '--temperature=2')
    assert done.status == 0 and done.out.startswith('\n武')
    assert done.out.removeprefix('\n').count('\n') == 2  # the sample ends at a line end; its hyphens follow


def test_a_stop_string_that_can_never_occur_is_warned_about(run, chinese):
    assert "warning: stop=END can never occur: the training text has no 'E'" in run(*chinese, '--stop=END').err


@pytest.mark.parametrize('flag', ['--min_p=-0.1', '--min_p=1.5', '--no_repeat_ngram=-1'])
def test_impossible_values_are_refused(run, chinese, flag):
    done = run(*chinese, flag)
    assert done.status == 2 and 'must be' in done.err
