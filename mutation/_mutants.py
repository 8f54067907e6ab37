"""Which mutants there are: those of Cosmic Ray, and a statement left out."""

import ast
import difflib
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from parso.python.tree import Keyword


class Mutant(NamedTuple):
    lines: range  # of the statement
    code: str  # the whole module
    old: str  # what differs, without indentation
    new: str


class LeaveOutStatement:
    """
    A statement becomes `pass`: a call, a `raise`, a `return`, or a name that is given a new value made of its old one.
    Other assignments are kept: without them a name is missing, which any test would notice.
    """

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if node.type == "simple_stmt":
            statement = node.children[0]
            if statement.type == "expr_stmt":
                target, *rest = statement.children
                again = rest[0].type == "operator" and rest[0].value == "="
                names = {leaf.value for part in rest for leaf in ast_nodes(part) if leaf.type == "name"}
                if again and target.get_code().strip() not in names:
                    return
            elif statement.type not in ("atom_expr", "raise_stmt", "return_stmt"):
                return
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        first = node.get_first_leaf()
        node.children[0] = Keyword("pass", first.start_pos, prefix=first.prefix)
        return node


def operators() -> Iterator[Any]:
    for name in cosmic_ray.plugins.operator_names():
        operator = cosmic_ray.plugins.get_operator(name)
        if not operator.arguments():
            yield operator()
    yield LeaveOutStatement()


def annotated(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations begin and end: they mean nothing when the code runs."""
    found = []
    for node in ast.walk(ast.parse(code)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def sample(module: Path, number: int, seed: int) -> list[Mutant]:
    """`number` places of a module, drawn without regard to how many mutants each of them has, and a mutant of each."""
    code = module.read_text(encoding="utf-8")
    annotations = annotated(code)
    nodes = list(ast_nodes(get_ast(code)))
    places = defaultdict(list)
    for operator in operators():
        positions = (position for node in nodes for position in operator.mutation_positions(node))
        for occurrence, (start, _) in enumerate(positions):
            if not any(begin <= start < end for begin, end in annotations):
                places[start].append((operator, occurrence))

    draw = random.Random(f"{seed} {module.as_posix()}")
    mutants: list[Mutant] = []
    for place in draw.sample(sorted(places), len(places)):
        if len(mutants) == number:
            break
        operator, occurrence = draw.choice(places[place])
        mutated = mutate_code(code, operator, occurrence)
        if runs(mutated) and mutated != code:
            mutants.append(Mutant(statement(code, place[0]), mutated, *difference(code, mutated)))
    return mutants


def statement(code: str, line: int) -> range:
    """The lines of the smallest statement around a line, for one with a body those before it."""
    around = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            last = node.body[0].lineno - 1 if getattr(node, "body", None) else node.end_lineno
            if first <= line <= max(first, last):
                around.append(range(first, max(first, last) + 1))
    return min(around, key=len)


def runs(code: str | None) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # "is" with a literal is a mutant like others
            return code is not None and compile(code, "mutant", "exec") is not None
    except SyntaxError:
        return False


def difference(code: str, mutated: str) -> tuple[str, str]:
    lines = [line for line in difflib.ndiff(code.splitlines(), mutated.splitlines()) if line[:2] in ("- ", "+ ")]
    old, new = (" ".join(line[2:].strip() for line in lines if line[0] == sign) for sign in "-+")
    return old, new
