"""The engine process: an inference engine behind HTTP on a private socket."""
