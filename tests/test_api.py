"""What every public name of the library says of itself: types, parameters, errors. Read from the source; nothing is imported."""
import ast
import builtins
import re
from pathlib import Path

import pytest

LIBRARY = Path(__file__).resolve().parent.parent / "bloodnb"
MODULES = {path.stem: ast.parse(path.read_text()) for path in sorted(LIBRARY.glob("*.py")) if path.stem not in ("__init__", "_modidx")}
CLASSES = {node.name: node for tree in MODULES.values() for node in tree.body if isinstance(node, ast.ClassDef)}
DOCSTRINGS = [(node.name, ast.get_docstring(node) or "") for tree in MODULES.values() for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
KERAS_METHODS = re.compile(r"on_\w+|call|build|get_config|compute_output_shape|update_step")  # that Keras' base classes document
MANY = 3  # parameters from which on a function lists them


def public_names(tree: ast.Module) -> list[str]:
    return next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__"), [])


def public(tree: ast.Module, kind: type | tuple) -> list:
    return [node for node in tree.body if isinstance(node, kind) and node.name in public_names(tree)]


def methods(one: ast.ClassDef) -> list[ast.FunctionDef]:
    return [node for node in one.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def own_methods(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Public methods, but for those that do what a base class says of them."""
    return {f"{one.name}.{m.name}": m for one in public(tree, ast.ClassDef) for m in methods(one) if not documented_above(one.name, m.name)}


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    own = function.args
    return [a for a in (*own.posonlyargs, *own.args, own.vararg, *own.kwonlyargs, own.kwarg) if a is not None and a.arg not in ("self", "cls")]


def section(docstring: str, heading: str) -> str:
    found = re.search(rf"^{heading}\n-+\n(.*?)(?=^\w+\n---|\Z)", docstring, re.M | re.S)
    return found[1] if found else ""


def listed(docstring: str) -> dict[str, tuple[str, str]]:
    """Parameters of a numpydoc section: type and description by name; `a, b : int` lists two."""
    found = {}
    for names, kind, said in re.findall(r"^(\*{0,2}\w[\w, *]*?)(?: *: *(.+))?\n((?:(?: {4}.*)?\n)*)", section(docstring, "Parameters").rstrip() + "\n", re.M):
        found |= {name.strip(" *"): (kind, said) for name in names.split(",")}
    return found


def raised(function: ast.FunctionDef) -> set[str]:
    """Errors that a function raises itself and does not catch itself; what its inner functions do counts as its own."""
    found = set()

    def look(node: ast.AST, caught: bool) -> None:
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name) and not caught:
            found.add(node.exc.func.id)
        for child in ast.iter_child_nodes(node):
            whole = isinstance(node, ast.Try) and child in node.body and any(h.type is None or ast.unparse(h.type) in ("Exception", "BaseException") for h in node.handlers)
            look(child, caught or whole)

    look(function, False)
    return found


def announced(error: str, docstring: str) -> bool:
    """Whether a docstring names an error, or a kind of error that it is one of, such as OSError."""
    kinds = [kind.__name__ for kind in getattr(builtins, error, Exception).__mro__ if kind not in (Exception, BaseException, object)]
    return any(re.search(rf"\b{kind}\b", docstring) for kind in (error, *kinds))


def documented_above(class_name: str, method: str) -> bool:
    """Whether a base class in the library, or Keras, says what the method does."""
    for base in map(ast.unparse, CLASSES[class_name].bases):
        if base.startswith("keras.") and KERAS_METHODS.fullmatch(method):
            return True
        if (name := base.rpartition(".")[2]) in CLASSES:
            own = next((n for n in CLASSES[name].body if isinstance(n, ast.FunctionDef) and n.name == method), None)
            if (own and ast.get_docstring(own)) or documented_above(name, method):
                return True
    return False


def leads_to(said: str, parameter: str, passed: frozenset = frozenset()) -> bool:
    """Whether a description names a function or class of the library that describes a parameter of this name, or names another that does."""
    named = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", said)} - passed
    found = [listed(docstring)[parameter] for name, docstring in DOCSTRINGS if name in named and parameter in listed(docstring)]
    return any(kind or leads_to(further, parameter, passed | named) for kind, further in found)


each_module = pytest.mark.parametrize("module", MODULES)


@each_module
def test_public_functions_and_methods_say_their_types(module):
    tree = MODULES[module]
    lacking = {name: [a.arg for a in arguments(node) if a.annotation is None] + ["what it returns"] * (node.returns is None)
               for name, node in ({f.name: f for f in public(tree, ast.FunctionDef)} | own_methods(tree)).items()}
    lacking = {name: what for name, what in lacking.items() if what}
    assert not lacking, f"bloodnb.{module}: without a type: {lacking}. Annotate them."


@each_module
def test_public_names_have_docstrings(module):
    tree = MODULES[module]
    silent = [name for name, node in ({n.name: n for n in public(tree, (ast.FunctionDef, ast.ClassDef))} | own_methods(tree)).items() if not ast.get_docstring(node)]
    assert not silent, f"bloodnb.{module}: without a docstring, and no base class has one either: {silent}"


@each_module
def test_functions_of_many_parameters_list_them(module):
    wrong = {}
    for node in public(MODULES[module], ast.FunctionDef):
        names, told = [a.arg for a in arguments(node)], listed(ast.get_docstring(node) or "")
        open_ended = [a.arg for a in (node.args.vararg, node.args.kwarg) if a]
        if len(names) >= MANY or told:
            missing, unknown = [n for n in names if n not in told], [n for n in told if n not in names]
            vague = [n for n in names if n in told and not told[n][0] and not leads_to(told[n][1], n) and n not in open_ended]
            wrong |= {node.name: {"not listed": missing, "listed, but no parameter": unknown, "neither a type nor a function that describes it": vague}} if missing or unknown or vague else {}
    assert not wrong, f"bloodnb.{module}: the docstring's section Parameters: {wrong}"


@each_module
def test_arrays_have_shapes(module):
    shapeless = [f"{node.name}({a.arg})" for node in public(MODULES[module], ast.FunctionDef) for a in arguments(node)
                 if a.annotation and ast.unparse(a.annotation).removesuffix(" | None") == "np.ndarray" and (kind := listed(ast.get_docstring(node) or "").get(a.arg, ("",))[0])
                 and "shape" not in kind]
    assert not shapeless, f"bloodnb.{module}: arrays whose shape the docstring leaves open: {shapeless}. Write e.g. `images : ndarray of uint8, shape (n, height, width, 3)`."


@each_module
def test_errors_that_are_raised_are_announced(module):
    said = [(node.name, node, node) for node in public(MODULES[module], ast.FunctionDef)]
    for one in public(MODULES[module], ast.ClassDef):  # what making one raises, the class says
        said += [(one.name, m, one) for m in one.body if isinstance(m, ast.FunctionDef) and m.name in ("__init__", "__post_init__")]
        said += [(f"{one.name}.{m.name}", m, m) for m in methods(one)]
    silent = {name: sorted(errors) for name, body, node in said if (errors := {e for e in raised(body) if not announced(e, ast.get_docstring(node) or "")})}
    assert not silent, f"bloodnb.{module}: raised and not in the docstring: {silent}. Say when, under Raises."


def test_sections_are_read_as_numpydoc_writes_them():
    docstring = "Do.\n\nParameters\n----------\na, b : int\n    Two.\n*rest : str\nmodel, layer\n    See `grad_cam`.\n\nRaises\n------\nValueError\n    If so.\n"
    assert {name: kind for name, (kind, _) in listed(docstring).items()} == {"a": "int", "b": "int", "rest": "str", "model": "", "layer": ""}
    assert leads_to("See `grad_cam`.", "images") and not leads_to("See `grad_cam`.", "nothing")
    function = ast.parse("def f():\n    try:\n        raise KeyError(1)\n    except Exception:\n        raise ValueError(1)").body[0]
    assert raised(function) == {"ValueError"}
