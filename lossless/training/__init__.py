"""How an adapter learns from them."""
