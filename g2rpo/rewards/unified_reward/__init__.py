"""UnifiedReward: a vision-language model that rates an image for its caption in words."""
