"""Mutation testing: change one line of the program and see whether a test fails.

    python -m benchmarks.mutants                                  all mutants of all modules
    python -m benchmarks.mutants --per_module=20                  a sample, the same one for the same --seed
    python -m benchmarks.mutants --modules=model.py,kernels.py

A mutant that no test notices is printed with its line. docs/testing.md says how to read the result. Those that change
nothing that a test should notice are listed with the reason in equivalent_mutants.json; they are left out.

Each mutant is a fork of a process that has imported torch, in a copy of the repository, and runs the tests that execute
the changed line until one fails.

Why not mutmut or cosmic-ray: mutmut 3.8 calls a mutant only if its function's __module__ is the name of the file's
module. It is __main__ in the scripts that our tests run with runpy, so nothing would change in train.py. It leaves out
code outside functions and functions with decorators. cosmic-ray 8.7 starts the test command as a new process for each
mutant, and importing torch and transformers takes longer than most tests.
"""
import ast
import contextlib
import copy
import importlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.mutant_tests import Judge, Recorder
from configurator import REPO, UserError, configure

per_module = 0  # mutants per module, drawn at random; 0 = all
modules = ''  # comma-separated paths such as model.py,lib/generate.py; '' = all
workers = 2  # processes at the same time
seed = 0  # of the sample
budget = 60.0  # CPU seconds of tests per mutant; one that they do not notice survives
out = 'mutants.json'  # file for the results
again = ''  # such a file: test only its survivors

EQUIVALENT = REPO / 'benchmarks/equivalent_mutants.json'  # {module: {changed line: why no test should notice}}
TESTS = {  # the test files that should notice, first that of the module itself
    'lib/tasks.py': ('tasks', 'evaluate', 'hostile'),
    'lib/training/optim.py': ('optim', 'guard', 'hostile', 'train', 'distributed'),
    'configurator.py': ('configurator', 'preflight', 'read_text', 'console'),
    'lib/weights/checkpoint.py': ('checkpoint', 'saver', 'load_model', 'preflight', 'hostile', 'guard', 'export',
                                  'train'),
    'lib/text/tokenizer.py': ('tokenizer', 'data_folder', 'hostile', 'arithmetic', 'dialogue', 'chat'),
    'lib/generate.py': ('generate', 'sampling_rules', 'sample', 'evaluate', 'int8'),
    'lib/text/dataset.py': ('dataset', 'masks', 'data_folder', 'fuzz', 'guard', 'evaluate', 'train'),
    'train.py': ('train', 'guard', 'curves', 'log', 'signals', 'evaluate', 'preflight', 'masks', 'distributed', 'lora',
                 'saver', 'checkpoint', 'compiler', 'trackers', 'hostile'),
    'model.py': ('model', 'generate', 'decode', 'load_model', 'gpt2', 'optim'),
    'kernels.py': ('kernels', 'model', 'generate', 'decode', 'optim'),
}
SWAPPED = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
           ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub,
           ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
           ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
           ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And}


@dataclass
class Mutant:
    """One change of one line."""
    kind: str
    line: int
    before: str  # the original line
    after: str  # the line that replaces it

    @property
    def key(self):
        """The line by which equivalent_mutants.json knows it."""
        return f'without {self.before.strip()}' if self.after.strip() == 'pass' else self.after.strip()


def variants(node):
    """Yield (kind, changed copy) for each way to change one node of a syntax tree."""
    def changed(**attributes):
        new = copy.copy(node)
        for name, value in attributes.items():
            setattr(new, name, value)
        return new
    match node:
        case ast.Compare() if len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
            yield 'comparison', changed(ops=[SWAPPED[type(node.ops[0])]()])
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops[:i], SWAPPED[type(op)](), *node.ops[i + 1:]]
                yield 'comparison', changed(ops=ops)
        case ast.BinOp() if type(node.op) in SWAPPED and not isinstance(node.left, (ast.JoinedStr, ast.List)):
            yield 'arithmetic', changed(op=SWAPPED[type(node.op)]())
        case ast.AugAssign():
            yield 'arithmetic', changed(op=SWAPPED[type(node.op)]())
            yield 'removed statement', ast.Pass()
        case ast.BoolOp():
            yield 'boolean', changed(op=SWAPPED[type(node.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield 'boolean', node.operand
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield 'sign', node.operand
        case ast.Constant(value=bool()):
            yield 'constant', changed(value=not node.value)
        case ast.Constant(value=int()):
            yield 'constant', changed(value=node.value + 1)
        case ast.Constant(value=float()):
            yield 'constant', changed(value=2 * node.value or 1.0)
        case ast.IfExp():
            yield 'branches', changed(body=node.orelse, orelse=node.body)
        case ast.Call(func=ast.Name(id='isinstance' | 'getattr' | 'hasattr' | 'setattr' | 'min' | 'max')):
            return
        case ast.Call(func=ast.Attribute(attr='transpose' | 'minimum')):  # the same with swapped arguments
            return
        case ast.Call() if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield 'swapped arguments', changed(args=[node.args[1], node.args[0], *node.args[2:]])
        case ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            yield 'removed statement', ast.Pass()
        case ast.Return(value=ast.expr()) if not isinstance(node.value, ast.Constant):
            yield 'return value', changed(value=ast.Constant(None))


def mutants_of(path):
    """Return the Mutants of a source file that are Python and not the same program, in the order of their lines."""
    source = path.read_text(encoding='utf-8')
    original = ast.dump(ast.parse(source))
    return [mutant for mutant in candidates(path) if differs(original, mutated(source, mutant))]


def candidates(path):
    """Return the Mutants of a source file, in the order of its lines; a few are no Python.

    Left alone: strings and what is inside an f-string, annotations, decorators, raised messages, statements of several
    lines, and in train.py everything outside functions, which are settings.
    """
    source = path.read_text(encoding='utf-8')
    lines, found = source.splitlines(), []

    def visit(node):
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.arg, ast.AnnAssign)):
            return
        for name, value in ast.iter_fields(node):
            if name in ('decorator_list', 'annotation', 'returns', 'ctx'):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)
        if getattr(node, 'lineno', 0) != getattr(node, 'end_lineno', None):
            return
        row = lines[node.lineno - 1].encode()
        for kind, new in variants(node):
            text = ast.unparse(ast.fix_missing_locations(new))
            text = f'({text})' if isinstance(new, ast.expr) else text
            after = (row[:node.col_offset] + text.encode() + row[node.end_col_offset:]).decode()
            found.append(Mutant(kind, node.lineno, lines[node.lineno - 1], after))
    tree = ast.parse(source)
    only_functions = path.name == 'train.py'
    for node in tree.body:
        if not only_functions or isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            visit(node)
    return sorted(found, key=lambda m: m.line)


def statements(source):
    """Return {line: lines of the statement it is in} for the lines inside functions.

    For the head of a function, with its default values, these are the lines of its body.
    """
    spans = {}

    def visit(node, inside):
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.stmt) and (inside or function):
            body = getattr(node, 'body', None)
            head = range(node.lineno, body[0].lineno if body else node.end_lineno + 1)
            lines = range(body[0].lineno, node.end_lineno + 1) if function else head
            spans.update({n: set(lines) for n in head or (node.lineno,)})
        for child in ast.iter_child_nodes(node):
            visit(child, inside or function)
    visit(ast.parse(source), False)
    return spans


def mutated(source, mutant):
    """Return the source with the mutant's line in place."""
    lines = source.splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.after + '\n'
    return ''.join(lines)


def differs(original, source):
    """Return whether `source` is Python and another program than the one of the dump `original`."""
    try:
        return ast.dump(ast.parse(source)) != original
    except SyntaxError:
        return False


def ours(module):
    """Return whether a module, by its name, is part of this repository."""
    top = module.split('.')[0]
    return any((folder / top).is_dir() or (folder / f'{top}.py').exists() for folder in (REPO, REPO / 'tests'))


def fork(tree, name, plugin):
    """Fork a process that gives a pytest plugin the tests of the module `name` in a copy of the repository.

    Return its id; its exit status is pytest's, its output is in the file tree.log.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        log = os.open(tree.parent / f'{tree.name}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        os.environ['PYTHONPATH'] = str(tree)
        sys.path[:] = [str(tree)] + [p for p in sys.path if p not in ('', str(REPO))]
        for module in [m for m in sys.modules if ours(m) and not m.startswith('benchmarks')]:
            del sys.modules[module]
        import pytest
        files = [f'tests/test_{room}.py' for room in TESTS[name]]
        status = pytest.main(['-x', '-q', '-s', '-p', 'no:cacheprovider', f'--basetemp={tree}.tmp', *files],
                             plugins=[plugin])
    finally:
        os._exit(int(status))


def record(tree, name):
    """Run the tests of a module once; return {id: [seconds, lines of the module that it executes]}.

    Also imports what the tests have imported, apart from this repository, so that no mutant waits for it.
    """
    log, out = tree.parent / 'lines', tree.parent / 'tests.json'
    log.write_bytes(b'')
    hook = f'from benchmarks.lines import trace\ntrace({str(tree / name)!r}, {str(log)!r})\n'
    (tree / 'sitecustomize.py').write_text(hook, encoding='utf-8')
    pid = fork(tree, name, Recorder(tree / name, log, out))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    (tree / 'sitecustomize.py').unlink()
    if status:
        text = (tree.parent / f'{tree.name}.log').read_text(encoding='utf-8', errors='replace')
        raise UserError(f'the tests of {name} fail without any change\n{text[-3000:]}')
    recorded = json.loads(out.read_text(encoding='utf-8'))
    for module in recorded['modules']:
        with contextlib.suppress(Exception):
            if not ours(module):
                importlib.import_module(module)
    return recorded['tests']


def tests_of(name, lines, recorded):
    """Return {id: seconds} of the tests that execute one of the lines of a module.

    First those in its own test file, the first in TESTS, then the others, the fastest first. lines: None for a
    statement of the module itself, which runs at its import, before every test. All tests together take at most
    `budget` seconds.
    """
    own = f'tests/test_{TESTS[name][0]}.py'
    chosen = sorted((not id.startswith(own), seconds, id) for id, (seconds, ran) in recorded.items()
                    if lines is None or not lines.isdisjoint(ran))
    sums = itertools.accumulate(seconds for _, seconds, _ in chosen)
    return {id: seconds for (_, seconds, id), total in zip(chosen, sums) if total <= budget}


def judge(jobs, trees, name):
    """Return {number: verdict} of the jobs of Judge, shared among processes, one per tree."""
    outs = [tree.parent / f'{tree.name}.verdicts' for tree in trees]
    for out in outs:
        out.write_text('', encoding='utf-8')
    pids = [fork(tree, name, Judge(tree / name, jobs[i::len(trees)], outs[i])) for i, tree in enumerate(trees)]
    for pid in pids:
        os.waitpid(pid, 0)
    lines = [line.split(' ', 1) for out in outs for line in out.read_text(encoding='utf-8').splitlines()]
    return {int(number): verdict for number, verdict in lines}


def copy_tree(target):
    """Copy what the tests need of the repository."""
    ignored = shutil.ignore_patterns('.git', '__pycache__', 'out*', '*.bin', '.ruff_cache', '.pytest_cache', 'mutants*')
    shutil.copytree(REPO, target, ignore=ignored)
    for path in (REPO / 'benchmarks').glob('mutant*.py'):
        shutil.copy(path, target / 'benchmarks')
    return target


def main():
    configure(globals())
    earlier = json.loads(Path(again).read_text(encoding='utf-8')) if again else {}
    chosen = [name for name in modules.split(',') if name] or list(earlier or TESTS)
    if unknown := [name for name in chosen if name not in TESTS]:
        raise UserError(f'modules={unknown[0]}: expected some of {", ".join(TESTS)}')
    os.environ.update(OMP_NUM_THREADS='1', OMP_WAIT_POLICY='PASSIVE', PYTEST_DISABLE_PLUGIN_AUTOLOAD='1')
    import pytest  # noqa: F401  imported here, so that each fork has them
    import torch
    import transformers  # noqa: F401
    torch.set_num_threads(1)  # no thread may run when a process forks
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = [copy_tree(Path(folder).resolve() / f'tree{i}') for i in range(workers)]
        for name in chosen:
            results[name] = run_module(name, trees, earlier.get(name))
            Path(out).write_text(json.dumps(results, indent=1), encoding='utf-8')  # what is done so far
    print_table(results)


def run_module(name, trees, earlier):
    """Test the mutants of one module; return the row of the table and the survivors.

    earlier: None, or such a result, of which the survivors are tested again.
    """
    began, source = time.monotonic(), (REPO / name).read_text(encoding='utf-8')
    reasons = json.loads(EQUIVALENT.read_text(encoding='utf-8')).get(name, {})
    found = [m for m in mutants_of(REPO / name) if m.key not in reasons]
    if earlier:
        known = {(m['kind'], m['before'], m['after']) for m in earlier['survivors']}
        found = [m for m in found if (m.kind, m.before, m.after) in known]
    elif 0 < per_module < len(found):
        found = sorted(random.Random(f'{seed} {name}').sample(found, per_module), key=lambda m: m.line)
    os.environ.pop('PYTHONDONTWRITEBYTECODE', None)  # of the tests and of all unchanged modules, once
    sys.dont_write_bytecode = False
    recorded = record(trees[0], name)
    for tree in trees[1:]:
        shutil.copytree(trees[0], tree, dirs_exist_ok=True)
    os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
    sys.dont_write_bytecode = True
    spans = statements(source)
    tests = [tests_of(name, spans.get(m.line), recorded) for m in found]
    verdicts = judge([(i, mutated(source, m), tests[i]) for i, m in enumerate(found) if tests[i]], trees, name)
    missing = [i for i in range(len(found)) if tests[i] and i not in verdicts]
    if missing:
        raise UserError(f'{name}: no verdict on {len(missing)} mutants, the first at line {found[missing[0]].line}')
    unapplied = [m for i, m in enumerate(found) if verdicts.get(i) == 'unapplied']
    survivors = [m for i, m in enumerate(found) if verdicts.get(i, 'passed') == 'passed']
    for m in survivors:
        print(f'{name}:{m.line}: {m.kind}: {m.after.strip()}', flush=True)
    n = len(found) - len(unapplied)
    return {'mutants': n, 'caught': n - len(survivors), 'equivalent': len(reasons),
            'late': [asdict(m) for i, m in enumerate(found) if verdicts.get(i) == 'late'],
            'unapplied': [asdict(m) for m in unapplied], 'minutes': (time.monotonic() - began) / 60,
            'survivors': [{**asdict(m), 'tests': len(tests[found.index(m)])} for m in survivors]}


def print_table(results):
    """Print per module: mutants, how many were caught, further ones that are known to be equivalent, and minutes."""
    print(f'{"module":<28}{"mutants":>8}{"caught":>8}{"":>7}{"equivalent":>12}{"minutes":>9}')
    rows = [(name, r['mutants'], r['caught'], r['equivalent'], r['minutes']) for name, r in results.items()]
    for name, n, caught, equivalent, minutes in [*rows, ('all', *map(sum, list(zip(*rows))[1:]))]:
        print(f'{name:<28}{n:>8}{caught:>8}{caught / max(1, n):>7.1%}{equivalent:>12}{minutes:>9.1f}')


if __name__ == '__main__':
    main()
