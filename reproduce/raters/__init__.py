"""Blind pairwise comparisons of two models' images by human raters."""
