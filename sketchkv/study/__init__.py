"""What the notebooks share: results with provenance, figures of one style, the report and the runner.

Nothing here is needed to use the cache.
"""
