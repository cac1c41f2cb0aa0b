"""Reports as HTML: one self-contained page for a browser, or a fragment for a notebook.

A file of this folder is a kind of report: it says with what heading, facts, warnings, tables and pictures the report is
shown (`contents`). How all of them look is written once, in `parts/`.
"""
