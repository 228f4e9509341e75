"""Models: weights and what scales them, as files hold them."""
