"""Runnable examples of using the service over HTTP."""
