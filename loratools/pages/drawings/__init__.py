"""Charts as SVG for a page: no style but by classes, and the number of every place in its `title`, shown on hover.

A picture is drawn from the values of `loratools.charts` alone. Colours say nothing that position, length, opacity or
dashes do not say too, so that a picture can be read in grey.
"""
