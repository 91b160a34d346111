"""The HTTP service: routes, authentication, problem documents and metrics above `core`."""
