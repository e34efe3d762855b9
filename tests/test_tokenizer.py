"""lib/text/tokenizer.py: round trips of hostile text, places where BPE text may be split, specs, messages."""
import hashlib
import json
import pickle
import random
import re
import sys

import numpy as np
import pytest
import torch
from textkit import have_gpt2, skip_without_gpt2

from configurator import UserError
from lib.text import tokenizer
from lib.text.tokenizer import SAFE_SPLIT, ByteTokenizer, CharTokenizer, TextError, from_spec, train_bpe

PLANES = ''.join(chr(plane << 16 | low) for plane in range(17) for low in (0x20, 0x61, 0x4E00, 0xD7FF, 0xFFFD, 0xFFFF))
HOSTILE = {
    'empty': '',
    'one character': 'x',
    'CRLF': 'one\r\ntwo\r\n\r\n',
    'byte order mark': '\ufeffbegin',
    'emoji with joiners': '👩‍👩‍👧‍👦 🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f e\u0301 é',
    'right to left': 'שלום עולם\u200f مرحبا 123',
    'controls': ''.join(map(chr, range(32))) + '\x7f\x85',
    'all planes': PLANES,
    'spells out end-of-text': 'a<|endoftext|>b <|endoftext|>',
    'spaces': '   \t\n  \n\n   ',
    'Chinese': '人之初，性本善。',
    'no newline': '天地玄黄，宇宙洪荒' * 2000,
}


@pytest.fixture(scope='module', params=['char', 'byte', 'bpe', 'gpt2'])
def any_kind(request):
    if request.param == 'char':
        return CharTokenizer(''.join(sorted(set(''.join(HOSTILE.values())))))
    if request.param == 'bpe':
        return train_bpe(['the cat sat on the mat. ' * 50, '性相近，习相远' * 20], 300)
    if request.param == 'gpt2' and not have_gpt2():
        pytest.skip("GPT-2's BPE file is not on this machine")
    return from_spec({'kind': request.param})


@pytest.mark.parametrize('name', HOSTILE)
def test_decoding_what_was_encoded_gives_the_text_back(any_kind, name):
    assert any_kind.decode(any_kind.encode(HOSTILE[name])) == HOSTILE[name]


@pytest.mark.parametrize('name', HOSTILE)
def test_encode_documents_gives_the_ids_of_encode(any_kind, name):
    assert any_kind.encode_documents([(HOSTILE[name], False)]).tolist() == any_kind.encode(HOSTILE[name])


def test_encode_documents_puts_one_separator_after_each_document(any_kind):
    texts = ['one', 'two<|endoftext|>', ' three\n', '<|endof', 'text|>']
    if any_kind.kind == 'char':
        any_kind = CharTokenizer(''.join(sorted(set('\n' + ''.join(texts)))))
    separator = [any_kind.eot] if any_kind.eot is not None else any_kind.encode('\n')
    expected = [i for text in texts for i in any_kind.encode(text) + separator]
    assert any_kind.encode_documents([(text, True) for text in texts]).tolist() == expected


def test_pieces_of_one_document_have_no_separator_between_them(any_kind):
    if any_kind.kind == 'char':
        any_kind = CharTokenizer('\n entow')
    separator = [any_kind.eot] if any_kind.eot is not None else any_kind.encode('\n')
    found = any_kind.encode_documents([('one', False), (' two', True)])
    assert found.tolist() == any_kind.encode('one two') + separator


def test_an_error_about_a_text_comes_whole_from_a_worker_process():
    assert pickle.loads(pickle.dumps(TextError('not text'))).message == 'not text'


def test_a_million_characters_without_a_newline_are_decoded_unchanged(any_kind):
    text = '天地玄黄，宇宙洪荒' * 120_000  # more than the million steps at which tiktoken's regular expressions give up
    assert any_kind.decode(any_kind.encode_documents([(text, False)])) == text


def test_an_end_of_text_typed_by_a_user_is_plain_text():
    bpe = train_bpe(['abc'], 257)
    assert bpe.eot not in bpe.encode('<|endoftext|>')


def test_a_lone_surrogate_is_refused_with_its_position(any_kind):
    with pytest.raises(TextError, match=r'lone surrogate U\+D800 at character 1 is not text'):
        any_kind.encode('a\ud800b')


def test_ids_that_are_not_utf8_become_replacement_characters():
    assert ByteTokenizer().decode([0xE4, 0xBA, 65]) == '\ufffdA'
    assert ByteTokenizer().decode_bytes([0xE4, 0xBA]) == b'\xe4\xba'


def test_an_id_outside_the_vocabulary_is_refused(any_kind):
    with pytest.raises(TextError, match=f'token id {any_kind.vocab_size} is outside the vocabulary'):
        any_kind.decode([0, any_kind.vocab_size])


def test_a_spec_survives_json_and_makes_the_same_tokenizer(any_kind):
    again = from_spec(json.loads(json.dumps(any_kind.spec)))
    assert again.encode('a') == any_kind.encode('a') and again.vocab_size == any_kind.vocab_size


def test_a_spec_survives_a_checkpoint_that_allows_only_plain_values(any_kind, tmp_path):
    torch.save({'tokenizer': any_kind.spec}, tmp_path / 'ckpt.pt')
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['tokenizer'] == any_kind.spec


def test_an_unknown_kind_is_refused():
    with pytest.raises(TextError, match="kind 'words'; this program knows char, byte, gpt2, bpe"):
        from_spec({'kind': 'words'})


@pytest.mark.parametrize('chars, text, message', [
    ('：，人', 'a', r"^character 'a' \(U\+0061\) is not in this model's 3-character vocabulary; leave it out, or "
                  'train on a text prepared with --tokenizer=bpe$'),
    ('：，人', ':', r"vocabulary; it has '：' \(U\+FF1A\)$"),
    ('abc:', '：', r"it has ':' \(U\+003A\)$"),
    ('。', '.', r"it has '。' \(U\+3002\)$"),
    ('a 。', '\u3000', r"it has ' ' \(U\+0020\)$"),
    ('a\u3000', ' ', r"it has '\u3000' \(U\+3000\)$"),
    ('abc', '\x07', r'^character U\+0007 is not'),
    ('！', '!', r"it has '！' \(U\+FF01\)$"), ('～', '~', r"it has '～' \(U\+FF5E\)$"),
    ('.', '。', r"it has '.' \(U\+002E\)$"),
    ('hijk', 'ĳ', r'4-character vocabulary; leave it out'),  # NFKC makes two characters of it
    ('e\u0301', 'é', r"2-character vocabulary; the text writes it as 'e' \+ '\\u0301'$"),
    ('e', 'é', r'1-character vocabulary; leave it out'),
])
def test_an_unknown_character_is_reported_with_a_similar_one_that_is_known(chars, text, message):
    with pytest.raises(ValueError) as caught:
        CharTokenizer(chars).encode(text)
    assert re.search(message, caught.value.message)


@pytest.mark.parametrize('chars, start', [('\nab', [0]), ('ab\n', [2]), ('ab', [0])])
def test_characters_begin_with_a_newline_or_the_first_id(chars, start):
    assert CharTokenizer(chars).start_ids == start


def test_bytes_are_256_and_begin_with_a_newline():
    assert ByteTokenizer().vocab_size == 256 and ByteTokenizer().start_ids == [ord('\n')]


def test_bpe_begins_with_end_of_text():
    bpe = train_bpe(['abc'], 257)
    assert bpe.start_ids == [bpe.eot] == [256]


@pytest.mark.parametrize('n_chars, dtype', [(1 << 16, '<u2'), ((1 << 16) + 1, '<u4')])
def test_65536_ids_fit_uint16_and_more_need_uint32(n_chars, dtype):
    codes = [*range(0xD800), *range(0xE000, 0x11000)][:n_chars]
    assert CharTokenizer(''.join(map(chr, codes))).dtype == dtype


@pytest.mark.parametrize('data, model, reason', [
    ({'kind': 'byte'}, {'kind': 'gpt2'}, "its tokenizer is byte, the model's is gpt2"),
    ({'kind': 'bpe', 'tokens': ['a']}, {'kind': 'bpe', 'tokens': ['b']}, 'both have a BPE, but not the same one'),
    ({'kind': 'char', 'chars': 'abcdef'}, {'kind': 'char', 'chars': 'ab'},
     "it has characters that the model was not trained on ('c', 'd', 'e' and 1 more)"),
    ({'kind': 'char', 'chars': 'abcde'}, {'kind': 'char', 'chars': 'ab'},
     "it has characters that the model was not trained on ('c', 'd', 'e')"),
    ({'kind': 'char', 'chars': 'ab'}, {'kind': 'char', 'chars': 'abc'},
     'it has 2 different characters, the model 3, so their ids differ')])
def test_a_mismatch_of_two_tokenizers_is_described(data, model, reason):
    assert tokenizer.describe_mismatch(data, model) == reason


# Splitting

NASTY = ["'", "'s", "'ll", 'a', 'é', '人', '７', '9', '½', '_', ' ', '  ', '\n', '\r\n', '\t', '\x1c', '\x85', '\xa0',
         '\u3000', '\u2028', '\u180e', '\u200d', '\u0301', '，', '。', ',', '.', '!', ')', '”', '👩', '\U0001f3fd',
         'ǅ', 'ª', '\ufeff']


def test_gpt2s_tokenizer_is_that_of_tiktoken():
    skip_without_gpt2()
    ours, theirs = tokenizer.gpt2()._encoding, pytest.importorskip('tiktoken').get_encoding('gpt2')
    for part in ('_mergeable_ranks', '_special_tokens', '_pat_str'):
        assert getattr(ours, part) == getattr(theirs, part)


@pytest.fixture(scope='module', params=['gpt2', 'bpe'])
def merger(request):
    """A BPE with merges across every kind of character: GPT-2's, or one trained on runs of arbitrary characters."""
    if request.param == 'gpt2':
        skip_without_gpt2()
        return tokenizer.gpt2()
    rng = random.Random(0)
    return train_bpe([rng.choice(NASTY) * rng.randrange(1, 5) + rng.choice(NASTY) for _ in range(20_000)], 600)


def test_white_space_is_that_of_unicode():
    """Python counts four separators as white space, U+001C to U+001F, that Unicode and regular expressions do not."""
    spaces = {code for code in range(sys.maxunicode + 1) if chr(code).isspace()} - set(range(0x1c, 0x20))
    assert len(tokenizer.WHITE) == sys.maxunicode + 1 and set(np.flatnonzero(tokenizer.WHITE)) == spaces


def test_splitting_at_any_safe_place_changes_no_id(merger):
    for seed in range(40):
        text = ''.join(random.Random(seed).choices(NASTY, k=300))
        whole = merger.encode(text)
        places = [match.end() for match in SAFE_SPLIT.finditer(text)]
        assert places
        for at in places:
            assert merger.encode(text[:at]) + merger.encode(text[at:]) == whole, (seed, at, text[at - 3:at + 3])


def test_encode_documents_gives_the_ids_of_encode_for_any_text(merger):
    for seed in range(40):
        rng = random.Random(seed)
        texts = [''.join(rng.choices(NASTY, k=rng.randrange(12))) for _ in range(60)]
        expected = [i for text in texts for i in merger.encode(text) + [merger.eot]]
        assert merger.encode_documents([(text, True) for text in texts]).tolist() == expected, seed


@pytest.mark.parametrize('reserved', [tokenizer.CUT, tokenizer.END])
def test_the_two_reserved_characters_in_a_text_are_encoded_as_text(merger, reserved):
    texts = [f'a  b{reserved}c \n', '  d']
    expected = [i for text in texts for i in merger.encode(text) + [merger.eot]]
    assert merger.encode_documents([(text, True) for text in texts]).tolist() == expected


def test_a_text_without_a_safe_place_is_not_split():
    assert train_bpe(['a'], 257).safe_split('a' * 1000, 500) == -1


def test_the_first_safe_place_at_or_after_the_start_is_found():
    bpe = train_bpe(['a'], 257)
    assert [bpe.safe_split('one two three', start) for start in (3, 4, 7, 8)] == [3, 7, 7, -1]
    assert [bpe.safe_split('a b', start) for start in (0, 1, 2)] == [1, 1, -1]


def test_characters_and_bytes_may_be_split_anywhere():
    assert CharTokenizer('ab').safe_split('abab', 3) == ByteTokenizer().safe_split('abab', 3) == 3


# A trained BPE

def test_a_trained_bpe_has_the_requested_size_and_shortens_the_text():
    text = 'the quick brown fox jumps over the lazy dog and the cat sat on the mat\n' * 20
    bpe = train_bpe([text], 290)
    assert bpe.vocab_size == 290 and len(bpe.encode(text)) < len(text) / 2


def test_no_token_reaches_over_a_word_and_no_space_is_added_before_a_text():
    assert train_bpe(['ab'] * 50, 300).spec['tokens'][256:] == ['ab']
    learned = train_bpe(['ab cd ' * 50], 300).spec['tokens'][256:]
    assert ' cd' in learned and not any(' ' in token[1:] for token in learned)


def test_training_is_deterministic():
    texts = ['one two three two three three\n' * 30, '性相近习相远' * 9]
    assert train_bpe(texts, 320).spec == train_bpe(texts, 320).spec


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(SystemExit, match='at least 257'):
        train_bpe(['a'], 256)


# Faults

def test_without_tiktoken_the_error_says_what_to_install(monkeypatch):  # fault 77
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(SystemExit, match='pip install tiktoken'):
        tokenizer.gpt2().encode('x')


def test_without_tokenizers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(SystemExit, match='pip install tokenizers'):
        train_bpe(['x'], 300)


def test_if_gpt2s_file_cannot_be_downloaded_the_error_names_the_cache_folder(monkeypatch):
    load = pytest.importorskip('tiktoken.load')

    def refuse(*_):
        raise ConnectionError('Name or service not known')
    monkeypatch.setattr(load, 'read_file_cached', refuse)
    with pytest.raises(SystemExit, match='TIKTOKEN_CACHE_DIR'):
        tokenizer.gpt2().encode('x')


def test_that_error_names_the_file_as_tiktokens_cache_expects_it(monkeypatch, tmp_path):
    load = pytest.importorskip('tiktoken.load')
    name = hashlib.sha1(tokenizer.GPT2_MERGES[0].encode()).hexdigest()
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(load, 'read_file', lambda url: (_ for _ in ()).throw(ConnectionError('no network')))
    with pytest.raises(SystemExit, match=f'save {tokenizer.GPT2_MERGES[0]} as FOLDER/{name} and set'):
        tokenizer.gpt2().encode('x')
    (tmp_path / name).write_bytes(b'a saved file')
    sha256 = hashlib.sha256(b'a saved file').hexdigest()
    assert load.read_file_cached(tokenizer.GPT2_MERGES[0], sha256) == b'a saved file'


def test_a_model_can_be_trained_on_gpt2s_ids_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    gpt2 = from_spec({'kind': 'gpt2'})
    assert (gpt2.vocab_size, gpt2.eot) == (50257, 50256)


def test_without_gpt2s_file_the_reason_names_the_cause_and_ends_with_it(monkeypatch):
    def refuse(*_):
        raise ConnectionError("HTTPSConnectionPool(host='openaipublic.blob.core.windows.net', port=443): Max retries "
                              'exceeded with url: /gpt-2/encodings/main/vocab.bpe (Caused by NameResolutionError("'
                              "Failed to resolve 'openaipublic.blob.core.windows.net'\"))")
    monkeypatch.setattr(pytest.importorskip('tiktoken.load'), 'read_file_cached', refuse)
    with pytest.raises(UserError) as told:
        from_spec({'kind': 'gpt2'}).encode('a')
    assert told.value.message.endswith('Reason: ConnectionError: NameResolutionError("Failed to resolve '
                                       "'openaipublic.blob.core.windows.net'\")")
