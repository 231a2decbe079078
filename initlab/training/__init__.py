"""The training experiment."""
