"""A memory as plain values and tensors, step by step, and a stream that goes on from them. No files in here."""
