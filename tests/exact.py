"""An index that ranks by the keys themselves: what any index is compared with, and a `KeyIndex` of a user's own."""

from sketchkv.index import KeyIndex


class ExactKeys(KeyIndex):
    """Holds the keys of full blocks as they are."""

    def encode(self, blocks, member):
        return {"keys": blocks.flatten(2, 3)}

    def estimate(self, query):
        return query @ self.used("keys").transpose(-1, -2)
