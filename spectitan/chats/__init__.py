"""Chat templates of model folders, run as programs of strangers: in a sandbox, in a process of their own, with limits of time and memory.

The process imports this package and jinja2 only; nothing here may import more.
"""
