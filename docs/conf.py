"""How Sphinx builds the site: ``make docs``. Nothing is fetched, neither here nor by the pages."""

import os
import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import SphinxError

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs._pages import reference
from secateur import __version__

project = "Secateur"
author = "Secateur contributors"
release = version = __version__
copyright = "Secateur contributors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "_pages"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["lightning", "transformers"]  # the site is built without them
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shapes", "returns_style")]
python_use_unqualified_type_names = True
maximum_signature_line_length = 88
add_module_names = False
nitpicky = False

html_theme = "furo"
html_title = f"Secateur {__version__}"
html_static_path = ["_static"]
html_css_files = ["secateur.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"


def _inline_math(writer, node):
    writer.body.append(tex2mathml(node.astext()))
    raise SkipNode


def _block_math(writer, node):
    writer.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def _keep_bars(app, what, name, obj, options, lines):
    """Let |ρ| in a docstring be what it says, and no substitution of reStructuredText."""
    lines[:] = [re.sub(r"(?<!`)\|(ρ[^|`\s]*)\|", r"\\|\1\\|", line) for line in lines]


def _link_files(app, docname, source):
    """Let links to files of the repository beside docs/ be downloads; in the repository they are links as they are."""
    here = Path(app.srcdir, docname).parent

    def target(found):
        path = Path(os.path.normpath(here / found[1]))
        outside = path.is_file() and not path.is_relative_to(app.srcdir)
        return f"](path:{found[1]})" if outside else found[0]

    source[0] = re.sub(r"\]\((\.\./[^)#:]+)\)", target, source[0])


class _Page(HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self):
        super().__init__()
        self.links, self.places = [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def _check_links(app, exception):
    """Refuse a site with a link that leads nowhere within it, or a page that loads something from elsewhere."""
    if exception or app.builder.format != "html":
        return
    folder = Path(app.outdir)
    pages = {}
    for path in folder.rglob("*.html"):
        page = pages[path.relative_to(folder).as_posix()] = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            place = unquote(parts.fragment)
            if target in pages:
                if place and place not in pages[target].places:
                    wrong.append(f"{name}: {link}: no such place")
            elif not (folder / target).exists():
                wrong.append(f"{name}: {link}: no such file")
    if wrong:
        raise SphinxError("links lead nowhere:\n" + "\n".join(sorted(set(wrong))))


def setup(app):
    """Make the pages of the reference, and set what Sphinx can't by a name."""
    reference.main()
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.connect("autodoc-process-docstring", _keep_bars)
    app.connect("source-read", _link_files)
    app.connect("build-finished", _check_links)
