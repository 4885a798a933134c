"""The names that notebooks know `store` by."""

from sketchkv.study.store import GridError, compute  # noqa: F401
