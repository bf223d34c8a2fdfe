"""Bearer tokens, as both ends know them: shared/tokens.py."""

from ..shared.tokens import Right, Tokens

__all__ = ["Right", "Tokens"]
