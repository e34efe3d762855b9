"""Settings of a script: the literals at its top, then config files, then --key=value flags.

A script states its settings as assignments with a comment (batch_size = 12  # sequences per micro-batch) and first
calls `configure(globals())` in main(). A value must have the type of its default. Flags override config files wherever
they are on the command line, and a later config file overrides an earlier one. A config file is Python and is
executed: read a stranger's config before you run it.
"""
import difflib
import inspect
import re
import sys
from pathlib import Path
from typing import NamedTuple

from lib.machine import console

REPO = Path(__file__).resolve().parent
BOOLS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


class UserError(SystemExit):
    """A user's mistake. Uncaught, it ends the program with exit status 1 and one line on stderr, without a traceback.

    The message names the setting or file, what was found, and what to do.
    """

    def __init__(self, message):
        if len(message) > 2000:  # a value of a file may be as long as the file
            message = f'{message[:1000]} ... {message[-500:]}'
        super().__init__(f'error: {message}')
        self.message = message


class Origin(NamedTuple):
    """Where the value of a setting comes from. kind: default, config, flag or checkpoint."""
    kind: str = 'default'
    place: str = ''  # '--name', 'FILE:LINE', or the path of a checkpoint


class Settings(dict):
    """{name: value}, with the `origins` of the values and the `errors` found while reading them."""

    def __init__(self, values):
        super().__init__(values)
        self.origins = dict.fromkeys(values, Origin())
        self.errors, self.understood = [], True  # False: the values are not what the user meant

    def put(self, name, value, kind, place):
        self[name], self.origins[name] = value, Origin(kind, str(place))

    def was_set(self, name):
        """Return whether a flag, a config file or a checkpoint set `name`."""
        return self.origins[name].kind != 'default'

    def set_by_flag(self, name):
        """Return whether a flag set `name`, now or in the run that is resumed."""
        return self.origins[name].kind == 'flag'

    def on_command_line(self, name):
        """Return whether `name` is a flag on this command line."""
        return self.origins[name] == ('flag', f'--{name}')

    def kinds(self):
        """Return {name: kind of origin}, for a checkpoint."""
        return {name: origin.kind for name, origin in self.origins.items()}


class _ConfigScope(dict):
    """The local scope of a config file: records the line of each assignment and leaves flags unchanged.

    `module`: the file's globals, so that comprehensions see the same names."""

    def __init__(self, module, flags):
        super().__init__()
        self.module, self.flags, self.lines = module, flags, {}

    def __setitem__(self, name, value):
        self.lines[name] = sys._getframe(1).f_lineno, value
        if name not in self.flags:
            self.module[name] = value

    def __getitem__(self, name):
        return self.module[name]


def find_path(path):
    """Return `path` relative to the working directory if it exists there, else to the repository, else unchanged.

    UserError for a name that no file can have.
    """
    try:
        path = Path(path).expanduser()
        return REPO / path if not path.exists() and (REPO / path).exists() else path
    except (OSError, RuntimeError) as error:  # too long, or ~ of a user that does not exist
        raise UserError(f'{str(path)[:80]}: {getattr(error, "strerror", None) or error}') from None


def _did_you_mean(name, known):
    similar = [other for other in known if other.startswith(name)] or difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {similar[0]}?' if similar else '; --help lists them all'


def _coerce(text, default):
    """Return a flag's text as the type of `default`; a ValueError names the type that was expected."""
    kind = type(default)
    if kind is str:
        return text
    try:
        return BOOLS[text.lower()] if kind is bool else kind(text.replace('_', ''))
    except (KeyError, ValueError):
        raise ValueError({bool: 'True or False', int: 'a whole number', float: 'a number'}[kind]) from None


def _parse(argv, settings, words):
    """Return ({name: value} of the flags, list of other words); what cannot be read goes to settings.errors."""
    flags, others, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith('--'):
            if '=' in word and word.lstrip('-').partition('=')[0].replace('-', '_') in settings:
                settings.understood = False
                settings.errors.append(f'{word}: a setting begins with two hyphens: --{word.lstrip("-")}')
            else:
                others.append(word)
            continue
        name, equals, text = word[2:].partition('=')
        name = name.replace('-', '_')
        if name not in settings:
            settings.errors.append(f'unknown setting --{name}{_did_you_mean(name, settings)}')
            if not equals and rest and not rest[0].startswith('--') and not rest[0].endswith('.py'):
                rest.pop(0)  # most likely its value
            continue
        if not equals and isinstance(settings[name], bool):
            text = rest.pop(0) if rest and rest[0].lower() in BOOLS else 'true'
        elif not equals:
            if not rest or rest[0].startswith('--'):
                settings.errors.append(f'--{name} needs a value: --{name}=...')
                continue
            text = rest.pop(0)
        try:
            value = _coerce(text, settings[name])
        except ValueError as expected:
            settings.errors.append(f'--{name}={text}: expected {expected}')
            continue
        flags[name] = f'{flags[name]}\n{value}' if name == words and name in flags else value
    return flags, others


def _run_config(path, settings, flags):
    """Execute a config file, which sees the values so far, and take over what it assigns."""
    found = find_path(path)
    if not found.exists() or found.is_dir():  # it may be a pipe
        settings.understood = False
        if found.is_dir() and 'out_dir' in settings:
            settings.errors.append(f'{path} is a folder, not a config file; to name a run, use --out_dir={path}')
            return
        configs = {p.stem: p.relative_to(REPO).as_posix() for p in (REPO / 'config').glob('*.py')}
        near = difflib.get_close_matches(Path(path).stem, configs, n=1, cutoff=0.75)
        settings.errors.append(f'config file {path} not found' + ''.join(f'; did you mean {configs[n]}?' for n in near))
        return
    scope = _ConfigScope(dict(settings, __file__=str(found), __name__=found.stem), flags)
    try:
        exec(compile(found.read_text(encoding='utf-8-sig'), str(found), 'exec'), scope.module, scope)
    except Exception as error:
        settings.understood = False
        frames = inspect.getinnerframes(error.__traceback__)
        places = [error, *frames[::-1]] if isinstance(error, SyntaxError) else frames[::-1]
        line = next((f.lineno for f in places if f.filename == str(found)), '?')
        settings.errors.append(f'{path}:{line}: {type(error).__name__}: {getattr(error, "msg", error)}')
        return
    for name, (line, value) in scope.lines.items():
        if name.startswith('_') or callable(value) or inspect.ismodule(value) or name in flags:
            continue
        if name not in settings:
            settings.errors.append(f'{path}:{line}: unknown setting {name}{_did_you_mean(name, settings)}')
            continue
        kind = type(settings[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            settings.errors.append(f'{path}:{line}: {name} = {value!r}: expected {kind.__name__}')
            continue
        settings.put(name, value, 'config', f'{path}:{line}')


def resolve(defaults, argv, early=None, words=''):
    """Return the Settings that `argv` makes of `defaults`; errors are collected in `.errors`, not raised.

    defaults: {name: int, float, bool or str}. early: {name: function returning its automatic value}, resolved before
    config files run so that they can ask for it. words: the setting that takes the words that are not flags, one per
    line, and whose flag may be repeated; without it such a word is a config file.
    """
    settings = Settings(defaults)
    flags, others = _parse(argv, settings, words)
    if words and others:
        flags[words] = '\n'.join([flags[words], *others] if words in flags else others)
    for name, value in flags.items():
        settings.put(name, value, 'flag', f'--{name}')
    for name, automatic in (early or {}).items():
        if name not in flags:
            settings[name] = automatic()
    for path in [] if words else others:
        _run_config(path, settings, flags)
    large = [name for name, value in settings.items() if type(value) is int and value.bit_length() > 64]
    settings.errors += [f'{name} is a number of more than 64 bits' for name in large]
    settings.understood &= not large  # the checks calculate with them, and would overflow
    return settings


def describe(source, values, doc=''):
    """Return the --help text of a script: its docstring, and each setting with type, default and comment.

    source: the script's text. values: {setting: default}. doc: a text to show instead of source's docstring. In the
    block of settings, which ends at the first function, a comment on a separate line is a heading.
    """
    own = re.match(r'\s*"""(.*?)"""', source, re.S)
    doc, gap = doc or (own.group(1) if own else ''), False
    lines = [doc.strip(), '', 'Settings (--name=value):'] if doc else []
    for line in source.splitlines():
        if line.startswith(('def ', 'class ')):
            break
        match = re.match(r'(\w+)(?:: \w+)? = (.+?)(?:  # (.*))?$', line)
        if match and match.group(1) in values:
            name, _, meaning = match.groups()
            kind, default = type(values[name]).__name__, repr(values[name])
            lines.append(f'  {"--" + name:<30} {kind:<5} {default:<22} {meaning or ""}'.rstrip())
        elif line.startswith('# ') and gap and not line.startswith('# ---'):
            lines.append(f'\n  {line[2:]}')
        gap = match is not None or line.startswith('#') or not line.strip()
    return '\n'.join(lines)


def exit_with(errors):  # one line per mistake, exit status 2
    print('\n'.join(f'error: {error}' for error in errors), file=sys.stderr, flush=True)
    raise SystemExit(2)


def literals(namespace):
    """Return the settings among a script's globals: {name: int, float, bool or str}, without _names and CONSTANTS."""
    return {name: value for name, value in namespace.items()
            if name.islower() and not name.startswith('_') and type(value) in (int, float, bool, str)}


def configure(namespace, argv=None, early=None, check=None, words=''):
    """Override the literals in `namespace` (a script's globals()) from `argv` and return the Settings.

    early, words: see `resolve`. check: a function from Settings to a list of further errors, so that all mistakes
    are reported at once. They end the program with exit status 2, --help with 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    console.protect()
    defaults = literals(namespace)
    if '--help' in argv or '-h' in argv:
        print(describe(Path(namespace['__file__']).read_text(encoding='utf-8'), defaults, namespace.get('__doc__')))
        raise SystemExit(0)
    sys.excepthook = console.print_exception
    settings = resolve(defaults, argv, early, words)
    if errors := settings.errors + (check(settings) if check and settings.understood else []):
        exit_with(errors)
    namespace.update(settings)
    return settings
