"""The domain of Tunesmith: specs, jobs, adapters, training and inference. Knows no HTTP."""
