"""Scoring of image files with reward models: resumable, with confidence intervals."""
