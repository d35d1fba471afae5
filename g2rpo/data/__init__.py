"""Prompt sets, images and text embeddings."""
