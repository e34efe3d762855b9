"""lib/text/tokenizer.py: round trips on hostile text, where BPE text may be cut, specs, messages."""
import json
import os
import pickle
import random
import re
from pathlib import Path

import pytest
import torch

from configurator import REPO
from lib.text import tokenizer
from lib.text.data_folder import from_nanogpt_meta
from lib.text.tokenizer import SAFE_SPLIT, CharTokenizer, TextError, from_spec, train_bpe

if (shared := REPO.parent / 'shared' / 'tiktoken').is_dir():
    os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(shared))

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
    'spells out the mark': 'a<|endoftext|>b <|endoftext|>',
    'spaces': '   \t\n  \n\n   ',
    'Chinese': '人之初，性本善。',
    'no newline': '天地玄黄，宇宙洪荒' * 2000,
}


def have_gpt2():
    try:
        tokenizer.gpt2().encode('')
    except SystemExit:
        return False
    return True


@pytest.fixture(scope='module', params=['char', 'byte', 'bpe', 'gpt2'])
def coder(request):
    if request.param == 'char':
        return CharTokenizer(''.join(sorted(set(''.join(HOSTILE.values())))))
    if request.param == 'bpe':
        return train_bpe(['the cat sat on the mat. ' * 50, '性相近，习相远' * 20], 300)
    if request.param == 'gpt2' and not have_gpt2():
        pytest.skip('GPT-2 BPE files are not on this machine')
    return from_spec({'kind': request.param})


@pytest.mark.parametrize('name', HOSTILE)
def test_decoding_what_was_encoded_gives_the_text_back(coder, name):
    assert coder.decode(coder.encode(HOSTILE[name])) == HOSTILE[name]


@pytest.mark.parametrize('name', HOSTILE)
def test_packing_gives_the_ids_of_encode(coder, name):
    assert coder.encode_documents([(HOSTILE[name], False)]).tolist() == coder.encode(HOSTILE[name])


def test_packing_puts_one_mark_after_each_document(coder):
    texts = ['one', 'two<|endoftext|>', ' three\n', '<|endof', 'text|>']
    if coder.kind == 'char':
        coder = CharTokenizer(''.join(sorted(set('\n' + ''.join(texts)))))
    mark = [coder.eot] if coder.eot is not None else coder.encode('\n')
    expected = [i for text in texts for i in coder.encode(text) + mark]
    assert coder.encode_documents([(text, True) for text in texts]).tolist() == expected


def test_ten_megabytes_without_a_newline_come_back(coder):
    text = '天地玄黄，宇宙洪荒' * 400_000
    assert coder.decode(coder.encode_documents([(text, False)])) == text


def test_an_end_of_text_typed_by_a_user_is_plain_text():
    coder = train_bpe(['abc'], 257)
    assert coder.eot not in coder.encode('<|endoftext|>')


def test_a_lone_surrogate_is_refused_by_name(coder):
    with pytest.raises(TextError, match=r'lone surrogate U\+D800 at character 1 is not text'):
        coder.encode('a\ud800b')


def test_ids_that_are_no_utf8_become_replacement_characters():
    coder = from_spec({'kind': 'byte'})
    assert coder.decode([0xE4, 0xBA, 65]) == '\ufffdA' and coder.decode_bytes([0xE4, 0xBA]) == b'\xe4\xba'


def test_an_id_outside_the_vocabulary_is_named(coder):
    with pytest.raises(TextError, match=f'token id {coder.vocab_size} is outside the vocabulary'):
        coder.decode([0, coder.vocab_size])


def test_a_spec_survives_json_and_makes_the_same_tokenizer(coder):
    again = from_spec(json.loads(json.dumps(coder.spec)))
    assert again.encode('a') == coder.encode('a') and again.vocab_size == coder.vocab_size


def test_a_spec_survives_a_checkpoint_that_allows_only_plain_values(coder, tmp_path):
    torch.save({'tokenizer': coder.spec}, tmp_path / 'ckpt.pt')
    assert torch.load(tmp_path / 'ckpt.pt', weights_only=True)['tokenizer'] == coder.spec


def test_an_unknown_kind_is_refused():
    with pytest.raises(TextError, match="kind 'words'; this program knows char, byte, gpt2, bpe"):
        from_spec({'kind': 'words'})


@pytest.mark.parametrize('chars, text, message', [
    ('：，人', 'a', r"^character 'a' \(U\+0061\) is not in this model's 3-character vocabulary$"),
    ('：，人', ':', r"vocabulary; it has '：' \(U\+FF1A\)$"),
    ('abc:', '：', r"it has ':' \(U\+003A\)$"),
    ('。', '.', r"it has '。' \(U\+3002\)$"),
    ('abc', '\x07', r'^character U\+0007 is not'),
])
def test_an_unknown_character_is_named_with_the_twin_that_is_known(chars, text, message):
    with pytest.raises(ValueError) as caught:
        CharTokenizer(chars).encode(text)
    assert re.search(message, caught.value.message)


@pytest.mark.parametrize('chars, start', [('\nab', [0]), ('ab\n', [2]), ('ab', [0])])
def test_characters_begin_with_a_newline_or_the_first_id(chars, start):
    assert CharTokenizer(chars).start_ids == start


def test_bpe_begins_with_end_of_text():
    coder = train_bpe(['abc'], 257)
    assert coder.start_ids == [coder.eot] == [256]


# Cutting

NASTY = ["'", "'s", "'ll", 'a', 'é', '人', '７', '9', '½', '_', ' ', '  ', '\n', '\r\n', '\t', '\x1c', '\x85', '\xa0',
         '\u3000', '\u2028', '\u180e', '\u200d', '\u0301', '，', '。', ',', '.', '!', ')', '”', '👩', '\U0001f3fd',
         'ǅ', 'ª', '\ufeff']


def test_gpt2s_tokenizer_is_tiktokens():
    if not have_gpt2():
        pytest.skip("GPT-2's BPE file is not here")
    ours, theirs = tokenizer.gpt2()._encoding, pytest.importorskip('tiktoken').get_encoding('gpt2')
    for part in ('_mergeable_ranks', '_special_tokens', '_pat_str'):
        assert getattr(ours, part) == getattr(theirs, part)


@pytest.fixture(scope='module', params=['gpt2', 'bpe'])
def merger(request):
    """A BPE that merges what must not be torn: GPT-2's, or one that was raised on runs of anything."""
    if request.param == 'gpt2':
        if not have_gpt2():
            pytest.skip('GPT-2 BPE files are not on this machine')
        return tokenizer.gpt2()
    rng = random.Random(0)
    return train_bpe([rng.choice(NASTY) * rng.randrange(1, 5) + rng.choice(NASTY) for _ in range(20_000)], 600)


@pytest.mark.parametrize('seed', range(40))
def test_cutting_at_any_safe_place_changes_no_id(merger, seed):
    coder, rng = merger, random.Random(seed)
    text = ''.join(rng.choices(NASTY, k=300))
    whole = coder.encode(text)
    places = [match.end() for match in SAFE_SPLIT.finditer(text)]
    assert places
    for at in places:
        assert coder.encode(text[:at]) + coder.encode(text[at:]) == whole, (at, text[at - 3:at + 3])


@pytest.mark.parametrize('seed', range(40))
def test_packing_splits_any_text_as_encode_does(merger, seed):
    coder, rng = merger, random.Random(seed)
    texts = [''.join(rng.choices(NASTY, k=rng.randrange(12))) for _ in range(60)]
    expected = [i for text in texts for i in coder.encode(text) + [coder.eot]]
    assert coder.encode_documents([(text, True) for text in texts]).tolist() == expected


@pytest.mark.parametrize('kept', [tokenizer.CUT, tokenizer.END])
def test_packing_takes_its_own_marks_for_text_where_a_text_holds_them(merger, kept):
    texts = [f'a  b{kept}c \n', '  d']
    expected = [i for text in texts for i in merger.encode(text) + [merger.eot]]
    assert merger.encode_documents([(text, True) for text in texts]).tolist() == expected


def test_a_text_without_a_safe_place_is_not_cut():
    assert train_bpe(['a'], 257).safe_split('a' * 1000, 500) == -1


def test_a_cut_is_found_at_or_after_the_place_asked_for():
    assert train_bpe(['a'], 257).safe_split('one two three', 4) == 7


# A trained BPE

def test_a_trained_bpe_has_the_size_asked_for_and_pays():
    text = 'the quick brown fox jumps over the lazy dog and the cat sat on the mat\n' * 20
    coder = train_bpe([text], 290)
    assert coder.vocab_size == 290 and len(coder.encode(text)) < len(text) / 2


def test_training_is_deterministic():
    texts = ['one two three two three three\n' * 30, '性相近习相远' * 9]
    assert train_bpe(texts, 320).spec == train_bpe(texts, 320).spec


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(SystemExit, match='at least 257'):
        train_bpe(['a'], 256)


# nanoGPT's meta.pkl

class Payload:
    def __reduce__(self):
        return os.mkdir, ('pwned',)


def write_meta(folder, meta):
    (Path(folder) / 'meta.pkl').write_bytes(pickle.dumps(meta))


def test_nanogpts_character_table_is_read(tmp_path):
    write_meta(tmp_path, {'vocab_size': 3, 'itos': {0: '\n', 1: 'b', 2: 'a'}, 'stoi': {'\n': 0, 'b': 1, 'a': 2}})
    assert from_nanogpt_meta(tmp_path).encode('ab\n') == [2, 1, 0]


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path, {'itos': Payload()})
    with pytest.raises(TextError, match=r'meta.pkl refers to \w+.mkdir; refusing'):
        from_nanogpt_meta(tmp_path)
    assert not (tmp_path / 'pwned').exists()


@pytest.mark.parametrize('content', [b'', b'not a pickle', pickle.dumps([1, 2]), pickle.dumps({'itos': {1: 'a'}})])
def test_a_meta_pkl_of_another_kind_is_refused(tmp_path, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(TextError, match="is not nanoGPT's character table"):
        from_nanogpt_meta(tmp_path)
