"""`fastjepa check`: look at every image of a data set before a run does.

`__main__` is the command line, `scan` the check itself, `inspector` looks at one image, `tally` counts what is found in a
split, `describe` makes the report of it, and `summary` writes the report for people.
"""
