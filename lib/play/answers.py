"""From a request to its answer: the type and size of every value are checked here."""
import contextlib

from lib.play import views
from lib.play.curves import curves
from lib.play.models import passage
from lib.play.worker import Busy

MOST_CHARACTERS = 50_000  # of a text or a prompt
MOST_NEW = 2000  # tokens of a written text
MOST_AFTER = 20_000  # tokens that a text to be continued may have
MOST_TURNS = 200


class BadRequest(Exception):
    def __init__(self, message, status=400):
        super().__init__(message)
        self.message, self.status = message, status


def text_of(body, name):
    value = body.get(name, '')
    if not isinstance(value, str):
        raise BadRequest(f'{name} must be a text')
    if len(value) > MOST_CHARACTERS:
        raise BadRequest(f'{name} has {len(value):,} characters; at most {MOST_CHARACTERS:,} are read')
    return value


def number_of(body, name, kind, low, high, default=None):
    """Return a number of the request as `kind`, int or float; it must be between `low` and `high`."""
    value = body.get(name, default)
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fine or (kind is int and value != int(value)):
        raise BadRequest(f'{name} must be {"a whole" if kind is int else "a"} number from {low} to {high}')
    return kind(value)


def rules_of(body):
    """Return the sampling rules, within the limits of sample.py."""
    return {'temperature': number_of(body, 'temperature', float, 0, 100, 0.8),
            'top_k': number_of(body, 'top_k', int, 0, 2**31, 0),
            'top_p': number_of(body, 'top_p', float, 1e-9, 1, 1.0),
            'repetition_penalty': number_of(body, 'repetition_penalty', float, 1e-3, 100, 1.0)}


def after_of(body):
    value = body.get('after', [])
    if not isinstance(value, list) or len(value) > MOST_AFTER or any(type(i) is not int for i in value):
        raise BadRequest(f'after must be a list of at most {MOST_AFTER:,} token ids')
    return value


def turns_of(body):
    turns = body.get('turns')
    fine = (isinstance(turns, list) and 0 < len(turns) <= MOST_TURNS and all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn) for turn in turns))
    if not fine or len(turns) % 2 == 0 or any(turn[0] != ('user', 'assistant')[i % 2] for i, turn in enumerate(turns)):
        raise BadRequest(f'turns must be a list of at most {MOST_TURNS} [role, text], alternating user and assistant, '
                         'user first and last')
    if sum(len(text) for _, text in turns) > MOST_CHARACTERS:
        raise BadRequest(f'the conversation has over {MOST_CHARACTERS:,} characters; begin a new one')
    return turns


def answer(site, path, body):
    """Return (work, queued): a function that yields the lines of the answer, and whether the worker must compute it.

    path: of the request. body: its parsed JSON. BadRequest names the value that is wrong.
    """
    if not isinstance(body, dict):
        raise BadRequest('expected a JSON object')
    kind = path.removeprefix('/api/')
    if kind == 'models':
        for name in site.models.wanted():  # train.py has just written its first checkpoint
            with contextlib.suppress(Busy):
                site.worker.submit(lambda name=name: [site.models.get(name)])
        return lambda: [{'models': site.models.describe(), 'most_characters': MOST_CHARACTERS,
                         'most_new': MOST_NEW, 'most_look': views.MOST_LOOK}], False
    if kind == 'curves':
        cursors = body.get('cursors', {})
        if not isinstance(cursors, dict):
            raise BadRequest('cursors must be an object')
        return lambda: [{'runs': curves(site.models.logs(), cursors)}], False
    if kind not in COMPUTED:
        raise BadRequest('there is nothing here', 404)
    compute = COMPUTED[kind](body)
    return lambda: compute(site.models.get(body.get('model'))), True


def _likely(body):
    prompt, after, rules = text_of(body, 'prompt'), after_of(body), rules_of(body)
    return lambda opened: [views.likely(opened, prompt, after, rules)]


def _write(body):
    prompt, after, rules = text_of(body, 'prompt'), after_of(body), rules_of(body)
    n, seed = number_of(body, 'max_new_tokens', int, 0, MOST_NEW, 200), number_of(body, 'seed', int, 0, 2**53, 1337)
    return lambda opened: views.write(opened, prompt, after, n, seed, rules)


def _read(body):
    text, drop = text_of(body, 'text'), body.get('drop') is True
    return lambda opened: views.read(opened, text, drop)


def _look(body):
    text, drop = text_of(body, 'text'), body.get('drop') is True
    layer, head = (number_of(body, name, int, 0, 10_000, 0) for name in ('layer', 'head'))
    return lambda opened: [views.look(opened, text, layer, head, drop)]


def _passage(body):
    place, n = number_of(body, 'place', float, 0, 1, 0.0), number_of(body, 'tokens', int, 1, 2000, 200)
    return lambda opened: [{'text': passage(opened, place, n)}]


def _chat(body):
    turns, rules = turns_of(body), rules_of(body)
    n, seed = number_of(body, 'max_new_tokens', int, 0, MOST_NEW, 200), number_of(body, 'seed', int, 0, 2**53, 1337)
    return lambda opened: views.chat(opened, turns, n, seed, rules)


COMPUTED = {'next': _likely, 'write': _write, 'read': _read, 'look': _look, 'passage': _passage, 'chat': _chat}
