"""fastjepa doctor: what limits a run, and what stands in its way.

Facts are gathered (`probes`, in processes of their own: a probe may crash or hang), then judged by pure functions
(`installation`, `run`), then printed (`__main__`). Nothing is written, but to --json and to the cache of lists of images.
"""
