"""The house rules that a program can check: sizes, and that only `Run` decides who is awaited."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = sorted(ROOT.glob("*.py"))
# Attributes by which Run decides who is awaited and when a round closes, and what changes a set,
# dict or list in place.
DECIDING = {"passed", "since", "closed", "pushes", "folding", "folded", "closed_at", "took"}
LINES = 1400  # that a product file may have at most
# The first two hold four and seven rooms each (see their docstrings), with the theory of each room in
# the file: as many lines as it takes to say them plainly, until a room can be made simpler. The third
# is what both sides share, which projects that copy the callback need as well: the wire, who may
# speak (tokens, TLS), files and checkpoints, logs.
LONGER = {"server.py": 4956, "diloco_callback.py": 4053, "protocol.py": 2545}
CHANGING = {"add", "discard", "remove", "clear", "update", "pop", "setdefault", "append", "extend"}


def length(node):
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    return node.end_lineno - first + 1


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_class_or_function_is_too_long(path):
    assert len(path.read_text().splitlines()) <= LONGER.get(path.name, LINES)
    for kind, most in ((ast.ClassDef, 350), (ast.FunctionDef, 50)):
        found = [(node.name, node.lineno, length(node)) for node in nodes(path, kind)]
        assert [each for each in found if each[2] > most] == []


def decisions(tree):
    """(line, attribute) wherever code outside of Run changes what Run decides by: assigns to the
    attribute or an element of it, or calls a method that changes it in place. An object may set
    its own attributes (`self.closed`): what belongs to Run is reached through another object."""
    run = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == "Run"]
    inside = {id(node) for cls in run for node in ast.walk(cls)}
    found = []
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        targets = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in CHANGING else []
        found += [found_in for target in targets if (found_in := deciding(target))]
    return found


def deciding(target):
    """(line, attribute) if a target of a change is an attribute that Run decides by, of an object
    other than self."""
    if isinstance(target, ast.Tuple):
        return next((found for each in target.elts if (found := deciding(each))), None)
    while isinstance(target, ast.Subscript):
        target = target.value
    if isinstance(target, ast.Attribute) and target.attr in DECIDING:
        is_own = isinstance(target.value, ast.Name) and target.value.id == "self"
        return None if is_own else (target.lineno, target.attr)
    return None


def test_only_run_decides_who_is_awaited():
    assert decisions(ast.parse((ROOT / "server.py").read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "member.passed = 3",
        "self.run.slices[0].pushes = {}",
        "run.members['ada'].closed.add(0)",
        "del slice.pushes['ada', 1]",
        "slice.folded['ada'] = None",
        "member.since[0] += 1",
        "member.index, member.passed = 0, 1",
    ],
)
def test_a_decision_outside_of_run_is_seen(line):
    assert len(decisions(ast.parse(line))) == 1


@pytest.mark.parametrize(
    "name",
    ["Rules", "Push", "Round", "Slice", "Member", "Run", "Anew", "Paces", "Sync", "Point",
     "History"],
)  # fmt: skip
def test_the_rules_know_no_socket_thread_file_clock_or_tensor(name):
    [cls] = [n for n in nodes(ROOT / "server.py", ast.ClassDef) if n.name == name]
    names = {node.id for node in ast.walk(cls) if isinstance(node, ast.Name)}
    assert not names & {"torch", "time", "threading", "socket", "open", "pathlib", "os", "protocol"}
