"""Serving: the Engine protocol, its implementations and the gates that every adapter must pass."""
