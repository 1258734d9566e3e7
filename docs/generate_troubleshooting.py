"""Generates the tables of troubleshooting.md from the errors in the source: python docs/generate_troubleshooting.py

Messages are read from syntax trees. By convention a message is `problem; remedy`. Variables with known text and
constants are replaced by their values; other names become placeholders.
"""

from __future__ import annotations

import ast
import operator
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from docs.generate_options import fill  # noqa: E402
from skyreels_v3.request import BY_NAME  # noqa: E402

PACKAGE = ROOT / "skyreels_v3"
PAGE = ROOT / "docs" / "troubleshooting.md"
# subject -> the modules with its errors; a folder stands for those of its modules that are not named elsewhere
SUBJECTS = {
    "Command line and files of flags": ("cli", "main", "config_text", "api"),
    "Flags": ("checks", "request"),
    "Pictures, clips and sound": ("media", "inputs", "wan/talking_avatar"),
    "Speech, faces and extra packages": ("media/voice", "media/faces", "media/diarization", "packages"),
    "Inputs from the web": ("media/download",),
    "Checkpoints": ("checkpoints", "resolve", "convert", "wan", "hunyuan", "denoising"),
    "LoRAs": ("checkpoints/lora",),
    "The prompt enhancer": ("enhancer",),
    "The machine": ("runtime", "attention", "memory"),
    "Several processes": ("parallel",),
    "Files and outputs": ("media/files", "media/video_writer", "outputs", "generate"),
    "Going on": ("resume",),
    "Jobs and stories": ("batch", "story", "concat"),
    "The server and MCP": ("web",),
}


class Form(NamedTuple):
    """How to read a call that creates an error: the index of the message argument, and the text shown around it.

    `{}` in `before` stands for the argument at `FLAG_AT`, or else the first.
    """

    message: int
    before: str = ""
    after: str = ""


FORMS = {
    "UserError": Form(1, "{}: "),
    "refuse": Form(2, "--{}: "),
    "CheckpointError": Form(0, "--model_id: "),
    "lora_error": Form(0, "--lora: "),
    "MediaError": Form(1, "<flag>: <path> "),
    "Refused": Form(0, "<flag>: <url>: "),
    "EnhancerError": Form(0, "--enhance_prompt: ", "; none: a warning, the prompt stays as it was"),
    "ApiError": Form(1, "{}: "),
    "QueueFull": Form(0, "429: "),
    **dict.fromkeys(("OutOfMemory", "FloatingPointError", "RuntimeError"), Form(0)),
}
FLAG_AT = {"refuse": 1}
REMEDY = re.compile(r"; |: (?=(?:choose|give|say|send|drop) )")
TEXT_METHODS = ("strip", "lstrip", "rstrip", "splitlines", "lower", "partition", "removeprefix", "removesuffix")
UNKNOWN = "<...>"
HANDED_ON = "as the message says"
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv},
    **{ast.FloorDiv: operator.floordiv, ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.Pow: pow},
}
MAX_VARIANTS, MAX_DEPTH = 12, 12  # variants of a message, and how deep expressions are followed
Function = ast.FunctionDef | ast.AsyncFunctionDef
Constants = Mapping[str, ast.expr]


class Undecided(Exception):
    """A text depends on a choice that has not been made yet; with 0 choices there is no such text."""

    def __init__(self, question: str, choices: int) -> None:
        self.question, self.choices = question, choices


class Entry(NamedTuple):
    """An error as the user sees it, and what to do."""

    problem: str
    remedy: str


def tables() -> str:
    """Markdown: a table for each subject."""
    trees = {
        path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    constants = {module: dict(constants_of(tree)) for module, tree in trees.items()}
    found: dict[str, list[Entry]] = {subject: [] for subject in SUBJECTS}
    for module, tree in trees.items():
        known = dict(imported(tree, constants)) | constants[module]
        for function in ast.walk(tree):
            if isinstance(function, Function):
                for entry in Errors(function, known).entries():
                    found[subject_of(module)].append(entry)
    lines = []
    for subject, entries in found.items():
        lines += [f"## {subject}", "", "| error | what to do |", "|---|---|"]
        for remedy, alike in groupby(dict.fromkeys(entries), lambda entry: entry.remedy):
            lines.append(f"| {'<br>'.join(entry.problem for entry in alike)} | {remedy} |")
        lines += [""]
    return "\n".join(lines[:-1]) + "\n"


def subject_of(module: str) -> str:
    """The subject of a module's errors: by its own name, or else by its folder's."""
    for name in (module, module.partition("/")[0]):
        for subject, modules in SUBJECTS.items():
            if name in modules:
                return subject
    raise LookupError(f"SUBJECTS in docs/generate_troubleshooting.py has no place for the errors of {module}.py")


def constants_of(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """A module's constants."""
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Name) and target.id.isupper():
                    yield target.id, node.value


def imported(tree: ast.Module, constants: Mapping[str, Constants]) -> Iterator[tuple[str, ast.expr]]:
    """The constants of other modules that a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            there = constants.get((node.module or "").removeprefix("skyreels_v3.").replace(".", "/"), {})
            for alias in node.names:
                if alias.name in there:
                    yield alias.asname or alias.name, there[alias.name]


class Errors:
    """The errors that a function creates."""

    def __init__(self, function: Function, constants: Constants) -> None:
        self.function, self.constants = function, constants
        self.parents: dict[ast.AST, ast.AST] = {}
        self.nodes = [*self.walk(function)]
        self.definitions: dict[str, list[tuple[ast.stmt, ast.expr]]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                for name, value in (pair for target in node.targets for pair in bind(target, node.value)):
                    self.definitions.setdefault(name, []).append((node, value))
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                before = ast.copy_location(ast.Name(node.target.id), node)
                self.parents[before] = node
                both = ast.copy_location(ast.BinOp(before, ast.Add(), node.value), node)
                self.definitions.setdefault(node.target.id, []).append((node, both))
        self.row: dict[str, ast.expr] = {}  # the variables of a loop over a table, in the current row
        self.decided: dict[str, int] = {}

    def walk(self, node: ast.AST) -> Iterator[ast.AST]:
        """All nodes of the function, from top to bottom, except those of nested functions."""
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, Function):
                self.parents[child] = node
                yield child
                yield from self.walk(child)

    def entries(self) -> Iterator[Entry]:
        for node in self.nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORMS:
                for row in self.rows_around(node):
                    self.row = row
                    yield from self.variants(node, node.func.id)

    def rows_around(self, call: ast.Call) -> Iterator[dict[str, ast.expr]]:
        """The loop variables around `call` for each row of a table in the source; one empty dict without a loop."""
        rows: list[dict[str, ast.expr]] = [{}]
        for node in self.nodes:
            if isinstance(node, ast.For) and call in ast.walk(node):
                bound = [dict(bind(node.target, row)) for row in self.rows_of(node.iter)]
                rows = [outer | inner for outer in rows for inner in bound] if bound else rows
        yield from rows

    def rows_of(self, table: ast.expr) -> list[ast.expr]:
        """The rows of a literal tuple of tuples or dictionary; empty for anything else."""
        match table:
            case ast.Call(func=ast.Attribute(value=inner, attr="items")):
                return self.rows_of(inner)
            case ast.Name(id=name) if name in self.constants:
                return self.rows_of(self.constants[name])
            case ast.Tuple(elts=rows) if all(isinstance(row, ast.Tuple) for row in rows):
                return rows
            case ast.Dict(keys=keys, values=values):
                return [ast.Tuple([key, value]) for key, value in zip(keys, values, strict=True) if key is not None]
        return []

    def variants(self, call: ast.Call, name: str) -> Iterator[Entry]:
        """All messages an error may have; none if it only passes on another error's message."""
        form, several = FORMS[name], [{}]
        if len(call.args) <= form.message:
            return
        while several:
            self.decided = several.pop(0)
            try:
                flag = self.text(call.args[FLAG_AT.get(name, 0)]) if "{}" in form.before else ""
                message = self.text(call.args[form.message])
            except Undecided as open:
                several += [self.decided | {open.question: choice} for choice in range(open.choices)][:MAX_VARIANTS]
                continue
            if not re.search(r"[a-z]{3}", re.sub(r"<.*?>", "", message)) or ("{}" in form.before and not flag):
                continue
            if name == "refuse" and not (flag in BY_NAME and BY_NAME[flag].kind is bool):
                message = f"<value>: {message}"
            problem, *remedy = REMEDY.split(form.before.format(flag) + message + form.after, maxsplit=1)
            advice = re.sub(r"^<[^>]*>$", HANDED_ON, "".join(remedy))
            advice = advice or (HANDED_ON if problem.endswith("<error>") else "")
            if advice or name != "RuntimeError":  # RuntimeErrors without a remedy are for programmers
                yield Entry(markdown(problem), markdown(advice))

    def choose(self, question: str, choices: Sequence[Any]) -> Any:
        """The choice made for a question, the same throughout a message; raises Undecided if there is none yet."""
        if len(choices) > 1 and question not in self.decided:
            raise Undecided(question, len(choices))
        return choices[self.decided[question] if len(choices) > 1 else 0]

    def text(self, node: ast.expr, depth: int = 0) -> str:
        """The text of an expression, under the choices made so far."""
        if depth > MAX_DEPTH:
            return UNKNOWN
        if (number := self.number(node)) is not None:
            return f"{number:,}" if isinstance(number, int) else f"{number:g}"
        match node:
            case ast.Constant(value=None):
                raise Undecided("", 0)
            case ast.Constant(value=value):
                return str(value)
            case ast.JoinedStr(values=parts):
                return "".join(self.text(part, depth + 1) for part in parts)
            case ast.FormattedValue(value=value):
                return self.text(value, depth + 1)
            case ast.BinOp(left=left, op=ast.Add(), right=right) if self.number(right) is None:
                return self.text(left, depth + 1) + self.text(right, depth + 1)
            case ast.IfExp(test=test, body=body, orelse=other):
                return self.text(self.choose(ast.dump(test), (body, other)), depth + 1)
            case ast.Name(id=name) if name in self.row:
                return self.text(self.row[name], depth + 1)
            case ast.Name(id=name) if defined := self.reaching(node):
                value = self.choose(f"{name} {defined[0].lineno}", defined)
                made = UNKNOWN if isinstance(value, ast.Subscript) else self.text(value, depth + 1)
                return placeholder(name) if made == UNKNOWN else made
            case ast.Name(id=name) if isinstance(self.constants.get(name), ast.Constant | ast.JoinedStr | ast.Name):
                return self.text(self.constants[name], depth + 1)
            case ast.Attribute(value=ast.Name(id=name), attr=field) if name in self.constants:
                given = getattr(self.constants[name], "keywords", [])
                return next((self.text(each.value) for each in given if each.arg == field), placeholder(field))
            case ast.Name(id=name):
                return placeholder(name)
            case ast.Attribute(value=value, attr="name" | "__name__"):
                return self.text(value, depth + 1)
            case ast.Attribute(attr=name):
                return placeholder(name)
            case ast.Call(func=ast.Name(id="len")):
                return "<number>"
            case ast.Call(func=ast.Name(id="counted"), args=[count, one, *several]):
                words = self.text(several[0], depth + 1) if several else f"{self.text(one, depth + 1)}s"
                return f"{self.text(count, depth + 1)} {words}"
            case ast.Call(func=ast.Name(id="suggest_flag" | "suggest_value")):
                return "<suggestion>"
            case ast.Call(func=ast.Name(), args=[argument, *_]):
                return self.text(argument, depth + 1)
            case ast.Call(func=ast.Attribute(attr="join" | "get" | "fspath"), args=[argument, *_]):
                key = isinstance(argument, ast.Constant)
                return placeholder(argument.value) if key else self.text(argument, depth + 1)
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                return self.text(value, depth + 1) if name in TEXT_METHODS else UNKNOWN
            case ast.Subscript(slice=ast.Constant(value=str(key))):
                return placeholder(key)
            case ast.Subscript(value=value):
                return self.text(value, depth + 1)
            case ast.GeneratorExp(elt=element):
                return self.text(element, depth + 1)
        return UNKNOWN

    def reaching(self, use: ast.Name) -> list[ast.expr]:
        """The values that a variable may have where it is used."""
        around, found = {*self.blocks(use)}, {}
        for statement, value in reversed(self.definitions.get(use.id, ())):
            block = next(self.blocks(statement))
            if statement.lineno < use.lineno and block not in found:  # else a later one in the block overrides it
                found[block] = value
            if block in found and block in around:  # overrides all earlier ones
                break
        return [*reversed(found.values())]

    def blocks(self, node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
        """The blocks (lists of statements) around a node, innermost first."""
        while node in self.parents:
            parent = self.parents[node]
            for field, value in ast.iter_fields(parent):
                if isinstance(value, list) and node in value:
                    yield parent, field
            node = parent

    def number(self, node: ast.expr) -> Any:
        """The value of an arithmetic expression of numbers and constants; None for anything else."""
        match node:
            case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
                return value
            case ast.Name(id=name) if name in self.constants and name not in self.definitions:
                return self.number(self.constants[name])
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                sides = self.number(left), self.number(right)
                return None if None in sides else OPERATORS[type(op)](*sides)
        return None


def bind(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """The names that an assignment binds, with their values."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif isinstance(target, ast.Tuple):
        for place, part in enumerate(target.elts):
            match value:
                case ast.Tuple(elts=parts):
                    yield from bind(part, parts[place])
                case ast.IfExp(test=test, body=ast.Tuple(elts=ones), orelse=ast.Tuple(elts=others)):
                    yield from bind(part, ast.copy_location(ast.IfExp(test, ones[place], others[place]), value))


def placeholder(name: str) -> str:
    return f"<{name.strip('_').replace('_', ' ').lower()}>"


def markdown(text: str) -> str:
    """A message as Markdown: placeholders in italics, flags as code."""
    text = re.sub(r"[\\*\[\]|`]", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"<([a-z0-9. -]+)>", r"*\1*", text).replace("**", "* *")
    return re.sub(r"(?<![\w*-])--[a-z]\w*", r"`\g<0>`", text)


if __name__ == "__main__":
    fill(PAGE, __file__, tables())
