"""One budget of slots for the whole model, and which layer gets how much of it."""

from sketchkv.checks import real, whole


def pyramid(max_cache_size, layers, steepness=0.5):
    """Caps of all layers, a list of int, falling evenly from (1 + steepness) to (1 - steepness) times `max_cache_size`;
    their sum is exactly `layers * max_cache_size`.

    After PyramidKV (Cai et al. 2024, arXiv 2406.02069): lower layers spread their attention over more tokens. Steepness 0 is
    the uniform split, a negative one favours the upper layers. Raises ValueError unless -1 < steepness < 1, and for sizes
    that are no whole numbers.
    """
    max_cache_size, layers = whole("max_cache_size", max_cache_size, 1), whole("layers", layers, 1)
    if isinstance(steepness, bool) or not real(steepness) or not -1 < steepness < 1:
        raise ValueError(f"steepness must lie between -1 and 1, got {steepness!r}")
    # Sums are rounded, not caps: so that the whole is kept.
    tops = [
        round(max_cache_size * n * (1 + steepness * (layers - n) / max(layers - 1, 1)))
        for n in range(layers + 1)
    ]
    return [top - below for below, top in zip(tops, tops[1:], strict=False)]
