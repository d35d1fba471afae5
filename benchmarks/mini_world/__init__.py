"""A small synthetic world of captioned images, and the small real models trained on it."""
