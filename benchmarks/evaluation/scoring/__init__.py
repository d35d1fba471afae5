"""Held-out judging: reward models over files of images, resumable, with error bars."""
