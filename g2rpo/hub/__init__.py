"""Published weights and prompt sets: what they are, fetching them, and knowing that they are whole.

Everything fetched from a model hub lies in the ordinary Hugging Face cache, where every loader
looks; :mod:`g2rpo.hub.lock` pins revisions and SHA-256 hashes.
"""
