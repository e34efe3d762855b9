"""From text to token ids and back: characters, bytes, GPT-2's BPE, or a BPE trained on your own text.

Every tokenizer has
    kind, vocab_size          'char', 'byte', 'gpt2' or 'bpe'; ids run from 0 to vocab_size - 1
    spec                      plain values from which `from_spec` rebuilds it; saved in meta.json and in checkpoints
    eot                       the id of end-of-text, or None if the kind has none (char, byte)
    separator                 the text after each of several documents: end-of-text, or a newline if eot is None
    start_ids                 the ids that a sample without a prompt starts from
    encode(text)              list of ids; TextError (a ValueError) names a character that the vocabulary lacks
    decode(ids)               text; bytes that are not valid UTF-8 become U+FFFD
    decode_bytes(ids)         UTF-8 bytes; works on an incomplete character, so that a stream can wait for the rest
    encode_documents(pieces)  the ids of several pieces, [(text, True if a separator follows), ...], as a numpy array
    safe_split(text, start)   the first position >= start at which splitting text changes no id, or -1
"""
import re
import unicodedata
from functools import cached_property

import numpy as np

from configurator import UserError
from lib.machine.console import reason
from lib.text.fold import similar_characters
from lib.text.schema import spec_problem

EOT = '<|endoftext|>'
# How GPT-2 splits text before it merges bytes; the pattern is that of https://github.com/openai/tiktoken.
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# No match of GPT2_SPLIT contains a visible character followed by white space, or a letter or digit followed by a
# punctuation mark, and the pattern looks ahead only after white space. After such a character a new match always
# begins, so the texts on both sides are split as they would be alone.
SAFE_SPLIT = re.compile(r'\S(?=[ \t\r\n\u3000])|[^\W_](?=[,.;:!?)，。；：！？、）」』”])')
# Look-ahead makes GPT2_SPLIT slow. It only keeps the last white space before a visible character out of a run of white
# space. QUICK_SPLIT has no look-ahead and is more than twice as fast; a CUT inserted at that place gives the same
# result: 'a   b' is split into 'a', '  ', ' b' by GPT2_SPLIT, and so is 'a  CUT b' by QUICK_SPLIT.
QUICK_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"""
CUT, END = '\ufdd0', '\ufdd1'  # Unicode reserves both for internal use; END marks the end of a document
WHITE = np.zeros(0x110000, bool)  # code point -> does it match \s in tiktoken's regular expressions?
WHITE[[*range(9, 14), 32, 0x85, 0xa0, 0x1680, *range(0x2000, 0x200b), 0x2028, 0x2029, 0x202f, 0x205f, 0x3000]] = True
GPT2_MERGES = ('https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe',
               '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5')  # its sha256


class TextError(UserError, ValueError):
    """A text or tokenizer file is invalid. Code can catch it as a ValueError; uncaught, it ends with one line."""

    def __reduce__(self):  # so that it can be sent from a worker process
        return TextError, (self.message,)


def encoded(text, codec='utf-8'):
    """Return `text` as bytes; TextError if it contains half of a surrogate pair, which no encoding allows."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        raise TextError(f'lone surrogate U+{ord(text[error.start]):04X} at character {error.start:,} is not text; '
                        'remove it') from None


def _check_range(ids, vocab_size):
    """Return `ids` as an int64 array; TextError if one is outside the vocabulary."""
    ids = np.asarray(ids, dtype=np.int64).reshape(-1)
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise TextError(f'token id {bad} is outside the vocabulary of {vocab_size:,}')
    return ids


class _Tokenizer:
    """The common part. Each kind adds decode_bytes, and either _ids or encode and encode_documents."""

    eot, separator = None, '\n'

    @property
    def start_ids(self):
        """Where a text naturally begins: [end-of-text] if the kind has one, else [newline], else [0]."""
        return [self.eot] if self.eot is not None else [10]

    @property
    def dtype(self):
        """The numpy dtype of .bin files: little-endian uint16 if every id fits, else uint32."""
        return '<u2' if self.vocab_size <= 1 << 16 else '<u4'

    def decode(self, ids):
        return self.decode_bytes(ids).decode('utf-8', errors='replace')

    def safe_split(self, text, start):
        return start

    def encode_documents(self, pieces):
        return self._ids(''.join([text + self.separator if is_last else text for text, is_last in pieces]))

    def encode(self, text):
        return self._ids(text).tolist()


class CharTokenizer(_Tokenizer):
    """One id per distinct character; `chars` is the vocabulary, in the order of the ids."""

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
        for similar in filter(self.chars.__contains__, similar_characters(char)):
            return f"{message}; it has '{similar}' (U+{ord(similar):04X})"
        parts = unicodedata.normalize('NFD', char)
        if len(parts) > 1 and set(parts) <= set(self.chars):
            return f'{message}; the text writes it as {" + ".join(map(ascii, parts))}'
        return f'{message}; leave it out, or train on a text prepared with --tokenizer=bpe'

    def decode_bytes(self, ids):
        return self._code_of[_check_range(ids, self.vocab_size)].tobytes().decode('utf-32-le').encode('utf-8')


class ByteTokenizer(_Tokenizer):
    """The 256 byte values of UTF-8: there is no vocabulary to learn, and no text is unknown."""

    kind, vocab_size, spec = 'byte', 256, {'kind': 'byte'}

    def _ids(self, text):
        return np.frombuffer(encoded(text), np.uint8).astype(self.dtype)

    def decode_bytes(self, ids):
        return _check_range(ids, 256).astype(np.uint8).tobytes()


class BPETokenizer(_Tokenizer):
    """Byte pair encoding, run by tiktoken: GPT-2's own, or a trained one (see `bpe`).

    load: a function from the module tiktoken to an Encoding. It is called when the first text is encoded or decoded,
    so that training on token ids needs neither tiktoken nor GPT-2's files.
    """

    separator = EOT

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
    def _quick_encoding(self):
        exact = self._encoding
        return type(exact)('quick', pat_str=QUICK_SPLIT, mergeable_ranks=exact._mergeable_ranks,
                           special_tokens={END: self.eot, CUT: self.vocab_size})

    def encode(self, text):
        encoded(text)
        return self._encoding.encode_ordinary(text)

    def encode_documents(self, pieces):
        """Return the ids of all pieces, with one call of tiktoken, which is faster than one call per document.

        [('one', True), ('two', True)] -> encode('one') + [eot] + encode('two') + [eot], as a numpy array
        """
        joined = ''.join([text + END if is_last else text for text, is_last in pieces])
        if CUT in joined or joined.count(END) != sum(is_last for _, is_last in pieces):
            return self._encode_one_by_one(pieces)  # the text itself contains one of the two reserved characters
        codes = np.frombuffer(encoded(joined, 'utf-32-le'), '<u4')
        white = WHITE[codes]
        before_last = white[:-2] & white[1:-1] & ~white[2:] & (codes[2:] != ord(END))  # see QUICK_SPLIT
        with_cuts = np.insert(codes, np.flatnonzero(before_last) + 1, ord(CUT)).tobytes().decode('utf-32-le')
        ids = self._quick_encoding.encode_to_numpy(with_cuts, allowed_special='all')
        return ids[ids != self.vocab_size].astype(self.dtype)  # CUT has the id vocab_size

    def _encode_one_by_one(self, pieces):
        ids = []
        for text, is_last in pieces:
            ids += self.encode(text)
            if is_last:
                ids.append(self.eot)
        return np.array(ids, self.dtype)

    def decode_bytes(self, ids):
        return self._encoding.decode_bytes(_check_range(ids, self.vocab_size).tolist())

    def safe_split(self, text, start):
        found = SAFE_SPLIT.search(text, max(0, start - 1))
        return found.end() if found else -1


def byte_letters():
    """Return {character: byte}: the visible characters that stand for bytes in files of GPT-2 and Hugging Face.

    A byte is written as a Latin-1 character here. Printable bytes stand for themselves, the others are U+0100 onwards.
    The order is that of GPT-2's first 256 ids.
    """
    shown = [chr(b) for b in range(256) if chr(b).isprintable() and chr(b) != ' ']
    hidden = [chr(b) for b in range(256) if chr(b) not in shown]
    return {**dict(zip(shown, shown, strict=True)), **{chr(256 + n): byte for n, byte in enumerate(hidden)}}


def _encoding(tiktoken, name, tokens):
    """Return the tiktoken Encoding of `tokens` (see `bpe`) and end-of-text."""
    ranks = {token.encode('latin-1'): rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding(name, pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={EOT: len(ranks)})


def gpt2():
    """Return GPT-2's tokenizer (50,257 ids). Its first use raises UserError if the BPE file cannot be downloaded.

    tiktoken downloads, checks and caches the file. It is parsed here because tiktoken.get_encoding also reads the
    vocabulary from a second file to compare, which takes three times as long.
    """
    def load(tiktoken):
        try:
            from tiktoken.load import read_file_cached
            merges = read_file_cached(*GPT2_MERGES).decode()  # a title, then one pair per line in the order of ids
        except Exception as error:  # network and file errors of several libraries
            raise UserError(f"GPT-2's BPE file could not be loaded. Go online once; or save {GPT2_MERGES[0]} as FOLDER/"
                            '6d1cbeee0f20b3d9449abfede4726ed8212e3aee and set TIKTOKEN_CACHE_DIR=FOLDER; char, byte '
                            f'and bpe need no files. Reason: {reason(error)}') from None
        letters, line_end = byte_letters(), chr(0x200)
        read = str.maketrans({**letters, ' ': '', '\n': line_end})
        return _encoding(tiktoken, 'gpt2', [*letters.values(), *merges.translate(read).split(line_end)[1:-1]])
    return BPETokenizer({'kind': 'gpt2'}, 50257, load)


def bpe(tokens):
    """Return the BPE with these `tokens`: strings of bytes (characters below 256) in the order they were learned."""
    return BPETokenizer({'kind': 'bpe', 'tokens': list(tokens)}, len(tokens) + 1,
                        lambda tiktoken: _encoding(tiktoken, 'bpe', tokens))


def train_bpe(texts, vocab_size):
    """Return a BPE of at most `vocab_size` ids (256 bytes, merges, end-of-text) trained on `texts`, an iterable of str.

    It works on bytes and splits as GPT-2 does, so it encodes any Unicode text. A small text may yield fewer ids.
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
    """Return the tokenizer with this `spec`, from meta.json or a checkpoint; TextError if there is none."""
    kinds = {'char': lambda: CharTokenizer(spec['chars']), 'byte': ByteTokenizer, 'gpt2': gpt2,
             'bpe': lambda: bpe(spec['tokens'])}
    if problem := spec_problem(spec, kinds):
        raise TextError(f'tokenizer {problem}')
    return kinds[spec['kind']]()


def describe_mismatch(data, model):
    """Return why ids of a dataset with tokenizer spec `data` mean something else to a model with spec `model`."""
    if data['kind'] != model['kind']:
        return f"its tokenizer is {data['kind']}, the model's is {model['kind']}"
    if data['kind'] != 'char':
        return 'both have a BPE, but not the same one'
    unknown = sorted(set(data['chars']) - set(model['chars']))
    if unknown:
        shown = ', '.join(map(repr, unknown[:3]))
        if len(unknown) > 3:
            shown += f' and {len(unknown) - 3:,} more'
        return f'it has characters that the model was not trained on ({shown})'
    return (f"it has {len(data['chars']):,} different characters, the model {len(model['chars']):,}, "
            'so their ids differ')
