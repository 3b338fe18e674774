"""The laws of the layout of kfserver.py, read from its source."""

from __future__ import annotations

import ast
import collections
import importlib.util
import re
import statistics
import sys
import sysconfig
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple, Union

import pytest
from conftest import TESTS

import kfserver

SOURCE = (TESTS.parent / "kfserver.py").read_text("utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

Function = Union[ast.FunctionDef, ast.AsyncFunctionDef]
FUNCTION_KINDS = (ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS: List[Function] = [node for node in ast.walk(TREE) if isinstance(node, FUNCTION_KINDS)]
CLASSES: List[ast.ClassDef] = [node for node in ast.walk(TREE) if isinstance(node, ast.ClassDef)]

# Modules that the pure sections may not use, whatever name they or their parts were imported under.
IMPURE = {"http", "socket", "os", "sys", "time", "queue"}
# Packages that may be used where they happen to be installed, imported only where they are asked for.
OPTIONAL = {"redis", "cryptography"}


class Section(NamedTuple):
    """A banner: its number, its title, and the line it stands on."""

    number: int
    title: str
    line: int


def find_sections() -> List[Section]:
    """The banners, in order."""
    found = [(re.fullmatch(r"# ---- (\d+) (.+?) -+", text), line) for line, text in enumerate(LINES, 1)]
    return [Section(int(banner.group(1)), banner.group(2), line) for banner, line in found if banner]


SECTIONS = find_sections()
PURE = next(section.number for section in SECTIONS if section.title == "Endpoint")


def section_at(line: int) -> int:
    """The number of the section that a line belongs to; 0 above the first banner."""
    return max((section.number for section in SECTIONS if section.line < line), default=0)


def last_line(node: ast.AST) -> int:
    """The line on which a node ends; Python 3.7 knows only where its parts begin."""
    lines = [(getattr(each, "end_lineno", None), getattr(each, "lineno", 0)) for each in ast.walk(node)]
    return max(int(end or start) for end, start in lines)


def length(node: Union[Function, ast.ClassDef]) -> int:
    """Lines from ``def`` or ``class`` to the last, docstring and all."""
    return last_line(node) - node.lineno + 1


def parameters(function: Function) -> List[ast.arg]:
    """All of a function's parameters, ``self`` too."""
    every = function.args
    starred = [each for each in (every.vararg, every.kwarg) if each]
    return [*getattr(every, "posonlyargs", []), *every.args, *every.kwonlyargs, *starred]


def place(node: ast.AST) -> str:
    """Where a node stands, for the message of a test that fails."""
    return f"line {getattr(node, 'lineno', '?')}: {getattr(node, 'name', getattr(node, 'id', type(node).__name__))}"


def stored(target: ast.AST) -> Iterator[str]:
    """The names that an assignment, an import or a definition binds."""
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (*FUNCTION_KINDS, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def loaded(statement: ast.stmt) -> Iterator[ast.Name]:
    """The names that a statement of the module refers to and does not bind anywhere inside itself."""
    own = set(stored(statement))
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in own:
            yield node


def top_level_names() -> Dict[str, int]:
    """The section in which each name of the module is bound first."""
    names: Dict[str, int] = {}
    for statement in TREE.body:
        bound = [statement.name] if isinstance(statement, (ast.FunctionDef, ast.ClassDef)) else list(stored(statement))
        for name in bound:
            names.setdefault(name, section_at(statement.lineno))
    return names


# ---- Sections


def test_contents_list_is_the_banners_in_order() -> None:
    contents = re.findall(r"^ +(\d+) (\S.*)$", ast.get_docstring(TREE, clean=False) or "", re.MULTILINE)
    assert contents == [(str(section.number), section.title) for section in SECTIONS]


def test_sections_are_numbered_from_one() -> None:
    assert [section.number for section in SECTIONS] == list(range(1, len(SECTIONS) + 1))


def test_docstring_names_the_pure_sections() -> None:
    assert f"Sections 1 to {PURE} are pure" in (ast.get_docstring(TREE) or "")


def test_banners_are_all_as_wide_as_the_first() -> None:
    assert {len(LINES[section.line - 1]) for section in SECTIONS} == {len(LINES[SECTIONS[0].line - 1])}


def test_sections_open_with_their_law() -> None:
    assert [section.title for section in SECTIONS if not LINES[section.line].startswith("# Law: ")] == []


def test_names_refer_only_to_sections_above() -> None:
    names = top_level_names()
    downward = [f"{place(name)} is of section {names[name.id]}"
                for statement in TREE.body for name in loaded(statement)
                if names.get(name.id, 0) > section_at(name.lineno)]
    assert downward == []


def test_each_name_of_the_module_is_bound_once() -> None:
    # A constant that another section binds again changes what the first one does. A fallback binds its name twice.
    bound = collections.Counter(name for statement in TREE.body for name in (
        [statement.name] if isinstance(statement, (*FUNCTION_KINDS, ast.ClassDef)) else set(stored(statement))))
    assert [name for name, times in bound.items() if times > 1] == []


# ---- Purity and imports


def imported_from(statement: ast.stmt) -> Iterator[Tuple[str, str]]:
    """What an import binds: the name, and the top-level package that it comes from."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, (node.module or "").split(".")[0]


IMPORTS = [pair for statement in TREE.body for pair in imported_from(statement)]


def test_pure_sections_use_no_module_that_touches_the_world() -> None:
    impure = {name for name, package in IMPORTS if package in IMPURE}
    used = [place(name) for statement in TREE.body if section_at(statement.lineno) <= PURE
            for name in loaded(statement) if name.id in impure]
    assert used == []


def is_standard(package: str) -> bool:
    """Whether a package came with Python: its file lies among the standard library's, or it has none."""
    spec = importlib.util.find_spec(package)
    if package in sys.builtin_module_names or (spec and spec.origin in ("built-in", "frozen")):
        return True
    library = sysconfig.get_paths()["stdlib"]
    return bool(spec and (spec.origin or "").startswith(library) and "site-packages" not in (spec.origin or ""))


# Not everywhere: kfserver imports it where there is one.
NOT_ON_EVERY_SYSTEM = {"resource"}


@pytest.mark.parametrize("package", sorted({package for _, package in IMPORTS} - OPTIONAL - NOT_ON_EVERY_SYSTEM))
def test_imports_are_of_the_standard_library(package: str) -> None:
    assert package == "__future__" or is_standard(package)


def test_optional_packages_are_imported_only_inside_functions() -> None:
    at_import = [package for statement in TREE.body if not isinstance(statement, (ast.FunctionDef, ast.ClassDef))
                 for _, package in imported_from(statement) if package in OPTIONAL]
    assert at_import == []


def test_imports_stand_above_the_first_section() -> None:
    late = [place(node) for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))
            and section_at(node.lineno) > 0]
    assert late == []


# ---- State


def is_mutable(value: ast.AST) -> bool:
    """Whether an expression makes a dict, a list or a set, or something like one."""
    makers = {"dict", "list", "set", "bytearray", "deque", "OrderedDict", "defaultdict", "Counter"}
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Name) and value.func.id in makers
    return isinstance(value, (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp))


def test_module_holds_no_mutable_state() -> None:
    # What is shared by all servers in a process must not change: tables are tuples, frozensets or mapping proxies.
    mutable = [f"line {node.lineno}: {', '.join(stored(node))}" for node in TREE.body
               if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and is_mutable(node.value)
               and list(stored(node)) != ["__all__"]]
    assert mutable == []


def test_module_keeps_no_cache_for_all() -> None:
    # A cache around a function of the module is state that all servers in the process share.
    assert [place(function) for function in FUNCTIONS
            if any("cache" in ast.dump(decorator) for decorator in function.decorator_list)] == []


def test_module_has_no_global_statement() -> None:
    assert [place(node) for node in ast.walk(TREE) if isinstance(node, ast.Global)] == []


def test_all_lists_what_is_there_in_order() -> None:
    assert list(kfserver.__all__) == sorted(name for name in kfserver.__all__ if hasattr(kfserver, name))


# ---- Docstrings, errors, size


def public_definitions() -> Iterator[Union[Function, ast.ClassDef]]:
    """Every public class, function and method."""
    for outer in TREE.body:
        if isinstance(outer, (*FUNCTION_KINDS, ast.ClassDef)) and not outer.name.startswith("_"):
            yield outer
            if isinstance(outer, ast.ClassDef):
                yield from (inner for inner in outer.body
                            if isinstance(inner, FUNCTION_KINDS) and not inner.name.startswith("_"))


def test_public_definitions_have_a_docstring() -> None:
    assert [place(node) for node in public_definitions() if not ast.get_docstring(node)] == []


def is_raised_again(handler: ast.ExceptHandler) -> bool:
    """Whether a handler only tidies up: what it caught goes on."""
    return isinstance(handler.body[-1], ast.Raise) and handler.body[-1].exc is None


def caught(handler: ast.ExceptHandler) -> Set[str]:
    """The names of what an ``except`` catches; of a bare one, that of everything."""
    if handler.type is None:
        return {"BaseException"}
    return {node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)}


def test_any_error_at_all_is_caught_in_one_place_at_most() -> None:
    broad = [place(node) for node in ast.walk(TREE)
             if isinstance(node, ast.ExceptHandler) and caught(node) & {"Exception", "BaseException"}
             and not is_raised_again(node)]
    assert len(broad) <= 1, broad


def test_functions_take_at_most_five_parameters() -> None:
    assert [place(function) for function in FUNCTIONS if len(parameters(function)) > 5] == []


def test_functions_are_short() -> None:
    lengths = [length(function) for function in FUNCTIONS]
    assert statistics.median(lengths) <= 8
    assert sum(each <= 25 for each in lengths) >= 0.9 * len(lengths)


def test_classes_are_short() -> None:
    assert [place(each) for each in CLASSES if length(each) > 240] == []
