"""One module of routes per noun: parse, call one domain function, return a read model."""
