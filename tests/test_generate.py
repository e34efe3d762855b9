"""lib/generate.py: exact distributions of the sampling rules, generation against forward(), and streamed text."""
import math
from types import SimpleNamespace

import pytest
import torch

from configurator import UserError
from lib import decode
from lib import generate as room
from lib.generate import (
    StreamDecoder,
    apply_repetition_penalty,
    filter_top_k_top_p,
    generate,
    generate_text,
    random_numbers,
    sample_index,
    sample_next_token,
)
from lib.text.tokenizer import ByteTokenizer
from model import GPT, GPTConfig

PROBS = [0.15, 0.4, 0.05, 0.3, 0.1]
TOY = torch.tensor([PROBS]).log()  # (1, 5)
MODERN = dict(pos='rope', norm='rmsnorm', mlp='swiglu', qk_norm=True, tie_weights=False, softcap=15.0, smear=True,
              bias=False)


def tiny(vocab_size=13, block_size=8, **options):
    """A GPT with weights large enough that its predictions differ clearly."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=vocab_size)
    model = GPT(GPTConfig(**sizes, **options)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model


def reciter(text, eot=None):
    """Return (a GPT that repeats the distinct bytes of `text` forever, its tokenizer)."""
    script = list(text.encode())
    assert len(set(script)) == len(script)
    model = GPT(GPTConfig(block_size=16, vocab_size=256, n_layer=1, n_head=1, n_embd=256, tie_weights=False)).eval()
    with torch.no_grad():
        for p in model.transformer.h.parameters():
            p.zero_()  # the blocks add nothing: what comes next depends on the last byte alone
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.copy_(torch.eye(256))
        model.lm_head.weight.zero_()
        for here, there in zip(script, script[1:] + script[:1]):
            model.lm_head.weight[there, here] = 100.0
    tok = ByteTokenizer()
    tok.eot = eot
    return model, tok


def greedy_texts(model, tok, prompt, n, num_samples=1, **rules):
    """Return the text of each sample."""
    texts = [''] * num_samples
    for i, piece, _ in generate_text(model, tok, tok.encode(prompt), num_samples, n, temperature=0, **rules):
        texts[i] += piece
    return texts


def ids_of(model, prompt, num_samples, n, **rules):
    """Return the generated ids (B, n)."""
    return torch.stack(list(generate(model, prompt, num_samples, n, **rules)), dim=1)


def context(idx, prompt_length, block_size, kept):
    """Return the ids that the model should see before token len(idx); replays the slides of the context."""
    begin = max(0, prompt_length - block_size)
    for end in range(prompt_length, len(idx) + 1):
        if end - begin > block_size:
            begin = end - kept
    return idx[begin:]


@pytest.fixture
def recorded_logits(monkeypatch):
    """A list to which every step adds its logits (B, V)."""
    steps = []

    def record(logits, *args, **rules):
        steps.append(logits.clone())
        return sample_next_token(logits, *args, **rules)
    monkeypatch.setattr(room, 'sample_next_token', record)
    return steps


def uniform(n, seed=0):
    """Return n numbers in [0, 1)."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


# Rules for choosing a token

def distribution(logits, ids, size=5):
    probs = torch.zeros(size)
    probs[ids[0] if ids is not None else slice(None)] = logits.softmax(-1)[0]
    return probs.tolist()


@pytest.mark.parametrize('top_k, top_p, expected', [
    (0, 1.0, PROBS), (5, 1.0, PROBS), (10, 1.0, PROBS),
    (1, 1.0, [0, 1, 0, 0, 0]),
    (2, 1.0, [0, 4 / 7, 0, 3 / 7, 0]),
    (0, 0.39, [0, 1, 0, 0, 0]),
    (0, 0.41, [0, 4 / 7, 0, 3 / 7, 0]),
    (0, 0.71, [15 / 85, 40 / 85, 0, 30 / 85, 0]),
    (0, 1e-9, [0, 1, 0, 0, 0]),
    (2, 0.5, [0, 1, 0, 0, 0]),  # of the two that top-k leaves, 4/7 is already enough
    (2, 0.6, [0, 4 / 7, 0, 3 / 7, 0]),
])
def test_top_k_then_top_p_give_this_distribution(top_k, top_p, expected):
    assert distribution(*filter_top_k_top_p(TOY, top_k, top_p)) == pytest.approx(expected, abs=1e-6)


def test_top_k_keeps_exactly_k_of_equal_logits():
    assert filter_top_k_top_p(torch.zeros(1, 5), 2, 1.0)[0].shape == (1, 2)


@pytest.mark.parametrize('top_k', [0, 5, 10])
def test_rules_that_are_off_neither_sort_nor_change_the_logits(top_k):
    logits, ids = filter_top_k_top_p(TOY, top_k, 1.0)
    assert logits is TOY and ids is None


def test_top_p_keeps_no_token_more_than_its_sum_needs():
    assert distribution(*filter_top_k_top_p(torch.zeros(1, 2), 0, 0.5), size=2) == [1, 0]


def test_sampled_tokens_follow_the_distribution_of_all_rules_together():
    n, seen = 200_000, torch.tensor([[False, True, False, False, True]])
    ids = sample_next_token(TOY.repeat(n, 1), uniform(n), seen.repeat(n, 1),
                            repetition_penalty=1.5, temperature=0.5, top_k=3, top_p=0.8)
    # the penalty makes p ** 1.5 of 0.4 and 0.1, the temperature squares: 0.0225, 0.064, 0.0025, 0.09, 0.001.
    # top-k keeps 0.0225, 0.064 and 0.09; the last two have 0.87 of their sum, enough for top-p
    odds = [0, 0.064, 0, 0.09, 0]
    for got, p in zip((ids.bincount(minlength=5) / n).tolist(), [odd / sum(odds) for odd in odds]):
        assert abs(got - p) <= 4.5 * math.sqrt(p * (1 - p) / n)


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(100_000, 1)
    assert set(sample_index(logits, uniform(100_000)).tolist()) == {1, 3}


@pytest.mark.parametrize('u, index', [(0.0, 1), (0.4999, 1), (0.5, 3), (0.9999999, 3)])
def test_the_uniform_number_selects_the_token_by_the_cumulative_probability(u, index):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert sample_index(logits, torch.tensor([u])).tolist() == [index]


def test_a_number_that_rounds_to_one_selects_the_last_token():
    assert sample_index(torch.zeros(1, 5), torch.tensor([1.0])).tolist() == [4]


def test_uniform_numbers_are_uniform_and_independent_of_each_other():
    u = random_numbers(3, 200, 500).double()
    assert 0 <= u.min() and u.max() < 1
    assert float(u.mean()) == pytest.approx(1 / 2, abs=0.005) and float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    assert abs(float(torch.corrcoef(u[:2])[0, 1])) < 0.15


def test_the_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits, seen = torch.tensor([[3.0, -3.0, 3.0, -3.0]]), torch.tensor([[True, True, False, False]])
    assert apply_repetition_penalty(logits, seen, 1.5).tolist() == [[2.0, -4.5, 3.0, -3.0]]


@torch.no_grad()
def test_the_penalty_applies_to_prompt_and_generated_tokens():
    model = tiny()
    pairs = torch.cartesian_prod(torch.arange(13), torch.arange(13))
    likeliest = model(pairs)[0][:, 0].argmax(-1)
    prompt = pairs[(likeliest == pairs[:, 0]) & (likeliest != pairs[:, 1])][0].tolist()  # repeats its first
    ids = ids_of(model, prompt, 1, 5, temperature=0, repetition_penalty=1e9)[0].tolist()
    assert len({*prompt, *ids}) == 7


@pytest.mark.parametrize('penalty', [0.5, 1.5, 2.0])
def test_any_penalty_but_1_changes_the_tokens(penalty):
    plain, other = (ids_of(tiny(), [1], 1, 20, temperature=0, **rule) for rule in ({}, {'repetition_penalty': penalty}))
    assert not torch.equal(plain, other)


def test_the_penalty_regards_a_token_as_seen_once_it_was_drawn_and_not_before(monkeypatch):
    model = tiny()
    constant = torch.tensor([0.9, 1.0] + [-1.0] * 11)
    monkeypatch.setattr(model.lm_head, 'forward', lambda x: constant.expand(*x.shape[:-1], 13))
    ids = ids_of(model, [5], 1, 3, temperature=0, repetition_penalty=2.0)
    assert ids[0].tolist() == [1, 0, 1]  # 1.0 > 0.9; 0.9 > 0.5; 0.5 > 0.45


def test_without_a_penalty_it_does_not_matter_what_was_seen():
    u = torch.full((1,), 0.3)
    assert torch.equal(sample_next_token(TOY, u, torch.tensor([[True, False] * 2 + [True]])), sample_next_token(TOY, u))
    logits, seen = torch.tensor([[1.0, 0.9]]), torch.tensor([[True, False]])
    assert sample_next_token(logits, None, seen, temperature=0) == 0


@pytest.mark.parametrize('top_k', [0, 1, 13, 18])
def test_any_top_k_generates_tokens_of_the_vocabulary(top_k):
    ids = ids_of(tiny(), [1], 3, 20, top_k=top_k)
    assert ids.shape == (3, 20) and 0 <= ids.min() and ids.max() < 13


@pytest.mark.parametrize('rule', [dict(top_k=1), dict(top_p=1e-9)])
def test_sampling_from_one_candidate_is_greedy(rule):
    assert torch.equal(ids_of(tiny(), [1], 2, 20, **rule), ids_of(tiny(), [1], 2, 20, temperature=0))


def test_the_rules_do_not_change_their_argument():
    logits = TOY.clone()
    for seen in (None, torch.ones(1, 5, dtype=torch.bool)):
        sample_next_token(logits, uniform(1), seen, temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=2.0)
    assert torch.equal(logits, TOY)


# Generation

@pytest.mark.parametrize('options', [{}, MODERN], ids=['gpt2', 'modern'])
@pytest.mark.parametrize('prompt', [[3], [5, 1, 12, 0, 7]], ids=['1', '5'])
@torch.no_grad()
def test_cached_logits_equal_those_of_forward_over_the_whole_prefix(recorded_logits, options, prompt):
    model = tiny(block_size=32, **options)
    whole = torch.cat([torch.tensor(prompt).expand(3, -1), ids_of(model, prompt, 3, 33 - len(prompt))], dim=1)
    assert len(recorded_logits) == 33 - len(prompt)
    for T, logits in enumerate(recorded_logits, len(prompt)):
        torch.testing.assert_close(logits, model(whole[:, :T])[0][:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize('options', [{}, MODERN], ids=['gpt2', 'modern'])
@pytest.mark.parametrize('length', [1, 7, 8, 20])
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_forward_over_a_sliding_context(options, length):
    model, kept = tiny(**options), int(room.KEEP_ON_SLIDE * 8)
    idx = [(5 * i) % 13 for i in range(length)]
    got = ids_of(model, list(idx), 2, 30, temperature=0)
    for _ in range(30):
        idx.append(int(model(torch.tensor([context(idx, length, 8, kept)]))[0][0, -1].argmax()))
    assert got.tolist() == [idx[length:]] * 2


@torch.no_grad()
def test_each_sample_slides_over_the_text_it_generated(recorded_logits):
    model, prompt = tiny(), [4, 2]
    whole = torch.cat([torch.tensor(prompt).expand(3, -1), ids_of(model, prompt, 3, 20)], dim=1)
    for T, logits in enumerate(recorded_logits, 2):
        for row, idx in zip(logits, whole):
            want = model(context(idx[:T], 2, 8, int(room.KEEP_ON_SLIDE * 8))[None])[0][0, -1]
            torch.testing.assert_close(row, want, atol=1e-4, rtol=0)


def test_a_full_context_slides_to_its_newer_half(monkeypatch):
    model, lengths = tiny(), []
    forward = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **more: lengths.append(idx.size(1)) or forward(idx, **more))
    ids_of(model, [1], 1, 14)
    assert lengths == [1] * 8 + [4] + [1] * 4 + [4]


def test_a_context_of_one_token_works():
    assert ids_of(tiny(block_size=1), [1, 2, 3], 2, 5).shape == (2, 5)


def test_the_prompt_is_read_once_for_all_samples(monkeypatch):
    model, shapes = tiny(), []
    forward = model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **more: shapes.append(tuple(idx.shape)) or forward(idx, **more))
    ids_of(model, [1, 2, 3], 4, 3)
    assert shapes == [(1, 3), (4, 1), (4, 1)]


def test_samples_of_a_batch_differ():
    assert len({tuple(row) for row in ids_of(tiny(), [1], 5, 20).tolist()}) == 5


def test_samples_depend_on_the_seed_only():
    model = tiny()
    first = ids_of(model, [1], 3, 20, seed=7)
    torch.manual_seed(99)
    same, other = (ids_of(model, [1], 3, 20, seed=seed) for seed in (7, 8))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(ids_of(model, [1], 3, 20), ids_of(model, [1], 3, 20, seed=1337))  # nanoGPT's, unless given


@pytest.mark.parametrize('options', [{}, MODERN], ids=['gpt2', 'modern'])
@pytest.mark.parametrize('num_samples', [2, 10])
def test_a_sample_does_not_depend_on_the_number_of_samples(options, num_samples):
    """Sample i is a function of (seed, i)."""
    model = tiny(**options)
    one, several = (ids_of(model, [1, 2], n, 30, top_k=5) for n in (1, num_samples))
    assert torch.equal(one[0], several[0])


def test_a_sample_does_not_depend_on_the_maximum_length():
    short, long = (ids_of(tiny(), [1], 3, n) for n in (5, 20))
    assert torch.equal(short, long[:, :5])


@pytest.mark.parametrize('rule', [dict(top_k=16), dict(top_k=1000), dict(min_p=1e-12), dict(no_repeat_ngram=21),
                                  dict(repetition_penalty=1 + 1e-7)], ids=str)
def test_a_rule_that_removes_no_token_changes_no_sample(rule):
    plain, same = (ids_of(tiny(vocab_size=16), [1], 3, 20, seed=7, **rules) for rules in ({}, rule))
    assert torch.equal(plain, same)


def test_generation_does_not_change_the_global_random_state():
    model, before = tiny(), torch.get_rng_state()
    ids_of(model, [1], 2, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_temperature_zero_ignores_the_seed():
    first, second = (ids_of(tiny(), [1], 1, 20, temperature=0, seed=seed) for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize('rules', [dict(temperature=0), dict(temperature=5.0), dict(top_k=3), dict(top_p=0.9),
                                   dict(repetition_penalty=1.3)])
def test_padded_ids_are_never_sampled_however_likely(rules):
    model = tiny(vocab_size=16, tie_weights=False)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)  # rows of 100 / C then score 100 everywhere: the rest of x sums to 0
        model.lm_head.weight[13:] = 100 / 16
        assert float(model(torch.tensor([[1]]))[0][0, -1, 15]) == pytest.approx(100, abs=1e-3)
    assert ids_of(model, [1], 4, 20, valid_vocab=13, **rules).max() < 13


def test_weights_in_bfloat16_generate():
    assert ids_of(tiny().to(torch.bfloat16), [1], 2, 20).max() < 13


def test_products_in_bfloat16_over_float32_weights_generate_with_keys_in_float32(monkeypatch):
    model, dtypes = tiny(), []
    model.set_compute_dtype(torch.bfloat16)
    real = decode.KVCache
    monkeypatch.setattr(decode, 'KVCache', lambda *args: dtypes.append(args[-1]) or real(*args))
    assert ids_of(model, [1], 2, 12).max() < 13
    assert set(dtypes) == {torch.float32}  # faster on a CPU


# Text

def test_a_piece_contains_whole_characters_only():
    model, tok = reciter('né中🙂x')
    pieces = [piece for _, piece, _ in generate_text(model, tok, tok.encode('x'), 1, 11, temperature=0, live=True)]
    assert pieces == ['n', '', 'é', '', '', '中', '', '', '', '🙂', 'x']


def test_a_character_cut_off_at_the_end_is_left_out():
    assert greedy_texts(*reciter('né中🙂x'), 'x', 9) == ['né中']


def test_invalid_utf8_becomes_replacement_characters():
    assert StreamDecoder(ByteTokenizer()).feed([0xFF, 0x61, 0xE4, 0x61]) == '�a�a'


@pytest.mark.parametrize('live', [True, False])
@pytest.mark.parametrize('stop, expected', [
    ('def', 'abc'), ('d', 'abc'), ('a', ''), ('h', 'abcdefg'),
    ('dex', 'abcdefgh'), ('hi', 'abcdefgh'), ('', 'abcdefgh')])
def test_a_stop_string_may_span_several_tokens(stop, expected, live):
    assert greedy_texts(*reciter('abcdefgh'), 'h', 8, stop=stop, live=live) == [expected]


def test_a_stop_string_may_begin_inside_one_token_and_end_in_another():
    decoder = StreamDecoder(ByteTokenizer(), 'END')
    pieces = [decoder.feed(list(chunk)) for chunk in (b'so E', b'N E', b'ND and on')]
    assert (pieces, decoder.done) == (['so ', 'EN ', ''], True)


def test_a_stop_string_of_multibyte_characters_is_found():
    assert greedy_texts(*reciter('né中🙂x'), 'x', 11, stop='中🙂', live=True) == ['né']


def test_no_piece_contains_a_part_of_the_stop_string():
    model, tok = reciter('abcdefgh')
    yielded = generate_text(model, tok, [ord('h')], 1, 8, temperature=0, stop='def', live=True)
    pieces = [piece for _, piece, _ in yielded]
    assert pieces == ['a', 'b', 'c', '', '', '']


def test_a_stop_string_in_the_prompt_is_ignored():
    assert greedy_texts(*reciter('abcdefgh'), 'abc', 3, stop='c') == ['def']


@pytest.mark.parametrize('live', [True, False])
def test_end_of_text_ends_a_sample_and_is_not_printed(live):
    assert greedy_texts(*reciter('abcdefgh', eot=ord('e')), 'h', 8, live=live) == ['abcd']


def test_generation_ends_when_all_samples_have_ended(monkeypatch):
    model, tok = reciter('abcdefgh')
    calls, forward = [], model.forward
    monkeypatch.setattr(model, 'forward', lambda idx, **more: calls.append(1) or forward(idx, **more))
    assert greedy_texts(model, tok, 'h', 500, num_samples=2, stop='c', live=True) == ['ab', 'ab']
    assert len(calls) == 3


def test_reading_every_token_or_many_at_once_gives_the_same_texts():
    model, tok = tiny(vocab_size=256, block_size=16), ByteTokenizer()
    texts = []
    for live in (True, False):
        texts.append([''] * 3)
        for i, piece, _ in generate_text(model, tok, [65], 3, 50, stop='a', live=live):
            texts[-1][i] += piece
    assert texts[0] == texts[1] and all(texts[0])


@pytest.mark.parametrize('n', [0, 1, 16, 17, 50])
def test_every_sample_ends_once(n):
    model, tok = tiny(vocab_size=256), ByteTokenizer()
    ends = [i for i, _, last in generate_text(model, tok, [65], 3, n, top_k=20, stop='#', live=True) if last]
    assert sorted(ends) == [0, 1, 2]  # of 50 tokens the three stop at different ones


def test_text_contains_no_id_that_the_tokenizer_lacks():
    model = tiny(vocab_size=300, tie_weights=False)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(1.0)
        model.lm_head.weight[256:] = 100 / 16
    assert all(last for _, _, last in generate_text(model, ByteTokenizer(), [65], 2, 10))  # decoding one would raise


def test_zero_new_tokens_give_no_text():
    assert greedy_texts(*reciter('ab'), 'a', 0, num_samples=2) == ['', '']


@pytest.mark.parametrize('rules', [dict(temperature=0), dict(top_k=0), dict(top_k=3), dict(top_p=0.5)])
def test_nan_logits_are_an_error_with_a_remedy(rules):
    model = tiny(vocab_size=256)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(UserError, match='NaN or infinity in torch.float32 on cpu; try'):
        list(generate_text(model, ByteTokenizer(), [65], 2, 20, **rules))


def test_the_sample_in_a_log_follows_its_rules_and_leaves_the_model_in_training():
    model, tok = tiny(vocab_size=256, dropout=0.5).train(), ByteTokenizer()
    data = SimpleNamespace(marks=None)
    text = room.sample_text(model, tok, data, 0, 7, print)
    assert model.training
    pieces = generate_text(model.eval(), tok, [10], 1, 200, seed=7, temperature=0.8, top_k=200)
    assert text == ''.join(piece for _, piece, _ in pieces) != ''


def test_a_model_without_a_sample_is_a_warning_in_training():
    model, warnings = tiny(vocab_size=256).train(), []
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    assert room.sample_text(model, ByteTokenizer(), SimpleNamespace(marks=None), 0, 1, warnings.append) == ''
    assert len(warnings) == 1 and warnings[0].startswith('no sample: the model computes NaN') and model.training


def test_cudnn_attention_is_off_for_samples_during_training_and_on_again_afterwards(monkeypatch):
    seen = []
    monkeypatch.setattr(room, 'generate_text', lambda *args, **more: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()) or [])
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        tok, data = SimpleNamespace(start_ids=[0]), SimpleNamespace(marks=None)
        room.sample_text(torch.nn.Linear(1, 1), tok, data, 0, 1, print)
        assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
