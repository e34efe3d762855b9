"""A conversation with a model that was trained on dialogues: its history, its answers as they come, and the terminal.

The prompt is encoded by lib/text/dialogue.py, as the training data was. The KV cache holds what the model has read so
far, so each new question costs its own tokens only.
"""
import signal
import sys

import numpy as np
import torch

from configurator import UserError
from lib.decode import Reader, make_cache
from lib.generate import StreamDecoder, forbid_repeated_ngrams, sample_next_token
from lib.text import dialogue
from lib.text.prompt import typed

HELP = '/reset forgets the conversation, /quit ends it; Ctrl-C stops an answer'


class Conversation:
    """What was said, and the model's cache of it.

    marks: the checkpoint's. system: a text that stays at the beginning. no_repeat_ngram: within one answer; 0 = off.
    rules: see lib.generate.sample_next_token.
    """

    def __init__(self, model, tok, marks, *, max_new_tokens=500, seed=1337, system='', no_repeat_ngram=0, **rules):
        self.model, self.tok, self.marks, self.rules = model, tok, marks, rules
        self.no_repeat_ngram = no_repeat_ngram
        self.max_new_tokens, self.seed, self.system = max_new_tokens, seed, dialogue.clean(system)
        self.device = model.lm_head.weight.device
        self.block_size = model.config.block_size
        self.dropped = 0  # exchanges that were forgotten because they did not fit, at the last question
        self.reset()

    def reset(self):
        """Forget everything that was said."""
        self.exchanges, self.n_answers = [], 0
        self.read, self.cache, self.reader = [], None, None  # read: the ids in the cache

    def prompt(self, question):
        """Return the ids to answer after; drops the oldest exchanges until they leave room for an answer.

        The room is a quarter of the context. UserError if even the question alone is too long.
        """
        room = min(self.max_new_tokens, max(1, self.block_size // 4))
        self.dropped = 0
        while True:
            ids = dialogue.prompt_ids(self.tok, self.system, self.exchanges, question, self.marks)
            if len(ids) + room <= self.block_size:
                return ids
            if not self.exchanges:
                raise UserError(f'the question has {len(ids)} tokens with its marks; the context of {self.block_size} '
                                f'leaves room for {self.block_size - room}: make it shorter')
            del self.exchanges[0]
            self.dropped += 1

    @torch.inference_mode()
    def answer(self, question):
        """Yield the answer to `question` piece by piece; the exchange becomes part of the history, even if stopped."""
        question, said = dialogue.clean(question), ''
        ids = self.prompt(question)
        try:
            for piece in self._generate(ids):
                said += piece
                yield piece
        finally:  # also when the caller stops early
            if text := dialogue.clean(said):
                self.exchanges.append((question, text))

    def _generate(self, ids):
        decoder, V = StreamDecoder(self.tok, self.marks['end']), self.tok.vocab_size
        random = np.random.default_rng([self.seed, self.n_answers]).random(self.max_new_tokens, np.float32)
        uniform = torch.from_numpy(random).to(self.device)
        self.n_answers += 1
        if self.cache is None or ids[:len(self.read)] != self.read:  # the beginning changed: read everything again
            dtype = torch.float32 if self.device.type == 'cpu' else self.model.dtype
            self.cache, self.read = make_cache(self.model, 1, dtype), []
            self.reader = Reader(self.model, self.cache)
        new, seen = ids[len(self.read):], None
        if self.rules.get('repetition_penalty', 1.0) != 1:
            seen = torch.zeros(1, V, dtype=torch.bool, device=self.device)
            seen[0, ids] = True
        for n in range(self.max_new_tokens):
            logits = self.reader(torch.tensor([new], device=self.device))
            self.read += new
            logits = logits[:, -1, :V].float()  # (1, V)
            if self.no_repeat_ngram:
                said = torch.tensor([self.read[len(ids):]], dtype=torch.long, device=self.device)
                logits = forbid_repeated_ngrams(logits, said, self.no_repeat_ngram)
            new = sample_next_token(logits, uniform[n:n + 1], seen, **self.rules).tolist()
            if new == [-1]:
                raise UserError(f'the model computes NaN or infinity in {self.model.dtype} on {self.device}; '
                                'try --dtype=float32 or --device=cpu')
            if seen is not None:
                seen[0, new] = True
            last = n == self.max_new_tokens - 1 or len(self.read) == self.block_size
            yield decoder.feed(new, last)
            if decoder.done:
                return


def print_answer(conversation, question, live):
    """Print the answer to `question` and a newline, piece by piece if `live`; Ctrl-C ends it early."""
    pieces = conversation.answer(question)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if live:
            for piece in pieces:
                print(piece, end='', flush=True)
            print(flush=True)
        else:
            print(''.join(pieces), flush=True)
    except KeyboardInterrupt:
        pieces.close()
        print(flush=True)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(conversation, live, fit=lambda text: text):
    """Read questions from the terminal, or from a pipe, and print the answers, until /quit or the end of the input.

    fit: a function that changes a question to the characters that the model knows.
    """
    asks = '> ' if sys.stdin.isatty() else ''
    if asks:
        print(HELP)
    while True:
        try:
            line = typed(input(asks)).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == '/quit':
            return
        if line == '/reset':
            conversation.reset()
        elif line.startswith('/'):
            print(HELP)
        elif line:
            try:
                print_answer(conversation, fit(line), live)
            except UserError as error:  # a character that the vocabulary lacks, or a question that is too long
                print(error.message, file=sys.stderr)
            if conversation.dropped:
                forgot = f'{conversation.dropped} exchanges' if conversation.dropped > 1 else 'exchange'
                print(f'(the context of {conversation.block_size} tokens was full: forgot the oldest {forgot})',
                      file=sys.stderr)


def open_conversation(model, tok, state, **settings):
    """Return a Conversation with the marks in checkpoint `state`; UserError if it was not trained on dialogues."""
    if not (marks := state.get('chat')):
        raise UserError('chat needs a model trained on questions and answers, and this one has no marks for them; '
                        'prepare dialogues and train or fine-tune on them (data/README.md, "Dialogues"), or sample '
                        'without --chat')
    return Conversation(model, tok, marks, **settings)
