"""What the server and the trainer agree on: trees, wire models, manifests, stores, coordination.

Imports neither side and nothing heavy (no torch, vllm, fastapi, transformers).
"""
