"""UnifiedReward: a vision-language model rates an image for its caption."""
