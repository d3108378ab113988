"""Reads a Rust workspace: its modules and the paths that they name.

A module is called by its crate's directory and its place in it: runtime/daemon/src/pod/registry.rs is `daemon::pod::registry`.
Code that is compiled only for tests is left out: the body of an item under `#[cfg(test)]`, and the file of such a module.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

NOT_CODE = re.compile(
    r"""
    //[^\n]*                                  # a comment
  | /\*.*?\*/
  | \bb?r(\#*)".*?"\1                         # a raw string
  | \bb?"(?:\\.|[^"\\])*" | "(?:\\.|[^"\\])*" # a string
  | b?'(?:\\(?:x..|u\{[^}]*\}|.)|[^'\\\n])'   # a character, but no lifetime
    """,
    re.DOTALL | re.VERBOSE,
)
TEST_ONLY = re.compile(r"#\[cfg\(test\)\]")
ATTRIBUTE = re.compile(r"\s*#\[[^\]]*\]")
TEST_FILE = re.compile(r"\s*(?:pub(?:\([^)]*\))?\s+)?mod\s+(\w+)\s*;")
PATH_ATTRIBUTE = re.compile(r'#\[path\s*=\s*"([^"]+)"\]')
INLINE_MODULE = re.compile(r"\bmod\s+(\w+)\s*\{")
USE = re.compile(r"\buse\s+([^;]+);")
PATH = re.compile(r"(?<![\w:])\w+(?:\s*::\s*\w+)+")


@dataclass
class Module:
    """A file: its module's name, its code without comments, strings and tests, and its whole text without tests."""

    file: str
    name: str
    code: str
    text: str


@dataclass
class Workspace:
    """The crates' library names (`bulkhead_vmm`) with the names used here (`vmm`), and their modules."""

    crates: dict[str, str] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)


@dataclass(frozen=True)
class Arrow:
    """Module `source` names module `target` in this file, at this line."""

    file: str
    line: int
    source: str
    target: str


def blank(text: str) -> str:
    """Replaces everything but line breaks by blanks."""
    return re.sub(r"[^\n]", " ", text)


def closing(code: str, opening: int) -> int:
    """Returns the position of the brace that closes the one at `opening`."""
    depth = 0
    for at in range(opening, len(code)):
        depth += {"{": 1, "}": -1}.get(code[at], 0)
        if depth == 0:
            return at + 1
    return len(code)


def test_items(code: str) -> list[tuple[int, int]]:
    """Finds the parts of `code` that are compiled only for tests: an attribute and its item, up to `;` or the closing brace."""
    spans = []
    for found in TEST_ONLY.finditer(code):
        at = found.end()
        while more := ATTRIBUTE.match(code, at):
            at = more.end()
        end = re.compile(r"[;{]").search(code, at)
        if end is None:
            spans.append((found.start(), len(code)))
        else:
            spans.append((found.start(), end.end() if end[0] == ";" else closing(code, end.start())))
    return spans


def read(files: dict[str, str], crates: dict[str, tuple[str, str]]) -> Workspace:
    """Reads all modules. `files` has the text of each Rust file by its path; `crates` maps each directory to the library's name
    and to the name used here."""
    workspace = Workspace({library: name for library, name in crates.values()})
    tests: set[str] = set()
    for file, text in files.items():
        crate = next((directory for directory in crates if file.startswith(directory + "/src/")), None)
        if crate is None:
            continue
        code = NOT_CODE.sub(lambda found: blank(found[0]), text)
        spans = test_items(code)
        for start, end in spans:
            tests |= test_files(file, text[start:end])
            code = code[:start] + blank(code[start:end]) + code[end:]
            text = text[:start] + blank(text[start:end]) + text[end:]
        workspace.modules.append(Module(file, module_name(file, crate, crates[crate][1]), code, text))
    workspace.modules = [module for module in workspace.modules if not of_tests(module.file, tests)]
    return workspace


def module_name(file: str, crate: str, name: str) -> str:
    parts = list(Path(file).relative_to(Path(crate) / "src").with_suffix("").parts)
    if parts[-1] in ("mod", "lib", "main"):
        parts.pop()
    return "::".join([name, *parts])


def test_files(file: str, item: str) -> set[str]:
    """Returns the paths that `#[cfg(test)] mod x;` can refer to: a file and a directory. Empty for all other items."""
    declared = TEST_FILE.match(re.sub(r"#\[[^\]]*\]", "", item))
    if not declared:
        return set()
    here = Path(file).parent
    if path := PATH_ATTRIBUTE.search(item):
        return {str(here / path[1])}
    inside = here if Path(file).stem in ("mod", "lib", "main") else here / Path(file).stem
    return {f"{inside}/{declared[1]}.rs", f"{inside}/{declared[1]}/"}


def of_tests(file: str, tests: set[str]) -> bool:
    return file in tests or any(file.startswith(test) for test in tests if test.endswith("/"))


def inner_modules(module: Module) -> list[str]:
    """Returns the modules with a body at the top level of this file."""
    return [f"{module.name}::{found[1]}" for found in INLINE_MODULE.finditer(module.code)]


def arrows(workspace: Workspace) -> list[Arrow]:
    """Finds all paths that begin in a crate of the workspace, in `use` and elsewhere."""
    found = []
    for module in workspace.modules:
        inner = [(m.end() - 1, closing(module.code, m.end() - 1), m[1]) for m in INLINE_MODULE.finditer(module.code)]
        code = module.code
        paths = [(m.start(1), path) for m in USE.finditer(code) for path in used(m[1])]
        code = USE.sub(lambda m: blank(m[0]), code)
        paths += [(m.start(), re.sub(r"\s", "", m[0])) for m in PATH.finditer(code)]
        for at, path in paths:
            source = "::".join([module.name, *(name for start, end, name in inner if start < at < end)])
            if target := resolve(path, source, workspace):
                found.append(Arrow(module.file, module.code.count("\n", 0, at) + 1, source, target))
    return found


def used(tree: str) -> list[str]:
    """Returns the paths of a `use`: `a::{b, c::{d, e}}` gives a::b, a::c::d and a::c::e."""
    tree = re.sub(r"\s+as\s+\w+", "", tree)
    tree = re.sub(r"\s", "", tree)
    opening = tree.find("{")
    if opening < 0:
        return [tree.removesuffix("::*")]
    inside, depth, start, paths = tree[opening + 1 : closing(tree, opening) - 1], 0, 0, []
    for at, letter in enumerate(inside + ","):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            paths += [tree[:opening] + path for path in used(inside[start:at]) if path]
            start = at + 1
    return [path.removesuffix("::self") for path in paths]


def resolve(path: str, source: str, workspace: Workspace) -> str | None:
    """Resolves `path` as written in module `source`. None if it does not begin in a crate of the workspace."""
    first, *rest = path.removeprefix("::").split("::")
    here = source.split("::")
    if first in workspace.crates:
        return "::".join([workspace.crates[first], *rest])
    if first == "crate":
        return "::".join([here[0], *rest])
    if first == "self":
        return "::".join([*here, *rest])
    if first == "super":
        here.pop()
        while rest and rest[0] == "super":
            rest.pop(0)
            here.pop()
        return "::".join([*here, *rest])
    return None
