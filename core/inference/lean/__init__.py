"""The lean decoder: models of the Llama family, many rows and many adapters in one step.

Owns its own copy of the weights, the key-value cache and the matrices of resident adapters. Knows
no requests, no sampling and no text.
"""
