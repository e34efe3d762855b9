"""Dialogues: from rows to token ids and a loss mask, and from the ids back to where each dialogue begins.

A dialogue is (system, exchanges): a text, '' for none, and a list of (question, answer). It is written as

    system END   user QUESTION assistant ANSWER end   user QUESTION assistant ANSWER end   ...

where the marks user, assistant and end are plain text, so every tokenizer can encode them. Only answers and the end
marks after them are targets of the loss. Each part is encoded separately, in training and in a conversation alike,
so a prompt has the same tokens as in training. Questions and answers hold no blank line (see `clean`), so nobody can
write a mark.
"""
import hashlib
import json
import re

import numpy as np

from configurator import UserError
from lib.text.tokenizer import TextError, encoded

# The first marks that the tokenizer can encode are used; the second are for a vocabulary without Latin letters.
MARKS = ({'user': 'Q:\n', 'assistant': '\n\nA:\n', 'end': '\n\n'},
         {'user': '问：\n', 'assistant': '\n\n答：\n', 'end': '\n\n'})
ROLES = ('system', 'user', 'assistant')


def clean(text):
    """Return `text` without white space around it and without blank lines in it, of which the marks are made."""
    return re.sub(r'\n\s*\n', '\n', text.strip())


def choose_marks(tok):
    """Return the marks that a tokenizer can encode; UserError if it can encode none."""
    for marks in MARKS:
        try:
            for mark in marks.values():
                tok.encode(mark)
            return marks
        except TextError as error:
            problem = error.message
    raise UserError(f'the vocabulary has no characters to mark questions and answers with: {problem}; '
                    'use another tokenizer')


# From rows to dialogues

def is_row(record, prompt_keys=(), answer_keys=()):
    """Return whether a JSON or parquet record holds a dialogue: in a known shape, or under the keys named."""
    if prompt_keys or answer_keys:
        return True
    return 'messages' in record or 'prompt' in record and 'completion' in record


def read_row(record, place, prompt_keys=(), answer_keys=()):
    """Return the dialogue of a record, or None if it has no answer to learn from.

    place: FILE:LINE for the UserError that names a missing key, an unknown role or a content that is not text.
    """
    if prompt_keys or answer_keys:
        return _pair(_joined(record, prompt_keys, 'prompt_key', place),
                     _joined(record, answer_keys, 'answer_key', place))
    if 'messages' in record:
        return from_messages(record['messages'], place)
    if not is_row(record):
        raise UserError(f'{place}: expected messages, or prompt and completion, among {", ".join(map(str, record))}; '
                        'set --prompt_key=... and --answer_key=..., or --text_key=... for text')
    prompt, completion = record['prompt'], record['completion']
    if isinstance(prompt, list) and isinstance(completion, list):  # both written as messages
        return from_messages(prompt + completion, place)
    return _pair(_text(prompt, 'prompt', place), _text(completion, 'completion', place))


def _pair(question, answer):
    return ('', [(question, answer)]) if answer else None


def _text(value, name, place):
    if not isinstance(value, str | None):
        raise UserError(f'{place}: {name} holds {type(value).__name__}, expected text')
    try:
        encoded(value or '')
    except TextError as error:
        raise UserError(f'{place}: {error.message}') from None
    return clean(value or '')


def _joined(record, keys, flag, place):
    """Return the texts under `keys` joined by newlines, without those that repeat the previous one."""
    if not any(key in record for key in keys):
        raise UserError(f'{place}: no key {" or ".join(keys) or "(none named)"} among '
                        f'{", ".join(map(str, record))}; set --{flag}=...')
    texts = []
    for key in keys:
        text = _text(record.get(key), key, place)
        if text and texts[-1:] != [text]:
            texts.append(text)
    return '\n'.join(texts)


def from_messages(messages, place):
    """Return the dialogue in a list of {'role', 'content'}, or None if it has no answer to learn from.

    Messages of one role in a row are joined by a newline. An answer before any question answers an empty one. The
    dialogue ends before the first empty answer, and before a question that nobody answers. UserError if a role is
    unknown, a system message is not the first, or a content is not text.
    """
    if not isinstance(messages, list | tuple):
        raise UserError(f'{place}: messages holds {type(messages).__name__}, expected a list')
    system, turns = [], []
    for message in messages:
        role = message.get('role') if isinstance(message, dict) else None
        if role not in ROLES:
            raise UserError(f'{place}: role {role!r} in messages, expected {", ".join(ROLES)}; rename or remove it')
        text = _text(message.get('content'), 'content', place)
        if role == 'system':
            if turns:
                raise UserError(f'{place}: a system message after the conversation began; put it first or remove it')
            system.append(text)
        elif turns and turns[-1][0] == role:
            turns[-1][1] = clean(f'{turns[-1][1]}\n{text}')
        else:
            turns.append([role, text])
    if turns and turns[0][0] == 'assistant':
        turns.insert(0, ['user', ''])
    exchanges = []
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
        if not answer:
            break
        exchanges.append((question, answer))
    return (clean('\n'.join(system)), exchanges) if exchanges else None


# From dialogues to ids

def parts(system, exchanges, marks, question=None):
    """Yield (text, is a target, is a mark) in the order in which a dialogue is written.

    question: one more, still without an answer, with the mark after which the model answers.
    """
    if system:
        yield system, False, False
        yield marks['end'], False, True
    for asked, answer in exchanges:
        yield marks['user'], False, True
        yield asked, False, False
        yield marks['assistant'], False, True
        yield answer, True, False
        yield marks['end'], True, True
    if question is not None:
        yield marks['user'], False, True
        yield question, False, False
        yield marks['assistant'], False, True


def as_text(pieces):
    """Yield (dialogue, True) pieces as (text, True), with everything that will be encoded, to choose a tokenizer by."""
    for (system, exchanges), is_last in pieces:
        yield ''.join(text for text, _, _ in parts(system, exchanges, MARKS[0])), is_last


def encode_mark(tok, mark):
    """Return the ids of a mark, each newline encoded alone.

    A BPE encodes newlines before a letter in the same way. So the ids of the parts are those of the whole text, which
    other programs encode as one.
    """
    return [i for part in re.findall(r'\n|[^\n]+', mark) for i in tok.encode(part)]


def encode(tok, system, exchanges, marks, question=None):
    """Return (ids, mask) of a dialogue, two lists of one length; mask has 1 where the token is a target."""
    ids, mask = [], []
    for text, learn, is_mark in parts(system, exchanges, marks, question):
        new = encode_mark(tok, text) if is_mark else tok.encode(text)
        ids += new
        mask += [int(learn)] * len(new)
    return ids, mask


def prompt_ids(tok, system, exchanges, question, marks):
    """Return the ids after which the model writes its answer to `question`."""
    return encode(tok, system, exchanges, marks, question)[0]


def separator(tok):
    """Return the token after each dialogue: end-of-text, or a newline if the tokenizer has none."""
    return tok.eot if tok.eot is not None else tok.encode('\n')[0]


def pack(tok, dialogues, marks):
    """Return (ids, mask) of many dialogues as arrays; end-of-text follows each, or a newline if there is no such mark.

    That token is no target.
    """
    after, ids, mask = separator(tok), [], []
    for system, exchanges in dialogues:
        new_ids, new_mask = encode(tok, system, exchanges, marks)
        ids += [*new_ids, after]
        mask += [*new_mask, 0]
    return np.array(ids, tok.dtype), np.array(mask, np.uint8)


def counts(dialogues):
    """Return (characters, bytes, bytes of answers) of the texts in `dialogues`; marks are not counted."""
    texts = [text for system, exchanges in dialogues for text in (system, *(q for q, _ in exchanges))]
    answers = ''.join(answer for _, exchanges in dialogues for _, answer in exchanges)
    asked, answer_bytes = ''.join(texts), len(answers.encode())
    return len(asked) + len(answers), len(asked.encode()) + answer_bytes, answer_bytes


def starts(tokens, mask, after):
    """Return where each dialogue begins, (n,) int64, in the arrays that `pack` made.

    after: the token that follows a dialogue. A dialogue ends with a target, and only then comes this token without
    being one: a user mark, which may also follow a target, begins with another.
    """
    ends = np.flatnonzero((mask[1:] == 0) & (mask[:-1] == 1) & (tokens[1:] == after)) + 1
    return np.concatenate([[0], ends + 1])[:-1 if len(ends) and ends[-1] == len(tokens) - 1 else None]


# The files of a data folder

def check_meta(meta):
    """Raise an error that data_folder.read_meta reports if what meta.json says about masks is incomplete."""
    if not all(type(meta['chat'][name]) is str and meta['chat'][name] for name in ('user', 'assistant', 'end')):
        raise ValueError(f'chat is {meta["chat"]!r}')
    for split, facts in meta['splits'].items():
        if type(facts['mask_sha256']) is not str or type(facts['answer_bytes']) is not int:
            raise ValueError(f'mask_sha256 or answer_bytes of {split} is wrong')


def mapped(path, dtype):
    """Return the numbers in a file, which stay on disk; read into memory where it cannot be mapped (ENODEV)."""
    try:
        return np.memmap(path, dtype=dtype, mode='r')
    except OSError:  # some FUSE and shared folders
        return np.fromfile(path, dtype=dtype)


def read_mask(path, expected, in_memory):
    """Return the mask in a file, (n_tokens,) uint8; mapped if it has `in_memory` bytes or more.

    expected: what meta.json says about the split. UserError if the file is missing or is not what prepare wrote.
    """
    if not path.exists():
        raise UserError(f'{path} not found, and meta.json says that it belongs to the data; run prepare.py again')
    size = path.stat().st_size
    if size != expected['n_tokens']:
        raise UserError(f'{path} has {size} bytes for {expected["n_tokens"]} tokens; run prepare.py again')
    if size >= in_memory:
        return mapped(path, np.uint8)
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != expected['mask_sha256']:
        raise UserError(f'{path} was changed since prepare wrote it: meta.json does not match its sha256; '
                        'run prepare.py again')
    return np.frombuffer(raw, np.uint8)


# For other programs

def chat_template(marks):
    """Return the Jinja template with which transformers writes messages as this program does.

    Blank lines inside a message are unchanged there; `clean` removes them here.
    """
    user, assistant, end = (json.dumps(marks[name]) for name in ('user', 'assistant', 'end'))
    return ("{%- for message in messages -%}{%- set text = message['content'] | trim -%}"
            "{%- if message['role'] == 'system' -%}{{- text + " + end + " -}}"
            "{%- elif message['role'] == 'user' -%}{{- " + user + " + text -}}"
            "{%- else -%}{{- " + assistant + " + text + " + end + " -}}{%- endif -%}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{- " + assistant + " -}}{%- endif -%}")
