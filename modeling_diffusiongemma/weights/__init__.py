"""Weights in files: names, loading and saving, quantised layouts, repositories with code. It knows layers, but not the model that
they make up."""
