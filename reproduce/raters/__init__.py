"""People compare the pictures of two models, without knowing which is whose."""
