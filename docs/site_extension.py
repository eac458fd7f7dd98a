"""What the documentation needs of Sphinx beyond its settings: a Sphinx extension.

- A block `{committed} FILE` or `{committed} FILE#SECTION` stands for a committed file or a section
  of it, so that figures are written in one place. Links in it are made to lead where they did.
- Links to files outside of `docs` become downloads, links to folders their names.
- Docstrings are read as people read them: an indented paragraph stays as it is.
- A type is found under the name that it is imported by, wherever it is defined.
"""

import importlib
import inspect
import os
import re
from pathlib import Path

from sphinx.util.nodes import make_refnode

COMMITTED = re.compile(r"^```\{committed\} ([^\s#]+)(?:#(\S+))?\n```$", re.M)
LINK = re.compile(r"(!?)\[([^]]*)\]\(((?!\w+:|#)[^)#\s]+)(#[^)\s]*)?\)")
# Pages that show a file from outside.
PAGES = {
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}


def expand(app, docname, source):
    """Replaces blocks `{committed}` by what they stand for, and links that leave the site."""
    docs = Path(app.srcdir)
    here = docs / Path(docname).parent

    def committed(match):
        path = (here / match[1]).resolve()
        app.env.note_dependency(str(path))
        text = path.read_text(encoding="utf-8")
        if match[2]:
            sections = re.split(r"^## (?=\S+$)", text, flags=re.M)
            (text,) = (part for part in sections if part.split("\n", 1)[0] == match[2])
            text = text.split("\n", 1)[1].strip()
        return rebase(text, path.parent, here, docs)

    text = COMMITTED.sub(committed, source[0])
    text = re.sub(r"\n\n```$", "\n```", text, flags=re.M)  # the empty line is doctest's
    source[0] = rebase(text, here, here, docs)


def rebase(text, old, new, docs):
    """Returns Markdown of a file in folder `old` for one in `new`; `docs` is the site's folder."""

    def link(match):
        mark, shown, target, anchor = match.groups()
        path = (old / target).resolve()
        inside = path.is_relative_to(docs)
        if not inside and (page := PAGES.get(path.relative_to(docs.parent).as_posix())):
            path, inside = docs / page, True
        if path.is_dir() and not inside:
            return f"{shown} (`{path.relative_to(docs.parent).as_posix()}`)"
        relative = Path(os.path.relpath(path, new)).as_posix()
        if mark or inside:
            return f"{mark}[{shown}]({relative}{anchor or ''})"
        return f"{{download}}`{shown.replace('`', '')} <{relative}>`"

    return LINK.sub(link, text)


CODE = re.compile(r"(`+[^`]+`+)")


def as_restructured_text(app, what, name, obj, options, lines):
    """Marks indented paragraphs of a docstring as literal, and escapes what is no markup in prose.

    Sections such as Args, whose lines are indented too, follow their heading without an empty line.
    """
    marked, prose, blank, inside, literal = [], [], True, False, False

    def flush():
        marked.extend(escaped("\n".join(prose)).split("\n") if prose else [])
        prose.clear()

    for line in lines:
        indented = line.startswith(" ")
        if indented and blank and not inside:
            flush()
            marked.extend(["::", ""])
            literal = True
        literal = literal and (indented or not line)
        inside = indented or (inside and not line)
        blank = not line
        (marked if literal else prose).append(line)
    flush()
    if what in ("attribute", "property"):
        # Nothing, once it is shown; in front of the first line it keeps Napoleon from taking what
        # stands before a colon for a type.
        marked.insert(0, "\\")
    lines[:] = marked


def escaped(text):
    """Returns prose with the characters escaped that would be markup outside of backquotes."""
    parts = CODE.split(text)
    for index, part in enumerate(parts):
        if index % 2 == 0:
            part = re.sub(r"(?<=\w)_(?=\W|$)", r"\\_", part.replace("|", r"\|"))
            if index and part[:1].isalnum():
                part = "\\ " + part
            parts[index] = part
    return "".join(parts)


def skip(app, what, name, obj, skipped, options):
    """Leaves out what a NamedTuple says of its fields: its docstring says more."""
    if str(getattr(obj, "__doc__", "")).startswith("Alias for field number"):
        return True
    return None


def public_names(app):
    """Returns {where an object is defined: the name that users import it by}."""
    names = {}
    for page in (Path(app.srcdir) / "api").glob("*.md"):
        for module in re.findall(r"automodule:: (\S+)", page.read_text(encoding="utf-8")):
            for name, value in vars(importlib.import_module(module)).items():
                if inspect.isclass(value) or inspect.isfunction(value):
                    names[f"{value.__module__}.{value.__qualname__}"] = f"{module}.{name}"
    return names


def resolve(app, env, node, contnode):
    """Finds a class by where it is defined; one that is not public is a name without a link."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    public = app.public_names.get(target)
    entry = env.get_domain("py").objects.get(public)
    if entry is not None:
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, public
        )
    module, _, name = target.rpartition(".")
    if module.startswith("jaxpoison") and hasattr(importlib.import_module(module), name):
        return contnode
    return None


def setup(app):
    app.connect("source-read", expand)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("autodoc-skip-member", skip)
    app.connect("builder-inited", lambda app: setattr(app, "public_names", public_names(app)))
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
