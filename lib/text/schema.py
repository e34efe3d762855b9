"""What meta.json, meta.pkl and other small files may contain; checked once, when they are read."""
import io
import json
import pickle
import pickletools


def parse_json(text):
    """Return the value of a JSON text; ValueError for anything that is not one, however it is nested or long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError('it is nested too deeply') from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python refuses to convert very long numbers, and says how to allow them
        raise ValueError(str(error).split(':')[0]) from None


def read_json(path):
    """Return the value in a JSON file; OSError, or ValueError if it holds none. A byte order mark is no part of it."""
    return parse_json(path.read_text(encoding='utf-8-sig'))


KINDS = ('char', 'byte', 'gpt2', 'bpe')


def spec_problem(spec, kinds=KINDS):
    """Return what is wrong with a tokenizer spec from a file; '' if a tokenizer can be made of it."""
    if type(spec) is not dict:
        return f'is a {type(spec).__name__}, expected a dictionary'
    if type(spec.get('kind')) is not str or spec['kind'] not in kinds:
        return f"of kind {str(spec.get('kind'))[:40]!r}; this program knows {', '.join(kinds)}"
    if spec['kind'] == 'char':
        return _chars_problem(spec.get('chars'))
    if spec['kind'] == 'bpe':
        return _tokens_problem(spec.get('tokens'))
    return ''


def _chars_problem(chars):
    if type(chars) is not str or not chars:
        return f'chars is {"empty" if chars == "" else f"a {type(chars).__name__}"}, expected the characters as text'
    if len(set(chars)) < len(chars):
        twice = next(char for i, char in enumerate(chars) if char in chars[:i])
        return f'chars has {twice!r} twice'
    half = next((char for char in chars if '\ud800' <= char <= '\udfff'), '')
    return f'chars has the lone surrogate U+{ord(half):04X}' if half else ''


def _tokens_problem(tokens):
    if type(tokens) not in (list, tuple) or not all(type(token) is str and token for token in tokens):
        return 'tokens is not a list of texts'
    distinct = set(tokens)
    if len(distinct) < len(tokens):
        return 'tokens has a token twice'
    if any(max(token) > '\xff' for token in tokens):
        return 'tokens has characters above U+00FF, which stand for no byte'
    missing = [byte for byte in range(256) if chr(byte) not in distinct]
    return f'tokens lacks {len(missing)} single bytes, for example {missing[0]}' if missing else ''


class _Refused(ValueError):
    pass


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers; refuses a pickle that refers to any class or function."""

    def find_class(self, module, name):
        raise _Refused(f'refers to {module}.{name}; refusing')


def load_plain_pickle(data):
    """Return the plain value of a pickle, given as bytes; ValueError if it is damaged or refers to code.

    Every operation is looked at first: a number in nine bytes can ask for gigabytes of memory.
    """
    try:
        for operation, argument, _ in pickletools.genops(data):  # raises an error for lengths beyond the end
            if operation.name in ('PUT', 'BINPUT', 'LONG_BINPUT') and argument > len(data):
                raise _Refused(f'asks for {argument:,} places in {len(data):,} bytes')
        return _PlainUnpickler(io.BytesIO(data)).load()
    except _Refused:
        raise
    except Exception as error:  # a damaged pickle can raise almost anything
        raise ValueError(f"is not nanoGPT's character table ({type(error).__name__}: {error})") from None


def nanogpt_chars(data):
    """Return the characters in nanoGPT's meta.pkl, given as bytes, in the order of their ids.

    ValueError, to be shown after the name of the file, if it is anything else.
    """
    table = load_plain_pickle(data)
    try:
        tokens = [table['itos'][i] for i in range(len(table['itos']))]
        chars = ''.join(tokens)
    except (LookupError, TypeError) as error:
        raise ValueError(f"is not nanoGPT's character table ({type(error).__name__}: {error})") from None
    if any(len(token) != 1 for token in tokens):
        raise ValueError('has tokens of several characters; only one character per id is supported')
    if problem := spec_problem({'kind': 'char', 'chars': chars}):
        raise ValueError(f"is not nanoGPT's character table: {problem}")
    return chars
