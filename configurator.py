"""Settings for scripts: literals at the top of the script, config files, then --key=value flags.

A script states its settings as plain assignments with a comment each:

    batch_size = 12  # sequences in a micro-batch

and calls `configure(globals(), argv)` first thing in main(). The type of the default is the schema.
Flags beat config files wherever they stand on the line, and a later config file beats an earlier one.
A config file is Python and is executed, so read a stranger's config before you run it.
"""
import difflib
import inspect
import os
import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent
BOOLS = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


class UserError(SystemExit):
    """A user's mistake: uncaught, it ends the program with exit status 1 and this one line on stderr, no traceback.

    The message names the setting or file, says what was found, and what to do.
    """

    def __init__(self, message):
        super().__init__(f'error: {message}')
        self.message = message


def reason(error):
    """Return an exception in one line of at most 200 characters: its type and its message, or a UserError's message."""
    text = ' '.join(getattr(error, 'message', str(error)).split())
    text = text if len(text) <= 200 else f'{text[:200].rsplit(" ", 1)[0]} ...'
    return text if isinstance(error, UserError) else f'{type(error).__name__}: {text}'


class Settings(dict):
    """Name -> value, with the `origins` of the values (a flag, 'FILE:LINE', or 'default') and the `errors` met.

    whole: False where a config file or a word was not understood, so that the values are not what the user meant.
    """

    def __init__(self, values):
        super().__init__(values)
        self.origins = dict.fromkeys(values, 'default')
        self.errors, self.whole = [], True

    def given(self, name):
        """True where a flag or a config file set `name`."""
        return self.origins[name] != 'default'

    def by_flag(self, name):
        """True where the command line itself set `name`."""
        return self.origins[name].startswith('--')


class _ConfigScope(dict):
    """The local scope a config file runs in: it notes the line of each assignment, and flags stay as they are.

    `module` is the file's real namespace (its globals), so that functions and comprehensions see the same names.
    """

    def __init__(self, module, fixed):
        super().__init__()
        self.module, self.fixed, self.lines = module, fixed, {}

    def __setitem__(self, name, value):
        self.lines[name] = sys._getframe(1).f_lineno, value
        if name not in self.fixed:
            self.module[name] = value

    def __getitem__(self, name):
        return self.module[name]

    def __delitem__(self, name):
        del self.module[name]


def find_path(path):
    """Return `path` as found from the working directory, else from the repository, else as it is."""
    path = Path(path).expanduser()
    return REPO / path if not path.exists() and (REPO / path).exists() else path


def _nearest(name, known, otherwise='; --help lists them all'):
    near = difflib.get_close_matches(name, known, n=1)
    return f'; did you mean {near[0]}?' if near else otherwise


def _coerce(text, default):
    """Read a flag's text as the type of `default`; a ValueError says which type was expected."""
    kind = type(default)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError('True or False')
        return BOOLS[text.lower()]
    try:
        return kind(text.replace('_', ''))
    except ValueError:
        raise ValueError('a whole number' if kind is int else 'a number') from None


def _parse(argv, settings, words):
    """Split the command line into {name: value} and a list of words, noting what cannot be read."""
    flags, loose, rest = {}, [], list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith('--'):
            if '=' in word and word.lstrip('-').partition('=')[0].replace('-', '_') in settings:
                settings.whole = False
                settings.errors.append(f'{word}: a setting begins with two hyphens: --{word.lstrip("-")}')
            else:
                loose.append(word)
            continue
        name, equals, text = word[2:].partition('=')
        name = name.replace('-', '_')
        if name not in settings:
            settings.errors.append(f'unknown setting --{name}{_nearest(name, settings)}')
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
    return flags, loose


def _run_config(path, settings, fixed):
    """Execute a config file over the values so far and take over what it assigns."""
    found = find_path(path)
    if not found.is_file():
        settings.whole = False
        if found.is_dir() and 'out_dir' in settings:
            settings.errors.append(f"{path} is a folder, not a config file; a run's is named by --out_dir={path}")
            return
        configs = {p.stem: p.relative_to(REPO).as_posix() for p in (REPO / 'config').glob('*.py')}
        near = difflib.get_close_matches(Path(path).stem, configs, n=1, cutoff=0.75)
        settings.errors.append(f'config file {path} not found' + ''.join(f'; did you mean {configs[n]}?' for n in near))
        return
    scope = _ConfigScope(dict(settings, __file__=str(found), __name__=found.stem), fixed)
    try:
        exec(compile(found.read_text(encoding='utf-8'), str(found), 'exec'), scope.module, scope)
    except Exception as error:
        settings.whole = False
        frames = inspect.getinnerframes(error.__traceback__)
        line = getattr(error, 'lineno', None) or next((f.lineno for f in frames[::-1] if f.filename == str(found)), '?')
        settings.errors.append(f'{path}:{line}: {type(error).__name__}: {getattr(error, "msg", error)}')
        return
    for name, (line, value) in scope.lines.items():
        if name.startswith('_') or callable(value) or inspect.ismodule(value) or name in fixed:
            continue
        if name not in settings:
            settings.errors.append(f'{path}:{line}: unknown setting {name}{_nearest(name, settings)}')
            continue
        kind = type(settings[name])
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            settings.errors.append(f'{path}:{line}: {name} = {value!r}: expected {kind.__name__}')
            continue
        settings[name], settings.origins[name] = value, f'{path}:{line}'


def resolve(defaults, argv, early=None, words=''):
    """Return the Settings that `argv` makes of `defaults`; problems are collected in `.errors`, not raised.

    defaults: {name: int, float, bool or str}. early: {name: function giving its automatic value}, resolved before
    config files run so that they may ask for it. words: the setting that takes the words which are not flags, one
    a line, and whose flag may be repeated; without it such a word is a config file.
    """
    settings = Settings(defaults)
    flags, loose = _parse(argv, settings, words)
    if words and loose:
        flags[words] = '\n'.join([flags[words], *loose] if words in flags else loose)
    settings.update(flags)
    settings.origins.update({name: f'--{name}' for name in flags})
    for name, automatic in (early or {}).items():
        if name not in flags:
            settings[name] = automatic()
    for path in [] if words else loose:
        _run_config(path, settings, flags)
    return settings


def describe(source, names):
    """Return the --help text of a script: its docstring, and each setting with type, default and comment.

    source: the script's text. names: its settings. A comment line of its own in the defaults block is a heading.
    """
    doc = re.match(r'\s*"""(.*?)"""', source, re.S)
    lines, gap = [doc.group(1).strip(), '', 'Settings (--name=value):'] if doc else [], False
    for line in source.splitlines():
        match = re.match(r'(\w+)(?:: \w+)? = (.+?)(?:  # (.*))?$', line)
        if match and match.group(1) in names:
            name, default, meaning = match.groups()
            lines.append(f'  {"--" + name:<30} {type(names[name]).__name__:<5} {default:<22} {meaning or ""}'.rstrip())
        elif line.startswith('# ') and gap and not line.startswith('# ---'):
            lines.append(f'\n  {line[2:]}')
        gap = match is not None or line.startswith('#') or not line.strip()
    return '\n'.join(lines)


def stop(problems):
    """End the program over a user's mistakes, a line each on stderr, with exit status 2."""
    print('\n'.join(f'error: {problem}' for problem in problems), file=sys.stderr, flush=True)
    raise SystemExit(2)


def _interrupted(kind, error, trace):
    """Tell of Ctrl-C in a word instead of a traceback; Python then ends with the status that shells expect, 130."""
    if issubclass(kind, KeyboardInterrupt):
        print('interrupted', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def configure(namespace, argv=None, early=None, check=None, words=''):
    """Override the literals in `namespace` (a script's globals()) from `argv` and return the Settings.

    early, words: see `resolve`. check: a function from Settings to a list of further problems, so that all of a
    user's mistakes are told at once. Mistakes end the program with exit status 2, --help with 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {name: value for name, value in namespace.items()
                if not name.startswith('_') and type(value) in (int, float, bool, str)}
    if '--help' in argv or '-h' in argv:
        print(describe(Path(namespace['__file__']).read_text(encoding='utf-8'), defaults))
        raise SystemExit(0)
    for stream in (sys.stdout, sys.stderr):
        asked, _, handler = os.environ.get('PYTHONIOENCODING', '').partition(':')
        if hasattr(stream, 'reconfigure'):  # LC_ALL=C would choke on Chinese text
            stream.reconfigure(encoding=None if asked else 'utf-8', errors=handler or 'replace')
    sys.excepthook = _interrupted
    settings = resolve(defaults, argv, early, words)
    problems = settings.errors + (check(settings) if check and settings.whole else [])
    if problems:
        stop(problems)
    namespace.update(settings)
    return settings
