"""Published weights and prompt sets: the catalogue, fetching and verifying.

Files from a model hub are in the standard Hugging Face cache, where every loader looks;
:mod:`g2rpo.hub.lock` pins revisions and SHA-256 hashes.
"""
