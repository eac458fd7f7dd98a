"""The rooms of the package: who may import whom, in one table that the documents show as well."""

import ast
import functools
import graphlib
import re
import sys
import tomllib

import conftest
import pytest
from programs import ROOT, run_code

PACKAGE = ROOT / "jaxpoison"

# Each room with the rooms that it imports: all that it may import, and nothing that it does not.
ALLOWED = {
    "core": (),
    "curvature": ("core",),
    "data": ("core",),
    "models": ("core",),
    "runs": ("core",),
    "solvers": ("core",),
    "influence": ("core", "curvature", "solvers"),
    "attribution": ("core", "influence", "solvers"),
    "network": ("core", "data"),
    "filters": ("core", "data", "network"),
    "training": ("core", "data", "network", "solvers"),
    "attacks": ("core", "data", "models", "network", "solvers", "training"),
    "defenses": (
        *("core", "curvature", "data", "filters", "influence", "network", "solvers", "training"),
    ),
    "evaluation": ("attacks", "core", "data", "network", "training"),
    "audit": (
        *("core", "curvature", "data", "defenses", "evaluation", "filters", "influence"),
        *("models", "network", "runs", "solvers", "training"),
    ),
    "cli": ("audit", "data", "runs"),
    "__main__": ("cli",),
}
# The engine must run where nothing but JAX is installed.
NEEDS_JAX_ONLY = ("attribution", "core", "curvature", "influence", "solvers")
NOT_FOR_THE_ENGINE = (
    *("flax", "optax", "orbax", "tensorflow_datasets", "array_record", "PIL"),
    *("matplotlib", "rich", "tyro", "pandas", "sklearn", "cleanlab"),
)
EXTRAS = ("tensorflow_datasets", "array_record", "matplotlib", "tyro", "pandas", "sklearn")


@functools.cache
def modules():
    """Returns {dotted name: path} of all modules of the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def room(module):
    """Returns the room that a module of the package is in; '' for the package itself."""
    return [*module.split("."), ""][1]


@functools.cache
def imports(module):
    """Returns the modules that one imports, those inside of functions included."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: imports are written in full"
            # `from jaxpoison.core import loops` imports a module, `... import Loop` a name.
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {whole if whole in modules() else str(node.module) for whole in wholes}
    return found


def arrows():
    """Returns {(room, imported room): [modules that import]} between rooms of the package."""
    found = {}
    for module in modules():
        for imported in imports(module):
            if imported in modules() and room(imported) not in ("", room(module)):
                found.setdefault((room(module), room(imported)), []).append(module)
    return found


def floor(name):
    return 1 + max((floor(below) for below in ALLOWED[name]), default=0)


def picture():
    """Returns the rooms as the documents show them: floor, room and what it imports."""
    rooms = sorted(ALLOWED, key=lambda name: (-floor(name), name))
    lines = (f"{floor(name)}  {name:<10}  {', '.join(ALLOWED[name])}".rstrip() for name in rooms)
    return "\n".join(lines)


def test_every_room_is_in_the_table():
    assert {room(module) for module in modules()} - {""} == set(ALLOWED)


def test_no_arrow_is_outside_the_table():
    outside = {
        f"{start} -> {end}": importing
        for (start, end), importing in arrows().items()
        if end not in ALLOWED.get(start, ())
    }
    assert not outside


def test_no_arrow_in_the_table_is_unused():
    unused = {(start, end) for start, ends in ALLOWED.items() for end in ends} - set(arrows())
    assert not unused


def test_the_table_has_no_circle():
    # `floor` of a room in a circle would never end; this names the circle.
    tuple(graphlib.TopologicalSorter(ALLOWED).static_order())


def test_no_modules_import_each_other_in_a_circle():
    """Inside of rooms too; graphlib's error names the circle."""
    graph = {
        module: {imported for imported in imports(module) if imported in modules()} - {module}
        for module in modules()
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_engine_imports_jax_and_numpy_only():
    outside = {
        f"{module} imports {imported}"
        for module in modules()
        if room(module) in NEEDS_JAX_ONLY
        for imported in imports(module)
        if imported.split(".")[0] not in ("jax", "numpy", "jaxpoison", *sys.stdlib_module_names)
    }
    assert not outside


def test_nothing_in_the_package_imports_what_stands_on_it():
    scripts = {path.stem for part in ("experiments", "benchmarks", "tests")
               for path in (ROOT / part).rglob("*.py")}  # fmt: skip
    scripts |= {"experiments", "benchmarks", "tests"}
    wrong = {
        f"{module} imports {imported}"
        for module in modules()
        for imported in imports(module)
        if imported.split(".")[0] in scripts - sys.stdlib_module_names
    }
    assert not wrong


def test_the_documents_show_the_table():
    texts = [(ROOT / name).read_text() for name in ("docs/architecture.md", "CONTRIBUTING.md")]
    shown = [
        block
        for text in texts
        for block in re.findall(
            r"<!-- rooms -->\n```\n(.*?)\n```\n<!-- /rooms -->", text, re.DOTALL
        )
    ]
    assert shown == [picture()]


def test_dependencies():
    """The engine and the rooms need these; all else is an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def names(requirements):
        return {re.match(r"[\w-]+(\[\w+\])?", line)[0] for line in requirements}

    wanted = {"jax", "flax", "optax", "orbax-checkpoint", "numpy"}
    wanted |= {"pillow", "jinja2", "rich", "threadpoolctl"}
    assert names(extras["audit"]) == {"pyarrow", "cleanlab", "pandas"}
    assert names(project["dependencies"]) == wanted
    assert names(extras["tfds"]) == {"tensorflow-datasets", "array-record", "importlib-resources"}
    assert "jaxpoison[tfds]" in names(extras["experiments"])
    assert "jaxpoison[experiments]" in names(extras["test"])


def test_the_lists_of_the_fast_and_the_longest_tests_name_what_exists():
    lists = dict.fromkeys(conftest.LONGEST, ()) | conftest.FAST
    for file, tests in lists.items():
        text = (ROOT / "tests" / f"{file}.py").read_text()
        assert all(f"\ndef {test}(" in text for test in tests), file


def loaded(statement, names):
    """Returns which of the modules `names` a fresh interpreter has after `statement`."""
    code = f"import sys\n{statement}\nprint([name for name in {names!r} if name in sys.modules])"
    result = run_code(code)
    assert result.returncode == 0, result.stderr
    return ast.literal_eval(result.stdout)


def test_importing_the_package_imports_nothing():
    assert loaded("import jaxpoison", ("jax", "numpy", *NOT_FOR_THE_ENGINE)) == []


@pytest.mark.parametrize("name", [name for name in NEEDS_JAX_ONLY if name != "core"])
def test_the_engine_alone_is_light(name):
    assert loaded(f"from jaxpoison import {name}", ("jax", *NOT_FOR_THE_ENGINE)) == ["jax"]


def test_no_room_needs_an_extra_to_be_imported():
    rooms = sorted({room(module) for module in modules()} - {""})
    assert loaded(f"from jaxpoison import {', '.join(rooms)}", ("flax", *EXTRAS)) == ["flax"]
