"""From text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained on one's own text.

Whatever its kind, a tokenizer has
    kind, vocab_size    'char', 'byte', 'gpt2' or 'bpe'; ids run from 0 to vocab_size - 1
    spec                plain values from which `from_spec` makes it again; stands in meta.json and in checkpoints
    eot                 the id of end-of-text, or None where the kind has none (char, byte)
    mark, start_ids     what follows each of many documents: end-of-text, else a newline; [its id] begins a sample
    encode(text)        list of ids; a TextError (a ValueError) names a character that the vocabulary lacks
    decode(ids)         text; bytes that are no UTF-8 become U+FFFD
    decode_bytes(ids)   UTF-8 bytes; never fails on half a character, so a stream can wait for the rest
    pack(pieces)        the ids of many pieces at once: [(text, True where a document ends), ...] to a numpy array
    cut(text, start)    the first place from `start` on where text may be cut without changing its ids, or -1
"""
import pickle
import re
import unicodedata
from functools import cached_property
from pathlib import Path

import numpy as np

from configurator import UserError

EOT = '<|endoftext|>'
# The ways GPT-2 splits text before merging bytes; see https://github.com/openai/tiktoken (the pattern is its own).
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# No match of that pattern holds a visible character followed by white space, nor a letter or digit followed by a
# punctuation mark, and its look-ahead matters only after white space. So behind such a character a new match surely
# begins, the text before it splits as it would alone, and so does the text after it.
SAFE_CUT = re.compile(r'\S(?=[ \t\r\n\u3000])|[^\W_](?=[,.;:!?)，。；：！？、）」』”])')
# Looking ahead makes the split slow. All that it does is to leave the last white space before a visible character out
# of a run; text with a CUT put there is split in the same places by QUICK_SPLIT, more than twice as fast.
QUICK_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
CUT, END = '\ufdd0', '\ufdd1'  # Unicode keeps these two for a program's own use; END marks the end of a document
WHITE = np.zeros(0x110000, bool)  # what \s means to tiktoken's regular expressions
WHITE[[*range(9, 14), 32, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f, 0x3000]] = True
GPT2_MERGES = ('https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
               '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')  # its sha256
TWINS = dict(zip('."\'<>-$', '。“‘《》—￥', strict=True))  # marks whose usual Chinese form is not their full-width form


class TextError(UserError, ValueError):
    """What is wrong with a text or a tokenizer's file: a ValueError to whoever catches it, else a line to the user."""

    def __reduce__(self):  # it travels from worker processes
        return TextError, (self.message,)


def encoded(text, codec='utf-8'):
    """Return `text` as bytes; raises TextError where it holds half of a surrogate pair, which is no text."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise TextError(f'lone surrogate U+{ord(text[error.start]):04X} at character {error.start:,} is not text; '
                        'remove it') from None


def _check_range(ids, vocab_size):
    """Return `ids` as an int64 array, or raise TextError where one lies outside the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise TextError(f'token id {bad} is outside the vocabulary of {vocab_size:,}')
    return ids


class _Tokenizer:
    """What all kinds share; each adds encode, decode_bytes and pack."""

    eot, mark = None, '\n'

    @property
    def start_ids(self):
        """The natural beginning of a text: [end-of-text], else [newline], else [0]."""
        return [self.eot] if self.eot is not None else [10]

    @property
    def dtype(self):
        """The numpy dtype of .bin files: uint16 while every id fits, else uint32; little-endian."""
        return '<u2' if self.vocab_size <= 1 << 16 else '<u4'

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def cut(self, text, start):
        return start

    def pack(self, pieces):
        return self._ids(''.join([text + self.mark if ends else text for text, ends in pieces]))

    def encode(self, text):
        return self._ids(text).tolist()


class CharTokenizer(_Tokenizer):
    """One id for each distinct character; `chars` is the vocabulary, in the order of the ids."""

    kind = 'char'

    def __init__(self, chars):
        self.chars, self.vocab_size = chars, len(chars)
        self.spec = {'kind': 'char', 'chars': chars}
        self._code_of = np.frombuffer(chars.encode('utf-32-le'), '<u4')
        self._id_of = np.full(0x110000, -1, np.int32)  # code point -> id
        self._id_of[self._code_of] = np.arange(len(chars))

    @property
    def start_ids(self):
        return [max(0, int(self._id_of[10]))]

    def _ids(self, text):
        codes = np.frombuffer(encoded(text, 'utf-32-le'), '<u4')
        ids = self._id_of[codes]
        if ids.size and ids.min() < 0:
            raise TextError(self._unknown(chr(codes[ids.argmin()])))
        return ids.astype(self.dtype)

    def _unknown(self, char):
        name = f"'{char}' (U+{ord(char):04X})" if char.isprintable() else f'U+{ord(char):04X}'
        message = f"character {name} is not in this model's {self.vocab_size:,}-character vocabulary"
        wide = chr(ord(char) + 0xFEE0) if '!' <= char <= '~' else '\u3000' if char == ' ' else ''
        for twin in (wide, unicodedata.normalize('NFKC', char), TWINS.get(char),
                     next((ascii for ascii, usual in TWINS.items() if usual == char), '')):
            if twin and twin != char and twin in self.chars:
                return f"{message}; it has '{twin}' (U+{ord(twin):04X})"
        return message

    def decode_bytes(self, ids):
        return self._code_of[_check_range(ids, self.vocab_size)].tobytes().decode('utf-32-le').encode('utf-8')


class ByteTokenizer(_Tokenizer):
    """The 256 byte values of UTF-8: no vocabulary to learn, and nothing is ever unknown."""

    kind, vocab_size, spec = 'byte', 256, {'kind': 'byte'}

    def _ids(self, text):
        return np.frombuffer(encoded(text), np.uint8).astype(self.dtype)

    def decode_bytes(self, ids):
        return _check_range(ids, 256).astype(np.uint8).tobytes()


class BPETokenizer(_Tokenizer):
    """Byte pair encoding, run by tiktoken: GPT-2's own, or one that was trained (see `bpe`).

    load: a function that returns the tiktoken Encoding; called when the first text comes, so that training on token
    ids needs neither tiktoken nor GPT-2's files.
    """

    mark = EOT

    def __init__(self, spec, vocab_size, load):
        self.kind, self.spec, self.vocab_size, self.eot = spec['kind'], spec, vocab_size, vocab_size - 1
        self._load = load

    @cached_property
    def _encoding(self):
        try:
            import tiktoken
        except ImportError:
            raise UserError('BPE needs the package tiktoken: pip install tiktoken') from None
        return self._load(tiktoken)

    @cached_property
    def _quick(self):
        exact = self._encoding
        return type(exact)('quick', pat_str=QUICK_SPLIT, mergeable_ranks=exact._mergeable_ranks,
                           special_tokens={END: self.eot, CUT: self.vocab_size})

    def encode(self, text):
        encoded(text)
        return self._encoding.encode_ordinary(text)

    def pack(self, pieces):
        """As the module says; many documents go in one call, which is faster than one by one."""
        joined = ''.join([text + END if ends else text for text, ends in pieces])
        if CUT in joined or joined.count(END) != sum(ends for _, ends in pieces):  # the text has such a character
            return np.array([i for text, ends in pieces for i in self.encode(text) + [self.eot] * ends], self.dtype)
        codes = np.frombuffer(encoded(joined, 'utf-32-le'), '<u4')
        white = WHITE[codes]
        before_last = white[:-2] & white[1:-1] & ~white[2:] & (codes[2:] != ord(END))
        marked = np.insert(codes, np.flatnonzero(before_last) + 1, ord(CUT)).tobytes().decode('utf-32-le')
        ids = self._quick.encode_to_numpy(marked, allowed_special='all')
        return ids[ids != self.vocab_size].astype(self.dtype)

    def decode_bytes(self, ids):
        return self._encoding.decode_bytes(_check_range(ids, self.vocab_size).tolist())

    def cut(self, text, start):
        found = SAFE_CUT.search(text, max(0, start - 1))
        return found.end() if found else -1


def byte_letters():
    """Return {character: byte}, how GPT-2's files and Hugging Face's write bytes visibly; bytes are Latin-1 characters.

    Printable ones are written as themselves, the rest as U+0100 and on. The order is that of GPT-2's first 256 ids.
    """
    shown = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    hidden = [chr(b) for b in range(256) if chr(b) not in shown]
    return {**dict(zip(shown, shown, strict=True)), **{chr(256 + n): byte for n, byte in enumerate(hidden)}}


def _encoding(tiktoken, name, tokens):
    """Return the tiktoken Encoding of `tokens` (see `bpe`) and end-of-text."""
    ranks = {token.encode('latin-1'): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def gpt2():
    """Return GPT-2's tokenizer of 50,257 ids; its first use raises UserError where its file cannot be had.

    tiktoken fetches, checks and caches the file. Its own way from there, which reads the vocabulary a second time in
    JSON to compare, takes three times as long.
    """
    def load(tiktoken):
        try:
            from tiktoken.load import read_file_cached
            merges = read_file_cached(*GPT2_MERGES).decode()  # a title, then two parts a line, in the order of the ids
        except Exception as error:  # whatever the network or the cache may bring
            raise UserError(f"GPT-2's BPE file could not be had ({type(error).__name__}: {str(error)[:100]}); go "
                            'online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it; char and byte '
                            'tokenizers need no files') from None
        letters, line_end = byte_letters(), chr(0x200)
        read = str.maketrans({**letters, ' ': '', '\n': line_end})
        return _encoding(tiktoken, 'gpt2', [*letters.values(), *merges.translate(read).split(line_end)[1:-1]])
    return BPETokenizer({'kind': 'gpt2'}, 50257, load)


def bpe(tokens):
    """Return the BPE of `tokens`: strings whose characters (below 256) are bytes, in the order they were learned."""
    return BPETokenizer({'kind': 'bpe', 'tokens': list(tokens)}, len(tokens) + 1,
                        lambda tiktoken: _encoding(tiktoken, 'bpe', tokens))


def train_bpe(texts, vocab_size):
    """Return a BPE of at most `vocab_size` ids (256 bytes, merges, end-of-text) learned from `texts`, an iterable.

    Byte-level with GPT-2's way of splitting, so any Unicode survives. A small text may yield fewer ids.
    """
    if vocab_size < 257:
        raise UserError(f'vocab_size={vocab_size}: a BPE has at least 257 ids (256 bytes and end-of-text)')
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError('training a BPE needs the package tokenizers: pip install tokenizers') from None
    letters = byte_letters()
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=sorted(letters), show_progress=False))
    ranked = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    return bpe([''.join(letters[c] for c in token) for token, _ in ranked])


def from_spec(spec):
    """Return the tokenizer of a `spec`, as found in meta.json or a checkpoint; raises TextError for an unknown kind."""
    kinds = {'char': lambda: CharTokenizer(spec['chars']), 'byte': ByteTokenizer, 'gpt2': gpt2,
             'bpe': lambda: bpe(spec['tokens'])}
    if spec.get('kind') not in kinds:
        raise TextError(f"tokenizer of kind {spec.get('kind')!r}; this program knows {', '.join(kinds)}")
    return kinds[spec['kind']]()


def difference(data, model):
    """Return in words why ids of a dataset with spec `data` mean something else to a model with another, `model`."""
    if data['kind'] != model['kind']:
        return f"its tokenizer is {data['kind']}, the model's is {model['kind']}"
    if data['kind'] != 'char':
        return 'both have a BPE, but not the same one'
    lacks = sorted(set(data['chars']) - set(model['chars']))
    if lacks:
        shown = ', '.join(map(repr, lacks[:3])) + f' and {len(lacks) - 3:,} more' * (len(lacks) > 3)
        return f'it has characters that the model was not trained on ({shown})'
    return (f"it has {len(data['chars']):,} different characters, the model {len(model['chars']):,}, "
            'so they are numbered otherwise')


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers; a pickle that refers to any class or function is refused."""

    def find_class(self, module, name):
        raise TextError(f'meta.pkl refers to {module}.{name}; refusing')


def from_nanogpt_meta(folder):
    """Return the character tokenizer of nanoGPT's `folder`/meta.pkl; raises TextError where it is anything else."""
    path = Path(folder) / 'meta.pkl'
    with open(path, 'rb') as file:
        try:
            itos = _PlainUnpickler(file).load()['itos']
            chars = ''.join(itos[i] for i in range(len(itos)))
        except TextError:
            raise
        except Exception as error:  # a damaged pickle fails in a dozen ways
            raise TextError(f"{path} is not nanoGPT's character table ({type(error).__name__}: {error})") from None
    if len(chars) != len(itos):
        raise TextError(f'{path} holds tokens of several characters; only one character per id is supported')
    return CharTokenizer(chars)
