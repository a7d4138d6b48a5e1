"""The only files that import flwr: pack, unpack, and three ways to run the same engine."""

from fedsim import references

with references.undisturbed():
    import rich.console  # noqa: F401 (which flwr imports)
