"""Render executed notebooks as pages that need nothing but themselves, and can be read on a phone."""

import re
from typing import Any

import nbformat
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

# The exporter's own page without what it would fetch, and with tables and figures that fit into 390 pixels.
PAGE = """
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_css -%}
<style>
main { max-width: 62rem; margin: 0 auto; }
math { font-size: 1.08em; }
math[display="block"] { overflow-x: auto; overflow-y: hidden; padding: 0.3em 0; }
.jp-RenderedHTMLCommon :is(td, th) { white-space: normal !important; overflow-wrap: break-word; }
.jp-RenderedHTMLCommon img, .jp-RenderedImage img { max-width: 100%; height: auto; }
.jp-OutputArea-output pre { white-space: pre-wrap; overflow-wrap: break-word; }
@media (max-width: 640px) {
  .jp-InputPrompt, .jp-OutputPrompt { display: none !important; }
  .jp-Notebook, .jp-Cell { padding-left: 2px !important; padding-right: 2px !important; }
  .jp-RenderedHTMLCommon table { font-size: 11px; display: table; width: 100%; }
  .jp-RenderedHTMLCommon :is(td, th) { padding: 3px; overflow-wrap: anywhere; }
}
</style>
{%- endblock -%}
"""


class _Renderer(IPythonRenderer):
    """Markdown as nbconvert renders it, but with formulas as MathML, which browsers draw by themselves."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        links = {"anchor_link_text": self.anchor_link_text, "exclude_anchor_links": self.exclude_anchor_links}
        attached = context.get("cell", {}).get("attachments", {})
        source = re.sub(r"!\[(Open in Colab)\]\([^)]+\)", r"\1", source)  # the badge is a picture elsewhere
        source = re.sub(r"(\]\([\w-]+)\.ipynb([)#])", r"\1.html\2", source)
        renderer = _Renderer(escape=False, attachments=attached, **links)
        return MarkdownWithMath(renderer=renderer).render(source)


def page(notebook: nbformat.NotebookNode) -> str:
    """The notebook as one HTML file, whose links to other notebooks lead to their pages."""
    return _Exporter(raw_template=PAGE).from_notebook_node(notebook)[0]
