"""From what a user typed to the ids that a model reads."""
import sys

from configurator import UserError, find_path
from lib.text import fold as folding


def typed(argument):
    """Return the text that was typed: under an ASCII locale Python reads its bytes as lone surrogates."""
    return argument.encode('utf-8', 'surrogateescape').decode('utf-8', 'replace')


def read_prompt(start):
    """Return the prompt as text: `start`, or the file that 'FILE:path' names; UserError if it is not UTF-8."""
    if not start.startswith('FILE:'):
        return typed(start)
    try:
        return find_path(start[5:]).read_text(encoding='utf-8-sig')  # without the byte order mark of Notepad
    except OSError as error:
        raise UserError(f'start={start}: {error.strerror}') from None
    except UnicodeDecodeError as error:
        raise UserError(f'start={start}: not UTF-8 at byte {error.start}; save the file as UTF-8') from None


def fit_to_vocabulary(prompt, stop, tok, fold):
    r"""Return the prompt and the stop string as a character vocabulary can hold them; changes are printed to stderr.

    Escapes such as \n become the characters they stand for. fold: the prompt takes the character width of the text.
    """
    if tok.kind != 'char':  # the other tokenizers can encode any text
        return prompt, stop
    prompt, stop, note = folding.unescape(prompt, tok.chars), folding.unescape(stop, tok.chars), ''
    if fold:
        prompt, note = folding.fold(prompt, tok.chars)
    if note:
        print(note, file=sys.stderr)
    if unknown := folding.unknown_character(stop, tok.chars):
        print(f'warning: stop={stop} can never occur: the training text has no {unknown!r}', file=sys.stderr)
    return prompt, stop


def encode_text(text, tok):
    """Return the ids of a text; a written end-of-text mark becomes that token if the tokenizer has it."""
    parts = [text] if tok.eot is None else text.split(tok.separator)
    ids = tok.encode(parts[0])
    for part in parts[1:]:
        ids += [tok.eot] + tok.encode(part)
    return ids


def encode_prompt(text, tok):
    """Return the ids of the prompt, those of the beginning of a text if it is empty."""
    return encode_text(text, tok) or tok.start_ids
