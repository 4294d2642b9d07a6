"""The architecture as docs/architecture.md gives it, held by reading the source: layers, imports, sizes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ipadapter_jax"

# From the lowest layer to the highest: a file imports from its own folder and from lower layers.
LAYERS = [
    "errors",
    "inputs",
    "storage",
    "images",
    "diffusion",
    "ops",
    "runtime",
    "models",
    "weights",
    "pipelines",
    "data",
    "batch",
    "evaluate",
    "train",
    "testing",
    "cli",
    "__init__",  # the package's face: nothing inside imports from it
]
PROGRAMS = ("benchmarks", "configs", "examples", "experiments", "scripts")
MAX_FILE_LINES = 320
MAX_FUNCTION_LINES = 60  # of the body

# Peers of the tests, and readers of pickles: loading one of those runs code that the file brings along.
FORBIDDEN_MODULES = {"torch", "torchvision", "diffusers", "tensorflow"} | {"pickle", "_pickle", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "__import__"}


def name_of(path: Path) -> str:
    """ipadapter_jax/models/unet.py -> ipadapter_jax.models.unet; a package's __init__.py keeps its name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {name_of(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in FILES.items()}


def exists(module: str) -> bool:
    return module in FILES or f"{module}.__init__" in FILES


def imports(name: str) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever the statement stands."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(name.split(".")[: -node.level]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:  # `from a import b` names the module a.b, or something inside the module a
                full = f"{base}.{alias.name}"
                yield full if exists(full) or not base.startswith(PACKAGE) else base
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def dotted(node: ast.AST) -> str:
    """The source `a.b.c` as a string; empty for anything that is not such a chain of names."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def layer(module: str) -> str:
    """The folder or file right below the package that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def test_imports_point_downward() -> None:
    unknown = {layer(name) for name in FILES} - set(LAYERS)
    assert not unknown, f"give {unknown} a place in LAYERS and a line in docs/architecture.md"
    upward = [
        f"{name} imports {module}"
        for name in FILES
        for module in imports(name)
        if module.split(".")[0] == PACKAGE and LAYERS.index(layer(module)) > LAYERS.index(layer(name))
    ]
    assert not upward, "imports from a higher layer:\n" + "\n".join(upward)
    cycles = list(import_cycles())
    assert not cycles, "import cycles:\n" + "\n".join(" -> ".join(cycle) for cycle in cycles)


def import_cycles() -> Iterator[list[str]]:
    """Every module that can be reached from itself, with the shortest way back."""
    graph = {name: [module for module in imports(name) if module in FILES] for name in FILES}
    for start in FILES:
        ways = [[start]]
        seen = {start}
        while ways:
            way = ways.pop(0)
            if start in graph[way[-1]]:
                yield [*way, start]
                break
            ways += [[*way, name] for name in dict.fromkeys(graph[way[-1]]) if name not in seen]
            seen |= set(graph[way[-1]])


def test_third_parties() -> None:
    found = []
    for name in FILES:
        for module in imports(name):
            top = module.split(".")[0]
            if top in FORBIDDEN_MODULES:
                found.append(f"{name} imports {module}")
            plain = top in {"jax", "numpy", PACKAGE} or top in sys.stdlib_module_names
            if layer(name) == "diffusion" and not plain:
                found.append(f"{name} imports {module}: diffusion/ is mathematics on arrays")
            if layer(name) not in ("models", "ops") and module.startswith("flax.linen"):
                found.append(f"{name} imports {module}: networks live in models/")
    assert not found, "\n".join(found)


def test_nothing_runs_what_it_reads() -> None:
    found = []
    programs = [path for folder in PROGRAMS for path in sorted((ROOT / folder).rglob("*.py"))]
    for path in [*FILES.values(), *programs]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Name | ast.Attribute) and dotted(node) in FORBIDDEN_CALLS:
                found.append(f"{place} uses {dotted(node)}")
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                is_off = isinstance(node.value, ast.Constant) and not node.value.value
                found += [] if is_off else [f"{place} sets {node.arg}"]
    assert not found, "\n".join(found)


# Which kernels of cuDNN run on this GPU is tried once in a process, and remembered where the kernels are chosen.
REMEMBERED = {"ipadapter_jax.ops.attention_kernels": {"_AGREED", "REFUSED"}}
# Methods that change a list, dictionary, set or deque.
MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft"}
MUTATORS |= {"remove", "setdefault", "update"}


def module_level_names(tree: ast.Module) -> set[str]:
    """What the statements of a module, outside of its functions and classes, assign to or import from this package."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def changed_names(node: ast.AST) -> Iterator[str]:
    """The names whose value one statement or call changes in place: NAME.add(...), NAME[...] = ..., NAME.attribute =
    ..., del NAME[...]; and those that `global` declares, to be assigned again."""
    if isinstance(node, ast.Global):
        yield from node.names
    elif isinstance(node, ast.Call):
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr in MUTATORS
            and isinstance(node.func.value, ast.Name)
        ):
            yield node.func.value.id
    elif isinstance(node, ast.Assign | ast.Delete | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
        for target in targets:
            if isinstance(target, ast.Subscript | ast.Attribute) and isinstance(target.value, ast.Name):
                yield target.value.id


def test_no_module_level_mutable_state() -> None:
    """State of a process belongs to an object with an owner, to a cached pure function or to a ContextVar."""
    found = []
    for name, tree in TREES.items():
        shared = module_level_names(tree) - REMEMBERED.get(name, set())
        for node in ast.walk(tree):
            if changed := sorted(shared.intersection(changed_names(node))):
                found.append(f"{name}:{getattr(node, 'lineno', '')} changes {', '.join(changed)}")
    assert not found, "module-level state:\n" + "\n".join(found)


def test_sizes() -> None:
    found = []
    for name, path in FILES.items():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{name} has {lines} lines: one concept per file")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                # Without signature and docstring: a public function with many arguments has to describe them.
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{name}: {node.name} has {length} lines")
    assert not found, "\n".join(found)


IMPORT_ALL = """
import importlib, socket, sys
def no_network(*_): raise OSError("an import tried to reach the network")
socket.socket.connect = socket.getaddrinfo = no_network
class NotInstalled:  # None in sys.modules would not do: tensorflow_datasets takes it for a loaded tensorflow
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "diffusers", "tensorflow"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NotInstalled())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_module_imports_without_the_peers() -> None:
    names = [name.removesuffix(".__init__") for name in FILES if not name.endswith("__main__")]
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def text_files() -> Iterator[tuple[Path, str]]:
    """All files that belong to the repository and hold text."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    for path in (ROOT / name for name in listing.split("\0") if name):
        try:
            if path.is_file() and "\0" not in (text := path.read_text(encoding="utf-8")):
                yield path, text
        except UnicodeDecodeError:
            pass


def test_no_path_of_one_machine() -> None:
    workplace = re.compile(r"(?<![\w.~}-])/(?:work|root)/|/tmp/(?:venv|skeleton)|\.\./shared\b")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if workplace.search(line)
    ]
    assert not found, "paths that exist on one machine only:\n" + "\n".join(found)
